"""Quality control: what the reads of each run (source file) look like.

Figures are gathered in bounded memory and in exact integers, so that they don't depend on the
order in which threads hand over their blocks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Lengths below _EXACT have a bin each; above, an octave has _PER_OCTAVE bins (1.6 % wide or less).
_EXACT, _PER_OCTAVE = 4096, 64
_EXACT_BITS, _OCTAVE_BITS = _EXACT.bit_length() - 1, _PER_OCTAVE.bit_length() - 1
_BINS = _EXACT + (31 - _EXACT_BITS) * _PER_OCTAVE

# Sums of floats are kept as multiples of 2**-20 in two 26-bit halves: exact for 2**37 reads.
_SCALE, _HALF = 20, 26
_LARGEST = 2.0 ** (2 * _HALF - _SCALE) - 1  # values, their squares too, are cut at 4.3e9

NOTE = (
    "length: median (shortest to longest) of the good rows; the chosen reads' mean signal, "
    "standard deviation of the means between reads, and mean standard deviation within a read "
    "(spread)."
)
COLUMNS = ("file", "class", "rows", "good", "chosen", "length", "mean", "between reads", "spread")


class RunStatistics:
    """Gathers, for each source file, lengths in pass one and signals in pass two (42 KB a file).

    Not for several threads at once: one thread adds what the others parsed."""

    def __init__(self, num_files: int) -> None:
        self._lengths = np.zeros((num_files, _BINS), np.int64)
        self._length_sum = np.zeros(num_files, np.int64)
        self._shortest = np.full(num_files, np.iinfo(np.int32).max, np.int64)
        self._longest = np.zeros(num_files, np.int64)
        self._chosen = np.zeros(num_files, np.int64)
        self._sums = np.zeros((num_files, 3, 2), np.int64)  # mean, its square, spread; two halves

    def add_lengths(self, file: int, samples: np.ndarray) -> None:
        """samples (n,) int32 > 0: numbers in the signal of each good row of `file`."""
        if not len(samples):
            return
        values = samples.astype(np.int64)
        self._lengths[file] += np.bincount(_length_bin(values), minlength=_BINS)
        self._length_sum[file] += values.sum()
        self._shortest[file] = min(self._shortest[file], values.min())
        self._longest[file] = max(self._longest[file], values.max())

    def add_signals(
        self, file: np.ndarray, lengths: np.ndarray, total: np.ndarray, squares: np.ndarray
    ) -> None:
        """Chosen reads: file, lengths (k,) ints; total, squares (k,) float64 over all samples."""
        with np.errstate(over="ignore", invalid="ignore"):  # values of 1e200 are cut below
            means = total / lengths
            spreads = np.sqrt(np.maximum(squares / lengths - means**2, 0.0))
            kinds = [np.nan_to_num(each, nan=np.inf) for each in (means, means**2, spreads)]
        self._chosen += np.bincount(file, minlength=len(self._chosen))
        for kind, values in enumerate(kinds):
            fixed = np.rint(np.clip(values, -_LARGEST, _LARGEST) * 2**_SCALE).astype(np.int64)
            np.add.at(self._sums[:, kind, 0], file, fixed >> _HALF)
            np.add.at(self._sums[:, kind, 1], file, fixed & (2**_HALF - 1))

    def clear_signals(self) -> None:
        """Forgets pass two, for one that has to be done again."""
        self._chosen[:] = 0
        self._sums[:] = 0

    def rows(self, sources: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """One entry a source file for the manifest's "quality".

        sources: the manifest's "sources" (file, dataset_class, is_test, rows, good) in the order
        of the files' numbers. Figures of a file without such reads are None."""
        keys = ("file", "dataset_class", "is_test", "rows", "good")
        return [
            {key: source[key] for key in keys}
            | {
                "chosen": int(self._chosen[file]),
                "length": self._length_figures(file),
                "signal": self._signal_figures(file),
            }
            for file, source in enumerate(sources)
        ]

    def _length_figures(self, file: int) -> dict[str, float] | None:
        reached = np.cumsum(self._lengths[file])
        count = int(reached[-1])
        if not count:
            return None
        shortest, longest = int(self._shortest[file]), int(self._longest[file])
        # The quartile q is the value at place ceil(q n), counted from 1: one that occurred.
        places = [(count + 3) // 4, (count + 1) // 2, (3 * count + 3) // 4]
        values = [_bin_start(int(at)) for at in np.searchsorted(reached, places)]
        low, middle, high = (min(max(value, shortest), longest) for value in values)
        return {
            "mean": round(int(self._length_sum[file]) / count, 1),
            "min": shortest,
            "lower_quartile": low,
            "median": middle,
            "upper_quartile": high,
            "max": longest,
        }

    def _signal_figures(self, file: int) -> dict[str, float] | None:
        count = int(self._chosen[file])
        if not count:
            return None
        mean, square, spread = (
            ((int(high) << _HALF) + int(low)) / 2**_SCALE / count
            for high, low in self._sums[file].tolist()
        )
        return {
            "mean": round(mean, 4),
            "between_reads_sd": round(max(square - mean**2, 0.0) ** 0.5, 4),
            "within_read_sd": round(spread, 4),
        }


def _length_bin(values: np.ndarray) -> np.ndarray:
    """(n,) int64 > 0 -> the bin of each, in the order of the values."""
    octave = np.frexp(values.astype(np.float64))[1] - 1  # exact: 2**octave <= value
    step = np.maximum(octave - _OCTAVE_BITS, 0)
    above = _EXACT + (octave - _EXACT_BITS) * _PER_OCTAVE + (values >> step) - _PER_OCTAVE
    return np.where(values < _EXACT, values, above)


def _bin_start(number: int) -> int:
    if number < _EXACT:
        return number
    octave, within = divmod(number - _EXACT, _PER_OCTAVE)
    return (_PER_OCTAVE + within) << (octave + _EXACT_BITS - _OCTAVE_BITS)


def table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[tuple[str, ...]]:
    """The rows under COLUMNS as texts; names: of the classes, by their number."""
    return [
        (
            f"{row['file']}{' (test)' if row['is_test'] else ''}",
            names[row["dataset_class"]],
            *(f"{row[key]:,}" for key in ("rows", "good", "chosen")),
            *_figures(row),
        )
        for row in rows
    ]


def _figures(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Length as median (min to max), then the signal's three figures."""
    length, signal = row["length"], row["signal"]
    return (
        f"{length['median']:,} ({length['min']:,} to {length['max']:,})" if length else "-",
        *(
            f"{signal[key]:.3f}" if signal else "-"
            for key in ("mean", "between_reads_sd", "within_read_sd")
        ),
    )
