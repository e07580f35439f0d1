"""Training with the dataset on the device, in the host's memory, and read from its shards.

    python benchmarks/residency.py --epochs 5 --steps 20

For each architecture: examples/s, and at most which share of the time the device had nothing to do.
Prints a table and writes it to RESULTS.md."""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import inputs
import jax
import results
from architectures import PAIRS, Pair
from our_setup import Setup

from capfinder import memory

PACKAGES = ("numpy", "jax", "flax", "tensorflow-cpu")
RESIDENCIES = ("device", "host", "stream")
MOST_IDLE = 0.05


def measure(pair: Pair, version: Path, epochs: int) -> dict[str, list[dict[str, Any]]]:
    """The epochs' rows, one epoch of each residency in turns, after one that compiles."""
    setups = {
        residency: Setup(
            version,
            pair.model_type,
            pair.ours,
            batch_size=pair.batch_size,
            seed=42,
            data_residency=residency,
        )
        for residency in RESIDENCIES
    }
    rows: dict[str, list[dict[str, Any]]] = {residency: [] for residency in RESIDENCIES}
    for number in range(epochs + 1):
        for residency, setup in setups.items():
            batch = next(iter(setup.evaluation_batches("validation")))  # one is enough here
            (row,) = setup.fit(max_epochs=1, validation_batches=[batch]).history
            if number:
                rows[residency].append(row)
    return rows


def main() -> None:
    names = [pair.model_type for pair in PAIRS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=names, default=names, help="architectures (default: all)")
    add("--epochs", type=int, default=5, help="of each residency, in turns")
    add("--steps", type=int, default=20, help="of an epoch")
    results.add_option(parser)
    options = parser.parse_args()
    memory.keep_freed()
    lines, worst = [], 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for pair in PAIRS:
            if pair.model_type not in options.models:
                continue
            data = inputs.training_signals(
                Path(scratch), steps=options.steps, batch_size=pair.batch_size, seed=42
            )
            name = pair.model_type
            found = measure(pair, data.version, options.epochs)
            for residency, rows in found.items():
                speeds = [row["examples_per_second"] for row in rows]
                shares = [row["idle_share"] for row in rows]
                worst = max(worst, statistics.median(shares))
                ratio, low, high = results.median_ratio(
                    speeds, [row["examples_per_second"] for row in found["device"]]
                )
                lines.append(
                    (
                        name,
                        residency,
                        f"{statistics.median(speeds):,.0f}",
                        f"{ratio:.2f}",
                        f"{low:.2f} to {high:.2f}",
                        f"{statistics.median(shares):.2%}",
                        f"{max(shares):.2%}",
                    )
                )
                print("  ".join(lines[-1]), flush=True)
                name = ""
    columns = ("model", "data", "examples/s", "to device", "of the rounds", "idle", "worst")
    verdict = "holds" if worst < MOST_IDLE else "DOES NOT HOLD"
    platform = jax.default_backend()
    results.publish(
        f"Where the data lie ({platform})",
        f"{results.provenance(PACKAGES)}\n\nPlatform: {platform}. float32, batches as in the "
        f"comparison of the architectures, {options.steps} steps an epoch; medians of "
        f"{options.epochs} epochs each, in turns. Idle: the share of the training steps' time in "
        f"which the device may have had nothing to do.\n\n{results.table(columns, lines)}\n\n- "
        f"The device is idle for less than {MOST_IDLE:.0%}: {verdict} (highest median "
        f"{worst:.2%}).",
        trial=options.trial,
    )


if __name__ == "__main__":
    main()
