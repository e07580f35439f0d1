"""Example signals of each class: read from the shards, drawn off-screen as PNG or SVG."""

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from capfinder.data import records

READS_PER_CLASS = 4
SPLIT = "train"
# Okabe and Ito's colours less yellow: told apart by colour-blind people and when printed in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
SOFT, FAINT = "#555555", "#d5dae0"
STYLE: Any = {
    "font.family": "DejaVu Sans",  # it comes with matplotlib
    "font.size": 8.0,
    "svg.fonttype": "path",
    "svg.hashsalt": "capfinder",  # or the ids in the drawing differ each time
    "text.parse_math": False,  # a $ in a name is a $
}


@dataclass(frozen=True)
class Example:
    """A read as stored, padding cut off: signal (k,) float64; length: samples before fitting."""

    read_id: str
    length: int
    signal: np.ndarray


def read_examples(directory: Path, counts: Mapping[str, int]) -> dict[int, list[Example]]:
    """The first READS_PER_CLASS reads of each class in the training split, as they are stored.

    counts: the split's reads by class number as text, as in the manifest; no more is read than
    it takes. Raises: InputError when a shard is missing or damaged."""
    wanted = {int(label): min(READS_PER_CLASS, count) for label, count in counts.items()}
    found: dict[int, list[Example]] = {label: [] for label in sorted(wanted)}
    for block in records.read_blocks(directory, SPLIT):
        for label, examples in found.items():
            rows = np.flatnonzero(block.cap_classes == label)
            for row in rows[: wanted[label] - len(examples)]:
                length = int(block.lengths[row])
                read_id = block.read_ids[row].decode("utf-8", "replace")
                examples.append(Example(read_id, length, unpadded(block.signals[row], length)))
        if all(len(examples) >= wanted[label] for label, examples in found.items()):
            break
    return found


def unpadded(stored: np.ndarray, length: int) -> np.ndarray:
    """(T,) -> (min(length, T),) float64: what the read filled before zeros were put round it."""
    kept = min(length, stored.size)
    left = (stored.size - kept) // 2
    return stored[left : left + kept].astype(np.float64)


def write_png(path: Path, examples: Mapping[int, Sequence[Example]], names: Sequence[str]) -> None:
    with _own_style():
        _save(_draw(examples, names), path, format="png", dpi=160, metadata={"Software": None})


def svg(examples: Mapping[int, Sequence[Example]], names: Sequence[str]) -> Markup:
    """The drawing as an element to stand in an HTML page."""
    stream = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with _own_style():
        _save(_draw(examples, names), stream, format="svg", metadata=nothing)
    text = stream.getvalue().decode("utf-8")
    text = text[text.index("<svg") :]  # without the XML declaration
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)  # HTML knows SVG
    label = f'<svg role="img" aria-label="example signals of {len(names)} classes" '
    return Markup(text.replace("<svg ", label, 1))  # its texts are outlines of letters


@contextmanager
def _own_style() -> Iterator[None]:
    """Matplotlib's defaults and ours, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # drawn as a box
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def _save(figure: Figure, target: Path | IO[bytes], **options: Any) -> None:
    figure.savefig(target, facecolor="white", **options)


def _draw(examples: Mapping[int, Sequence[Example]], names: Sequence[str]) -> Figure:
    """A row for each class, a column for each read, all on one scale but for rows far beyond it."""
    rows = len(names)
    everything = [example for of_class in examples.values() for example in of_class]
    samples = max((example.signal.size for example in everything), default=1)
    reach = {label: _reach(examples.get(label, [])) for label in range(rows)}
    common = max(each for each in reach.values() if each <= 3 * median(reach.values()))
    width, height = 9.0, 0.8 + 1.4 * rows  # in inches
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(
        left=0.8 / width,
        right=1 - 0.15 / width,
        bottom=0.55 / height,
        top=1 - 0.25 / height,
        wspace=0.1,
        hspace=0.22,
    )
    panels = figure.subplots(rows, READS_PER_CLASS, sharex=True, sharey="row", squeeze=False)
    for label, name in enumerate(names):
        colour = COLOURS[label % len(COLOURS)]
        panels[label, 0].set_ylabel(printable(name, 16), fontsize=9, fontweight="bold")
        for number, panel in enumerate(panels[label]):
            of_class = examples.get(label, [])
            _trace(panel, of_class[number] if number < len(of_class) else None, colour)
        limit = max(reach[label], common)
        panels[label, 0].set_ylim(-limit, limit)
    panels[0, 0].set_xlim(0, samples)
    figure.supxlabel("sample, in order of time (3' to 5')", fontsize=9, y=0.1 / height)
    figure.supylabel("current (z-score)", fontsize=9, x=0.05 / width)
    return figure


def _trace(panel: Any, example: Example | None, colour: str) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(SOFT)
    panel.tick_params(colors=SOFT, labelsize=7, length=2.5)
    panel.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    if example is None:
        panel.text(0.5, 0.5, "no more reads", transform=panel.transAxes, ha="center", color=SOFT)
        return
    panel.plot(np.arange(example.signal.size), example.signal, color=colour, linewidth=0.7)
    kept = example.signal.size
    cut = f"{kept:,} of {example.length:,}" if kept < example.length else f"{kept:,}"
    title = f"{printable(example.read_id, 12)}  {cut} samples"
    panel.set_title(title, fontsize=6.5, color=SOFT, loc="left", pad=2)


def _reach(examples: Sequence[Example]) -> float:
    """The largest finite value, 1 at least: half the height of a panel."""
    signals = [example.signal for example in examples]
    found = [np.abs(signal[np.isfinite(signal)]).max(initial=0.0) for signal in signals]
    return 1.03 * max(1.0, *found, 0.0)


def printable(text: str, longest: int) -> str:
    """On one line and no longer than that."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}\N{HORIZONTAL ELLIPSIS}"
