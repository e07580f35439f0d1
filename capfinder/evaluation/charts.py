"""Charts as inline SVG: small pure functions from numbers to markup, no script, no request.

Colours come from the page's style sheet through class names (c0..c7 for series), so that light,
dark and print share one drawing. Every label is escaped."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from capfinder.evaluation import formats
from capfinder.evaluation.formats import tick_percent
from capfinder.evaluation.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Formatter,
    Point,
    frame,
    join,
    padded,
    path,
    svg,
)

COLOURS = 8
MAX_TRACE_POINTS = 500


@dataclass(frozen=True)
class Series:
    """One line of a chart; `colour` is an index, points that aren't finite leave a gap."""

    name: str
    colour: int
    points: Sequence[Point]


def _legend(names: Sequence[tuple[str, int]]) -> Markup:
    """Coloured words above the chart, as HTML so that they wrap."""
    return Markup('<p class="legend">{}</p>').format(
        join(
            [
                Markup('<span><i class="c{}"></i>{}</span>').format(colour % COLOURS, name)
                for name, colour in names
            ]
        )
    )


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_format: Formatter,
    x_format: Formatter = formats.number,
    marked_x: float | None = None,
    marked_label: str = "",
    logarithmic: bool = False,
) -> Markup | None:
    """Lines over a shared x axis, with a dashed upright at `marked_x`; None without a point."""
    good = [
        (a, b)
        for line in series
        for a, b in line.points
        if math.isfinite(a) and math.isfinite(b) and (b > 0 or not logarithmic)
    ]
    if not good:
        return None
    x_low, x_high = min(a for a, _ in good), max(a for a, _ in good)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    x = Axis(x_low, x_high, LEFT, WIDTH - RIGHT)
    if logarithmic:
        limits = min(b for _, b in good) / 1.5, max(b for _, b in good) * 1.5
    else:
        limits = padded([b for _, b in good])
    y = Axis(*limits, HEIGHT - BOTTOM, TOP, logarithmic)
    whole_numbers = all(a == int(a) for a, _ in good)

    def x_text(value: float) -> str:  # no epoch 2.5
        return "" if whole_numbers and value != int(value) else x_format(value)

    parts = frame(x, y, x_label=x_label, x_format=x_text, y_format=y_format)
    if marked_x is not None and x_low <= marked_x <= x_high:
        on_left = x(marked_x) > (x.start + x.stop) / 2
        parts.append(
            Markup(
                '<line class="mark" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>'
                '<text class="marked" x="{3:.1f}" y="{4}" text-anchor="{5}">{6}</text>'
            ).format(
                x(marked_x),
                y.start,
                y.stop,
                x(marked_x) + (-5 if on_left else 5),
                y.stop + 10,
                "end" if on_left else "start",
                marked_label,
            )
        )
    for line in series:
        colour = line.colour % COLOURS
        parts.append(
            Markup('<path class="line c{}" d="{}"/>').format(colour, path(line.points, x, y))
        )
        if len(line.points) <= 30:
            parts += [
                Markup('<circle class="dot c{}" cx="{:.1f}" cy="{:.1f}" r="2.5"/>').format(
                    colour, x(a), y(b)
                )
                for a, b in line.points
                if math.isfinite(a) and math.isfinite(b) and (b > 0 or not logarithmic)
            ]
    chart = svg(WIDTH, HEIGHT, ", ".join(line.name for line in series), join(parts))
    if len(series) == 1:
        return chart
    return _legend([(line.name, line.colour) for line in series]) + chart


def reliability(bins: Sequence[dict[str, float]]) -> Markup | None:
    """Accuracy against confidence, a disc for each bin whose area is its number of reads."""
    if not bins:
        return None
    x = Axis(0, 1, LEFT, WIDTH - RIGHT)
    y = Axis(0, 1.03, HEIGHT - BOTTOM, TOP)
    parts = frame(
        x, y, x_label="confidence of the model", x_format=tick_percent, y_format=tick_percent
    )
    parts.append(
        Markup('<line class="mark" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
            x(0), y(0), x(1), y(1)
        )
    )
    points = [(row["confidence"], row["accuracy"]) for row in bins]
    parts.append(Markup('<path class="line thin c0" d="{}"/>').format(path(points, x, y)))
    most = max(row["count"] for row in bins)
    for row in bins:
        parts.append(
            Markup(
                '<circle class="bubble c0" cx="{:.1f}" cy="{:.1f}" r="{:.1f}">'
                "<title>{:,} reads: confidence {:.1%}, right {:.1%}</title></circle>"
            ).format(
                x(row["confidence"]),
                y(row["accuracy"]),
                3 + 9 * math.sqrt(row["count"] / most),
                row["count"],
                row["confidence"],
                row["accuracy"],
            )
        )
    return svg(WIDTH, HEIGHT, "accuracy against confidence", join(parts))


def heat_map(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> Markup:
    """A confusion matrix: counts, and each row's shares as numbers and as depth of colour."""
    cell = 76 if len(names) <= 6 else max(40, 460 // len(names))
    longest = max((len(name) for name in names), default=0)
    left, top = 46 + min(7 * longest, 160), 50
    size = cell * len(names)
    parts = [
        Markup('<text class="axis" x="{}" y="14" text-anchor="middle">predicted</text>').format(
            left + size / 2
        ),
        Markup(
            '<text class="axis" transform="translate(14 {}) rotate(-90)" text-anchor="middle">'
            "true</text>"
        ).format(top + size / 2),
    ]
    for index, name in enumerate(names):
        middle = (index + 0.5) * cell
        parts.append(
            Markup(
                '<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>'
                '<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>'
            ).format(left + middle, top - 10, name, left - 8, top + middle + 4, name)
        )
    for i, row in enumerate(matrix):
        total = sum(row)
        for j, count in enumerate(row):
            share = count / total if total else 0.0
            parts.append(
                Markup(
                    '<g class="cell {}"><rect x="{}" y="{}" width="{}" height="{}" rx="3" '
                    'style="fill-opacity:{:.3f}"/><title>{} called {}: {:,} of {:,} reads</title>'
                    '<text x="{:.1f}" y="{:.1f}" text-anchor="middle">{:,}</text>'
                    '<text class="share" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text></g>'
                ).format(
                    ("right" if i == j else "wrong") + (" deep" if share > 0.55 else ""),
                    left + j * cell + 1,
                    top + i * cell + 1,
                    cell - 2,
                    cell - 2,
                    # mistakes are rarer: the root makes a few per cent visible
                    0.05 + 0.95 * (share if i == j else math.sqrt(share)),
                    names[i],
                    names[j],
                    count,
                    total,
                    left + (j + 0.5) * cell,
                    top + (i + 0.5) * cell + (-1 if total else 4),
                    count,
                    left + (j + 0.5) * cell,
                    top + (i + 0.5) * cell + 14,
                    f"{share:.1%}" if total else "",
                )
            )
    return svg(left + size + 8, top + size + 8, "confusion matrix", join(parts), "matrix")


def comparison(
    rows: Sequence[tuple[str, float, str]], interval: tuple[float, float] | None
) -> Markup:
    """Upright names, lying bars from 0 to 100 %: (name, accuracy, class name), the first one
    with its 95 % interval as a whisker."""
    left, bar, step = 150, 20, 34
    x = Axis(0, 1, left, WIDTH + 40)
    parts = []
    for index, (name, value, kind) in enumerate(rows):
        y = 6 + index * step
        parts.append(
            Markup(
                '<text class="name" x="{}" y="{}" text-anchor="end">{}</text>'
                '<rect class="track" x="{}" y="{}" width="{:.1f}" height="{}" rx="4"/>'
                '<rect class="bar {}" x="{}" y="{}" width="{:.1f}" height="{}" rx="4"/>'
                '<text class="value" x="{:.1f}" y="{}">{:.1%}</text>'
            ).format(
                left - 10,
                y + 15,
                name,
                left,
                y,
                x(1) - left,
                bar,
                kind,
                left,
                y,
                max(2.0, x(value) - left),
                bar,
                x(1) + 8,
                y + 15,
                value,
            )
        )
    if interval:
        low, high = x(interval[0]), x(interval[1])
        parts.append(
            Markup(
                '<path class="whisker" d="M{0:.1f} 16H{1:.1f}M{0:.1f} 11v10M{1:.1f} 11v10"/>'
            ).format(low, high)
        )
    return svg(WIDTH + 100, 6 + step * len(rows), "accuracies compared", join(parts), "bars")


def trace(signal: np.ndarray, colour: int, *, samples: int, limits: tuple[float, float]) -> Markup:
    """One read's current on a scale shared by all traces: `samples` wide, `limits` high."""
    width, height = 300, 84
    x = Axis(0, max(samples - 1, 1), 4, width - 4)
    y = Axis(limits[0], limits[1], height - 4, 4)
    thinned = max(1, math.ceil(len(signal) / MAX_TRACE_POINTS))
    points = [(float(i), float(signal[i])) for i in range(0, len(signal), thinned)]
    body = Markup(
        '<line class="grid" x1="4" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
        '<path class="line thin c{}" d="{}"/>'
    ).format(width - 4, y(0), y(0), colour % COLOURS, path(points, x, y))
    return svg(width, height, f"a read of {len(signal)} samples", body, "trace")
