"""Commands run in this process."""

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def shown_by(command: Callable[[], int]) -> tuple[int, str]:
    """A command's exit code, and what it printed to either stream."""
    with io.StringIO() as shown, contextlib.redirect_stdout(shown):
        with contextlib.redirect_stderr(shown):
            code = command()
        return code, shown.getvalue()


@dataclass(frozen=True)
class Ended:
    """A command that wrote to output_dir."""

    code: int
    shown: str
    output_dir: Path

    def read(self, name: str) -> Any:
        return json.loads((self.output_dir / name).read_text())
