"""What every chart is made of: scales, round tick marks, grid lines and the <svg> element."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 14, 42

Point = tuple[float, float]
Formatter = Callable[[float], str]


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic scale from `low`..`high` to pixels `start`..`stop`."""

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (value - low) / (high - low) * (self.stop - self.start)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers within low..high, e.g. 0, 0.2, 0.4."""
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within low..high, with 2 and 5 times them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        values = [factor * 10.0**power for power in powers for factor in factors]
        inside = [value for value in values if low <= value <= high]
        if len(inside) >= 3:
            break
    return inside or [low, high]


def padded(values: Sequence[float]) -> tuple[float, float]:
    """The range of the values, a little widened; never empty."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def svg(width: float, height: float, label: str, body: Markup, extra: str = "") -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}" class="{}">{}</svg>').format(
        round(width), round(height), label, extra, body
    )


def join(parts: Sequence[Markup]) -> Markup:
    return Markup("").join(parts)


def path(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """An SVG path; a point that isn't finite ends the stroke, the next one starts another."""
    commands, pen = [], "M"
    for a, b in points:
        if not (math.isfinite(a) and math.isfinite(b)) or (y.logarithmic and b <= 0):
            pen = "M"
            continue
        commands.append(f"{pen}{x(a):.1f} {y(b):.1f}")
        pen = "L"
    return "".join(commands)


def frame(
    x: Axis, y: Axis, *, x_label: str, x_format: Formatter, y_format: Formatter
) -> list[Markup]:
    """Grid lines, tick labels and the name of the x axis."""
    parts = []
    for value in log_ticks(y.low, y.high) if y.logarithmic else ticks(y.low, y.high):
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
            ).format(
                x.start, x.stop, y(value), y(value), x.start - 7, y(value) + 4, y_format(value)
            )
        )
    for value in ticks(x.low, x.high):
        parts.append(
            Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                x(value), y.start + 17, x_format(value)
            )
        )
    parts.append(
        Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            (x.start + x.stop) / 2, y.start + 35, x_label
        )
    )
    return parts
