"""A small training job that does all that a large one does: three classes in six files, a search
with trials that are pruned, epochs of several steps, two files exported."""

import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from kills import Place

HEADER = "read_id,cap_class,timeseries"
CLASSES, RUNS, READS = 3, 2, 32  # reads of each run
SEED = 5  # with it a trial is pruned, and the best epoch lies in the middle
LENGTHS = (24, 48)  # samples of a signal (from, to)
OFTEN, SELDOM = 1e-5, 10.0  # train_params.checkpoint_minutes: after every step, or never here
SETTINGS: dict[str, Any] = {
    "etl_params": {"use_remote_dataset_version": "", "examples_per_class": None},
    "tune_params": {
        "tuning_strategy": "hyperband",
        "max_trials": 4,
        "max_epochs_hpt": 3,
        "factor": 3,
        "patience": 3,
    },
    "train_params": {"max_epochs_final_model": 6, "patience": 6},
    "shared_params": {
        "num_classes": CLASSES,
        "batch_size": 48,
        "target_length": 32,
        "train_test_fraction": 0.8,
        "train_val_fraction": 0.75,
        "use_augmentation": True,
    },
    "model_params": {
        "conv_filters": [4],
        "conv_kernels": [3],
        "conv_dropouts": [0.1],
        "lstm_units": [4],
        "lstm_dropouts": [0.1],
        "dense_units": 8,
        "dense_dropout": 0.1,
        "learning_rate": 0.03,
    },
    # One shape, so that the programs compiled for the first trial do for the others.
    "search_params": {
        "conv_layers": {"choices": [1]},
        "conv_filters": {"choices": [4]},
        "conv_kernels": {"choices": [3]},
        "*dropout*": {"choices": [0.1]},
        "lstm_layers": {"choices": [1]},
        "lstm_units": {"choices": [4]},
        "dense_units": {"choices": [8]},
        "learning_rate": {"low": 0.01, "high": 0.3, "log": True},
    },
    "lr_scheduler_params": {
        "type": "reduce_lr_on_plateau",
        "reduce_lr_on_plateau": {"patience": 1},
    },
    "tracking_params": {"mode": "off"},
    "export_params": {"formats": ["keras", "h5"]},
}


def write_caps(directory: Path) -> None:
    """Classes that differ in a slow wave under much noise."""
    rng = np.random.default_rng(SEED)
    directory.mkdir(parents=True)
    for cap_class in range(CLASSES):
        for run in range(RUNS):
            lines = [HEADER]
            for _ in range(READS):
                time = np.linspace(0, 6, rng.integers(*LENGTHS))
                signal = np.sin(time * (cap_class + 1)) + rng.normal(0, 1, time.size)
                read_id = uuid.UUID(bytes=rng.bytes(16))
                lines.append(f'{read_id},{cap_class},"{",".join(f"{x:.6f}" for x in signal)}"')
            path = directory / f"data__cap_{cap_class}_run{run}.csv"
            path.write_text("\n".join([*lines, ""]))


def arguments(caps: Path, place: Place, *, programs: Path, checkpoint_minutes: float) -> list[str]:
    """What follows `python -m capfinder`; writes the settings beside the output directory.

    programs: where compiled ones are kept, which changes no result, nor do checkpoint_minutes."""
    values = {group: dict(of_group) for group, of_group in SETTINGS.items()}
    values["etl_params"]["caps_data_dir"] = str(caps)
    values["shared_params"]["output_dir"] = str(place.output_dir)
    values["train_params"]["checkpoint_minutes"] = checkpoint_minutes
    values["runtime_params"] = {"compilation_cache_dir": str(programs)}
    config = place.directory / "train.json"
    config.write_text(json.dumps(values))
    return ["train-model", "--config_file", str(config)]
