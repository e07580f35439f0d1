"""Large inputs made fast: simulated signals, again and again under new read_ids."""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import inputs
import numpy as np

SHARES = (0.30, 0.25, 0.25, 0.20)  # of the reads, per class: unequal, so that keep_all matters
RUNS_PER_CLASS = 3
SEED_READS = 500  # simulated per class; their signals are repeated
CHUNK_ROWS = 2_000
TARGET_LENGTH = 500
TINY_SAMPLES = 10
TINY_TARGET_LENGTH = 16  # the least that is allowed: a dataset of 20 million reads stays small
GIGABYTE = 1e9
HEADER = b"read_id,cap_class,timeseries\r\n"


@dataclass(frozen=True)
class Input:
    """A directory of CSV files, with what is in it."""

    name: str
    directory: Path
    reads: int
    size: int  # bytes
    target_length: int


def seed_signals(workdir: Path) -> list[list[bytes]]:
    """Per class the texts of simulated signals, quotes included, line end too."""
    directory = workdir / "scale_seed"
    inputs.simulate(directory, reads_per_class=SEED_READS, num_classes=len(SHARES))
    found: list[list[bytes]] = [[] for _ in SHARES]
    for path in sorted(directory.glob("data__*.csv")):
        for row in path.read_bytes().splitlines(keepends=True)[1:]:
            _read_id, label, signal = row.split(b",", 2)
            found[int(label)].append(signal)
    return found


def cut(signal: bytes, samples: int) -> bytes:
    """The first `samples` numbers of a signal's text."""
    return b",".join(signal.split(b",")[:samples]) + b'"\r\n'


def rows(signals: list[bytes], cap_class: int, rng: np.random.Generator) -> Iterator[list[bytes]]:
    """Chunks of rows without end; every read_id is new, of a UUID's form."""
    middle = b",%d," % cap_class
    while True:
        text = rng.bytes(16 * CHUNK_ROWS).hex().encode()
        chosen = rng.integers(0, len(signals), CHUNK_ROWS).tolist()
        yield [
            b"%b-%b-%b-%b-%b%b%b"
            % (h[:8], h[8:12], h[12:16], h[16:20], h[20:], middle, signals[which])
            for which, h in zip(
                chosen, (text[at : at + 32] for at in range(0, len(text), 32)), strict=True
            )
        ]


def write_file(
    path: Path, signals: list[bytes], cap_class: int, *, reads: int, max_bytes: float, seed: int
) -> int:
    """Writes rows until there are `reads` of them or the next one would go beyond `max_bytes`;
    returns how many there are."""
    rng, written, size = np.random.default_rng([seed, cap_class]), 0, len(HEADER)
    with path.open("wb") as stream:
        stream.write(HEADER)
        for chunk in rows(signals, cap_class, rng):
            chunk = chunk[: reads - written]
            ends = size + np.cumsum([len(row) for row in chunk])
            fitting = int(np.searchsorted(ends, max_bytes, side="right"))
            stream.writelines(chunk[:fitting])
            written += fitting
            if written == reads or fitting < len(chunk):
                break
            size = int(ends[-1])
    return written


def make_input(
    workdir: Path, name: str, signals: list[list[bytes]], *, gigabytes: float, reads: int
) -> Input:
    """An input of `gigabytes`, or of `reads` rows of TINY_SAMPLES when that isn't 0; one that was
    made before is used again."""
    directory, facts = workdir / f"scale_{name}", workdir / f"scale_{name}.json"
    if reads:
        signals = [[cut(signal, TINY_SAMPLES) for signal in of_class] for of_class in signals]
    target_length = TINY_TARGET_LENGTH if reads else TARGET_LENGTH
    if not facts.exists():
        print(f"Making {directory.name} ...", flush=True)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        total = 0
        for cap_class, share in enumerate(SHARES):
            for run in range(RUNS_PER_CLASS):
                total += write_file(
                    directory / f"data__class{cap_class}_run{run + 1}.csv",
                    signals[cap_class],
                    cap_class,
                    reads=round(reads * share / RUNS_PER_CLASS) if reads else sys.maxsize,
                    max_bytes=float("inf")
                    if reads
                    else gigabytes * GIGABYTE * share / RUNS_PER_CLASS,
                    seed=run,
                )
        facts.write_text(json.dumps({"reads": total}), "utf-8")
    size = sum(path.stat().st_size for path in directory.glob("*.csv"))
    return Input(
        name, directory, json.loads(facts.read_text("utf-8"))["reads"], size, target_length
    )
