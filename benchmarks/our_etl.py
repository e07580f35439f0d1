"""Our ETL and batches, timed within one process whose imports are done (etl.py runs this)."""

import argparse
import contextlib
import csv
import functools
import importlib
import inspect
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clock import since, usage

from capfinder import cli, files
from capfinder.data import cache, loader

# What the ETL spends its time in. CPU seconds of the thread that calls each function are counted,
# as the compiled kernels run on it.
STAGES = {
    "read the files, hash them": "capfinder.etl.csv_files:read_blocks",
    "find rows, check and hash them": "capfinder.etl.csv_reader:scan_block",
    "hash the read_ids": "capfinder.etl.hashing:keyed_hash",
    "choose reads, splits and places": "capfinder.etl.plan:make_plan",
    "read the chosen rows": "capfinder.etl.csv_files:read_ranges",
    "parse the numbers": "capfinder.etl.csv_reader:parse_signals",
    "put shards in order": "capfinder.etl.shuffle:write_shard",
    "write shards, hash them": "capfinder.data.records:write_shard",
    "read shards back to check them": "capfinder.data.records:read_shard_blocks",
}
# Where the signals may lie, and what opens them there.
RESIDENCIES = {"device": "open_split", "host": "open_split", "stream": "open_shards"}
_END = object()
MIN_SECONDS = 1.0  # of reading batches: short epochs are repeated


class Clock:
    """CPU seconds per stage, of all threads; a stage within a stage is counted once, for itself."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()
        self._thread = threading.local()

    @contextlib.contextmanager
    def _counting(self, stage: str) -> Iterator[None]:
        outer = getattr(self._thread, "inner_seconds", 0.0)
        self._thread.inner_seconds = 0.0
        started = time.thread_time()
        try:
            yield
        finally:
            seconds = time.thread_time() - started
            with self._lock:
                self.seconds[stage] += seconds - self._thread.inner_seconds
            self._thread.inner_seconds = outer + seconds

    def wrap(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def plain(*arguments: Any, **named: Any) -> Any:
            with self._counting(stage):
                return function(*arguments, **named)

        @functools.wraps(function)
        def generator(*arguments: Any, **named: Any) -> Iterator[Any]:
            items = function(*arguments, **named)
            while True:
                with self._counting(stage):
                    item = next(items, _END)
                if item is _END:
                    return
                yield item

        return generator if inspect.isgeneratorfunction(function) else plain

    def install(self) -> None:
        """Puts the wrapped functions in place of the plain ones."""
        for stage, place in STAGES.items():
            try:
                function = find(place)
            except (ImportError, AttributeError):
                print(f"{place}: not found; correct STAGES in {__file__}", file=sys.stderr)
                continue
            self.seconds[stage] = 0.0  # shown even if never called, as that is worth a look
            replace(function, self.wrap(stage, function))


def find(place: str) -> Callable[..., Any]:
    """The function of "module:name"."""
    module_name, name = place.split(":")
    return getattr(importlib.import_module(module_name), name)


def replace(function: Callable[..., Any], wrapped: Callable[..., Any]) -> None:
    """Puts `wrapped` in place of `function`, wherever it was imported."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("capfinder"):
            for attribute, value in list(vars(module).items()):
                if value is function:
                    setattr(module, attribute, wrapped)


def time_stage(found: dict[str, float]) -> None:
    """From now on the ETL stage says in `found` what it took: what lies round it in the command,
    such as the summary and Comet's archive, isn't counted, nor is it for the original."""
    run = find("capfinder.stages.etl:run")

    def timed(*arguments: Any, **named: Any) -> Any:
        before = usage()
        result = run(*arguments, **named)
        found.update(since(before))
        return result

    replace(run, timed)


def make_dataset(options: list[str], caps_data_dir: Path, output_dir: Path) -> Path:
    """`capfinder make-train-dataset` in this process; returns the version's directory."""
    command = ["make-train-dataset", "-c", str(caps_data_dir), "-o", str(output_dir), *options]
    if exit_code := cli.main(command):
        raise SystemExit(exit_code)
    (version,) = (output_dir / "dataset" / "cap_data").glob("*.*.*")
    return version


def read_batches(split: Any, *, residency: Any, batch_size: int, seed: int) -> dict[str, float]:
    """Epochs of shuffled, class-balanced batches, after one that warms up; every batch is waited
    for, as by a training step that does nothing."""
    batches = loader.TrainBatches(
        split, batch_size=batch_size, seed=seed, augment=False, residency=residency
    )
    examples, epoch = 0, 0
    for batch in batches.epoch(epoch):
        jax.block_until_ready(batch)
    before = usage()
    while time.perf_counter() - before[0] < MIN_SECONDS:
        epoch += 1
        for batch in batches.epoch(epoch):
            jax.block_until_ready(batch)
            examples += len(batch["cap_class"])
    return since(before) | {"examples": examples}


def compare(version: Path, original: Path) -> dict[str, int]:
    """How many of the original's examples have, under the same read_id, the same class and the
    same bytes of signal in our dataset; and how many test reads of each are in its training set."""
    ours: dict[bytes, tuple[int, bytes]] = {}
    ids: dict[str, set[bytes]] = {}
    for name in ("train", "validation", "test"):
        split = cache.open_split(version, name)
        ids[name] = set(split.read_id.tolist())
        dtype = split.signal.dtype
        for row, read_id in enumerate(split.read_id.tolist()):
            ours[read_id] = int(split.cap_class[row]), split.signal[row].tobytes()
    found = same = 0
    theirs: dict[str, set[bytes]] = {"train": set(), "test": set()}
    for name in theirs:
        paths = [original / f"{name}_{part}.csv" for part in ("read_id", "y", "x")]
        streams = [path.open(newline="") for path in paths]
        for (read_id,), (label,), signal in list(zip(*map(csv.reader, streams), strict=True))[1:]:
            theirs[name].add(read_id.encode())
            found += 1
            expected = int(label), np.array(signal, np.float64).astype(dtype).tobytes()
            same += ours.get(read_id.encode()) == expected
        for stream in streams:
            stream.close()
    return {
        "examples": found,
        "same": same,
        "original_test": len(theirs["test"]),
        "original_leaked": len(theirs["test"] & theirs["train"]),
        "our_test": len(ids["test"]),
        "our_leaked": len(ids["test"] & (ids["train"] | ids["validation"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("caps_data_dir", "warm_up_dir", "output_dir", "result"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True, help="of the batches' order")
    parser.add_argument("--compare", type=Path, help="a dataset that original_etl.py wrote")
    given, options = parser.parse_known_args()
    options += ["--seed", str(given.seed)]
    make_dataset(options, given.warm_up_dir, given.output_dir / "warm_up")
    clock, stage = Clock(), dict[str, float]()
    clock.install()
    time_stage(stage)
    version = make_dataset(options, given.caps_data_dir, given.output_dir / "run")
    result: dict[str, Any] = {"etl": stage, "stages": dict(clock.seconds)}
    manifest = files.read_json(version / "manifest.json")
    result["examples"] = sum(sum(count.values()) for count in manifest["counts"].values())
    result["opening"], result["batches"] = {}, {}
    splits: dict[str, Any] = {}
    for residency, opened in RESIDENCIES.items():
        if opened not in splits:
            before = usage()
            splits[opened] = getattr(cache, opened)(version, "train")
            result["opening"][opened] = since(before)
        result["batches"][residency] = read_batches(
            splits[opened], residency=residency, batch_size=given.batch_size, seed=given.seed
        )
    result["device"] = jax.devices()[0].device_kind
    if given.compare is not None:
        result["compare"] = compare(version, given.compare)
    files.write_json(given.result, result)


if __name__ == "__main__":
    main()
