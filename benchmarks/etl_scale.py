"""The ETL on inputs of several sizes: peak memory of all its processes, CPU seconds per GB.

    python benchmarks/etl_scale.py --gigabytes 0.5 5 --tiny_reads 20000000

Each size is made once (simulated signals under new read_ids) and put through the ETL twice: as many
reads of every class as the smallest has, then with split_params.keep_all. Prints a table and writes
it to RESULTS.md. A GB is 1e9 bytes of CSV. CPU seconds per GB are those beyond what the ETL takes
on a small input, per GB beyond that: what grows."""

import argparse
import json
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import inputs
import processes
import results
from scale_input import (
    GIGABYTE,
    RUNS_PER_CLASS,
    SHARES,
    TINY_SAMPLES,
    TINY_TARGET_LENGTH,
    Input,
    make_input,
    seed_signals,
)

HERE = Path(__file__).parent
SECTION = "ETL at scale"
BASE_GIGABYTES = 0.02  # the small input: large enough that every part of the ETL has work
REPEATS, REPEAT_BELOW_BYTES = 3, 2e9  # inputs below that are put through so often: their noise
MEMORY_BOUND = 2 << 30  # bytes of PSS
CPU_TOLERANCE = 0.15
PACKAGES = ("numpy", "numba")


@dataclass(frozen=True)
class Outcome:
    """One run of the ETL."""

    title: str
    source: Input
    examples: int
    used: processes.Usage
    memory: processes.MemoryWatch
    disk_peak: int  # bytes in output_dir while it ran
    disk_end: int

    def cpu_per_gigabyte(self, base: "Outcome") -> float:
        """CPU seconds beyond those of `base`, per GB beyond it."""
        return (self.used.cpu - base.used.cpu) / ((self.source.size - base.source.size) / GIGABYTE)


def repeated(workdir: Path, source: Input, *, keep_all: bool, cores: int | None) -> Outcome:
    """The run whose CPU seconds are the median, with the memory of the worst."""
    times = REPEATS if source.size < REPEAT_BELOW_BYTES else 1
    runs = [run_etl(workdir, source, keep_all=keep_all, cores=cores) for _ in range(times)]
    runs.sort(key=lambda one: one.used.cpu)
    worst = max(runs, key=lambda one: one.memory.peak)
    return replace(runs[times // 2], memory=worst.memory)


def run_etl(workdir: Path, source: Input, *, keep_all: bool, cores: int | None) -> Outcome:
    """`capfinder train-model --stage etl` on `source`; what it wrote is deleted."""
    output = workdir / "scale_output"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    config = {
        "etl_params": {
            "caps_data_dir": os.fspath(source.directory),
            "examples_per_class": None,
            "use_remote_dataset_version": "",
        },
        "shared_params": {
            "num_classes": len(SHARES),
            "target_length": source.target_length,
            "output_dir": os.fspath(output),
        },
        "split_params": {"keep_all": keep_all},
        "tracking_params": {"mode": "off"},
    }
    config_file = workdir / "scale_config.json"
    config_file.write_text(json.dumps(config), "utf-8")
    arguments = ["train-model", "--config_file", config_file, "--stage", "etl"]
    command: list[Any] = [sys.executable, HERE / "with_cores.py", str(cores), *arguments]
    if cores is None:
        command = [*inputs.CAPFINDER, *arguments]
    memory, disk = processes.MemoryWatch(), processes.DiskWatch(output)

    def watch(session: int) -> None:
        memory(session)
        disk(session)

    title = f"{source.name}{', keep_all' if keep_all else ''}"
    print(f"{title}: {source.size / GIGABYTE:.2f} GB, {source.reads:,} reads ...", flush=True)
    log = workdir / f"scale_{source.name}.log"
    used = processes.run(command, log_path=log, env=processes.environment(), watch=watch)
    (path,) = (output / "dataset" / "cap_data").glob("*/manifest.json")
    counts = json.loads(path.read_text("utf-8"))["counts"]
    examples = sum(sum(count.values()) for count in counts.values())
    disk_end = processes.directory_bytes(output)
    shutil.rmtree(output)
    return Outcome(title, source, examples, used, memory, disk.peak, disk_end)


def table(outcomes: list[Outcome], base: Outcome) -> str:
    columns = ["input", "GB", "reads", "in dataset", "wall s", "MB/s", "CPU s", "CPU s/GB"]
    columns += ["peak PSS MiB", "anonymous MiB", "disk peak GB", "disk end GB"]
    lines = [
        (
            one.title,
            f"{one.source.size / GIGABYTE:.2f}",
            f"{one.source.reads:,}",
            f"{one.examples:,}",
            f"{one.used.wall:.1f}",
            f"{one.source.size / one.used.wall / 1e6:.0f}",
            f"{one.used.cpu:.1f}",
            f"{one.cpu_per_gigabyte(base):.2f}",
            f"{one.memory.peak / processes.MIB:,.0f}",
            f"{one.memory.peak_anonymous / processes.MIB:,.0f}",
            f"{one.disk_peak / GIGABYTE:.2f}",
            f"{one.disk_end / GIGABYTE:.2f}",
        )
        for one in outcomes
    ]
    return results.table(columns, lines)


def verdicts(outcomes: list[Outcome], base: Outcome) -> list[str]:
    """What was required, and whether it holds."""
    peak = max(outcomes, key=lambda one: one.memory.peak)
    holds = "holds" if peak.memory.peak < MEMORY_BOUND else "DOES NOT HOLD"
    found = [
        f"Peak PSS below {MEMORY_BOUND / processes.MIB:,.0f} MiB at every size: {holds} (highest "
        f"{peak.memory.peak / processes.MIB:,.0f}, {peak.title})."
    ]
    sized = [one for one in outcomes if one.source.target_length != TINY_TARGET_LENGTH]
    for keep_all in (False, True):
        same = [one for one in sized if one.title.endswith("keep_all") == keep_all]
        if len(same) < 2:
            continue
        small, large = (choose(same, key=lambda one: one.source.size) for choose in (min, max))
        ratio = large.cpu_per_gigabyte(base) / small.cpu_per_gigabyte(base)
        holds = "holds" if abs(ratio - 1) <= CPU_TOLERANCE else "DOES NOT HOLD"
        found.append(
            f"CPU seconds per GB within {CPU_TOLERANCE:.0%} of each other: {holds} ({large.title} "
            f"to {small.title}: {ratio:.3f})."
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--gigabytes", type=float, nargs="*", default=[0.5, 5.0], help="sizes of CSV")
    add("--tiny_reads", type=int, default=0, help=f"also this many reads of {TINY_SAMPLES} samples")
    add("--cores", type=int, help="let the ETL believe in so many cores (default: the machine's)")
    add("--no_keep_all", action="store_true", help="leave out the runs with keep_all")
    add("--keep", action="store_true", help="keep the CSV files for the next time")
    add("--workdir", type=Path, default=Path.home() / ".cache" / "capfinder-benchmarks")
    results.add_option(parser)
    given = parser.parse_args()
    workdir = given.workdir.absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    signals = seed_signals(workdir)
    wanted = [(f"{size:g}GB", size, 0) for size in given.gigabytes]
    if given.tiny_reads:
        wanted.append((f"tiny{given.tiny_reads}", 0.0, given.tiny_reads))
    small = make_input(workdir, "base", signals, gigabytes=BASE_GIGABYTES, reads=0)
    base = repeated(workdir, small, keep_all=False, cores=given.cores)
    outcomes = []
    for name, gigabytes, reads in wanted:
        source = make_input(workdir, name, signals, gigabytes=gigabytes, reads=reads)
        for keep_all in (False,) if given.no_keep_all else (False, True):
            outcomes.append(repeated(workdir, source, keep_all=keep_all, cores=given.cores))
        if not given.keep:
            shutil.rmtree(source.directory)
            (workdir / f"scale_{name}.json").unlink()
    cores = f" The ETL was told of {given.cores} cores." if given.cores else ""
    text = "\n\n".join(
        (
            results.provenance(PACKAGES) + cores,
            f"{len(SHARES)} classes, {RUNS_PER_CLASS} files each; tiny reads have {TINY_SAMPLES} "
            f"samples. CPU s are of whole processes. CPU s/GB leave out the {base.used.cpu:.1f} "
            f"CPU s of the ETL's first {small.size / 1e6:.0f} MB, which are mostly start-up. Of "
            f"inputs below {REPEAT_BELOW_BYTES / GIGABYTE:g} GB: the median of {REPEATS} runs, and "
            "the highest memory.",
            table(outcomes, base),
            "\n".join(f"- {line}" for line in verdicts(outcomes, base)),
        )
    )
    title = SECTION + (f", {given.cores} cores" if given.cores else "")
    results.publish(title, text, trial=given.trial)


if __name__ == "__main__":
    main()
