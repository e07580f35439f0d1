"""RESULTS.md: one section a benchmark, and the facts about the machine that belong to numbers."""

import argparse
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

PATH = Path(__file__).with_name("RESULTS.md")
INTRODUCTION = "# Results\n\nWritten by the programs in this directory; README.md says how.\n"


def machine() -> str:
    """Processor, cores and memory, without the machine's name."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB of memory, {platform.system()}"


def versions(names: Sequence[str]) -> str:
    """Of Python and of installed packages."""
    return ", ".join([f"Python {platform.python_version()}"] + [f"{n} {version(n)}" for n in names])


def command() -> str:
    """The command line of this process, as one would type it in a checkout; paths are left out."""
    words = sys.argv[1:]
    kept = [
        word
        for place, word in enumerate(words)
        if "/" not in word and not (place + 1 < len(words) and "/" in words[place + 1])
    ]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *kept])


def provenance(packages: Sequence[str]) -> str:
    return (
        f"`{command()}`, {date.today().isoformat()}. Machine: {machine()}. "
        f"Ours: {versions(packages)}."
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up on a terminal too: the first left, others right."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(cells) + " |"

    rule = [("-" * width) if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(columns), line(rule), *(line(row) for row in rows)])


@dataclass(frozen=True)
class Measure:
    """One row of a comparison: a value of each round for either, and what ours has to be."""

    title: str
    ours: Sequence[float]
    theirs: Sequence[float]
    form: str  # of a value
    is_less_better: bool = False
    required: str = ""


def comparison(measures: Sequence[Measure]) -> str:
    """Medians of the rounds, how many times better ours is, pair by pair; of one round its values
    as they are."""
    is_one = all(len(measure.ours) == 1 for measure in measures)
    rows = []
    for measure in measures:
        better, worse = measure.ours, measure.theirs
        if measure.is_less_better:
            better, worse = worse, better
        ratio, lowest, highest = median_ratio(better, worse)
        values = (statistics.median(values) for values in (measure.ours, measure.theirs))
        spread = [] if is_one else [f"{lowest:.2f} to {highest:.2f}"]
        shown = (measure.form.format(value) for value in values)
        rows.append((measure.title, *shown, f"{ratio:.2f}", *spread, measure.required))
    first, spread = ("one run", []) if is_one else ("median of the rounds", ["of the rounds"])
    return table((first, "ours", "0.4.3", "times better", *spread, "required"), rows)


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trial", action="store_true", help="print only, don't touch RESULTS.md")


def publish(title: str, text: str, *, trial: bool) -> None:
    """Prints the section and, unless it's a trial, puts it into RESULTS.md."""
    print(f"\n## {title}\n\n{text}\n", flush=True)
    if not trial:
        write_section(title, text)


def write_section(title: str, text: str) -> None:
    """Replaces the section `title` of RESULTS.md, or adds it at the end."""
    whole = PATH.read_text("utf-8") if PATH.exists() else INTRODUCTION
    introduction, *sections = whole.split("\n## ")
    kept = {section.partition("\n")[0]: section.partition("\n")[2].strip() for section in sections}
    kept[title] = text.strip()
    parts = [introduction.strip(), *(f"## {name}\n\n{body}" for name, body in kept.items())]
    PATH.write_text("\n\n".join(parts) + "\n", "utf-8")


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Median, lowest and highest of the ratios pair by pair."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)
