"""Markdown with values of anybody's in it: they are shown as they are and mean nothing there."""

import re
from collections.abc import Sequence

from capfinder.allowed import shortened
from capfinder.log import printable

MOST_ROWS = 100  # of a table; a line below it says how many more there are
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_SPECIAL = re.compile(r"[\\`*_\[\]|~$#@]|(?<=www)\.|:(?=//)", re.IGNORECASE)
_LIST_MARK = re.compile(r"^(\d*)([-+.)])")


def verbatim(value: object) -> str:
    """`value` as a code span on one line, in which nothing is Markdown, HTML or a link."""
    shown = shortened(printable(str(value)))
    if not shown.strip():
        return "(empty)"
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    space = " " if shown[0] in "` " or shown[-1] in "` " else ""
    return f"{fence}{space}{shown}{space}{fence}"


def cell(value: object) -> str:
    """As `code`, for a table: readers disagree on how | is told from the end of a cell."""
    return verbatim(value).replace("|", "\\x7c")


def prose(value: object) -> str:
    """`value` as part of a sentence, without the full stop at its end."""
    shown = printable(" ".join(str(value).split())).removesuffix(".")
    shown = _SPECIAL.sub(r"\\\g<0>", shown)
    shown = re.sub("[&<>]", lambda found: _ENTITIES[found[0]], shown)
    return _LIST_MARK.sub(r"\1\\\2", shown)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns and rows of cells, all of them Markdown already; "" when there is no row."""
    if not rows:
        return ""
    lines = [columns, ["---"] * len(columns), *rows[:MOST_ROWS]]
    drawn = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    more = len(rows) - MOST_ROWS
    return f"{drawn}\n\n... and {more:,} more." if more > 0 else drawn


def listed(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def numbered(items: Sequence[str]) -> str:
    return "\n".join(f"{number}. {item}" for number, item in enumerate(items, start=1))


def python(source: str) -> str:
    """A block of code. Values in it must be literals, so that no line of theirs ends it."""
    return f"```python\n{source.strip()}\n```"


def section(title: str, blocks: Sequence[str]) -> str:
    """A heading and what is under it, but for empty blocks; "" when all are empty."""
    filled = [block for block in blocks if block]
    return "\n\n".join([f"## {title}", *filled]) if filled else ""
