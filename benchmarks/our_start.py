"""launch.py as it is, with the moments of its training noted: our_start.py RESULT ARGUMENTS...

Nothing is imported earlier than launch.py would: once capfinder.training.loop has been loaded, its
`fit` is replaced by one that also notes when on_step and on_epoch are first called."""

import functools
import importlib.abc
import importlib.util
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moments import Moments

LOOP = "capfinder.training.loop"
ROOT = Path(__file__).parent.parent


class AfterImport(importlib.abc.MetaPathFinder):
    """Lets `change` have a module as soon as it has been loaded, once."""

    def __init__(self, name: str, change: Callable[[Any], None]) -> None:
        self._name, self._change = name, change

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            self._change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def noting(loop: Any, moments: Moments) -> None:
    fit = loop.fit

    @functools.wraps(fit)
    def noted(*arguments: Any, on_step: Any, on_epoch: Any, **named: Any) -> Any:
        def step(taken: int) -> None:
            moments.note("step")
            on_step(taken)

        def epoch(row: Any) -> None:
            moments.note("epoch")
            on_epoch(row)

        return fit(*arguments, on_step=step, on_epoch=epoch, **named)

    loop.fit = noted


def main() -> None:
    moments = Moments(Path(sys.argv[1]))
    sys.meta_path.insert(0, AfterImport(LOOP, lambda loop: noting(loop, moments)))
    launch = ROOT / "launch.py"
    sys.path[0] = str(ROOT)  # as Python sets it for launch.py
    sys.argv = [str(launch), *sys.argv[2:]]
    runpy.run_path(str(launch), run_name="__main__")


if __name__ == "__main__":
    main()
