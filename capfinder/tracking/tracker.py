"""What a run logs to Comet; it never holds a run up and never ends one.

One call waits, `Tracker.log_artifact`; all others are queued and return at once."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from capfinder.errors import SettingsError, StoppedError
from capfinder.tracking import client
from capfinder.tracking.client import NO_KEY
from capfinder.tracking.sender import Sender

END_SECONDS = 60.0  # how long `end` lets the client write or send what is left
STOPPED_SECONDS = 3.0  # the same after a signal: the user or the scheduler waits


class Tracker:
    """What stages log to; the same calls online, offline and off.

    A file given to it must stay where it is until `end`, which a `with` block calls."""

    def __init__(self, sender: Sender | None) -> None:
        self._sender = sender

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end(STOPPED_SECONDS if isinstance(error, StoppedError) else END_SECONDS)

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Nested groups become dotted names, as in the settings: shared_params.batch_size."""
        self._send("log_parameters", dict(_flat(parameters)))

    def log_metrics(
        self,
        metrics: Mapping[str, float],
        *,
        step: int | None = None,
        epoch: int | None = None,
        prefix: str | None = None,
    ) -> None:
        """One point per metric; `prefix` "train" gives train_loss and so on."""
        values = {name: float(value) for name, value in metrics.items()}
        self._send("log_metrics", values, prefix=prefix, step=step, epoch=epoch)

    def log_confusion_matrix(self, matrix: Any, labels: Sequence[str], *, name: str) -> None:
        """matrix: (C, C) counts, rows true, columns predicted."""
        counts = [[int(count) for count in row] for row in matrix]
        self._send(
            "log_confusion_matrix",
            matrix=counts,
            labels=[str(label) for label in labels],
            title=name,
            file_name=f"{name}.json",
        )

    def log_file(self, path: Path, *, name: str | None = None) -> None:
        self._send("log_asset", str(path), file_name=name or path.name)

    def log_model(self, path: Path, *, name: str) -> None:
        """path: a model file, or a directory of which every file is logged."""
        self._send("log_model", name, str(path))

    def log_artifact(
        self,
        name: str,
        *,
        kind: str,
        version: str,
        metadata: Mapping[str, Any],
        paths: Sequence[Path],
    ) -> bool:
        """Starts the upload of a new version of an artifact; the one call that waits, until the
        server has taken the version's number. ArtifactStore.wait_until_stored waits for the files.

        Returns False, and nothing is uploaded, when the run isn't online.
        Raises: CometError when the server refuses."""
        if self._sender is None:
            return False
        return self._sender.log_artifact(
            name=name, kind=kind, version=version, metadata=metadata, paths=paths
        )

    def end(self, seconds: float = END_SECONDS) -> None:
        """Writes the offline archive or finishes the upload, as far as `seconds` allow; a second
        call does nothing."""
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.close(seconds)

    def _send(self, method: str, *arguments: Any, **named: Any) -> None:
        if self._sender is not None:
            self._sender.send(method, *arguments, **named)


def check(mode: str) -> None:
    """Raises: SettingsError when mode is "online" and there is no API key."""
    if mode == "online" and not client.api_key(client.import_client()):
        raise SettingsError(
            f"tracking_params.mode is 'online' but {NO_KEY}, or use tracking_params.mode=offline."
        )


def start(mode: str, *, project: str, output_dir: Path, name: str) -> Tracker:
    """A tracker for one run.

    mode: "off"; "offline" (an archive in output_dir/comet/); "online"; "auto" (online when there
    is an API key, else offline). Without a network, online and auto go offline with a warning.

    Raises: SettingsError when mode is "online" and there is no API key."""
    if mode == "off":
        return Tracker(None)
    if mode not in ("auto", "offline", "online"):
        raise ValueError(f"mode is 'auto', 'online', 'offline' or 'off', not {mode!r}")
    check(mode)
    return Tracker(Sender(mode, project, output_dir / "comet", name))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is None or isinstance(value, str | int | float):
            yield f"{prefix}{key}", "null" if value is None else value
        else:
            yield f"{prefix}{key}", str(value)
