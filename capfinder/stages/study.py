"""The Optuna study behind tuning: who may start a trial, and who takes one up again.

Trials survive their worker. A running trial has a lock file that the kernel frees when its worker
dies, however it dies; workers that share a database but not the lock files also keep a heartbeat.
The next worker that sees a running trial without an owner takes it up again under its own number.
Should two ever run one, which an owner that woke up from a long sleep can bring about, the one
that took it up last ends it, and the other finds it lost."""

import socket
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from capfinder.errors import InputError, StageFailedError
from capfinder.log import logger
from capfinder.stages import heartbeat, locks
from capfinder.stages.running_trial import Lost, Trial
from capfinder.stages.storage import open_storage, what_it_said
from capfinder.stages.strategy import Plan, Sampler, make_pruner

__all__ = ["Lost", "Plan", "Study", "Trial", "Waiting", "name_of", "worker_name"]

MOST_STARTS = 2  # a trial whose worker died is taken up again once
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
WAIT_SECONDS = 1.0  # between two looks at a worker that may be dead


class Waiting(Exception):
    """Every trial left is being run by another worker; the text names them."""


class Study:
    """One study under a fixed name; any number of workers may have it open.

    As a context manager it says in a line when its database is lost."""

    def __init__(
        self,
        directory: Path,
        *,
        fingerprint: str,
        name_prefix: str,
        storage: str | None,
        plan: Plan,
        first: Mapping[str, Any] | None,
        facts: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Opens the study, or makes it.

        storage: an Optuna URL; None: a journal file in `directory`. first: the parameters of
        trial 0. facts: what the fingerprint is of, kept to tell studies apart.
        Raises: SettingsError when the storage can't be used; InputError when `overwrite` would
        take a study away from another worker."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.directory, self.fingerprint = directory, fingerprint
        self.name = name_of(name_prefix, fingerprint)
        self._locks, self._plan = directory / "locks", plan
        self._locks.mkdir(parents=True, exist_ok=True)
        self._home = _home(self._locks) if storage else ""
        self._watch = heartbeat.Watch()
        self._sampler, self._pruner = Sampler(plan, first), make_pruner(plan)
        self._storage = open_storage(directory, storage)
        with self.exclusively():
            if overwrite:
                self._delete()
            study = self._load()
            if facts is not None and "settings" not in study.user_attrs:
                study.set_user_attr("settings", dict(facts))

    def __enter__(self) -> "Study":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Raises: StageFailedError in place of an error of the database."""
        if isinstance(error, StorageInternalError):
            raise StageFailedError(
                f"tune_params.storage: the study's database failed ({what_it_said(error)}); "
                "the same command goes on from here"
            ) from error

    def exclusively(self) -> AbstractContextManager[None]:
        """Holds the study for itself, among those who share its directory, for as long as it
        takes to look and act on it."""
        return locks.held(self._locks / f"{self.name}.lock")

    def trials(self) -> list[FrozenTrial]:
        """Those that were begun."""
        found = self._load().get_trials(deepcopy=False)
        return [
            trial
            for trial in found
            if trial.state != TrialState.WAITING and not trial.user_attrs.get("surplus")
        ]

    def finished(self) -> int:
        return sum(trial.state in FINISHED for trial in self.trials())

    def best(self) -> FrozenTrial | None:
        """The complete trial with the highest value, the earliest of equals; else a pruned one."""
        trials = self.trials()
        for state in FINISHED:
            found = [trial for trial in trials if trial.state == state and trial.value is not None]
            if found:
                return max(found, key=lambda trial: (trial.value, -trial.number))
        return None

    def next_trial(self) -> Trial | None:
        """A trial without an owner, else a new one; None when max_trials are finished.

        Raises: Waiting when other workers run all that are left."""
        with self.exclusively():
            trial, running = None, [(frozen, self._free(frozen)) for frozen in self._running()]
            taken = [frozen for frozen, lock in running if lock is None]  # by workers that live
            finished = self.finished()
            has_place = finished + len(taken) < self._plan.max_trials
            for frozen, lock in running:
                if lock is not None and has_place and trial is None:
                    trial = self._take_up(frozen.number, lock)
                elif lock is not None:
                    lock.close()
            if trial is None and has_place:
                trial = self._start(self._load().ask())
            if trial is None and finished < self._plan.max_trials:
                shown = (f"{frozen.number} ({worker_name(frozen)})" for frozen in taken)
                raise Waiting(f"trial {', '.join(shown)}")
            return trial

    def _running(self) -> list[FrozenTrial]:
        return [trial for trial in self.trials() if trial.state == TrialState.RUNNING]

    def _start(self, asked: optuna.Trial) -> Trial:
        lock = self._own(asked.number)
        assert lock is not None, "a new trial's lock is free"
        trial = Trial(asked, lock, self._plan, self._home)
        if not self._home or self._has_place(asked.number):
            return trial
        trial.note(surplus=True)
        trial.fail("others had started enough trials at the same moment")
        raise Waiting("a trial that was just started")

    def _has_place(self, number: int) -> bool:
        """False where workers elsewhere, who don't see our locks, have begun enough before it.

        The database numbers trials in the order in which they are made, so of several workers
        that take the last place at once all but one find it taken."""
        before = [trial for trial in self.trials() if trial.number < number]
        counted = sum(trial.state in (TrialState.RUNNING, *FINISHED) for trial in before)
        return counted < self._plan.max_trials

    def _take_up(self, number: int, lock: IO[str]) -> Trial | None:
        """The trial, unless its worker had just ended it or it has already been taken up."""
        study = self._load()
        frozen = study.get_trials(deepcopy=False)[number]
        if frozen.state == TrialState.RUNNING:
            if frozen.user_attrs.get("starts", 0) < MOST_STARTS:
                logger.info("trial %d: taken up again after %s", number, worker_name(frozen))
                trial = optuna.Trial(study, frozen._trial_id)
                return Trial(trial, lock, self._plan, self._home)
            error = frozen.user_attrs.get("error", "killed, perhaps for its memory")
            reason = f"its process died {MOST_STARTS} times: {error}"
            with suppress(UpdateFinishedTrialError):  # a worker elsewhere was quicker
                self._storage.set_trial_user_attr(frozen._trial_id, "reason", reason)
                study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
        lock.close()
        return None

    def _free(self, frozen: FrozenTrial) -> IO[str] | None:
        """The lock of a running trial, or None while its worker lives or may still live."""
        facts = frozen.user_attrs
        is_elsewhere = facts.get("home", "") != self._home  # its lock can't be seen from here
        if is_elsewhere and not facts.get("left"):
            mark = facts.get("worker"), facts.get("beat")
            if not self._watch.is_dead(frozen.number, mark):
                return None
        return self._own(frozen.number)

    def _own(self, number: int) -> IO[str] | None:
        """The trial's lock, or None while a living worker holds it."""
        return locks.take(self._locks / f"{self.name}.trial_{number}")

    def _delete(self) -> None:
        if self.name not in optuna.get_all_study_names(self._storage):
            return
        for frozen in self._running():
            self._wait_for_death(frozen)
        optuna.delete_study(study_name=self.name, storage=self._storage)

    def _wait_for_death(self, frozen: FrozenTrial) -> None:
        """Raises: InputError as soon as the trial's worker shows itself."""
        mark, has_said = frozen.user_attrs.get("beat"), False
        while (lock := self._free(frozen)) is None:
            frozen = self._storage.get_trial(frozen._trial_id)
            if frozen.state.is_finished():
                return
            is_near = frozen.user_attrs.get("home", "") == self._home
            if is_near or frozen.user_attrs.get("beat") != mark:
                raise InputError(
                    f"tune_params.overwrite: another worker ({worker_name(frozen)}) runs trial "
                    f"{frozen.number} of this study; wait for it to end, or stop it"
                )
            if not has_said:
                logger.info(
                    "Looking for up to %.0f s whether the worker of trial %d (%s) still lives",
                    heartbeat.MISSED_BEATS * heartbeat.BEAT_SECONDS,
                    frozen.number,
                    worker_name(frozen),
                )
            has_said = True
            time.sleep(min(WAIT_SECONDS, heartbeat.BEAT_SECONDS))
        lock.close()

    def _load(self) -> optuna.Study:
        """Makes it only where it isn't there: trying to writes a line to the journal each time."""
        asked: dict[str, Any] = {
            "study_name": self.name,
            "storage": self._storage,
            "sampler": self._sampler,
            "pruner": self._pruner,
        }
        with suppress(KeyError):
            return optuna.load_study(**asked)
        return optuna.create_study(**asked, direction="maximize", load_if_exists=True)


def name_of(prefix: str, fingerprint: str) -> str:
    return f"{prefix}-{fingerprint[:16]}"


def worker_name(trial: FrozenTrial) -> str:
    """Host and process of the worker that ran it last."""
    host, process, *_ = f"{trial.user_attrs.get('worker', '')}::".split(":")
    return f"process {process} on {host}" if process else "an unknown process"


def _home(locks_directory: Path) -> str:
    """The same for all who see each other's locks in this directory."""
    place = locks_directory.stat()
    return f"{socket.gethostname()}:{place.st_dev}:{place.st_ino}"
