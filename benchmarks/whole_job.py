"""A whole small job, ours and Capfinder 0.4.3's: CSV files in, an exported classifier out.

    python benchmarks/whole_job.py

ETL, tuning, training, evaluation and export, each project in one process. Prints a table and writes
it to RESULTS.md."""

import argparse
import json
import os
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import inputs
import original
import processes
import results
from architectures import CLASSES, LENGTH, trunk_values

HERE = Path(__file__).parent
SECTION = "A whole small job beside Capfinder 0.4.3"
MODEL_TYPE = "cnn_lstm"
SMALL = {
    "conv_filters": [32, 32],
    "conv_kernels": [5, 5],
    "conv_dropouts": [0.1, 0.1],
    "lstm_units": [32],
    "lstm_dropouts": [0.1],
    "dense_units": 32,
    "dense_dropout": 0.1,
    "learning_rate": 1e-3,
}
# Only the learning rate stays open, of 1e-2, 1e-3 and 1e-4: all trials are the same work.
SEARCH = {
    "conv_layers": {"low": 2, "high": 2},
    "lstm_layers": {"low": 1, "high": 1},
    "*_filters": {"choices": [32]},
    "*_kernels": {"choices": [5]},
    "*_units": {"choices": [32]},
    "*_dropout*": {"choices": [0.1]},
}
SHARED = {
    "target_length": LENGTH,
    "num_classes": CLASSES,
    "dtype": "float32",
    "batch_size": 256,
    "train_test_fraction": 0.95,
    "train_val_fraction": 0.8,
}
LEAST_READS = 1_280  # of a class: its test reads, which the original leaves out below a batch
FORMATS = ("keras", "h5")  # what the original writes
REQUIRED = 2
PACKAGES = ("numpy", "jax", "flax", "optuna", "keras")
# The parts of the original's job, and the stages of ours.
PARTS = {
    "ETL": ("etl",),
    "tuning": ("tune",),
    "training": ("train",),
    "evaluation and export": ("evaluate", "export"),
}

Found = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Bench:
    """What is run, where and with which settings."""

    workdir: Path
    python: Path  # of the original
    reads_per_class: int
    trials: int
    epochs: int
    formats: tuple[str, ...]
    seed: int

    @property
    def caps(self) -> Path:
        return self.workdir / f"job_caps_{self.reads_per_class}"

    def simulate(self) -> None:
        inputs.simulate(
            self.caps,
            reads_per_class=self.reads_per_class,
            num_classes=CLASSES,
            runs_per_class=2,
            seed=self.seed,
        )

    def run(self, who: str) -> dict[str, Any]:
        """Wall and CPU seconds of the process, seconds of its parts, accuracy on its test reads."""
        output = self.workdir / f"job_{who}"
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        return self._ours(output) if who == "ours" else self._theirs(output)

    def _ours(self, output: Path) -> dict[str, Any]:
        settings = {f"shared_params.{name}": value for name, value in SHARED.items()} | {
            "etl_params.caps_data_dir": os.fspath(self.caps),
            "etl_params.use_remote_dataset_version": "",
            "etl_params.examples_per_class": self.reads_per_class,
            "tune_params.tuning_strategy": "random_search",
            "tune_params.max_trials": self.trials,
            "tune_params.max_epochs_hpt": 1,
            "tune_params.seed": self.seed,
            "train_params.max_epochs_final_model": self.epochs,
            "model_params": SMALL,
            "search_params": SEARCH,
            "tracking_params.mode": "off",
            "export_params.formats": list(self.formats),
            # As for the original, no program that was compiled before.
            "runtime_params.compilation_cache_dir": os.fspath(output / "compiled"),
        }
        arguments = inputs.launch_arguments(MODEL_TYPE, output, settings)
        used = processes.run(
            [sys.executable, inputs.LAUNCH, *arguments],
            log_path=self.workdir / "job_ours.log",
            env=processes.environment(),
        )
        metrics = json.loads((output / "evaluation" / "metrics.json").read_text("utf-8"))
        record = json.loads((output / "run.json").read_text("utf-8"))
        parts = {
            part: sum(record["stages"][stage]["seconds"] for stage in stages)
            for part, stages in PARTS.items()
        }
        return {"wall": used.wall, "cpu": used.cpu, "parts": parts} | metrics["test"]

    def _theirs(self, output: Path) -> dict[str, Any]:
        told, result = output / "told.json", output / "result.json"
        about = {
            "shared": SHARED,
            "caps_data_dir": os.fspath(self.caps),
            "output_dir": os.fspath(output),
            "examples_per_class": self.reads_per_class,
            "model_type": MODEL_TYPE,
            "theirs": trunk_values(SMALL),
            "trials": self.trials,
            "trial_epochs": 1,
            "epochs": self.epochs,
            "seed": self.seed,
            "result": os.fspath(result),
        }
        told.write_text(json.dumps(about), "utf-8")
        used = processes.run(
            [self.python, HERE / "original_job.py", told],
            log_path=self.workdir / "job_theirs.log",
            env=processes.environment(HOME=original.home(self.workdir)),
        )
        outcome: dict[str, Any] = json.loads(result.read_text("utf-8"))
        return {"wall": used.wall, "cpu": used.cpu} | outcome


def table(found: Found) -> str:
    def measure(
        title: str, value: Callable[[dict[str, Any]], float], required: str = ""
    ) -> results.Measure:
        ours, theirs = ([value(outcome) for outcome in found[who]] for who in ("ours", "theirs"))
        return results.Measure(
            title, ours, theirs, "{:,.1f}", is_less_better=True, required=required
        )

    def seconds(part: str) -> results.Measure:
        return measure(f"{part}, s", lambda outcome: outcome["parts"][part])

    whole = [
        measure("whole process, s", lambda outcome: outcome["wall"], f">= {REQUIRED}"),
        measure("whole process, CPU s", lambda outcome: outcome["cpu"]),
    ]
    return results.comparison(whole + [seconds(part) for part in PARTS])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--reads_per_class", type=int, default=5_000, help="reads of each class, all used")
    add("--trials", type=int, default=3, help="of tuning, one epoch each")
    add("--epochs", type=int, default=5, help="of the final training")
    add("--rounds", type=int, default=1, help="runs of either, in turns")
    add("--formats", nargs="+", default=FORMATS, help="what ours exports")
    add("--seed", type=int, default=42, help="of reads, splits and weights")
    original.add_options(parser)
    results.add_option(parser)
    given = parser.parse_args()
    if given.rounds < 1 or not 1 <= given.trials <= 3:
        parser.error("needs a round, and 1 to 3 trials: there are 3 learning rates")
    if given.reads_per_class < LEAST_READS:
        parser.error(f"--reads_per_class: at least {LEAST_READS}")
    workdir, python = original.prepared(given)
    bench = Bench(
        workdir=workdir,
        python=python,
        reads_per_class=given.reads_per_class,
        trials=given.trials,
        epochs=given.epochs,
        formats=tuple(given.formats),
        seed=given.seed,
    )
    bench.simulate()
    found: Found = defaultdict(list)
    for number in range(1, given.rounds + 1):
        for who in ("ours", "theirs"):
            outcome = bench.run(who)
            found[who].append(outcome)
            print(f"round {number}: {who:6} {outcome['wall']:.1f} s {outcome['parts']}", flush=True)
    imports = statistics.median(outcome["parts"]["imports"] for outcome in found["theirs"])
    accuracies = [found[who][-1]["accuracy"] for who in ("ours", "theirs")]
    runs = "one run of either" if given.rounds == 1 else f"{given.rounds} rounds"
    which = "" if given.rounds == 1 else " of the last round"
    text = "\n\n".join(
        (
            f"{results.provenance(PACKAGES)} The original: {original.versions(python)}.",
            f"{CLASSES} classes of {given.reads_per_class:,} simulated reads; {given.trials} "
            f"trials of one epoch, {given.epochs} epochs of the best; {MODEL_TYPE} with "
            f"convolutions of 32 and 32 filters, an LSTM of 32 units, a dense layer of 32; batches "
            f"of {SHARED['batch_size']}, float32; {runs}; no compiled programs on "
            f"disk. Ours is one `launch.py` that exports {', '.join(bench.formats)} and writes its "
            "report; Comet is left out of both. Ours imports what a part needs within it, theirs "
            f"all of it first ({imports:.1f} s). Test accuracy{which}: ours "
            f"{accuracies[0]:.1%}, theirs {accuracies[1]:.1%} (most of its test reads are also in "
            "its training set).",
            table(found),
        )
    )
    results.publish(SECTION, text, trial=given.trial)


if __name__ == "__main__":
    main()
