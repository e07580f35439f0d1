"""When a training finished its first step and its first epoch, noted from within its process."""

import json
import time
from pathlib import Path


class Moments:
    """Seconds on the system's clock, which the process that started this one reads as well."""

    def __init__(self, path: Path) -> None:
        self._path, self._noted = path, dict[str, float]()

    def note(self, name: str) -> None:
        """The first time only: JAX hands steps to the device and goes on, so this waits until
        every array that there is has its values."""
        if name in self._noted:
            return
        import jax  # the training has imported it before it comes here

        for array in jax.live_arrays():
            array.block_until_ready()
        self._noted[name] = time.monotonic()
        self._path.write_text(json.dumps(self._noted), "utf-8")
