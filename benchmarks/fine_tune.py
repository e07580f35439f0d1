"""Fine-tuning the classifier that Capfinder 0.4.3 ships beside training from scratch, on few reads.

    python benchmarks/fine_tune.py

The shipped .keras file is imported; then, with 200 reads of each class, the same architecture is
trained from random weights, from the shipped ones, and from these with all but the dense layers
frozen. For each the learning rate that had the lowest val_loss with the first seed. Not a timing:
other work may go on beside it. Prints a table and writes it to RESULTS.md."""

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

SECTION = "Fine-tuning the shipped classifier"
PACKAGES = ("numpy", "jax", "flax")
SHIPPED = "capfinder==0.4.3"
CLASSES, LENGTH = 4, 500
TEST_READS = 1_000  # of each class
# From random weights larger steps are needed; either gets the best of its own.
STARTS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "from scratch": ({}, (2e-3, 1e-3, 5e-4)),
    "fine-tuned": ({"freeze": "nothing"}, (1e-3, 3e-4, 1e-4)),
    "fine-tuned, trunk frozen": ({"freeze": "trunk"}, (3e-3, 1e-3, 3e-4)),
}


@dataclass(frozen=True)
class Bench:
    workdir: Path
    model: Path  # the import
    reads: int
    epochs: int

    def train(self, start: str, rate: float, seed: int) -> dict[str, float]:
        """rate; val_loss of the best epoch; accuracy on the test reads."""
        output_dir = self.workdir / f"{start.replace(', ', '_').replace(' ', '_')}_{rate:g}_{seed}"
        shutil.rmtree(output_dir, ignore_errors=True)
        options, _ = STARTS[start]
        known = json.loads((self.model / "import.json").read_text("utf-8"))
        values: dict[str, Any] = {
            "etl_params": {
                "caps_data_dir": str(self.caps(seed)),
                "examples_per_class": self.reads,
            },
            "split_params": {"test_caps_data_dir": str(self.caps(0))},
            "tune_params": {"max_trials": 0, "seed": seed},
            "train_params": {"max_epochs_final_model": self.epochs, "patience": self.epochs // 4},
            "shared_params": {
                "model_type": known["model_type"],
                "num_classes": CLASSES,
                "batch_size": 32,
                "target_length": LENGTH,
                "dtype": "float32",
                "output_dir": str(output_dir),
            },
            "model_params": {"learning_rate": rate},
            "tracking_params": {"mode": "off"},
            "export_params": {"formats": []},
        }
        if options:
            values["train_params"] |= {"init_from": str(self.model)} | options
        else:
            values["model_params"] = known["hyperparameters"] | values["model_params"]
        settings = output_dir.with_suffix(".json")
        settings.write_text(json.dumps(values), "utf-8")
        processes.run(
            [sys.executable, inputs.LAUNCH, f"--config={settings}"],
            log_path=output_dir.with_suffix(".log"),
            env=processes.environment(),
        )
        metrics = json.loads((output_dir / "evaluation" / "metrics.json").read_text("utf-8"))
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
        reads = self.reads if seed else TEST_READS
        directory = self.workdir / f"caps_{seed}_{reads}"
        if not directory.exists():
            inputs.simulate(
                directory, reads_per_class=reads, num_classes=CLASSES, seed=1_000 + seed
            )
        return directory

    def runs(self, start: str, seeds: Sequence[int]) -> list[dict[str, float]]:
        """One a seed, all with the learning rate that is best for the first."""
        first = min(
            (self.train(start, rate, seeds[0]) for rate in STARTS[start][1]),
            key=lambda run: run["val_loss"],
        )
        return [first, *(self.train(start, first["rate"], seed) for seed in seeds[1:])]


def shipped_classifier(workdir: Path) -> Path:
    """The .keras file in the package, fetched from the package index when absent."""
    path = workdir / "shipped.keras"
    if not path.exists():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        subprocess.run([*pip, "-d", str(workdir), SHIPPED], check=True)
        [wheel] = workdir.glob("capfinder-0.4.3*.whl")
        with zipfile.ZipFile(wheel) as members:
            names = [name for name in members.namelist() if name.endswith(".keras")]
            [name] = [name for name in names if "classifier" in name]
            path.write_bytes(members.read(name))
    return path


def verdict(accuracies: list[float], scratch: list[float]) -> str:
    difference, error = difference_of_means(accuracies, scratch)
    if error is None or abs(difference) <= ERRORS * error:
        return "no difference that can be told from chance"
    return "better than from scratch" if difference > 0 else "WORSE than from scratch"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of reads, weights and order")
    add("--epochs", type=int, default=40, help="of each training, at most")
    add("--reads_per_class", type=int, default=200, help="to train and validate with")
    add("--workdir", type=Path, default=Path.home() / ".cache" / "capfinder-benchmarks")
    results.add_option(parser)
    given = parser.parse_args()
    workdir = given.workdir.absolute() / "fine_tune"
    workdir.mkdir(parents=True, exist_ok=True)
    model = workdir / "shipped"
    if not (model / "import.json").exists():
        inputs.capfinder(
            workdir, "import-model", keras_file=shipped_classifier(workdir), output_dir=model
        )
    bench = Bench(workdir, model, given.reads_per_class, given.epochs)
    found = {start: bench.runs(start, given.seeds) for start in STARTS}
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
    text = "\n\n".join(
        (
            results.provenance(PACKAGES),
            f"{CLASSES} classes of simulated reads, {given.reads_per_class} of each to train and "
            f"validate with, {TEST_READS:,} of each to test; batches of 32, {given.epochs} epochs "
            f"at most, float32. Seeds {', '.join(map(str, given.seeds))}: each draws reads, "
            "weights and order. Simulated signals are of a physical model and assumed effects of "
            "the caps, the shipped weights of real reads.",
            results.table(columns, rows),
        )
    )
    results.publish(SECTION, text, trial=given.trial)


if __name__ == "__main__":
    main()
