"""Our ETL beside Capfinder 0.4.3's own, on the same simulated CSV files, in turns.

    python benchmarks/etl.py --reads_per_class 10000 --rounds 5

Prints a table and writes it to RESULTS.md."""

import argparse
import functools
import json
import shutil
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

HERE = Path(__file__).parent
SECTION = "ETL and batches beside Capfinder 0.4.3"
CLASSES, RUNS_PER_CLASS, WARM_UP_READS = 4, 2, 50
REQUIRED_ETL, REQUIRED_BATCHES = 10, 15  # times the original's
PARSE = "parse the numbers"
PACKAGES = ("numpy", "numba", "jax")


@dataclass(frozen=True)
class Bench:
    """What is run, where and with which settings."""

    workdir: Path
    python: Path  # of the original
    reads_per_class: int
    settings: dict[str, str]
    seed: int

    def caps(self, reads_per_class: int) -> Path:
        return self.workdir / f"caps_{CLASSES}x{reads_per_class}"

    @property
    def data(self) -> Path:
        return self.caps(self.reads_per_class)

    def simulate(self) -> None:
        for seed, reads in enumerate((self.reads_per_class, WARM_UP_READS), start=1):
            inputs.simulate(
                self.caps(reads),
                reads_per_class=reads,
                num_classes=CLASSES,
                runs_per_class=RUNS_PER_CLASS,
                seed=seed,
            )

    def _run(self, name: str, command: list[Any], **env: str) -> processes.Usage:
        log = self.workdir / f"{name}.log"
        return processes.run(command, log_path=log, env=processes.environment(**env))

    def _fresh(self, name: str) -> Path:
        shutil.rmtree(self.workdir / name, ignore_errors=True)
        return self.workdir / name

    def _options(self) -> list[str]:
        return [word for key, value in self.settings.items() for word in (f"--{key}", value)]

    def our_command(self) -> dict[str, Any]:
        """The command as a user runs it: a whole process."""
        output = self._fresh("our_command")
        command = [*inputs.CAPFINDER, "make-train-dataset", "-c", self.data, "-o", output]
        command += [*self._options(), "--seed", str(self.seed)]
        used = self._run("our_command", command)
        (path,) = (output / "dataset" / "cap_data").glob("*/manifest.json")
        counts = json.loads(path.read_text("utf-8"))["counts"]
        examples = sum(sum(count.values()) for count in counts.values())
        return {"etl": {"wall": used.wall, "cpu": used.cpu}, "examples": examples}

    def our_process(self, *, compare: bool) -> dict[str, Any]:
        """The same in a process that is warm, and the batches of training."""
        output = self._fresh("our_process")
        result = self.workdir / "our_process.json"
        command = [sys.executable, HERE / "our_etl.py", "--caps_data_dir", self.data]
        command += ["--warm_up_dir", self.caps(WARM_UP_READS), "--output_dir", output]
        command += ["--result", result, "--seed", str(self.seed), *self._options()]
        if compare:
            command += ["--compare", self.workdir / "original_process" / "dataset"]
        self._run("our_process", command)
        return json.loads(result.read_text("utf-8"))

    def original(self, name: str, *, warm: bool) -> dict[str, Any]:
        """Capfinder's functions: as a whole process, or in a process that is warm."""
        output, result = self._fresh(name), self.workdir / f"{name}.json"
        command = [self.python, HERE / "original_etl.py", "--caps_data_dir", self.data]
        command += ["--output_dir", output, "--result", result, *self._options()]
        if warm:
            command += ["--warm_up_dir", self.caps(WARM_UP_READS)]
        used = self._run(name, command, HOME=original.home(self.workdir))
        found = json.loads(result.read_text("utf-8"))
        return found if warm else found | {"etl": {"wall": used.wall, "cpu": used.cpu}}

    def plain_read(self) -> tuple[int, float]:
        """Bytes of the data files, and seconds to read them, with the page cache warm."""
        buffer, total, started = bytearray(processes.MIB), 0, time.perf_counter()
        for path in self.data.glob("data__*.csv"):
            with path.open("rb", buffering=0) as stream:
                while count := stream.readinto(buffer):
                    total += count
        return total, time.perf_counter() - started


def measure(bench: Bench, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """One round that isn't counted (caches of the disk, compiled kernels), then `rounds`, in which
    who comes first takes turns."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number in range(rounds + 1):
        runs: dict[str, Callable[[], dict[str, Any]]] = {
            "original_whole": functools.partial(bench.original, "original_whole", warm=False),
            "our_whole": bench.our_command,
            "original_warm": functools.partial(bench.original, "original_process", warm=True),
            "our_warm": functools.partial(bench.our_process, compare=number == rounds),
        }
        order = list(runs)
        if number % 2 == 0 and number != rounds:  # the last compares with the original's output
            order = ["our_whole", "original_whole", "our_warm", "original_warm"]
        for name in order:
            outcome = runs[name]()
            rate = outcome["examples"] / outcome["etl"]["wall"]
            label = f"round {number}" if number else "warm-up"
            print(f"{label}: {name:14} {rate:10,.0f} examples/s", flush=True)
            if number:
                found[name].append(outcome)
        if number:
            size, seconds = bench.plain_read()
            found["plain_read"].append({"bytes": size, "seconds": seconds})
    return found


def rates(outcomes: list[dict[str, Any]], part: str, clock: str) -> list[float]:
    """Examples per second of wall or CPU time; batches' examples are counted of their own."""
    found = []
    for outcome in outcomes:
        timing: Any = outcome
        for key in part.split("."):
            timing = timing[key]
        found.append(timing.get("examples", outcome["examples"]) / timing[clock])
    return found


def comparison(found: dict[str, list[dict[str, Any]]]) -> str:
    """The table of ours, theirs and the ratio."""
    lines = [
        ("ETL, examples/s, whole process", "whole", "etl", "etl", "wall", REQUIRED_ETL),
        ("ETL, examples/CPU s, whole process", "whole", "etl", "etl", "cpu", None),
        ("ETL, examples/s, without start-up", "warm", "etl", "etl", "wall", REQUIRED_ETL),
        ("ETL, examples/CPU s, without start-up", "warm", "etl", "etl", "cpu", None),
    ]
    for residency in found["our_warm"][0]["batches"]:
        part = f"batches.{residency}"
        for clock, unit in (("wall", "s"), ("cpu", "CPU s")):
            title = f"batches ({residency}), examples/{unit}"
            required = REQUIRED_BATCHES if clock == "wall" else None
            lines.append((title, "warm", part, "batches", clock, required))
    rows = []
    for title, state, our_part, their_part, clock, required in lines:
        ours = rates(found[f"our_{state}"], our_part, clock)
        theirs = rates(found[f"original_{state}"], their_part, clock)
        ratio, lowest, highest = results.median_ratio(ours, theirs)
        rows.append(
            (
                title,
                f"{statistics.median(ours):,.0f}",
                f"{statistics.median(theirs):,.0f}",
                f"{ratio:.1f}",
                f"{lowest:.1f} to {highest:.1f}",
                f">= {required}" if required else "",
            )
        )
    columns = ("median of the rounds", "ours", "0.4.3", "ratio", "of the rounds", "required")
    return results.table(columns, rows)


def throughput(found: dict[str, list[dict[str, Any]]]) -> str:
    """Against the plain read, and where the CPU time goes."""
    size = found["plain_read"][0]["bytes"]
    plain = statistics.median(size / p["seconds"] for p in found["plain_read"]) / 1e6
    warm = found["our_warm"]
    wall = statistics.median(size / o["etl"]["wall"] for o in warm) / 1e6
    cpu = statistics.median(size / o["etl"]["cpu"] for o in warm) / 1e6
    stages = {
        stage: [o["stages"].get(stage, 0.0) / o["etl"]["cpu"] for o in warm]
        for stage in warm[0]["stages"]
    }
    stages["everything else"] = [1 - sum(o["stages"].values()) / o["etl"]["cpu"] for o in warm]
    parsing = statistics.median(stages[PARSE])
    speed = statistics.median(
        size / o["stages"][PARSE] / 1e6 for o in warm if o["stages"].get(PARSE)
    )
    rows = [(stage, f"{statistics.median(shares):.1%}") for stage, shares in stages.items()]
    return (
        f"{size / 1e6:,.0f} MB of CSV: the ETL takes {wall:,.0f} MB/s of wall time "
        f"({cpu:,.0f} MB a CPU second), a plain read of the same files, in the page cache, "
        f"{plain:,.0f} MB/s: {wall / plain:.1%}. Parsing numbers is {parsing:.0%} of the ETL's CPU "
        f"time, at {speed:,.0f} MB of the files a CPU second.\n\n"
        + results.table(("share of the ETL's CPU time", ""), rows)
    )


def remarks(found: dict[str, list[dict[str, Any]]]) -> str:
    check = found["our_warm"][-1]["compare"]
    opened, streamed = (
        statistics.median(o["opening"][name]["wall"] for o in found["our_warm"])
        for name in ("open_split", "open_shards")
    )
    return (
        f"Same work: {check['same']:,} of the original's {check['examples']:,} examples have the "
        f"same class and the same bytes of signal in our dataset. Test reads that are also in the "
        f"training set: {check['original_leaked']:,} of {check['original_test']:,} in the "
        f"original's, {check['our_leaked']:,} of {check['our_test']:,} in ours. Not in the "
        f"figures: building the arrays of device and host, once per dataset, took {opened:.2f} s, "
        f"opening the shards to stream them {streamed:.2f} s. Our batches are arrays on the device "
        f"({found['our_warm'][0]['device']}), class-balanced and in a new order every epoch; the "
        f"original reads its file from top to bottom every time."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--reads_per_class", type=int, default=10_000, help="reads of each class, all used")
    add("--rounds", type=int, default=5, help="rounds that count; one more comes first")
    add("--batch_size", type=int, default=1024, help="examples a batch")
    add("--target_length", type=int, default=500, help="samples of every signal")
    add("--dtype", default="float16", choices=("float16", "float32", "float64"), help="of storage")
    add("--seed", type=int, default=42, help="of our selection and order")
    original.add_options(parser)
    results.add_option(parser)
    given = parser.parse_args()
    if given.rounds < 1 or given.reads_per_class < given.batch_size:
        parser.error("needs a round, and as many reads_per_class as are in a batch")
    workdir, python = original.prepared(given)
    bench = Bench(
        workdir=workdir,
        python=python,
        reads_per_class=given.reads_per_class,
        settings={
            "target_length": str(given.target_length),
            "dtype": given.dtype,
            "examples_per_class": str(given.reads_per_class),
            "train_test_fraction": "0.95",
            "train_val_fraction": "0.8",
            "num_classes": str(CLASSES),
            "batch_size": str(given.batch_size),
        },
        seed=given.seed,
    )
    bench.simulate()
    found = measure(bench, given.rounds)
    theirs = found["original_warm"][0]["versions"]
    text = "\n\n".join(
        (
            f"{results.provenance(PACKAGES)} The original: {theirs}.",
            f"{CLASSES} classes of {given.reads_per_class:,} simulated reads, "
            f"{RUNS_PER_CLASS} files each, all used; target_length {given.target_length}, "
            f"{given.dtype}; batches of {given.batch_size}; {given.rounds} rounds.",
            comparison(found),
            "A whole process includes the start-up of interpreter and imports, and for ours alone "
            "the report, the run's records and Comet's offline archive. Without start-up: the ETL "
            "alone, in a process that has put a small input through it before.",
            throughput(found),
            remarks(found),
        )
    )
    results.publish(SECTION, text, trial=given.trial)


if __name__ == "__main__":
    main()
