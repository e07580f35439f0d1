"""The reads whose caps Capfinder 0.4.3 and ours name: CSV files as 0.4.3 extracts them."""

import csv
from pathlib import Path

import numpy as np

from capfinder import simulate

HEADER = "read_id,cap_class,timeseries\n"
UNKNOWN_CAP = -99  # the class in the CSV files that 0.4.3 makes for prediction
CLASSES, TEST_READS = 4, 120  # reads of a class
EFFECT, TEST_SEED = 4.0, 22
FACTORS = (0.6, 1.5)  # of a test signal's length: some are longer than 500 samples


def write_test_caps(path: Path) -> None:
    """One file as 0.4.3 extracts it, its signals stretched to lengths round 500 samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(TEST_SEED)
    with path.open("w") as stream:
        stream.write(HEADER)
        for cap_class in range(CLASSES):
            reads = simulate.simulate_reads(
                cap_class=cap_class, run=1, chunk=0, effect=EFFECT, seed=TEST_SEED
            )
            chosen = zip(reads.read_ids[:TEST_READS], reads.signals[:TEST_READS], strict=True)
            for read_id, signal in chosen:
                samples = round(signal.size * float(rng.uniform(*FACTORS)))
                at = np.linspace(0, signal.size - 1, samples)
                values = np.interp(at, np.arange(signal.size), signal)
                numbers = ",".join(f"{value:.8f}" for value in values)
                stream.write(f'{read_id},{UNKNOWN_CAP},"{numbers}"\n')


def write_rounded(caps: Path, path: Path) -> None:
    """The same reads with the float16 nearest to each number, in all its digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with caps.open(newline="") as before, path.open("w") as stream:
        stream.write(HEADER)
        for row in csv.DictReader(before):
            values = np.array(row["timeseries"].split(","), np.float32).astype(np.float16)
            numbers = ",".join(f"{float(value):.25f}" for value in values)
            stream.write(f'{row["read_id"]},{row["cap_class"]},"{numbers}"\n')
