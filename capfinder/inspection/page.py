"""The page of `capfinder inspect`: the terminal's tables and the drawing in one file, which holds
no script, asks no network for anything and has every text from disk escaped."""

from pathlib import Path

import jinja2
from markupsafe import Markup

from capfinder.errors import InputError
from capfinder.inspection import plot
from capfinder.inspection.contents import Inspected

TEMPLATE = "page_template.html"
LONG_ROWS = 12  # a table of more rows is folded


def render(found: Inspected) -> str:
    """The HTML text; the same for the same dataset. Without a readable shard, without drawing."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawing, unreadable = _drawing(found)
    return environment.get_template(TEMPLATE).render(
        found=found,
        version=found.manifest["version"],
        drawing=drawing,
        unreadable=unreadable,
        split=plot.SPLIT,
        long_rows=LONG_ROWS,
    )


def _drawing(found: Inspected) -> tuple[Markup | None, str]:
    """The drawing or why there is none."""
    try:
        examples = plot.read_examples(found.directory, found.counts(plot.SPLIT))
    except InputError as error:
        return None, str(error)
    return plot.svg(examples, found.names), ""
