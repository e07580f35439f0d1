"""`capfinder capmap`: which class number means which cap."""

import argparse

from capfinder import capmap, log
from capfinder.commands.parsing import Commands, command


def add_capmap(commands: Commands) -> None:
    parser = command(
        commands,
        "capmap",
        _capmap,
        "Show or change the caps' names: list, add NUMBER NAME, remove NUMBER, reset, config.",
    )
    add = parser.add_argument
    add("action", choices=capmap.ACTIONS, help="config: the path of the file of names")
    add("number", nargs="?", type=int, help="class number, for add and remove")
    add("name", nargs="?", help="name of the cap, for add")


def _capmap(known: argparse.Namespace) -> None:
    log.start(None)
    capmap.command(known.action, known.number, known.name)
