"""Simulated cap signals for demonstrations, tests and benchmarks: no real read is in them.

One read is drawn base by base: a k-mer level, a dwell, noise, drift, gain and offset; the whole
read is z-scored, and the region round the cap is cut out, as Capfinder cuts it from a real read.
What a cap does to the current is assumed, not measured: simulated_readme.txt lists it all."""

import functools
import math
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from capfinder.errors import InputError, SettingsError
from capfinder.files import atomic_path, remove_partial, write_text
from capfinder.log import Bar, logger, progress

# Measured with 4 x 2,000 reads: a small convolutional LSTM network gets about 90 % of held-out
# reads right at an effect of 1.8 and 95 % at 2.3, the nearest mean signal 48 and 53 %.
DEFAULT_EFFECT = 2.2
MAX_CLASSES = 32
CHUNK_READS = 500  # drawn together, so memory is bounded whatever the file's size

FLANK_BASES, MARGIN_BASES = 5, 6  # the margin is what the jitter of the cut can reach into
# The same in every read, 5' to 3': the adapter right up to N1, the transcript from N2 on.
ADAPTER_MARGIN, ADAPTER_FLANK = "GATCCT", "GCAGA"
TRANSCRIPT_FLANK, TRANSCRIPT_MARGIN = "AGTCG", "ATACTG"
REGION_BASES = 2 * FLANK_BASES + 1
END_BASES = REGION_BASES + 2 * MARGIN_BASES
N1 = MARGIN_BASES + FLANK_BASES  # index of the first transcribed base, counted from the 5' end

LEVEL_SD = 0.22  # 5-mer levels: spread within a k-mer (0.18) and what the outer 4 bases add (0.12)
DWELL_SHAPE, DWELL_MEAN_SAMPLES, DWELL_MIN_SAMPLES = 1.8, 21.0, 2
NOISE_SD = 0.30
DRIFT_SD, DRIFT_PERIOD_SAMPLES = 0.15, (2_000.0, 8_000.0)
GAIN, GAIN_SD, RUN_GAIN_SD = 1.26, 0.05, 0.04
OFFSET, OFFSET_SD, RUN_OFFSET_SD = 0.20, 0.08, 0.06
JITTER_SAMPLES = 10
CLIP = 4.0
READ_BASES, READ_BASES_LOG_SD, READ_BASES_RANGE = 500.0, 0.35, (150, 2_000)
SHARED_PARENT_FRACTION = 0.2

# 2'-O-methylation of base b: what is added to the levels of b-1, b, b+1 per unit of effect, and
# the factor (less 1) on the dwell of b-1 and b.
SHIFTS = {-1: -0.35, 0: -0.8, 1: 0.3}
STRETCHES = {-1: 0.4, 0: 0.8}
KNOWN_CAPS = {0: ("cap_0", ()), 1: ("cap_1", (1,)), 2: ("cap_2", (1, 2)), 3: ("cap_2-1", (2,))}


@dataclass(frozen=True)
class Reads:
    """What one chunk of a run holds; row i of each list is read i."""

    read_ids: list[str]
    parent_read_ids: list[str]
    signals: list[np.ndarray]  # each (length,) float64, z-scored, 3' to 5'
    sequences: list[str]  # whole read, 5' to 3'


def cap_name(cap_class: int) -> str:
    return KNOWN_CAPS[cap_class][0] if cap_class in KNOWN_CAPS else f"cap_{cap_class}"


def methylated_positions(cap_class: int) -> tuple[int, ...]:
    """Which of N1..N5 carry a 2'-O-methyl group, e.g. (1, 2) for cap_2."""
    if cap_class in KNOWN_CAPS:
        return KNOWN_CAPS[cap_class][1]
    return tuple(bit + 1 for bit in range(5) if cap_class >> bit & 1)


@functools.cache
def _kmer_levels() -> np.ndarray:
    """(1024,) float64: level of each 5-mer, numbered in base 4 with A, C, G, T = 0, 1, 2, 3."""
    path = Path(__file__).with_name("kmer_levels_rna004.csv")
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
    return np.array([float(line.split(",")[1]) for line in lines[1:]])


def cap_effect(cap_class: int, effect: float) -> tuple[np.ndarray, np.ndarray]:
    """What is added to the levels, and what multiplies the dwells, of a read's last bases:
    two arrays (END_BASES,), 5' to 3'."""
    shift, stretch = np.zeros(END_BASES), np.ones(END_BASES)
    for position in methylated_positions(cap_class):
        base = N1 + position - 1
        for step, amount in SHIFTS.items():
            shift[base + step] += amount * effect
        for step, amount in STRETCHES.items():
            stretch[base + step] *= 1 + amount * effect
    return shift, stretch


def _numbers(sequence: str) -> list[int]:
    return ["ACGT".index(letter) for letter in sequence]


def _molecules(rng: np.random.Generator, reads: int) -> tuple[np.ndarray, np.ndarray]:
    """For each read the number of its molecule, and whether it is that molecule's only read."""
    starts = rng.random(reads) >= SHARED_PARENT_FRACTION
    starts[0] = True
    molecule = np.cumsum(starts) - 1
    return molecule, np.bincount(molecule)[molecule] == 1


def _read_names(rng: np.random.Generator, count: int) -> list[str]:
    raw = rng.bytes(16 * count)
    return [str(uuid.UUID(bytes=raw[i : i + 16], version=4)) for i in range(0, 16 * count, 16)]


def simulate_reads(*, cap_class: int, run: int, chunk: int, effect: float, seed: int) -> Reads:
    """CHUNK_READS reads: the same for the same arguments, whatever else is simulated."""
    run_rng = np.random.default_rng([seed, cap_class, run])
    run_gain, run_offset = run_rng.normal([GAIN, OFFSET], [RUN_GAIN_SD, RUN_OFFSET_SD])
    rng = np.random.default_rng([seed, cap_class, run, chunk])
    n = CHUNK_READS

    # All reads of the chunk lie one after the other in flat arrays, bases 5' to 3'.
    lengths = READ_BASES * np.exp(rng.normal(0, READ_BASES_LOG_SD, n))
    lengths = np.clip(lengths, *READ_BASES_RANGE).astype(np.int64)
    first: np.ndarray = np.cumsum(lengths) - lengths  # index of each read's 5' base
    end = first[:, None] + np.arange(END_BASES)  # (n, END_BASES) the bases at each read's 5' end
    bases = rng.integers(0, 4, int(lengths.sum()))
    bases[end[:, :N1]] = _numbers(ADAPTER_MARGIN + ADAPTER_FLANK)
    bases[end[:, N1 + 1 :]] = _numbers(TRANSCRIPT_FLANK + TRANSCRIPT_MARGIN)

    # The outermost two bases of a read borrow their neighbours from the next one: as random as any.
    kmer = sum(np.roll(bases, shift) * 4 ** (2 + shift) for shift in range(-2, 3))
    levels = _kmer_levels()[kmer] + rng.normal(0, LEVEL_SD, bases.size)
    dwells: np.ndarray = rng.gamma(DWELL_SHAPE, DWELL_MEAN_SAMPLES / DWELL_SHAPE, bases.size)

    shift, stretch = cap_effect(cap_class, effect)
    molecule, alone = _molecules(rng, n)
    gain = rng.normal(run_gain, GAIN_SD, n)[molecule]
    offset = rng.normal(run_offset, OFFSET_SD, n)[molecule]
    levels[end] = gain[:, None] * (levels[end] + shift) + offset[:, None]
    dwells[end] *= stretch
    dwells = np.maximum(np.rint(dwells), DWELL_MIN_SAMPLES).astype(np.int64)

    # Only the end's samples are drawn: of the rest the z-score needs the mean and the variance.
    amplitude = np.abs(rng.normal(0, DRIFT_SD, n))
    samples = np.add.reduceat(dwells, first)
    mean = np.add.reduceat(dwells * levels, first) / samples
    variance = np.add.reduceat(dwells * levels**2, first) / samples - mean**2
    variance += NOISE_SD**2 + amplitude**2 / 2

    end_dwells = dwells[end][:, ::-1]  # from here on in time order, 3' to 5'
    end_samples = end_dwells.sum(axis=1)
    row = np.repeat(np.arange(n), end_samples)
    start = np.cumsum(end_samples) - end_samples
    time = np.arange(row.size) - start[row]
    signal = np.repeat(levels[end][:, ::-1].ravel(), end_dwells.ravel())
    signal += gain[row] * rng.normal(0, NOISE_SD, row.size)
    pace = 2 * np.pi / rng.uniform(*DRIFT_PERIOD_SAMPLES, n)
    phase = rng.uniform(0, 2 * np.pi, n)
    signal += amplitude[row] * np.sin(phase[row] + pace[row] * time)
    signal = np.clip((signal - mean[row]) / np.sqrt(variance[row]), -CLIP, CLIP)

    cut = rng.integers(-JITTER_SAMPLES, JITTER_SAMPLES, (2, n), endpoint=True)
    cut[0] += start + end_dwells[:, :MARGIN_BASES].sum(axis=1)
    cut[1] += start + end_samples - end_dwells[:, -MARGIN_BASES:].sum(axis=1)

    read_ids, molecule_ids = _read_names(rng, n), _read_names(rng, n)
    letters = np.frombuffer(b"ACGT", np.uint8)[bases].tobytes().decode("ascii")
    return Reads(
        read_ids=read_ids,
        parent_read_ids=[read_ids[i] if alone[i] else molecule_ids[molecule[i]] for i in range(n)],
        signals=[signal[a:b] for a, b in cut.T],
        sequences=[letters[a : a + length] for a, length in zip(first, lengths, strict=True)],
    )


@dataclass(frozen=True)
class _Run:
    """One pair of files: a run's cap signals and their metadata."""

    cap_class: int
    number: int  # from 1
    reads: int

    @property
    def stem(self) -> str:
        return f"{cap_name(self.cap_class)}_run{self.number}.csv"

    def paths(self, directory: Path) -> tuple[Path, Path]:
        return directory / f"data__{self.stem}", directory / f"metadata__{self.stem}"


def _rows(run: _Run, *, effect: float, seed: int) -> Iterator[tuple[list[str], list[str]]]:
    """The lines of the run's two files, header aside, chunk by chunk."""
    pod5_file = f"simulated_{run.stem.removesuffix('.csv')}.pod5"
    region = slice(MARGIN_BASES, MARGIN_BASES + REGION_BASES)
    for chunk in range(math.ceil(run.reads / CHUNK_READS)):
        reads = simulate_reads(
            cap_class=run.cap_class, run=run.number, chunk=chunk, effect=effect, seed=seed
        )
        data, metadata = [], []
        for i in range(min(CHUNK_READS, run.reads - chunk * CHUNK_READS)):
            signal, sequence = reads.signals[i], reads.sequences[i]
            numbers = ",".join(["%.8f"] * signal.size) % tuple(signal.tolist())
            data.append(f'{reads.read_ids[i]},{run.cap_class},"{numbers}"\r\n')
            metadata.append(
                f"{reads.read_ids[i]},{reads.parent_read_ids[i]},{pod5_file},good_read,"
                f"{sequence[region]},{region.start},{region.stop},{len(sequence)},{sequence}\r\n"
            )
        yield data, metadata


def _write(run: _Run, directory: Path, *, effect: float, seed: int, bar: Bar) -> None:
    """Both files or, if stopped, neither: the data file, which readers look for, comes last."""
    data, metadata = run.paths(directory)
    with (
        atomic_path(data) as data_partial,
        atomic_path(metadata) as metadata_partial,
        data_partial.open("w", newline="", encoding="ascii") as data_stream,
        metadata_partial.open("w", newline="", encoding="ascii") as metadata_stream,
    ):
        data_stream.write("read_id,cap_class,timeseries\r\n")
        metadata_stream.write(
            "read_id,parent_read_id,pod5_file,read_type,roi_fasta,roi_start,roi_end,"
            "fasta_length,fasta\r\n"
        )
        for data_rows, metadata_rows in _rows(run, effect=effect, seed=seed):
            data_stream.writelines(data_rows)
            metadata_stream.writelines(metadata_rows)
            bar.advance(len(data_rows))


def _planned_runs(reads_per_class: int, num_classes: int, runs_per_class: int) -> list[_Run]:
    """A class's reads are shared evenly over its runs; the first runs get what is left over."""
    each, left = divmod(reads_per_class, runs_per_class)
    return [
        _Run(cap_class, number, each + (number <= left))
        for cap_class in range(num_classes)
        for number in range(1, runs_per_class + 1)
    ]


def _readme(settings: str, runs: Sequence[_Run]) -> str:
    classes = [f"  {run.cap_class}  {cap_name(run.cap_class)}" for run in runs if run.number == 1]
    template = Path(__file__).with_name("simulated_readme.txt").read_text("utf-8")
    constants = {name: value for name, value in globals().items() if name.isupper()}
    return template.format(settings=settings, classes="\n".join(classes), **constants)


def _check(
    reads_per_class: int, num_classes: int, runs_per_class: int, effect: float, seed: int
) -> None:
    if not 1 <= num_classes <= MAX_CLASSES:
        raise SettingsError(f"--num_classes is {num_classes}; allowed are 1 to {MAX_CLASSES}")
    if runs_per_class < 1:
        raise SettingsError(f"--runs_per_class is {runs_per_class}; it must be 1 or more")
    if reads_per_class < runs_per_class:
        raise SettingsError(
            f"--reads_per_class is {reads_per_class}; it must be at least --runs_per_class "
            f"({runs_per_class}), one read a run"
        )
    if not (math.isfinite(effect) and 0 <= effect <= 5):
        raise SettingsError(f"--effect is {effect}; allowed are 0 (no difference) to 5")
    if seed < 0:
        raise SettingsError(f"--seed is {seed}; it must be 0 or more")


def _check_directory(directory: Path, readme: str, runs: Sequence[_Run]) -> None:
    """The directory is new or empty of CSV files, or holds (part of) this very simulation."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: not a directory; choose another --output_dir")
    ours = {path for run in runs for path in run.paths(directory)}
    there = {path for end in ("*.csv", "*.csv.gz") for path in directory.glob(end)}
    there = {path for path in there if not path.name.startswith(".")}
    found = directory / "README.txt"
    text = found.read_text("utf-8", errors="replace") if found.is_file() else ""
    if text and not text.startswith(readme.splitlines()[0]):
        raise InputError(f"{found}: not this command's file; choose another --output_dir")
    strange = sorted(there - ours if text == readme else there)
    if strange:
        raise InputError(
            f"{directory}: already holds {strange[0].name}"
            f"{f' and {len(strange) - 1} more CSV files' if len(strange) > 1 else ''} that "
            "this simulation did not make; remove them or choose another --output_dir"
        )


def run(
    *,
    output_dir: Path,
    reads_per_class: int,
    num_classes: int,
    runs_per_class: int,
    effect: float,
    seed: int,
) -> list[Path]:
    """Writes data__<cap>_run<n>.csv, its metadata__ twin and README.txt; returns the data files.

    Files that the same simulation left there are kept, so a stopped one goes on.

    Raises: SettingsError for a bad argument; InputError when the directory can't be used."""
    _check(reads_per_class, num_classes, runs_per_class, effect, seed)
    runs = _planned_runs(reads_per_class, num_classes, runs_per_class)
    settings = (
        f"--reads_per_class {reads_per_class} --num_classes {num_classes} "
        f"--runs_per_class {runs_per_class} --effect {float(effect)} --seed {seed}"
    )
    readme = _readme(settings, runs)
    _check_directory(output_dir, readme, runs)
    missing = [r for r in runs if not all(path.is_file() for path in r.paths(output_dir))]
    total = sum(r.reads for r in missing)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        remove_partial(output_dir)
        write_text(output_dir / "README.txt", readme)
        with progress("Simulating", total=total, unit="reads") as bar:
            for planned in missing:
                _write(planned, output_dir, effect=effect, seed=seed, bar=bar)
    except OSError as error:
        raise InputError(f"{output_dir}: can't be written ({error})") from None
    logger.info(
        "%s: %s simulated reads of %d classes (%d of %d files made now)",
        output_dir,
        f"{reads_per_class * num_classes:,}",
        num_classes,
        len(missing),
        len(runs),
    )
    return [r.paths(output_dir)[0] for r in runs]
