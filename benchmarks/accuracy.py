"""What our models and Capfinder 0.4.3's learn from the same reads, with the same hyperparameters.

    python benchmarks/accuracy.py

Equal training, validation and test arrays, equally many epochs, the epoch of the lowest val_loss of
either; some seeds each. Not a timing: other work may go on beside it. Prints a table and writes it
to RESULTS.md."""

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import inputs
import original
import processes
import results
from architectures import CLASSES, LENGTH, Parameters, resnet_values, trunk_values

HERE = Path(__file__).parent
SECTION = "Accuracy beside Capfinder 0.4.3"
PACKAGES = ("numpy", "jax", "flax")
BATCH_SIZE = 128
ERRORS = 2  # standard errors that a difference has to exceed to be called one
TRUNK = {
    "conv_filters": [32, 32, 64],
    "conv_kernels": [7, 5, 3],
    "conv_dropouts": [0.1, 0.1, 0.1],
    "lstm_units": [64],
    "lstm_dropouts": [0.1],
    "dense_units": 32,
    "dense_dropout": 0.2,
    "learning_rate": 1e-3,
}
RESNET = {
    "stem_filters": 32,
    "stem_kernel": 7,
    "stage_filters": [32, 64],
    "stage_kernels": [3, 3],
    "stage_blocks": [2, 2],
    "dense_units": 32,
    "dense_dropout": 0.2,
    "learning_rate": 3e-4,
}
# Small enough to train many times; the original's encoder can't learn and has no place here.
MODELS: dict[str, tuple[Parameters, Callable[[Parameters], Parameters]]] = {
    "cnn_lstm": (TRUNK, trunk_values),
    "attention_cnn_lstm": (TRUNK, trunk_values),
    "resnet": (RESNET, resnet_values),
}


@dataclass(frozen=True)
class Bench:
    """What is run, where and with which settings."""

    workdir: Path
    python: Path  # of the original
    data: inputs.Data
    seeds: tuple[int, ...]
    epochs: int

    def run(self, who: str, model_type: str) -> dict[str, Any]:
        """{"runs": one of each seed}, of theirs also {"versions"}."""
        ours, to_theirs = MODELS[model_type]
        told, result = (
            self.workdir / f"accuracy_{part}_{who}_{model_type}.json" for part in ("told", "result")
        )
        about = {
            "model_type": model_type,
            "ours": ours,
            "theirs": to_theirs(ours),
            "version": os.fspath(self.data.version),
            "arrays": os.fspath(self.data.arrays),
            "num_classes": CLASSES,
            "batch_size": BATCH_SIZE,
            "epochs": self.epochs,
            "seeds": self.seeds,
            "result": os.fspath(result),
        }
        told.write_text(json.dumps(about), "utf-8")
        command = {
            "ours": [Path(sys.executable), HERE / "our_accuracy.py", told],
            "theirs": [self.python, HERE / "original_accuracy.py", told],
        }[who]
        log = self.workdir / f"accuracy_{who}_{model_type}.log"
        env = processes.environment(HOME=original.home(self.workdir))
        processes.run(command, log_path=log, env=env)
        found: dict[str, Any] = json.loads(result.read_text("utf-8"))
        return found


def row(model_type: str, found: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    ours, theirs = ([run["accuracy"] for run in found[who]["runs"]] for who in ("ours", "theirs"))
    difference, error = difference_of_means(ours, theirs)
    spread = max(theirs) - min(theirs)
    return (
        model_type,
        *(shown(values) for values in (ours, theirs)),
        *(f"{statistics.mean(values):.1%}" for values in (ours, theirs)),
        f"{100 * difference:+.2f}" + (f" ± {100 * error:.2f}" if error is not None else ""),
        f"{100 * spread:.2f}",
        verdict(difference, error, spread),
    )


def difference_of_means(ours: list[float], theirs: list[float]) -> tuple[float, float | None]:
    """Ours less theirs, and its standard error (Welch) from the seeds of both; None: one seed."""
    difference = statistics.mean(ours) - statistics.mean(theirs)
    if min(len(ours), len(theirs)) < 2:
        return difference, None
    return difference, math.sqrt(sum(statistics.variance(v) / len(v) for v in (ours, theirs)))


def verdict(difference: float, error: float | None, spread: float) -> str:
    """What was required, and then what the difference by itself says."""
    required = "holds" if difference >= -spread else "DOES NOT HOLD"
    if error is None:
        return f"{required}; one seed: error not known"
    if abs(difference) <= ERRORS * error:
        return f"{required}; within {ERRORS} standard errors"
    return f"{required}; ours {'higher' if difference > 0 else 'LOWER'} by more than {ERRORS}"


def shown(accuracies: list[float]) -> str:
    return ", ".join(f"{100 * accuracy:.1f}" for accuracy in accuracies)


def main() -> None:
    names = list(MODELS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=names, default=names, help="architectures (default: all)")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of weights, order and dropout")
    add("--epochs", type=int, default=6, help="of each training")
    add("--reads_per_class", type=int, default=2_500, help="reads of each class")
    add("--effect", type=float, default=2.0, help="of a cap on the current; smaller is harder")
    original.add_options(parser)
    results.add_option(parser)
    given = parser.parse_args()
    workdir, python = original.prepared(given)
    data = inputs.dataset(
        workdir,
        "accuracy_signals",
        effect=given.effect,
        examples_per_class=given.reads_per_class,
        num_classes=CLASSES,
        target_length=LENGTH,
        dtype="float32",
        train_test_fraction=0.6,  # many test reads, so that differences aren't chance
        train_val_fraction=0.8,
        seed=42,
    )
    bench = Bench(workdir, python, data, tuple(given.seeds), given.epochs)
    counts = {split: len(inputs.load_arrays(data.arrays, split)[1]) for split in inputs.SPLITS}
    found: dict[str, dict[str, Any]] = {model_type: {} for model_type in given.models}
    for who in ("theirs", "ours"):
        for model_type in given.models:
            found[model_type][who] = bench.run(who, model_type)
            print(f"{who:6} {model_type}: {found[model_type][who]['runs']}", flush=True)
    versions = found[given.models[0]]["theirs"]["versions"]
    rows = [row(model_type, found[model_type]) for model_type in given.models]
    columns = ["test accuracy, %", "ours, by seed", "0.4.3, by seed", "ours, mean", "0.4.3, mean"]
    columns += ["difference ± standard error", "spread of 0.4.3", "not below by more than it"]
    text = "\n\n".join(
        (
            f"{results.provenance(PACKAGES)} The original: {versions}.",
            f"{CLASSES} classes of simulated reads (effect {given.effect:g}): {counts['train']:,} "
            f"to train on, {counts['validation']:,} to validate, {counts['test']:,} to test, the "
            f"same for both; {given.epochs} epochs in batches of {BATCH_SIZE}, float32, the epoch "
            f"with the lowest val_loss; seeds {', '.join(map(str, given.seeds))}. Holds: our "
            "mean is at least theirs less the spread of their seeds, highest to lowest, which is "
            "what was required, but allows the more the more their seeds differ. So the difference "
            "of the means stands beside it, in percentage points, with its standard error from the "
            f"seeds of both: it counts as one beyond {ERRORS} standard errors, and with few seeds "
            "smaller ones go unseen. The original's encoder cannot learn and is left out.",
            results.table(columns, rows),
        )
    )
    results.publish(SECTION, text, trial=given.trial)


if __name__ == "__main__":
    main()
