"""Comet tracking that never holds a run up and never ends one.

A background thread owns the Comet client. The stages' calls are queued for it, so neither the
client's import nor a network can make training wait, and what goes wrong there is one warning."""

import contextlib
import logging
import os
import queue
import shlex
import ssl
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from capfinder.errors import SettingsError, StoppedError
from capfinder.log import logger

START_DELAY_SECONDS = 5.0  # the client's import (1 s of the interpreter) comes after the run's own
PROBE_SECONDS = 3.0
END_SECONDS = 60.0  # how long `end` lets the client write or send what is left
STOPPED_SECONDS = 3.0  # the same after a signal: the user or the scheduler waits
NO_KEY = (
    "tracking_params.mode is 'online' but there is no Comet API key. Set the environment variable "
    "COMET_API_KEY, or run `comet login`, or use tracking_params.mode=offline."
)
# Read by the client when it is imported: no patching of other libraries, no reports about us to
# its makers, nothing on the terminal (what it says goes to our log instead).
CLIENT_ENVIRONMENT = {
    "COMET_DISABLE_AUTO_LOGGING": "1",
    "COMET_ERROR_TRACKING_ENABLE": "0",
    "COMET_INTERNAL_REPORTING": "0",
    "COMET_DISABLE_ANNOUNCEMENT": "1",
    "COMET_LOGGING_CONSOLE": "CRITICAL",
}
# Only what the stages log: no code, git state, arguments, host, user, environment or terminal text.
# fmt: off
AUTOMATIC = (
    "log_code", "log_graph", "log_git_metadata", "log_git_patch", "log_env_details", "log_env_gpu",
    "log_env_host", "log_env_cpu", "log_env_network", "log_env_disk", "parse_args",
    "auto_output_logging", "auto_param_logging", "auto_metric_logging", "auto_log_co2",
)
# fmt: on
NOTHING_AUTOMATIC: dict[str, Any] = dict.fromkeys(AUTOMATIC, False) | {"display_summary_level": 0}


class Tracker:
    """What stages log to; the same calls online, offline and off. None of them waits or raises.

    A file given to it must stay where it is until `end`, which a `with` block calls."""

    def __init__(self, client: "_Client | None") -> None:
        self._client = client

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

    def end(self, seconds: float = END_SECONDS) -> None:
        """Writes the offline archive or finishes the upload, as far as `seconds` allow; a second
        call does nothing."""
        client, self._client = self._client, None
        if client is not None:
            client.close(seconds)

    def _send(self, method: str, *arguments: Any, **named: Any) -> None:
        if self._client is not None:
            self._client.send(method, *arguments, **named)


def check(mode: str) -> None:
    """Raises: SettingsError when mode is "online" and there is no API key."""
    if mode == "online" and not _api_key(_import_client()):
        raise SettingsError(NO_KEY)


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
    return Tracker(_Client(mode, project, output_dir / "comet", name))


class _Client:
    """The one place that talks to comet_ml: a queue of calls and the thread that makes them."""

    def __init__(self, mode: str, project: str, directory: Path, name: str) -> None:
        self._mode, self._project = mode, project
        self._directory, self._name = directory, name
        self._calls: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._warned = False
        self._key: str | None = None
        self._online = False
        self._relay = _Relay(self)
        self._thread = threading.Thread(target=self._work, name="comet", daemon=True)
        self._thread.start()

    def send(self, method: str, *arguments: Any, **named: Any) -> None:
        self._calls.put(lambda experiment: getattr(experiment, method)(*arguments, **named))

    def close(self, seconds: float) -> None:
        self._calls.put(None)
        self._closing.set()
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.warn(f"not finished after {seconds:.0f} s; what is left was not sent")
        logging.getLogger("comet_ml").removeHandler(self._relay)

    def warn(self, problem: str) -> None:
        """The first problem is a warning, later ones are for the debug log."""
        level = logging.DEBUG if self._warned else logging.WARNING
        self._warned = True
        logger.log(level, "Comet: %s. The run goes on.", self.redacted(problem).rstrip("."))

    def redacted(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.warn(f"{type(error).__name__}: {error}")

    def _work(self) -> None:
        self._closing.wait(START_DELAY_SECONDS)
        experiment = None
        with self._guarded():
            experiment = self._open()
        for call in iter(self._calls.get, None):
            if experiment is not None:
                with self._guarded():
                    call(experiment)
        if experiment is not None:
            with self._guarded():
                self._finish(experiment)

    def _open(self) -> Any:
        comet = _import_client()
        client_logger = logging.getLogger("comet_ml")
        client_logger.setLevel(logging.INFO)
        client_logger.addHandler(self._relay)
        self._key = _api_key(comet)
        self._directory.mkdir(parents=True, exist_ok=True)
        experiment = None
        if self._mode != "offline" and self._key:
            experiment = self._open_online(comet)
        if experiment is None:
            experiment = comet.OfflineExperiment(
                project_name=self._project,
                offline_directory=str(self._directory),
                **NOTHING_AUTOMATIC,
            )
            with contextlib.suppress(AttributeError):
                experiment.streamer.queue_timeout = 0.1  # seconds; `end` waits for its usual 1
        experiment.set_name(self._name)
        return experiment

    def _open_online(self, comet: Any) -> Any:
        """None when the server can't be used; the archive then takes what it would have got."""
        address = comet.get_backend_address(comet.get_config())
        if not _reachable(address):
            self.warn(f"no answer from {address} in {PROBE_SECONDS:.0f} s, going offline")
            return None
        try:
            experiment = comet.Experiment(
                api_key=self._key,
                project_name=self._project,
                offline_directory=str(self._directory),  # where it goes when the network is lost
                **NOTHING_AUTOMATIC,
            )
        except Exception as error:
            self.warn(f"{address} refused the run ({error}), going offline")
            return None
        if not experiment.alive:
            self.warn(f"{address} gave no experiment, going offline")
            return None
        self._online = True
        logger.info("Comet: online, %s", experiment.url)
        return experiment

    def _finish(self, experiment: Any) -> None:
        key = experiment.get_key()
        experiment.end()
        archives = sorted(self._directory.glob(f"{key}*.zip"))  # online: of a lost network
        for archive in archives:
            command = upload_command(archive, resume=self._online)
            logger.info("Comet: archive written. To upload it:\n  %s", command)
        if not archives:
            with contextlib.suppress(OSError):
                self._directory.rmdir()  # left empty by an online run


class _Relay(logging.Handler):
    """What the client says: into the debug log, its first complaint as our one warning."""

    def __init__(self, client: _Client) -> None:
        super().__init__(logging.INFO)
        self._client = client

    def emit(self, record: logging.LogRecord) -> None:
        text = self._client.redacted(record.getMessage())
        if record.levelno >= logging.WARNING:
            self._client.warn(text)
        else:
            logger.debug("Comet: %s", text)


def upload_command(archive: Path, *, resume: bool) -> str:
    """The shell command that sends an archive to Comet; resume: part of it is there already."""
    option = "--force-reupload " if resume else ""
    return f"comet upload {option}{shlex.quote(str(archive))}"


def _import_client() -> Any:
    os.environ.update(CLIENT_ENVIRONMENT)
    hook = sys.excepthook
    import comet_ml

    sys.excepthook = hook  # the client puts its own there, which reports our errors
    return comet_ml


def _api_key(comet: Any) -> str | None:
    """From COMET_API_KEY or any place the client knows (.comet.config, .env)."""
    return comet.get_api_key(None, comet.get_config()) or None


def _reachable(address: str) -> bool:
    """Whether a server answers at `address`, whatever it answers; takes PROBE_SECONDS at most."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(address, timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            pass
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ssl.SSLError):  # the client may know the certificate
                return
        except (OSError, ValueError):
            return
        answered.set()

    # A thread of its own: looking up a host's name has no time limit.
    asking = threading.Thread(target=ask, name="comet-probe", daemon=True)
    asking.start()
    asking.join(PROBE_SECONDS)
    return answered.is_set()


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is None or isinstance(value, str | int | float):
            yield f"{prefix}{key}", "null" if value is None else value
        else:
            yield f"{prefix}{key}", str(value)
