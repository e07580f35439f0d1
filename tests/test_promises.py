"""What the guide promises and what each setting does, where no other file's tests show it.

One run of the whole pipeline, in this process, on a model that compiles in a moment."""

import ast
import csv
import json
import os
import re
import shutil
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import in_process
import jax
import jax.numpy as jnp
import jax_settings
import numpy as np
import pytest
import tiny_architecture
from csv_input import write_classes
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FixedTrial

from capfinder import capmap, cli, files, log, models, settings
from capfinder.data import versions
from capfinder.data.versions import Dataset
from capfinder.errors import StageFailedError, StoppedError
from capfinder.interrupts import Interrupt
from capfinder.models import search
from capfinder.stages import assembly, evaluate, inference, memory, tune
from capfinder.stages.study import Plan, Study
from capfinder.stages.train import Training, TrainResult
from capfinder.tracking import Tracker
from capfinder.training.checkpoint import Checkpoints
from capfinder.training.loop import DivergedError
from capfinder.training.schedules import PlateauState, make_schedule, optimizer

PACKAGE = Path(__file__).parents[1] / "capfinder"
TESTS = Path(__file__).parent
LENGTH, CLASSES, BATCH, EPOCHS = 24, 3, 16, 4
CAP_NAMES = ["first & best", "cap_1", "Unknown cap: 2"]  # the mapping below knows two of the three
RATES = {"base_lr": 1e-3, "max_lr": 1e-2, "step_size_factor": 2, "mode": "triangular"}
VALUES: dict[str, Any] = {
    "etl_params": {
        "use_remote_dataset_version": "",
        "examples_per_class": None,
        "comet_project_name": "my_dataset",
    },
    "tune_params": {
        "comet_project_name": "my_tuning",
        "tuning_strategy": "random_search",
        "max_trials": 2,
        "max_epochs_hpt": 3,
        "patience": 5,
    },
    "train_params": {
        "comet_project_name": "my_training",
        "max_epochs_final_model": EPOCHS,
        "patience": EPOCHS,
    },
    "shared_params": {
        "num_classes": CLASSES,
        "batch_size": BATCH,
        "target_length": LENGTH,
        "train_test_fraction": 0.8,
        "train_val_fraction": 0.75,
    },
    "lr_scheduler_params": {"type": "cyclic_lr", "cyclic_lr": RATES},
    "search_params": {  # one shape: what was compiled once stays on disk
        "layers": {"choices": [1]},
        "units": {"choices": [8]},
        "dropout": {"choices": [0.1]},
    },
    "tracking_params": {"mode": "offline"},
    "export_params": {"formats": ["keras", "h5"]},
}


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home and a working directory of their own, no Comet key, the tiny model as cnn_lstm."""
    root = tmp_path_factory.mktemp("promises")
    with pytest.MonkeyPatch.context() as patched, jax_settings.restored():
        for name in [name for name in os.environ if name.startswith("COMET_")]:
            patched.delenv(name)
        patched.setenv("HOME", str(root / "home"))
        patched.delenv("XDG_CACHE_HOME", raising=False)
        (root / "home" / ".capfinder").mkdir(parents=True)
        mapping = {"-99": "cap_unknown", "0": CAP_NAMES[0], "1": CAP_NAMES[1]}
        capmap.mapping_path().write_text(json.dumps(mapping))
        (root / "here").mkdir()
        patched.chdir(root / "here")
        patched.setitem(models.ARCHITECTURES, "cnn_lstm", "tiny_architecture")
        patched.setattr(log, "PLAIN_LINE_SECONDS", 0.0)  # each step of a bar is a line
        jax.config.update("jax_disable_most_optimizations", True)
        jax.config.update("jax_compilation_cache_dir", str(root / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        yield root
    jax.config.update("jax_disable_most_optimizations", False)


class Ended(in_process.Ended):
    @property
    def log_text(self) -> str:
        """Of the newest log file."""
        return max(self.output_dir.glob("logs/*.log"), key=os.path.getmtime).read_text()


def train_model(root: Path, output_dir: Path, *options: str, **groups: dict[str, Any]) -> Ended:
    """`capfinder train-model` on VALUES with `groups` over them."""
    values = {name: dict(group) for name, group in VALUES.items()}
    values["etl_params"]["caps_data_dir"] = str(root / "caps")
    values["shared_params"]["output_dir"] = str(output_dir)
    values["runtime_params"] = {"compilation_cache_dir": str(root / "xla")}
    for name, group in groups.items():
        values[name] = values.get(name, {}) | group if isinstance(group, dict) else group
    path = root / "train.json"
    path.write_text(json.dumps(values))
    return capfinder(output_dir, "train-model", "--config_file", str(path), *options)


def capfinder(output_dir: Path, *arguments: str) -> Ended:
    return Ended(*in_process.shown_by(lambda: cli.main(list(arguments))), output_dir)


@pytest.fixture(scope="module")
def whole_run(surroundings: Path) -> Ended:
    write_classes(surroundings / "caps", classes=CLASSES, runs=2, reads=30)
    ended = train_model(surroundings, surroundings / "out")
    assert ended.code == 0, ended.shown
    return ended


def changed(ended: Ended, output_dir: Path, **changes: Any) -> ConfigDict:
    """The run's settings with `group__name=value` over them, for a stage on its own."""
    config = settings.checked(
        settings.to_config(settings.check(ended.read("run.json")["settings"]))
    )
    overrides = {key.replace("__", "."): value for key, value in changes.items()}
    return settings.checked(config, {**overrides, "shared_params.output_dir": str(output_dir)})


@pytest.fixture
def dataset(whole_run: Ended) -> Dataset:
    return versions.open_dataset(whole_run.output_dir / "dataset" / "cap_data" / "1.0.0")


# Comet


def archives(output_dir: Path) -> dict[str, tuple[list[dict[str, Any]], set[str]]]:
    """Per Comet project: the archive's messages and the names of its files."""
    found = {}
    for path in (output_dir / "comet").glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            text = archive.read("messages.json").decode()
            messages = [json.loads(line) for line in text.splitlines()]
            about = json.loads(archive.read("experiment.json"))
            names = {
                str(message["payload"]["additional_params"]["fileName"])
                for message in messages
                if message["type"] == "file_upload"
            }
            found[about["project_name"]] = (messages, names)
    return found


def test_each_stage_is_tracked_in_its_own_project(whole_run):
    assert archives(whole_run.output_dir).keys() == {
        "my_dataset",
        "my_tuning_cnn_lstm",
        "my_training_cnn_lstm",
    }


def test_model_weights_log_report_and_both_matrices_reach_comet(whole_run):
    _, names = archives(whole_run.output_dir)["my_training_cnn_lstm"]
    (classifier,) = whole_run.output_dir.glob("best_model/classifier/*.keras")
    (log_path,) = whole_run.output_dir.glob("logs/*.log")
    assert names >= {
        classifier.name,
        "best_model_weights.weights.h5",
        log_path.name,
        "report.html",
        "confusion_matrix_test.json",
        "confusion_matrix_train.json",
    }


def points(messages: list[dict[str, Any]], name: str) -> list[float]:
    metrics = [m["payload"]["metric"] for m in messages if m["type"] == "metric_msg"]
    return [metric["metricValue"] for metric in metrics if metric["metricName"] == name]


def test_schedules_act_in_training_and_not_in_tuning(whole_run):
    found = archives(whole_run.output_dir)
    for trial in whole_run.read("run.json")["tuning"]["trials"]:
        rates = points(found["my_tuning_cnn_lstm"][0], f"trial_{trial['number']}_learning_rate")
        assert len(rates) == 3
        assert rates == pytest.approx([trial["params"]["learning_rate"]] * 3)
    rates = points(found["my_training_cnn_lstm"][0], "learning_rate")
    assert rates == [row["learning_rate"] for row in whole_run.read(METRICS)["history"]]
    assert len(set(rates)) > 1
    assert min(rates) >= 1e-3 and max(rates) <= 1e-2


def test_tracking_off_leaves_no_archive(surroundings, whole_run, tmp_path):
    off = train_model(surroundings, tmp_path, "--stage=etl", tracking_params={"mode": "off"})
    assert off.code == 0, off.shown
    assert not (tmp_path / "comet").exists()
    assert (whole_run.output_dir / "comet").exists()


# What a run shows and where it writes

METRICS = "evaluation/metrics.json"


@pytest.mark.parametrize("bar", ["Reading train", "Tuning", "Training", "evaluation", "Exporting"])
def test_progress_with_an_eta_is_shown_for_each_stage(whole_run, bar):
    lines = re.findall(rf"{bar}: (\d+) of (\d+) \w+ \((\d+)%\), ETA \d+:\d\d", whole_run.shown)
    assert lines
    assert all(int(done) <= int(total) for done, total, _ in lines)


def test_the_learning_rate_is_printed_for_every_epoch(whole_run):
    for epoch, row in enumerate(whole_run.read(METRICS)["history"], start=1):
        line = rf"epoch {epoch}/{EPOCHS} .* learning rate {row['learning_rate']:.3g} "
        assert re.search(line, whole_run.shown)
        assert re.search(line, whole_run.log_text)


def test_the_paths_of_all_outputs_end_the_run(whole_run):
    end = whole_run.shown[whole_run.shown.rindex("Finished in") :]
    shown = dict(re.findall(r"^(\w+) +(/\S+)$", end, flags=re.MULTILINE))
    out = whole_run.output_dir
    (shown_model,) = out.glob("best_model/classifier/classifier_*.keras")
    (shown_log,) = out.glob("logs/capfinder_v*.log")
    assert shown == {
        "model": str(shown_model),
        "weights": str(out / "best_model" / "best_model_weights.weights.h5"),
        "report": str(out / "report.html"),
        "metrics": str(out / METRICS),
        "dataset": str(out / "dataset" / "cap_data" / "1.0.0"),
        "log": str(shown_log),
    }
    assert all(Path(path).exists() for path in shown.values())


def test_everything_is_written_below_output_dir(surroundings, whole_run):
    assert list((surroundings / "here").iterdir()) == []
    known = {"caps", "home", "here", "train.json", "out", "xla"}
    assert {path.name for path in surroundings.iterdir()} == known
    written = {path for path in (surroundings / "home").rglob("*") if path.is_file()}
    keras_own = Path.home() / ".keras" / "keras.json"  # written by any import of Keras
    fonts = set((Path.home() / ".cache" / "matplotlib").glob("*"))  # and of Comet's client
    assert written <= {capmap.mapping_path(), keras_own} | fonts


def test_classes_have_the_users_names_wherever_they_are_shown(whole_run):
    assert whole_run.read(METRICS)["class_names"] == CAP_NAMES
    labels = whole_run.read("best_model/classifier/labels.json")
    assert list(labels.values()) == CAP_NAMES
    with (whole_run.output_dir / "evaluation" / "predictions_test.csv").open() as stream:
        for row in csv.DictReader(stream):
            assert row["predicted_cap"] == CAP_NAMES[int(row["predicted_cap_class"])]
    matrix = (whole_run.output_dir / "evaluation" / "confusion_matrix_test.csv").read_text()
    report = (whole_run.output_dir / "report.html").read_text()
    for name in CAP_NAMES:
        assert name in matrix
        assert name in whole_run.log_text
        assert name.replace("&", "&amp;") in report


def test_a_class_is_named_by_its_number_in_the_files(surroundings):
    assert capmap.class_names({"1": 0, "7": 1, "0": 2}, 3) == [
        "cap_1",
        "Unknown cap: 7",
        "first & best",
    ]


def test_without_a_mapping_file_the_names_are_those_of_capfinder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert capmap.class_names({}, 4) == ["cap_0", "cap_1", "cap_2", "cap_2-1"]
    assert list(tmp_path.iterdir()) == []


def test_debug_code_logs_places_and_shows_where_an_error_came_from(
    surroundings, whole_run, tmp_path
):
    place = re.compile(r"\| INFO +\| \w+\.py:\d+ \w+ \| ")
    assert not place.search(whole_run.log_text)
    debug = train_model(surroundings, tmp_path / "debug", "--stage=etl", debug_code=True)
    assert debug.code == 0
    assert place.search(debug.log_text)
    for debug_code in (False, True):
        failed = train_model(
            surroundings,
            tmp_path / f"failed_{debug_code}",
            "--stage=etl",
            shared_params={"num_classes": CLASSES + 1},
            debug_code=debug_code,
        )
        assert failed.code == 2
        assert ("Traceback" in failed.shown) is debug_code
        assert ("Traceback" in failed.log_text) is debug_code


def test_no_module_asks_at_the_terminal_starts_programs_or_signals_other_processes():
    forbidden = {"input", "kill", "killpg", "system", "popen", "subprocess", "pidfd_send_signal"}
    allowed = {  # a layer's input; a process of our own program
        "onnx.py": {"input"},
        "fresh_process.py": {"subprocess", "kill"},
    }
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {getattr(node, "id", ""), getattr(node, "attr", "")}
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {part for name in node.names for part in name.name.split(".")}
                names |= set((getattr(node, "module", None) or "").split("."))
            if isinstance(node, ast.Name | ast.Attribute | ast.Import | ast.ImportFrom):
                names -= allowed.get(path.name, set())
                assert not names & forbidden, f"{path.name}, line {node.lineno}"


# make-train-dataset


def shards(output_dir: Path) -> dict[str, str]:
    found = (output_dir / "dataset" / "cap_data" / "1.0.0").glob("*.tfrecord-*")
    return {path.name: files.sha256_file(path) for path in found}


def test_make_train_dataset_makes_what_the_etl_stage_makes(surroundings, whole_run, tmp_path):
    options = {
        "-c": surroundings / "caps",
        "-o": tmp_path,
        "-t": LENGTH,
        "-e": "null",
        "-tt": 0.8,
        "-tv": 0.75,
        "--num_classes": CLASSES,
        "-b": 7,  # a dataset has no batches
        "--comet_project_name": "alone",
    }
    arguments = [str(part) for option in options.items() for part in option]
    ended = capfinder(tmp_path, "make-train-dataset", *arguments, "--use-augmentation")
    assert ended.code == 0, ended.shown
    assert shards(tmp_path) == shards(whole_run.output_dir)
    assert archives(tmp_path).keys() == {"alone"}
    assert not (tmp_path / "checkpoints").exists()
    assert capfinder(tmp_path, "make-train-dataset", *arguments, "-d", "float8").code == 2


def test_make_train_dataset_splits_by_group_keeps_all_and_takes_a_test_directory(tmp_path):
    caps = write_classes(tmp_path / "caps", runs=3)
    (caps / "data__cap_1_run2.csv").rename(tmp_path / "data__cap_1_run2.csv")
    held_out = write_classes(tmp_path / "held_out", runs=1, reads=4)
    for path in held_out.iterdir():
        path.write_text(re.sub(r"^(\w{8})-", r"\1_", path.read_text(), flags=re.M))  # other reads
    arguments = ["-c", str(caps), "-o", str(tmp_path / "out"), "--num_classes", "2", "-e", "null"]
    options = ["--group_by", "file", "--test_caps_data_dir", str(held_out), "--keep_all"]
    assert capfinder(tmp_path, "make-train-dataset", *arguments, *options).code == 0
    made = versions.open_dataset(tmp_path / "out" / "dataset" / "cap_data" / "1.0.0").manifest
    assert made["settings"]["group_by"] == "file"
    assert made["counts"]["test"] == {"0": 4, "1": 4}
    used = {label: sum(made["counts"][s][label] for s in ("train", "validation")) for label in "01"}
    assert used == {"0": 60, "1": 40}


def test_make_train_dataset_has_the_defaults_that_users_know(tmp_path):
    caps = write_classes(tmp_path / "caps", classes=4, runs=1, reads=20)
    ended = capfinder(tmp_path, "make-train-dataset", "-c", str(caps), "-o", str(tmp_path))
    assert ended.code == 0, ended.shown
    values = settings.flat(ended.read("run.json")["settings"])
    known = {
        "shared_params.target_length": 500,
        "shared_params.dtype": "float16",
        "etl_params.examples_per_class": 1000,
        "shared_params.train_test_fraction": 0.95,
        "shared_params.train_val_fraction": 0.8,
        "shared_params.num_classes": 4,
        "shared_params.batch_size": 1024,
        "etl_params.comet_project_name": "dataset",
        "etl_params.use_remote_dataset_version": "",
        "shared_params.use_augmentation": False,
    }
    assert {key: values[key] for key in known} == known


# Tuning


def tuned(config: ConfigDict, dataset: Dataset) -> tune.TuneResult:
    return tune.run(config, dataset=dataset, tracker=Tracker(None), interrupt=Interrupt())


def test_a_trial_ends_when_its_patience_does(whole_run, dataset, tmp_path):
    epochs = {}
    for patience in (0, 12):
        config = changed(
            whole_run,
            tmp_path / str(patience),
            model_params={"units": (8,), "learning_rate": 0.1},
            tune_params__max_trials=1,
            tune_params__max_epochs_hpt=12,
            tune_params__patience=patience,
        )
        (trial,) = tuned(config, dataset).trials
        assert trial["state"] == "complete"
        epochs[patience] = trial["epochs"]
    assert epochs[0] < epochs[12] == 12


def test_the_study_is_kept_where_storage_says(whole_run, dataset, tmp_path):
    config = changed(
        whole_run,
        tmp_path,
        tune_params__max_trials=1,
        tune_params__max_epochs_hpt=1,
        tune_params__storage=f"sqlite:///{tmp_path}/study.db",
    )
    assert len(tuned(config, dataset).trials) == 1
    assert (tmp_path / "study.db").stat().st_size > 0
    assert not list(tmp_path.rglob("journal.log"))
    assert list(whole_run.output_dir.rglob("journal.log"))


def test_a_study_of_other_data_or_another_factor_is_not_reused(whole_run, dataset):
    out = whole_run.output_dir
    assert tune.best(changed(whole_run, out), dataset=dataset) is not None
    other = Dataset(dataset.directory, dataset.version, "another", dataset.manifest)
    assert tune.best(changed(whole_run, out), dataset=other) is None
    # Random search knows no factor; hyperband's trials depend on it.
    assert tune.best(changed(whole_run, out, tune_params__factor=3), dataset=dataset) is not None
    hyperband = {"tune_params__tuning_strategy": "hyperband"}
    keys = {
        tune.fingerprint(changed(whole_run, out, tune_params__factor=n, **hyperband), dataset)
        for n in (2, 3)
    }
    assert len(keys) == 2


@pytest.mark.parametrize("factor", [2, 4])
def test_hyperband_prunes_at_powers_of_factor(tmp_path, factor):
    plan = Plan("hyperband", max_trials=16, max_epochs=16, factor=factor, seed=1)
    study = Study(
        tmp_path, fingerprint="f" * 64, name_prefix="toy", storage=None, plan=plan, first=None
    )
    ends = set()
    while (trial := study.next_trial()) is not None:
        value = trial.parameters.suggest_float("value", 0, 1)
        for epoch in range(1, 17):
            if trial.report(epoch, value):
                ends.add(epoch)
                trial.prune()
                break
        else:
            trial.complete(value)
    assert ends
    assert ends <= {factor**rung for rung in range(5)}


class Explorer(FixedTrial):
    """Takes the highest of everything, or what it is told, and keeps what was on offer."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__(given)
        self._given = given

    def _suggest(self, name: str, distribution: Any) -> Any:
        highest = getattr(distribution, "high", None)
        if highest is None:
            highest = distribution.choices[-1]
        self._params.setdefault(name, highest)
        return super()._suggest(name, distribution)


def offered(model_type: str, **given: Any) -> dict[str, Any]:
    """The distributions of a search at 500 samples, `given` parameters aside the deepest model."""
    trial = Explorer(given)
    module = models.importlib.import_module(f"capfinder.models.{model_type}")
    module.search_space(trial, target_length=500)
    return trial.distributions


DROPOUT = FloatDistribution(0.1, 0.5, step=0.1)
DROPOUT_OR_NONE = FloatDistribution(0.0, 0.5, step=0.1)
KERNEL = CategoricalDistribution(search.KERNELS)
ANY_RATE = FloatDistribution(1e-4, 1e-2, log=True)


@pytest.mark.parametrize(
    ("model_type", "widest", "most_convolutions", "most_lstms"),
    [("cnn_lstm", 128, 7, 8), ("attention_cnn_lstm", 256, 5, 3)],
)
def test_the_search_space_of_the_lstm_models(model_type, widest, most_convolutions, most_lstms):
    deepest = offered(model_type)
    assert deepest["conv_layers"] == IntDistribution(1, most_convolutions)
    for layer in range(most_convolutions):
        widest_here = min(widest, 32 * 2 ** (layer + 1))
        assert deepest[f"conv_filters_{layer}"] == IntDistribution(32, widest_here, step=32)
        assert deepest[f"conv_kernels_{layer}"] == KERNEL
        assert deepest[f"conv_dropouts_{layer}"] == DROPOUT
    assert deepest["lstm_layers"].high == min(
        most_lstms, int(np.log2(500 // 2**most_convolutions)) + 1
    )
    shallow = offered(model_type, conv_layers=1)
    assert shallow["lstm_layers"] == IntDistribution(1, most_lstms)
    assert shallow["lstm_units_0"] == IntDistribution(32, widest, step=32)
    assert shallow["lstm_dropouts_0"] == shallow["dense_dropout"] == DROPOUT
    assert shallow["dense_units"] == IntDistribution(16, widest, step=16)
    assert shallow["learning_rate"] == CategoricalDistribution((1e-2, 1e-3, 1e-4))


def test_the_search_space_of_the_resnet():
    assert offered("resnet") == {
        "stages": IntDistribution(2, 4),
        "stem_filters": IntDistribution(32, 128, step=32),
        "stem_kernel": KERNEL,
        **{f"stage_filters_{i}": IntDistribution(64, 256, step=64) for i in range(4)},
        **{f"stage_kernels_{i}": KERNEL for i in range(4)},
        **{f"stage_blocks_{i}": IntDistribution(2, 4) for i in range(4)},
        "dense_units": IntDistribution(32, 256, step=32),
        "dense_dropout": DROPOUT_OR_NONE,
        "learning_rate": ANY_RATE,
    }


def test_the_search_space_of_the_encoder():
    assert offered("encoder") == {
        "d_model": IntDistribution(32, 128, step=32),
        "num_heads": IntDistribution(1, 8),
        "head_size": IntDistribution(16, 64, step=16),
        "num_blocks": IntDistribution(1, 8),
        "feed_forward_units": IntDistribution(32, 512, step=32),
        "dropout": DROPOUT_OR_NONE,
        "mlp_layers": IntDistribution(1, 3),
        **{f"mlp_units_{i}": IntDistribution(32, 256, step=32) for i in range(3)},
        "mlp_dropout": DROPOUT_OR_NONE,
        "learning_rate": ANY_RATE,
    }


# Training


def training(ended: Ended, dataset: Dataset, output_dir: Path, **changes: Any) -> Training:
    config = changed(ended, output_dir, **changes)
    hyperparameters = tiny_architecture.Hyperparameters(learning_rate=0.1)
    return Training(config, dataset=dataset, hyperparameters=hyperparameters)


def trained(one: Training) -> Any:
    return one.run(tracker=Tracker(None), interrupt=Interrupt())


def test_training_ends_at_patience_or_max_epochs_whichever_is_first(whole_run, dataset, tmp_path):
    lengths = {}
    for patience, max_epochs in ((1, 30), (30, 12)):
        result = trained(
            training(
                whole_run,
                dataset,
                tmp_path,
                train_params__patience=patience,
                train_params__max_epochs_final_model=max_epochs,
            )
        )
        lengths[result.stopped] = len(result.history)
        losses = [row["val_loss"] for row in result.history]
        assert result.model.best_epoch == 1 + int(np.argmin(losses))
    assert lengths["patience"] < lengths["max_epochs"] == 12


def test_an_epoch_longer_than_checkpoint_minutes_is_saved_in_its_middle(
    whole_run, dataset, tmp_path, monkeypatch
):
    save, steps = Checkpoints.save_latest, []

    def noted(self, step, state, meta, **more):
        steps.append(meta["steps_in_epoch"])
        save(self, step, state, meta, **more)

    monkeypatch.setattr(Checkpoints, "save_latest", noted)
    for minutes in (1e-9, 60.0):
        steps.clear()
        one = training(
            whole_run,
            dataset,
            tmp_path / str(minutes),
            train_params__max_epochs_final_model=1,
            train_params__checkpoint_minutes=minutes,
        )
        trained(one)
        per_epoch = assembly.train_batches(one.config, dataset).steps_per_epoch
        assert per_epoch > 2
        expected = [*range(1, per_epoch), 0] if minutes < 1 else [0]
        assert steps == expected


@pytest.mark.parametrize(("epochs", "said"), [(1, "1 epoch ("), (2, "2 epochs (")])
def test_a_training_tells_how_many_epochs_it_took(epochs, said):
    history = [{"val_loss": 1.0, "val_accuracy": 0.5}] * epochs
    model: Any = SimpleNamespace(best_epoch=1)
    assert TrainResult("", model, history, "max_epochs", "").summary().startswith(said)


def test_the_one_seed_decides_weights_dropout_and_order(whole_run, dataset, tmp_path):
    def drawn(seed: int) -> list[bytes]:
        config = changed(whole_run, tmp_path, tune_params__seed=seed)
        hyperparameters = tiny_architecture.Hyperparameters()
        state = assembly.initial_state(config, hyperparameters, optimizer(1e-3), seed=seed)
        batch = next(assembly.train_batches(config, dataset).epoch(0))
        return [
            np.asarray(state.params["Dense_0"]["kernel"]).tobytes(),
            np.asarray(jax.random.key_data(state.rng)).tobytes(),
            np.asarray(batch["signal"]).tobytes(),
        ]

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))


def test_steps_per_call_and_microbatch_say_how_steps_are_taken(
    whole_run, dataset, tmp_path, caplog
):
    def taken(name: str, **changes: Any) -> tuple[list[int], list[float]]:
        caplog.clear()
        changes = {f"runtime_params__{key}": value for key, value in changes.items()}
        one = training(whole_run, dataset, tmp_path / name, **changes)
        history = trained(one).history
        about = Checkpoints(one.directory).read_meta()["about"]
        per_call = changes.get("runtime_params__steps_per_call", 1)
        assert about["computed_with"] == {
            "platform": "cpu",
            "lstm": {"input_product": "inside", "unroll": 1},
            "convolution": {"sums": True, "outputs": {"5": 4, "7": 2}},
            "steps_per_call": per_call,
        }
        assert files.fingerprint({k: about[k] for k in about if k != "computed_with"}) == one.key
        steps = re.findall(r"Training: (\d+) of", caplog.text)
        return [int(step) for step in steps], [row["loss"] for row in history]

    caplog.set_level("INFO", "capfinder")
    steps, losses = taken("alone")
    assert {1, 2, 3} <= set(steps)
    in_twos, same = taken("in twos", steps_per_call=2)
    assert {2, 4} <= set(in_twos) and not {1, 3} & set(in_twos)
    assert same == pytest.approx(losses, rel=1e-4)
    _, in_parts = taken("in parts", microbatch=8)  # other draws of dropout
    assert in_parts != pytest.approx(losses, rel=1e-4)
    assert in_parts == pytest.approx(losses, rel=0.3)


def test_a_training_that_diverges_is_taken_back_max_rollbacks_times(
    whole_run, dataset, tmp_path, caplog
):
    for allowed in (0, 1):
        caplog.clear()
        config = changed(
            whole_run,
            tmp_path / str(allowed),
            train_params__max_rollbacks=allowed,
            lr_scheduler_params__type="reduce_lr_on_plateau",
        )
        hyperparameters = tiny_architecture.Hyperparameters(learning_rate=1e30)
        with pytest.raises(DivergedError, match=r"diverged in epoch 1, step \d"):
            trained(Training(config, dataset=dataset, hyperparameters=hyperparameters))
        assert caplog.text.count("half the learning rate") == allowed


def test_out_of_memory_ends_training_in_a_line(whole_run, dataset, tmp_path, monkeypatch):
    """Found before the first step, from what the compiler plans."""
    monkeypatch.setattr(memory, "available_bytes", lambda: 1_000)
    with pytest.raises(StageFailedError, match=r"^Training: out of memory: a step of 16 .* had"):
        trained(training(whole_run, dataset, tmp_path))


SCHEDULE_CHANGES = {
    "reduce_lr_on_plateau.factor": 0.1,
    "reduce_lr_on_plateau.patience": 2,
    "reduce_lr_on_plateau.min_lr": 5e-4,
    "cyclic_lr.base_lr": 2e-3,
    "cyclic_lr.max_lr": 0.02,
    "cyclic_lr.step_size_factor": 3,
    "cyclic_lr.mode": "triangular",
    "cyclic_lr.gamma": 0.5,
    "sgdr.min_lr": 5e-4,
    "sgdr.max_lr": 3e-3,
    "sgdr.lr_decay": 0.5,
    "sgdr.cycle_length": 3,
    "sgdr.mult_factor": 3.0,
}


def learning_rates(kind: str, params: dict[str, Any]) -> list[float]:
    """Of 60 epochs of one step; for plateau, of epochs that never improve."""
    schedule = make_schedule(kind, params, learning_rate=1e-3, steps_per_epoch=1)
    if schedule.plateau is None:
        assert callable(schedule.learning_rate)
        return np.asarray(schedule.learning_rate(jnp.arange(60))).tolist()
    state, rates = PlateauState(), [1e-3]
    for _ in range(60):
        state, rate = schedule.plateau.after_epoch(state, 1.0, rates[-1])
        rates.append(rate)
    return rates


@pytest.mark.parametrize("key", SCHEDULE_CHANGES)
def test_every_setting_of_a_schedule_changes_the_rates(key):
    kind, name = key.split(".")
    group = settings.default_config().lr_scheduler_params[kind].to_dict()
    if name == "gamma":
        group["mode"] = "exp_range"
    other = group | {name: SCHEDULE_CHANGES[key]}
    assert learning_rates(kind, group) != learning_rates(kind, other)


# Settings of the run itself


def test_batch_size_and_augmentation_reach_the_training_data_alone(whole_run, dataset, tmp_path):
    plain = assembly.train_batches(changed(whole_run, tmp_path), dataset)
    config = changed(
        whole_run, tmp_path, shared_params__batch_size=9, shared_params__use_augmentation=True
    )
    augmented = assembly.train_batches(config, dataset)
    assert (plain.batch_size, augmented.batch_size) == (BATCH, 9)
    assert augmented.num_examples == 3 * plain.num_examples
    for split in ("validation", "test"):
        batches = assembly.evaluation_batches(config, dataset, split)
        assert batches.num_examples == sum(dataset.manifest["counts"][split].values())


def test_residency_says_whether_the_signals_lie_on_the_device(
    whole_run, dataset, tmp_path, monkeypatch
):
    def are_on_device(residency: str) -> bool:
        config = changed(whole_run, tmp_path, runtime_params__data_residency=residency)
        before = {id(array) for array in jax.live_arrays()}
        batches = assembly.train_batches(config, dataset)
        shape = (batches.num_examples, LENGTH)
        return any(a.shape == shape for a in jax.live_arrays() if id(a) not in before)

    assert are_on_device("device")
    assert not are_on_device("host")
    assert not are_on_device("stream")
    assert are_on_device("auto")
    monkeypatch.setattr(assembly, "HOST_BYTES_ON_CPU", 0)
    monkeypatch.setattr(assembly, "DEVICE_SHARE", 0)
    assert not are_on_device("auto")


def test_streaming_needs_no_cache_and_gives_the_same_batches_and_figures(
    whole_run, dataset, tmp_path
):
    copied = tmp_path / "dataset" / "cap_data" / dataset.version
    shutil.copytree(dataset.directory, copied)
    alone = versions.open_dataset(copied)
    streamed = changed(whole_run, tmp_path, runtime_params__data_residency="stream")
    mapped = changed(whole_run, tmp_path, runtime_params__data_residency="host")
    pairs = zip(
        assembly.train_batches(streamed, alone).epoch(1),
        assembly.train_batches(mapped, dataset).epoch(1),
        strict=True,
    )
    for one, other in pairs:
        assert jax.tree.map(lambda a, b: bool((a == b).all()), one, other) == {
            "signal": True,
            "cap_class": True,
        }
    for split in ("train", "test"):
        one, other = (
            assembly.open_split(config, each, split)
            for config, each in ((streamed, alone), (mapped, dataset))
        )
        evaluate.write_predictions(tmp_path / "one", one, np.eye(len(one), 2), ["a", "b"])
        evaluate.write_predictions(tmp_path / "other", other, np.eye(len(one), 2), ["a", "b"])
        assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    assert not (tmp_path / "dataset" / "cache").exists()


def test_evaluation_has_a_batch_size_of_its_own_that_changes_no_figure(
    whole_run, dataset, tmp_path, monkeypatch
):
    sizes, logits = [], inference._logits

    def noted(variables: Any, signals: Any, **more: Any) -> Any:
        sizes.append(len(signals))
        return logits(variables, signals, **more)

    noted.lower = logits.lower
    monkeypatch.setattr(inference, "_logits", noted)
    hyperparameters = tune.best(changed(whole_run, whole_run.output_dir), dataset=dataset)
    config = changed(whole_run, whole_run.output_dir)
    result = Training(
        config, dataset=dataset, hyperparameters=hyperparameters.hyperparameters
    ).load()
    for batch_size, expected in ((7, 7), (None, inference.BATCH_SIZES["cpu"])):
        sizes.clear()
        values = evaluate.run(
            changed(whole_run, tmp_path, evaluate_params__batch_size=batch_size),
            dataset=dataset,
            model=result.model,
            history=result.history,
            stopped=result.stopped,
            interrupted={},
            init_from=None,
            class_names=CAP_NAMES,
            tracker=Tracker(None),
        ).metrics
        assert set(sizes) == {expected}
        known = whole_run.read(METRICS)
        assert values["test"]["confusion_matrix"] == known["test"]["confusion_matrix"]
        assert values["test"]["loss"] == pytest.approx(known["test"]["loss"], rel=1e-6)


def test_compute_dtype_is_what_the_model_computes_in(tmp_path, monkeypatch):
    monkeypatch.setitem(models.ARCHITECTURES, "cnn_lstm", "capfinder.models.cnn_lstm")
    small = {
        "conv_filters": (4,),
        "conv_kernels": (3,),
        "conv_dropouts": (0.1,),
        "lstm_units": (4,),
        "lstm_dropouts": (0.1,),
    }
    hyperparameters = models.parse_hyperparameters("cnn_lstm", small)
    signal = np.random.default_rng(0).normal(size=(4, 8, 1)).astype(np.float32)
    modules = {}
    for dtype in ("float32", "bfloat16"):
        config = settings.checked(
            settings.default_config(), {"runtime_params.compute_dtype": dtype}
        )
        computing = assembly.policy(config).compute_dtype
        modules[dtype] = assembly.new_module(config, hyperparameters, compute_dtype=computing)

    @jax.jit
    def logits(signal: jax.Array) -> list[jax.Array]:
        variables = modules["float32"].init(jax.random.key(0), signal, train=False)
        return [module.apply(variables, signal, train=False) for module in modules.values()]

    exact, rounded = logits(signal)
    assert 1e-5 < jnp.abs(rounded - exact).max() < 0.1


@pytest.mark.parametrize("key", ["shared_params.dtype", "runtime_params.compute_dtype"])
def test_float64_is_switched_on_where_it_is_asked_for(key):
    base = settings.checked(settings.default_config(), {"runtime_params.compilation_cache_dir": ""})
    cache_dir = jax.config.jax_compilation_cache_dir
    assembly.configure_jax(settings.checked(base, {key: "float64"}))
    assert jnp.asarray(np.ones(1)).dtype == np.float64
    assembly.configure_jax(base)
    assert jnp.asarray(np.ones(1)).dtype == np.float32
    jax.config.update("jax_compilation_cache_dir", cache_dir)


def test_compiled_programs_are_kept_where_asked_for(surroundings, tmp_path, monkeypatch):
    def compile_with(cache_dir: str | None, number: float) -> None:
        key = "runtime_params.compilation_cache_dir"
        assembly.configure_jax(settings.checked(settings.default_config(), {key: cache_dir}))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compilation_cache.reset_cache()
        jax.jit(lambda x: x * number + 1)(np.ones(3, np.float32)).block_until_ready()

    monkeypatch.setenv("HOME", str(tmp_path))
    try:
        compile_with(str(tmp_path / "mine"), 1.5)
        assert any((tmp_path / "mine").iterdir())
        compile_with("", 2.5)
        assert not (tmp_path / ".cache").exists()
        compile_with(None, 3.5)
        assert any((tmp_path / ".cache" / "capfinder" / "programs").iterdir())
    finally:
        jax.config.update("jax_compilation_cache_dir", str(surroundings / "xla"))
        compilation_cache.reset_cache()


def test_a_rerun_writes_what_is_missing_and_trains_nothing_again(surroundings, whole_run, tmp_path):
    """Also with other values of settings that change no result."""
    shutil.copytree(whole_run.output_dir, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "evaluation")
    (tmp_path / "best_model" / "best_model_weights.weights.h5").unlink()
    (tmp_path / "report.html").unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("checkpoints/**/*")}
    again = train_model(
        surroundings,
        tmp_path,
        tune_params={"timeout_minutes": 3},
        train_params={"checkpoint_minutes": 3},
        evaluate_params={"batch_size": 5},
        runtime_params={"data_residency": "host"},
        tracking_params={"mode": "off"},
    )
    assert again.code == 0, again.shown
    assert not (tmp_path / "previous").exists()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("checkpoints/**/*")} == before
    figures = [ended.read(METRICS)["test"]["confusion_matrix"] for ended in (whole_run, again)]
    assert figures[0] == figures[1]
    assert (tmp_path / "best_model" / "best_model_weights.weights.h5").exists()
    assert (tmp_path / "report.html").exists()


# Signals


def test_the_first_ctrl_c_of_a_stage_asks_and_the_second_ends_the_run():
    interrupt = Interrupt()
    with interrupt.installed():
        with pytest.raises(StoppedError) as stopped:
            signal.raise_signal(signal.SIGINT)  # no stage that could end early
        assert stopped.value.exit_code == 130
        for _ in range(2):  # the count starts anew in each stage
            with interrupt.graceful("ending early"):
                assert not interrupt.requested
                signal.raise_signal(signal.SIGINT)
                assert interrupt.requested
                with pytest.raises(StoppedError) as stopped:
                    signal.raise_signal(signal.SIGINT)
                assert stopped.value.exit_code == 130
                assert "goes on from here" in str(stopped.value)


def test_sigterm_ends_the_run_with_143_and_the_handlers_come_back():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    interrupt = Interrupt()
    with pytest.raises(StoppedError) as stopped, interrupt.installed(), interrupt.graceful("x"):
        handler = signal.getsignal(signal.SIGTERM)
        assert callable(handler)
        handler(signal.SIGTERM, None)  # the signal itself would also wake the watchdog
    assert stopped.value.exit_code == 143
    assert [signal.getsignal(number) for number in numbers] == before


# Where each setting's effect is shown

SHOWN_BY: dict[str, dict[str, tuple[str, ...]]] = {
    "test_beam": {
        "test_beam_builds_the_dataset_that_this_machine_builds": ("etl_params.engine",),
        "test_workers_may_know_the_files_by_other_names": ("etl_params.beam_options",),
    },
    "test_command_line": {
        "test_resnet_with_bayesian_optimization_and_sgdr_from_json": ("shared_params.model_type",),
    },
    "test_devices": {
        "test_as_many_devices_of_the_mesh_are_used_as_share_a_batch_evenly": (
            "runtime_params.mesh",
        ),
    },
    "test_etl": {
        "test_a_named_version_is_used_whatever_the_data_and_must_fit": (
            "etl_params.use_remote_dataset_version",
        ),
        "test_without_data_the_newest_local_version_is_used_and_said": (
            "etl_params.caps_data_dir",
        ),
        "test_a_quota_is_drawn_evenly_from_all_runs": ("etl_params.examples_per_class",),
        "test_class_map_picks_and_renumbers": ("etl_params.class_map",),
        "test_rejects_up_to_the_fraction_are_kept_and_one_more_stops_the_run": (
            "etl_params.max_reject_fraction",
        ),
        "test_bad_input_is_one_line_and_leaves_nothing": ("shared_params.num_classes",),
        "test_each_setting_that_matters_makes_a_version_of_its_own": (
            "shared_params.target_length",
            "shared_params.train_test_fraction",
            "shared_params.train_val_fraction",
            "split_params.seed",
        ),
        "test_every_stored_signal_is_its_row_fitted_and_cast": ("shared_params.dtype",),
        "test_whole_runs_go_to_one_split_when_grouped_by_file": ("split_params.group_by",),
        "test_a_separate_test_directory_is_the_test_set_whole": (
            "split_params.test_caps_data_dir",
        ),
        "test_keep_all_uses_every_read_up_to_a_limit": ("split_params.keep_all",),
    },
    "test_export_stage": {
        "test_formats_not_asked_for_are_not_written": ("export_params.formats",),
        "test_files_may_take_signals_of_another_length": ("export_params.input_length",),
    },
    "test_fine_tuning": {
        "test_what_it_started_from_is_reported": ("train_params.init_from",),
        "test_a_frozen_trunk_keeps_every_bit_and_the_head_learns": ("train_params.freeze",),
    },
    "test_hosts": {
        "test_two_processes_end_with_the_weights_of_one": (
            "runtime_params.distributed",
            "runtime_params.coordinator_address",
            "runtime_params.num_processes",
            "runtime_params.process_id",
        ),
    },
    "test_promises": {
        "test_each_stage_is_tracked_in_its_own_project": (
            "etl_params.comet_project_name",
            "tune_params.comet_project_name",
            "train_params.comet_project_name",
        ),
        "test_a_trial_ends_when_its_patience_does": ("tune_params.patience",),
        "test_hyperband_prunes_at_powers_of_factor": ("tune_params.factor",),
        "test_the_one_seed_decides_weights_dropout_and_order": ("tune_params.seed",),
        "test_the_study_is_kept_where_storage_says": ("tune_params.storage",),
        "test_training_ends_at_patience_or_max_epochs_whichever_is_first": (
            "train_params.patience",
            "train_params.max_epochs_final_model",
        ),
        "test_an_epoch_longer_than_checkpoint_minutes_is_saved_in_its_middle": (
            "train_params.checkpoint_minutes",
        ),
        "test_a_training_that_diverges_is_taken_back_max_rollbacks_times": (
            "train_params.max_rollbacks",
        ),
        "test_steps_per_call_and_microbatch_say_how_steps_are_taken": (
            "runtime_params.steps_per_call",
            "runtime_params.microbatch",
        ),
        "test_batch_size_and_augmentation_reach_the_training_data_alone": (
            "shared_params.batch_size",
            "shared_params.use_augmentation",
        ),
        "test_everything_is_written_below_output_dir": ("shared_params.output_dir",),
        "test_evaluation_has_a_batch_size_of_its_own_that_changes_no_figure": (
            "evaluate_params.batch_size",
        ),
        "test_compute_dtype_is_what_the_model_computes_in": ("runtime_params.compute_dtype",),
        "test_residency_says_whether_the_signals_lie_on_the_device": (
            "runtime_params.data_residency",
        ),
        "test_compiled_programs_are_kept_where_asked_for": (
            "runtime_params.compilation_cache_dir",
        ),
        "test_tracking_off_leaves_no_archive": ("tracking_params.mode",),
        "test_debug_code_logs_places_and_shows_where_an_error_came_from": ("debug_code",),
        "test_every_setting_of_a_schedule_changes_the_rates": tuple(
            f"lr_scheduler_params.{key}" for key in SCHEDULE_CHANGES
        ),
    },
    "test_schedules": {
        "test_cyclic_settings_count_the_step_size_in_epochs": ("lr_scheduler_params.type",),
    },
    "test_study": {
        "test_max_trials_counts_complete_and_pruned_trials_over_reruns": (
            "tune_params.max_trials",
        ),
        "test_strategies_and_seeds_draw_differently": ("tune_params.tuning_strategy",),
    },
    "test_tune": {
        "test_curves_and_the_best_hyperparameters_reach_the_tracker": (
            "tune_params.max_epochs_hpt",
        ),
        "test_overwrite_starts_anew_every_time": ("tune_params.overwrite",),
        "test_trials_take_their_steps_as_the_final_training_does": (
            "runtime_params.steps_per_call",
            "runtime_params.microbatch",
        ),
        "test_no_time_means_no_trial": ("tune_params.timeout_minutes",),
        "test_no_trials_asked_for_means_model_params_and_no_study": ("model_params",),
        "test_search_params_change_what_is_drawn_and_model_params_outside_are_no_trial": (
            "search_params",
        ),
    },
}


@pytest.mark.parametrize("key", settings.BY_KEY)
def test_every_setting_has_a_test_of_its_effect(key):
    shown = [(f, test) for f, tests in SHOWN_BY.items() for test in tests if key in tests[test]]
    assert shown, f"{key}: name the test that shows its effect in SHOWN_BY"
    for name, test in shown:
        assert f"\ndef {test}(" in (TESTS / f"{name}.py").read_text(encoding="utf-8")
