"""Our training and inference beside Capfinder 0.4.3's: the same hyperparameters, in turns.

    python benchmarks/models.py --rounds 5 --steps 20

Prints a table for each architecture, and writes it to RESULTS.md before the next one begins."""

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import inputs
import original
import processes
import results
from architectures import CLASSES, LENGTH, PAIRS, TRAINING, Pair

HERE = Path(__file__).parent
PACKAGES = ("numpy", "jax", "flax")
TASKS = {"train": TRAINING, "predict": 1}  # FLOPs, in those of a forward pass
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
    started: float  # by time.monotonic

    def say(self, line: str) -> None:
        print(f"{time.monotonic() - self.started:6.0f} s  {line}", flush=True)

    def workers(self, pair: Pair) -> dict[str, processes.Worker]:
        """Both, started and waiting for commands."""
        data = inputs.training_signals(
            self.workdir, steps=self.steps, batch_size=pair.batch_size, seed=self.seed
        )
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


def measure(bench: Bench, pair: Pair) -> Found:
    """What each takes in every round, in turns, while the other waits. Before that both compile;
    last, what is asked once."""
    found: Found = defaultdict(list)
    workers = bench.workers(pair)
    with workers["ours"] as ours, workers["theirs"]:
        for who, worker in workers.items():
            bench.say(f"{pair.model_type}: {who} compiles and warms up ...")
            worker.ask("warm_up")
        for number in range(1, bench.rounds + 1):
            label = f"{pair.model_type}, round {number} of {bench.rounds}"
            found["product"].append(ours.ask("product"))
            bench.say(f"{label}: {found['product'][-1]['flops'] / 1e9:.0f} GFLOP/s, matrix product")
            for task in TASKS:
                for who in workers:
                    outcome = _turn(workers, who, task)
                    found[f"{who} {task}"].append(outcome)
                    rate = outcome["examples"] / outcome["wall"]
                    bench.say(f"{label}: {who} {task} {rate:,.0f} examples/s")
        for who, worker in workers.items():
            found[f"{who} facts"].append(worker.ask("facts"))
    return found


def _turn(workers: dict[str, processes.Worker], who: str, task: str) -> dict[str, Any]:
    """The task's outcome, with what share of a core the other one took meanwhile."""
    (other,) = (worker for name, worker in workers.items() if name != who)
    before = other.cpu()
    outcome = workers[who].ask(task)
    return outcome | {"other": (other.cpu() - before) / outcome["wall"]}


def table(found: Found, pair: Pair) -> str:
    """Speeds, at what a read costs either, CPU time and memory."""

    def measure(
        title: str, value: Callable[[str], list[float]], form: str, **more: Any
    ) -> results.Measure:
        return results.Measure(title, value("ours"), value("theirs"), form, **more)

    def rows(task: str, required: str) -> list[results.Measure]:
        cost = {who: TASKS[task] * pair.flops(who) for who in ("ours", "theirs")}

        def speeds(who: str) -> list[float]:
            return [o["examples"] / o["wall"] for o in found[f"{who} {task}"]]

        def gflops(who: str) -> list[float]:
            return [speed * cost[who] / 1e9 for speed in speeds(who)]

        def shares(who: str) -> list[float]:
            products = (product["flops"] / 1e9 for product in found["product"])
            return [a / b for a, b in zip(gflops(who), products, strict=True)]

        def cpu(who: str) -> list[float]:
            return [1000 * o["cpu"] / o["examples"] for o in found[f"{who} {task}"]]

        each = " and ".join(f"{flops / 1e6:,.1f}" for flops in cost.values())
        return [
            measure(f"{task}, examples/s", speeds, "{:,.0f}", required=required),
            measure(f"{task}, GFLOP/s, at {each} MFLOP an example", gflops, "{:,.1f}"),
            measure(f"{task}, share of the matrix product", shares, "{:.1%}"),
            measure(f"{task}, CPU ms an example", cpu, "{:,.2f}", is_less_better=True),
        ]

    def memory(who: str) -> list[float]:
        return [found[f"{who} facts"][0]["peak_memory"] / processes.MIB]

    label = "" if pair.is_same else " (architectures differ)"
    return results.comparison(
        [
            *rows("train", f">= {pair.train_at_least:g}{label}"),
            *rows("predict", f">= {pair.predict_at_least:g}{label}"),
            measure("peak memory, MiB", memory, "{:,.0f}", is_less_better=True),
        ]
    )


def remarks(found: Found, pair: Pair) -> str:
    ours, theirs = (found[f"{who} facts"][0]["parameters"] for who in ("ours", "theirs"))
    flops = [pair.flops(who) / 1e6 for who in ("ours", "theirs")]
    cost = f"ours {flops[0]:,.1f}, theirs {flops[1]:,.1f} MFLOP an example"
    if not pair.is_same:
        cost += f", {flops[1] / flops[0]:,.0f} times as many"
    product = [p["flops"] / 1e9 for p in found["product"]]
    idle = max(
        o["other"] for name in TASKS for who in ("ours", "theirs") for o in found[f"{who} {name}"]
    )
    losses = [found[f"{who} train"][-1]["loss"] for who in ("ours", "theirs")]
    verdict = "" if idle <= MOST_IDLE else " TOO MUCH: the figures are not to be trusted."
    return (
        f"{pair.remark} Parameters: ours {ours:,}, theirs {theirs:,}. Forward pass: {cost}. "
        f"Matrix product (float32): {statistics.median(product):,.0f} GFLOP/s ({min(product):,.0f} "
        f"to {max(product):,.0f}). Mean loss of the last round's steps: ours {losses[0]:.3f}, "
        f"theirs {losses[1]:.3f}. While one worked the other took at most {idle:.1%} of a core."
        f"{verdict}"
    )


def report(bench: Bench, pair: Pair, found: Found) -> str:
    return "\n\n".join(
        (
            f"{results.provenance(PACKAGES)} The original: {found['theirs facts'][0]['versions']}.",
            f"Batches of {pair.batch_size}, {LENGTH} samples, {CLASSES} classes, float32, dropout "
            f"as in the hyperparameters; {bench.rounds} rounds of {bench.steps} steps, "
            f"after a warm-up that compiles; device {found['ours facts'][0]['device']}.",
            table(found, pair),
            remarks(found, pair),
        )
    )


def main() -> None:
    names = [pair.model_type for pair in PAIRS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=names, default=names, help="architectures (default: all)")
    add("--rounds", type=int, default=5, help="of each task, ours and theirs in turns")
    add("--steps", type=int, default=20, help="training steps a round; predict takes as many reads")
    add("--seed", type=int, default=42, help="of weights, order and dropout")
    original.add_options(parser)
    results.add_option(parser)
    given = parser.parse_args()
    if given.rounds < 1 or given.steps < 1:
        parser.error("needs a round and a step")
    workdir, python = original.prepared(given)
    bench = Bench(workdir, python, given.steps, given.rounds, given.seed, time.monotonic())
    for pair in PAIRS:
        if pair.model_type in given.models:
            text = report(bench, pair, measure(bench, pair))
            title = f"Training and inference: {pair.model_type}"
            # Now, so that an interrupted run keeps those that it finished.
            results.publish(title, text, trial=given.trial)


if __name__ == "__main__":
    main()
