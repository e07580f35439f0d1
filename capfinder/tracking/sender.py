"""The thread that owns a run of Comet's client: calls are queued for it and made one by one.

Neither the client's import nor a network can make the caller wait, and what goes wrong is one
warning."""

import contextlib
import logging
import queue
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from capfinder.log import logger
from capfinder.tracking import client
from capfinder.tracking.client import CometError

START_DELAY_SECONDS = 20.0  # the client's import (2 s of a core) comes after the first steps
# Only what the stages log: no code, git state, arguments, host, user, environment or terminal text.
# fmt: off
AUTOMATIC = (
    "log_code", "log_graph", "log_git_metadata", "log_git_patch", "log_env_details", "log_env_gpu",
    "log_env_host", "log_env_cpu", "log_env_network", "log_env_disk", "parse_args",
    "auto_output_logging", "auto_param_logging", "auto_metric_logging", "auto_log_co2",
)
# fmt: on
NOTHING_AUTOMATIC: dict[str, Any] = dict.fromkeys(AUTOMATIC, False) | {"display_summary_level": 0}


class Sender:
    """The one place that talks to comet_ml: a queue of calls and the thread that makes them."""

    def __init__(self, mode: str, project: str, directory: Path, name: str) -> None:
        self._mode, self._project = mode, project
        self._directory, self._name = directory, name
        self._calls: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        self._waited_for = threading.Event()
        self._warned = False
        self._key: str | None = None
        self._online = False
        self._relay = Relay(self)
        self._thread = threading.Thread(target=self._work, name="comet", daemon=True)
        self._thread.start()

    def send(self, method: str, *arguments: Any, **named: Any) -> None:
        def call(experiment: Any) -> None:
            if experiment is not None:
                getattr(experiment, method)(*arguments, **named)

        self._calls.put(call)

    def log_artifact(self, **artifact: Any) -> bool:
        """As Tracker.log_artifact."""
        done: Future[bool] = Future()

        def call(experiment: Any) -> None:
            try:
                done.set_result(self._online and self._hand_over(experiment, **artifact))
            except Exception as error:
                text = self.redacted(" ".join(str(error).split()))
                done.set_exception(
                    CometError(f"Comet refused the artifact ({type(error).__name__}: {text[:300]})")
                )

        self._calls.put(call)
        self._waited_for.set()
        return done.result()

    @staticmethod
    def _hand_over(
        experiment: Any,
        *,
        name: str,
        kind: str,
        version: str,
        metadata: Mapping[str, Any],
        paths: Sequence[Path],
    ) -> bool:
        artifact = client.import_client().Artifact(
            name, kind, version=version, metadata=dict(metadata)
        )
        for path in paths:  # else the client copies each to its temporary directory first
            artifact.add(str(path), logical_path=path.name, copy_to_tmp=False)
        experiment.log_artifact(artifact)
        return True

    def close(self, seconds: float) -> None:
        self._calls.put(None)
        self._waited_for.set()
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
        return client.redacted(text, self._key)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.warn(f"{type(error).__name__}: {error}")

    def _work(self) -> None:
        self._waited_for.wait(START_DELAY_SECONDS)
        experiment = None
        with self._guarded():
            experiment = self._open()
        for call in iter(self._calls.get, None):
            with self._guarded():
                call(experiment)
        if experiment is not None:
            with self._guarded():
                self._finish(experiment)

    def _open(self) -> Any:
        comet = client.import_client()
        client_logger = logging.getLogger("comet_ml")
        client_logger.setLevel(logging.INFO)
        client_logger.addHandler(self._relay)
        self._key = client.api_key(comet)
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
        address = client.address(comet)
        if not client.is_reachable(address):
            self.warn(f"no answer from {address} in {client.PROBE_SECONDS:.0f} s, going offline")
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


class Relay(logging.Handler):
    """What the client says: into the debug log, its first complaint as our one warning."""

    def __init__(self, sender: Sender) -> None:
        super().__init__(logging.INFO)
        self._sender = sender

    def emit(self, record: logging.LogRecord) -> None:
        text = self._sender.redacted(record.getMessage())
        if record.levelno >= logging.WARNING:
            self._sender.warn(text)
        else:
            logger.debug("Comet: %s", text)


def upload_command(archive: Path, *, resume: bool) -> str:
    """The shell command that sends an archive to Comet; resume: part of it is there already."""
    option = "--force-reupload " if resume else ""
    return f"comet upload {option}{shlex.quote(str(archive))}"
