"""Fine-tuning beside training from scratch, on few reads.

    python benchmarks/fine_tune.py

From the classifier that Capfinder 0.4.3 ships, and from one of ours that was trained on many reads
of the same kind with other caps. With 200 reads of each class, the same architecture is trained
from random weights, from the model's, and from these with all but the dense layers frozen. For each
the learning rate that had the lowest val_loss with the first seed. Not a timing: other work may go
on beside it. Prints a table each and writes it to RESULTS.md."""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import inputs
import processes
import results
from accuracy import ERRORS, difference_of_means

PACKAGES = ("numpy", "jax", "flax")
SHIPPED = "capfinder==0.4.3"
CLASSES, LENGTH = 4, 500
TEST_READS = 1_000  # of each class
OWN_READS, OWN_EPOCHS = 5_000, 15  # of each class
# From random weights larger steps are needed; either gets the best of its own.
STARTS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "from scratch": ({}, (2e-3, 1e-3, 5e-4)),
    "fine-tuned": ({"freeze": "nothing"}, (1e-3, 3e-4, 1e-4)),
    "fine-tuned, trunk frozen": ({"freeze": "trunk"}, (3e-3, 1e-3, 3e-4)),
}


@dataclass(frozen=True)
class Source:
    """A model to start from. caps: those to tell apart when it is fine-tuned."""

    section: str
    path: Path
    hyperparameters: dict[str, Any]
    caps: Sequence[int]
    about: str


@dataclass(frozen=True)
class Bench:
    workdir: Path
    source: Source
    reads: int
    epochs: int

    def train(self, start: str, rate: float, seed: int) -> dict[str, float]:
        """rate; val_loss of the best epoch; accuracy on the test reads."""
        output_dir = self.workdir / f"{start.replace(', ', '_').replace(' ', '_')}_{rate:g}_{seed}"
        shutil.rmtree(output_dir, ignore_errors=True)
        options, _ = STARTS[start]
        values = settings(
            output_dir, self.caps(seed), reads=self.reads, epochs=self.epochs, seed=seed
        )
        values["etl_params"]["class_map"] = {str(c): i for i, c in enumerate(self.source.caps)}
        values["split_params"] = {"test_caps_data_dir": str(self.caps(0))}
        values["model_params"] = {"learning_rate": rate}
        if options:
            values["train_params"] |= {"init_from": str(self.source.path)} | options
        else:
            values["model_params"] = self.source.hyperparameters | values["model_params"]
        metrics = launch(values)
        best = metrics["history"][metrics["best_epoch"] - 1]
        shutil.rmtree(output_dir)
        run = {
            "rate": rate,
            "val_loss": best["val_loss"],
            "accuracy": metrics["test"]["accuracy"],
        }
        print(f"{start}, seed {seed}: {run}, best epoch {metrics['best_epoch']}", flush=True)
        return run

    def caps(self, seed: int) -> Path:
        """Simulated reads; those of seed 0 are the test set."""
        reads, caps = (self.reads if seed else TEST_READS), max(self.source.caps) + 1
        return simulated(self.workdir, reads=reads, caps=caps, seed=1_000 + seed)

    def runs(self, start: str, seeds: Sequence[int]) -> list[dict[str, float]]:
        """One a seed, all with the learning rate that is best for the first."""
        first = min(
            (self.train(start, rate, seeds[0]) for rate in STARTS[start][1]),
            key=lambda run: run["val_loss"],
        )
        return [first, *(self.train(start, first["rate"], seed) for seed in seeds[1:])]


def settings(
    output_dir: Path, caps: Path, *, reads: int, epochs: int, seed: int
) -> dict[str, dict[str, Any]]:
    return {
        "etl_params": {"caps_data_dir": str(caps), "examples_per_class": reads},
        "tune_params": {"max_trials": 0, "seed": seed},
        "train_params": {"max_epochs_final_model": epochs, "patience": epochs // 4},
        "shared_params": {
            "model_type": "cnn_lstm",
            "num_classes": CLASSES,
            "batch_size": 32,
            "target_length": LENGTH,
            "dtype": "float32",
            "output_dir": str(output_dir),
        },
        "tracking_params": {"mode": "off"},
        "export_params": {"formats": []},
    }


def launch(values: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Trains with these settings; what metrics.json then holds."""
    output_dir = Path(values["shared_params"]["output_dir"])
    path = output_dir.with_suffix(".json")
    path.write_text(json.dumps(values), "utf-8")
    processes.run(
        [sys.executable, inputs.LAUNCH, f"--config={path}"],
        log_path=output_dir.with_suffix(".log"),
        env=processes.environment(),
    )
    return json.loads((output_dir / "evaluation" / "metrics.json").read_text("utf-8"))


def simulated(workdir: Path, *, reads: int, caps: int, seed: int) -> Path:
    directory = workdir / f"caps_{seed}_{reads}_{caps}"
    if not directory.exists():
        inputs.simulate(directory, reads_per_class=reads, num_classes=caps, seed=seed)
    return directory


def shipped(workdir: Path) -> Source:
    """The .keras file in the package, fetched from the package index when absent, imported."""
    file, directory = workdir / "shipped.keras", workdir / "shipped"
    if not file.exists():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        subprocess.run([*pip, "-d", str(workdir), SHIPPED], check=True)
        [wheel] = workdir.glob("capfinder-0.4.3*.whl")
        with zipfile.ZipFile(wheel) as members:
            names = [name for name in members.namelist() if name.endswith(".keras")]
            [name] = [name for name in names if "classifier" in name]
            file.write_bytes(members.read(name))
    if not (directory / "import.json").exists():
        inputs.capfinder(workdir, "import-model", keras_file=file, output_dir=directory)
    known = json.loads((directory / "import.json").read_text("utf-8"))
    return Source(
        section="Fine-tuning the shipped classifier",
        path=directory,
        hyperparameters=known["hyperparameters"],
        caps=range(CLASSES),
        about="the shipped weights of real reads",
    )


def own(workdir: Path) -> Source:
    """Ours, trained here unless it is there already. To be fine-tuned for caps it never saw."""
    output_dir = workdir / "own"
    caps = simulated(workdir, reads=OWN_READS, caps=CLASSES, seed=999)
    metrics = launch(settings(output_dir, caps, reads=OWN_READS, epochs=OWN_EPOCHS, seed=1))
    accuracy = metrics["test"]["accuracy"]
    print(f"own model: {100 * accuracy:.1f} % of its test reads", flush=True)
    return Source(
        section="Fine-tuning a model of the same kind of reads",
        path=output_dir,
        hyperparameters=metrics["hyperparameters"],
        caps=range(CLASSES, 2 * CLASSES),
        about=f"and so are those of caps 0 to {CLASSES - 1}, {OWN_READS:,} of each, that the model "
        f"was made with (it names {100 * accuracy:.1f} % of its own test reads right); fine-tuned "
        f"and tested are caps {CLASSES} to {2 * CLASSES - 1}, with a new last layer",
    )


SOURCES = {"shipped": shipped, "own": own}


def verdict(accuracies: list[float], scratch: list[float]) -> str:
    difference, error = difference_of_means(accuracies, scratch)
    if error is None or abs(difference) <= ERRORS * error:
        return "no difference that can be told from chance"
    return "better than from scratch" if difference > 0 else "WORSE than from scratch"


def measured(bench: Bench, seeds: Sequence[int]) -> str:
    """A section of RESULTS.md."""
    found = {start: bench.runs(start, seeds) for start in STARTS}
    scratch = [run["accuracy"] for run in found["from scratch"]]
    rows = []
    for start, runs in found.items():
        accuracies = [run["accuracy"] for run in runs]
        rows.append(
            (
                start,
                ", ".join(f"{100 * accuracy:.1f}" for accuracy in accuracies),
                f"{100 * statistics.mean(accuracies):.1f}",
                f"{runs[0]['rate']:g}",
                verdict(accuracies, scratch) if start != "from scratch" else "",
            )
        )
    columns = ("weights at the start", "test accuracy, %, by seed", "mean", "learning rate", "")
    return "\n\n".join(
        (
            results.provenance(PACKAGES),
            f"{CLASSES} classes of simulated reads, {bench.reads} of each to train and "
            f"validate with, {TEST_READS:,} of each to test; batches of 32, {bench.epochs} epochs "
            f"at most, float32. Seeds {', '.join(map(str, seeds))}: each draws reads, "
            "weights and order. Simulated signals are of a physical model and assumed effects of "
            f"the caps, {bench.source.about}.",
            results.table(columns, rows),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sources", nargs="+", choices=tuple(SOURCES), default=list(SOURCES))
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of reads, weights and order")
    add("--epochs", type=int, default=40, help="of each training, at most")
    add("--reads_per_class", type=int, default=200, help="to train and validate with")
    add("--workdir", type=Path, default=Path.home() / ".cache" / "capfinder-benchmarks")
    results.add_option(parser)
    given = parser.parse_args()
    for name in given.sources:
        workdir = given.workdir.absolute() / "fine_tune" / name
        workdir.mkdir(parents=True, exist_ok=True)
        source = SOURCES[name](workdir)
        bench = Bench(workdir, source, given.reads_per_class, given.epochs)
        title = f"{source.section}, {bench.reads} reads of each cap"
        results.publish(title, measured(bench, given.seeds), trial=given.trial)


if __name__ == "__main__":
    main()
