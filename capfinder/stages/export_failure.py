"""When a format can't be exported: an error that says how to have the others."""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from capfinder import settings
from capfinder.allowed import shortened
from capfinder.errors import StageFailedError
from capfinder.exporting.keras import TwinError

_OF_TWIN = ("keras", "h5", "onnx")


@dataclasses.dataclass(frozen=True)
class Asked:
    """What was asked for. option: what asks for formats, which follow it with commas."""

    formats: Sequence[str]
    option: str

    @contextlib.contextmanager
    def written(self, name: str, path: Path) -> Iterator[None]:
        """Whatever keeps the format from being written inside becomes a StageFailedError."""
        try:
            yield
        except (OSError, MemoryError):  # of the machine, not of the format
            raise
        except TwinError as error:
            raise self.failure(str(error), _OF_TWIN) from error
        except StageFailedError as error:
            raise self.failure(f"{path}: {error}", [name]) from error
        except Exception as error:  # of the format's own libraries
            said = shortened(" ".join(f"{type(error).__name__}: {error}".split()))
            raise self.failure(f"{path}: can't be written ({said})", [name]) from error

    def failure(self, reason: str, failed: Collection[str]) -> StageFailedError:
        """failed: the formats that can't be had, also some that weren't asked for."""
        without = ", ".join(name for name in self.formats if name in failed)
        others = [name for name in self.formats if name not in failed] or [
            name for name in settings.EXPORT_FORMATS if name not in failed
        ]
        advice = f": {self.option}{','.join(others)} exports it without {without}" if others else ""
        return StageFailedError(f"{reason}. Nothing was exported; the model isn't lost{advice}")
