"""What benchmarks work on: simulated CSV files, and datasets made of them for either project."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import processes
from architectures import CLASSES, LENGTH

FRACTION = 0.8  # of the reads, and again of those, are trained on
SPLITS = ("train", "validation", "test")
ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch.py"
CAPFINDER = (sys.executable, "-m", "capfinder")


def simulate(directory: Path, **options: Any) -> None:
    """`capfinder simulate` with these options, e.g. reads_per_class=1000, seed=1."""
    capfinder(directory.parent, "simulate", output_dir=directory, **options)


def capfinder(workdir: Path, command: str, **options: Any) -> processes.Usage:
    """A command of ours with its options, to its end; the log is WORKDIR/COMMAND.log."""
    words: list[Any] = [*CAPFINDER, command]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    return processes.run(words, log_path=workdir / f"{command}.log", env=processes.environment())


@dataclass(frozen=True)
class Data:
    """One dataset: `version`, a directory as our training opens it, and `arrays`, a directory
    with the same signals and classes as plain .npy files."""

    version: Path
    arrays: Path


def dataset(workdir: Path, name: str, *, effect: float | None = None, **settings: Any) -> Data:
    """A dataset of simulated reads, all of them used; made anew when its settings changed.

    settings: those of make-train-dataset, examples_per_class among them."""
    directory, made_of = workdir / name, {"effect": effect} | settings
    facts = directory / "made_of.json"
    if not (facts.exists() and json.loads(facts.read_text("utf-8")) == made_of):
        print(f"Making {name} ...", flush=True)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        reads = {"reads_per_class": settings["examples_per_class"], "seed": 1}
        if effect is not None:
            reads["effect"] = effect
        simulate(directory / "caps", num_classes=settings["num_classes"], **reads)
        capfinder(
            directory,
            "make-train-dataset",
            caps_data_dir=directory / "caps",
            output_dir=directory,
            **settings,
        )
        _write_arrays(_version(directory), directory / "arrays")
        facts.write_text(json.dumps(made_of), "utf-8")
    return Data(_version(directory), directory / "arrays")


def training_signals(workdir: Path, *, steps: int, batch_size: int, seed: int) -> Data:
    """A dataset in float32 with as many training reads as `steps` batches have, exactly."""
    reads = round(steps * batch_size / FRACTION**2 / CLASSES)
    if round(reads * FRACTION**2 * CLASSES) != steps * batch_size:
        raise SystemExit(f"--steps {steps}: give a multiple of 4")
    return dataset(
        workdir,
        f"signals_{steps}x{batch_size}",
        examples_per_class=reads,
        num_classes=CLASSES,
        target_length=LENGTH,
        dtype="float32",
        train_test_fraction=FRACTION,
        train_val_fraction=FRACTION,
        seed=seed,
    )


def _version(directory: Path) -> Path:
    (version,) = (directory / "dataset" / "cap_data").glob("*.*.*")
    return version


def _write_arrays(version: Path, directory: Path) -> None:
    from capfinder.data import cache

    directory.mkdir()
    for name in SPLITS:
        split = cache.open_split(version, name)
        np.save(directory / f"{name}_signal.npy", split.signal[..., np.newaxis])
        np.save(directory / f"{name}_cap_class.npy", split.cap_class)


def load_arrays(directory: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """signal (N, T, 1) and cap_class (N,) int32, in memory."""
    signal, cap_class = (
        np.load(directory / f"{split}_{part}.npy") for part in ("signal", "cap_class")
    )
    return signal, cap_class


def launch_arguments(
    model_type: str, output_dir: Path, settings: dict[str, Any], *, stage: str | None = None
) -> list[str]:
    """What launch.py is called with; settings by their dotted keys, stage: None for all."""
    words = [f"--config={ROOT / 'configs' / model_type}.py", f"--output_dir={output_dir}"]
    if stage is not None:
        words.append(f"--stage={stage}")
    for key, value in settings.items():
        words.append(f"--config.{key}={value if isinstance(value, str) else json.dumps(value)}")
    return words
