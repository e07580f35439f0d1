"""`capfinder capmap`: which class number means which cap."""

import argparse

from capfinder import log
from capfinder.commands.parsing import Commands, command

ACTIONS = ("list", "add", "remove", "reset", "config")


def add_capmap(commands: Commands) -> None:
    parser = command(
        commands,
        "capmap",
        _capmap,
        "Show or change the caps' names: list, add NUMBER NAME, remove NUMBER, reset, config.",
    )
    parser.add_argument("action", choices=ACTIONS, help="config: the path of the file of names")
    parser.add_argument("number", nargs="?", type=int, help="class number, for add and remove")
    parser.add_argument("name", nargs="?", help="name of the cap, for add")


def _capmap(known: argparse.Namespace) -> None:
    from capfinder import capmap

    log.start(None)
    capmap.command(known.action, known.number, known.name)
