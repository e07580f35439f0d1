"""Small cap-signal CSV files for tests."""

import uuid
from pathlib import Path

import numpy as np

HEADER = "read_id,cap_class,timeseries"


def read_id(*numbers: int) -> str:
    return str(uuid.UUID(int=int(np.random.default_rng(numbers).integers(2**62)) << 64))


def row(name: str, cap_class: object, signal: object) -> str:
    text = signal if isinstance(signal, str) else ",".join(f"{value:.8f}" for value in signal)
    return f'{name},{cap_class},"{text}"'


def rows(cap_class: int, run: int, count: int, *, low: int = 5, high: int = 40) -> list[str]:
    """`count` rows with signals of low..high samples, fixed by class and run."""
    rng = np.random.default_rng([cap_class, run])
    signals = [rng.normal(size=rng.integers(low, high + 1)) for _ in range(count)]
    return [
        row(read_id(cap_class, run, number), cap_class, signal)
        for number, signal in enumerate(signals)
    ]


def write(path: Path, lines: list[str], *, end: str = "\r\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in [HEADER, *lines]).encode())
    return path


def write_classes(directory: Path, *, classes: int = 2, runs: int = 2, reads: int = 20) -> Path:
    """`runs` files of `reads` rows for each class."""
    for cap_class in range(classes):
        for run in range(runs):
            name = f"data__cap_{cap_class}_run{run}.csv"
            write(directory / name, rows(cap_class, run, reads))
    return directory
