"""The inner side of processes.Worker: a process that works only while it is asked to.

Commands are JSON lines on standard input, answers JSON lines on what was standard output. What
libraries print goes to standard error, so that it can't get between the answers."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

Handlers = Mapping[str, Callable[[], dict[str, Any]]]


class Commands:
    """The commands that come in; make one before anything else may print."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(self, outcome: dict[str, Any]) -> None:
        print(json.dumps(outcome), file=self._answers, flush=True)

    def serve(self, handlers: Handlers, *, until: str = "") -> bool:
        """Answers commands by their handlers. True when the command `until` comes, which the
        caller has to answer; False at the end of the input."""
        for line in sys.stdin:
            command = line.strip()
            if command == until:
                return True
            self.answer(handlers[command]())
        return False
