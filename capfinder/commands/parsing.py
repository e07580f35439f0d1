"""What every command's parser is made of."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeAlias

from capfinder import log


class Parser(argparse.ArgumentParser):
    """Errors in one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        said = log.printable(message)
        self.exit(2, f"error: {said} ({self.prog} --help lists the options)\n")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def command(
    commands: Commands,
    name: str,
    function: Callable[[argparse.Namespace], None],
    description: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=description, description=description, formatter_class=Help
    )
    parser.set_defaults(command_function=function)
    return parser


def directory(text: str) -> Path:
    """An option's type: one to write to."""
    if not text or "\0" in text:  # Path("") is the current directory
        raise argparse.ArgumentTypeError(f"{text!r} is no path; name a directory")
    return Path(text)
