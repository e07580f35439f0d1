"""Our training and inference beside Capfinder 0.4.3's: the same hyperparameters, in turns.

    python benchmarks/models.py --rounds 5 --steps 20

Prints a table for each architecture and writes it to RESULTS.md."""

import argparse
import json
import os
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import inputs
import original
import processes
import results
from architectures import CLASSES, LENGTH, PAIRS, TRAINING, Pair

HERE = Path(__file__).parent
FRACTION = 0.8  # of the reads, and again of those, are trained on
PACKAGES = ("numpy", "jax", "flax")
ROUND = {"train", "predict"}
MOST_IDLE = 0.02  # CPU seconds a second, of the one whose turn it isn't

Found = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Bench:
    """What is run, where and with which settings."""

    workdir: Path
    python: Path  # of the original
    steps: int
    rounds: int
    seed: int

    def workers(self, pair: Pair) -> dict[str, processes.Worker]:
        """Both, started and waiting for commands."""
        data = self._data(pair.batch_size)
        told = self.workdir / f"models_{pair.model_type}.json"
        about = {
            "model_type": pair.model_type,
            "batch_size": pair.batch_size,
            "ours": pair.ours,
            "theirs": pair.theirs,
            "num_classes": CLASSES,
            "version": os.fspath(data.version),
            "arrays": os.fspath(data.arrays),
            "seed": self.seed,
        }
        told.write_text(json.dumps(about), "utf-8")
        return {
            who: processes.Worker(
                [python, HERE / script, told],
                log_path=self.workdir / f"models_{who}.log",
                env=processes.environment(HOME=original.home(self.workdir)),
            )
            for who, python, script in (
                ("ours", Path(sys.executable), "our_models.py"),
                ("theirs", self.python, "original_models.py"),
            )
        }

    def _data(self, batch_size: int) -> inputs.Data:
        """As many training reads as `steps` batches have, exactly."""
        reads = round(self.steps * batch_size / FRACTION**2 / CLASSES)
        if round(reads * FRACTION**2 * CLASSES) != self.steps * batch_size:
            raise SystemExit(f"--steps {self.steps}: give a multiple of 4")
        return inputs.dataset(
            self.workdir,
            f"signals_{self.steps}x{batch_size}",
            examples_per_class=reads,
            num_classes=CLASSES,
            target_length=LENGTH,
            dtype="float32",
            train_test_fraction=FRACTION,
            train_val_fraction=FRACTION,
            seed=self.seed,
        )


def measure(bench: Bench, pair: Pair) -> Found:
    """A round that isn't counted (compilation), then the others: what each takes, in turns, while
    the other waits. Last, what is asked once."""
    found: Found = defaultdict(list)
    workers = bench.workers(pair)
    with workers["ours"] as ours, workers["theirs"]:
        for number in range(bench.rounds + 1):
            product = ours.ask("product")
            line = f"{product['flops'] / 1e9:.0f} GFLOP/s of matrix product"
            for task in ("train", "predict"):
                for who in ("ours", "theirs"):
                    outcome = _turn(workers, who, task)
                    rate = outcome["examples"] / outcome["wall"]
                    line += f", {who} {task} {rate:,.0f}/s"
                    if number:
                        found[f"{who} {task}"].append(outcome)
            if number:
                found["product"].append(product)
            label = f"round {number}" if number else "warm-up"
            print(f"{pair.model_type}, {label}: {line}", flush=True)
        for who, worker in workers.items():
            found[f"{who} facts"].append(worker.ask("facts"))
    return found


def _turn(workers: dict[str, processes.Worker], who: str, task: str) -> dict[str, Any]:
    """The task's outcome, with what share of a core the other one took meanwhile."""
    (other,) = (worker for name, worker in workers.items() if name != who)
    before = other.cpu()
    outcome = workers[who].ask(task)
    return outcome | {"other": (other.cpu() - before) / outcome["wall"]}


@dataclass(frozen=True)
class Measure:
    """One row: a value of each round for either, and how many times better ours is."""

    title: str
    ours: list[float]
    theirs: list[float]
    form: str
    is_less_better: bool = False
    required: float | None = None

    def row(self) -> tuple[str, ...]:
        pairs = (self.theirs, self.ours) if self.is_less_better else (self.ours, self.theirs)
        ratio, lowest, highest = results.median_ratio(*pairs)
        return (
            self.title,
            self.form.format(statistics.median(self.ours)),
            self.form.format(statistics.median(self.theirs)),
            f"{ratio:.2f}",
            f"{lowest:.2f} to {highest:.2f}",
            f">= {self.required:g}" if self.required else "",
        )


def table(found: Found, pair: Pair) -> str:
    def speeds(who: str, task: str) -> list[float]:
        return [o["examples"] / o["wall"] for o in found[f"{who} {task}"]]

    def cpu(who: str, task: str) -> list[float]:
        return [1000 * o["cpu"] / o["examples"] for o in found[f"{who} {task}"]]

    def shares(who: str, task: str, times: int) -> list[float]:
        flops = times * pair.flops(who)
        return [
            speed * flops / product["flops"]
            for speed, product in zip(speeds(who, task), found["product"], strict=True)
        ]

    measures = []
    for task, times, required in (
        ("train", TRAINING, pair.train_at_least),
        ("predict", 1, pair.predict_at_least),
    ):
        values = [speeds(who, task) for who in ("ours", "theirs")]
        measures.append(Measure(f"{task}, examples/s", *values, "{:,.0f}", required=required))
        values = [shares(who, task, times) for who in ("ours", "theirs")]
        measures.append(Measure(f"{task}, share of the matrix product", *values, "{:.1%}"))
        values = [cpu(who, task) for who in ("ours", "theirs")]
        title = f"{task}, CPU ms an example"
        measures.append(Measure(title, *values, "{:,.2f}", is_less_better=True))
    memory = [
        [found[f"{who} facts"][0]["peak_memory"] / processes.MIB] for who in ("ours", "theirs")
    ]
    measures.append(Measure("peak memory, MiB", *memory, "{:,.0f}", is_less_better=True))
    return results.table(results.COLUMNS, [measure.row() for measure in measures])


def remarks(found: Found, pair: Pair) -> str:
    ours, theirs = (found[f"{who} facts"][0]["parameters"] for who in ("ours", "theirs"))
    flops = [pair.flops(who) / 1e6 for who in ("ours", "theirs")]
    product = [p["flops"] / 1e9 for p in found["product"]]
    idle = max(
        o["other"] for name in ROUND for who in ("ours", "theirs") for o in found[f"{who} {name}"]
    )
    losses = [found[f"{who} train"][-1]["loss"] for who in ("ours", "theirs")]
    verdict = "" if idle <= MOST_IDLE else " TOO MUCH: the figures are not to be trusted."
    return (
        f"{pair.remark} Parameters: ours {ours:,}, theirs {theirs:,}. Forward pass: ours "
        f"{flops[0]:,.1f}, theirs {flops[1]:,.1f} MFLOP an example. Matrix product (float32): "
        f"{statistics.median(product):,.0f} GFLOP/s ({min(product):,.0f} to {max(product):,.0f}). "
        f"Mean loss of the last round's steps: ours {losses[0]:.3f}, theirs {losses[1]:.3f}. "
        f"While one worked the other took at most {idle:.1%} of a core.{verdict}"
    )


def report(bench: Bench, pair: Pair, found: Found) -> str:
    return "\n\n".join(
        (
            f"{results.provenance(PACKAGES)} The original: {found['theirs facts'][0]['versions']}.",
            f"Batches of {pair.batch_size}, {LENGTH} samples, {CLASSES} classes, float32, dropout "
            f"as in the hyperparameters; {bench.rounds} rounds of {bench.steps} steps; device "
            f"{found['ours facts'][0]['device']}.",
            table(found, pair),
            remarks(found, pair),
        )
    )


def main() -> None:
    names = [pair.model_type for pair in PAIRS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=names, default=names, help="architectures (default: all)")
    add("--rounds", type=int, default=5, help="rounds that count; one more comes first")
    add("--steps", type=int, default=20, help="training steps a round; predict takes as many reads")
    add("--seed", type=int, default=42, help="of weights, order and dropout")
    original.add_options(parser)
    results.add_option(parser)
    given = parser.parse_args()
    if given.rounds < 1 or given.steps < 1:
        parser.error("needs a round and a step")
    workdir, python = original.prepared(given)
    bench = Bench(workdir, python, given.steps, given.rounds, given.seed)
    for pair in PAIRS:
        if pair.model_type in given.models:
            text = report(bench, pair, measure(bench, pair))
            title = f"Training and inference: {pair.model_type}"
            results.publish(title, text, trial=given.trial)


if __name__ == "__main__":
    main()
