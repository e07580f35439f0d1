"""Numbers as a reader of the report wants them; a value that isn't there is a dash."""

from typing import Any

DASH = "\u2013"


def percent(value: float | None) -> str:
    """0.9312 -> 93.1 %, with a narrow space that doesn't break."""
    return DASH if value is None else f"{100 * value:.1f}\u202f%"


def tick_percent(value: float) -> str:
    """0.975 -> 97.5%"""
    return f"{100 * value:.4g}%"


def number(value: Any) -> str:
    """1234 -> 1,234; 0.123456 -> 0.1235; anything but a number as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return DASH if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def size(value: float | None) -> str:
    """Bytes in readable units: 2345678 -> 2.35 MB."""
    if value is None:
        return DASH
    units = ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g} {units[0]}"


def duration(seconds: float | None) -> str:
    """75 -> 1 min 15 s."""
    if seconds is None:
        return DASH
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
