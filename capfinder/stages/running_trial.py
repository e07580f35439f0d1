"""A trial that this process runs: what it reports, how it ends, and whether it is still its own."""

import copy
import os
import secrets
import socket
import time
from contextlib import suppress
from typing import IO, Any, cast

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from capfinder.stages.heartbeat import Heart
from capfinder.stages.strategy import Plan


class Lost(Exception):
    """Another worker has the trial now, as this one seemed dead; or the study was deleted."""


class Trial:
    """`parameters` to draw from, then reports, then one of the ends.

    Raises: Lost from a report or an end."""

    def __init__(self, trial: optuna.Trial, lock: IO[str], plan: Plan, home: str) -> None:
        """home: where the lock can be seen; "" where everybody sees it, and no heartbeat is
        needed."""
        self.parameters, self.number = trial, trial.number
        self._lock, self._plan = lock, plan
        frozen = self._frozen()
        self._reported = dict(frozen.intermediate_values)  # by an earlier worker
        self._verdict: list[Any] | None = frozen.user_attrs.get("verdict")
        self._starts = frozen.user_attrs.get("starts", 0)
        self._started = time.monotonic()
        self._worker = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self.note(left=False, worker=self._worker, home=home, starts=self._starts + 1)
        self._heart = Heart(self._beat) if home else None

    def note(self, **facts: Any) -> None:
        """Keeps JSON-able facts with the trial."""
        for name, value in facts.items():
            self.parameters.set_user_attr(name, value)

    def report(self, epoch: int, value: float) -> bool:
        """Reports the value of an epoch (1-based); True when the trial should be pruned now."""
        self._check_owner()
        if epoch not in self._reported:
            self.parameters.report(value, epoch)
        if epoch < max(self._reported, default=0) or epoch >= self._plan.max_epochs:
            return False  # an earlier worker went on from here; or nothing is left to save
        return self._should_prune(epoch)

    def _should_prune(self, epoch: int) -> bool:
        """The pruner's verdict, kept with the trial before the pruner books the value in its rung:
        it gives none for what is booked already, so a worker that died in between would lose it."""
        if self._verdict is None or self._verdict[0] != epoch:
            study = copy.copy(self.parameters.study)
            storage = _Unbooked(study._storage)
            study._storage = cast(optuna.storages.BaseStorage, storage)
            is_pruned = study.pruner.prune(study, self._frozen())
            if not storage.is_rung:
                return is_pruned
            self._verdict = [epoch, is_pruned]
            self.note(verdict=self._verdict)
        self.parameters.should_prune()  # books it
        return bool(self._verdict[1])

    def complete(self, value: float) -> None:
        self._end(TrialState.COMPLETE, value)

    def prune(self) -> None:
        self._end(TrialState.PRUNED)

    def fail(self, reason: str) -> None:
        self._end(TrialState.FAIL, reason=reason)

    def leave(self) -> None:
        """Stays a running trial, to be taken up again; the stop doesn't count against it."""
        self._leave(starts=self._starts)

    def abandon(self, error: str) -> None:
        """As `leave`, after an error that may be the trial's own: it does count."""
        self._leave(error=error)

    def close(self) -> None:
        """Lets go of the trial without another word."""
        self._lock.close()
        if self._heart is not None:
            self._heart.stop()

    def _leave(self, **facts: Any) -> None:
        # A signal came as it ended; another worker has it; or nothing can be written any more.
        with suppress(UpdateFinishedTrialError, Lost, StorageInternalError, OSError):
            self._check_owner()
            self.note(left=True, **facts)
        self.close()

    def _end(self, state: TrialState, value: float | None = None, **facts: Any) -> None:
        self._check_owner()
        self.note(seconds=round(time.monotonic() - self._started, 1), **facts)
        self.parameters.study.tell(self.parameters, value, state=state)
        self.close()

    def _check_owner(self) -> None:
        try:
            frozen = self._frozen()
        except KeyError:  # deleted
            raise Lost from None
        if frozen.state.is_finished() or frozen.user_attrs.get("worker") != self._worker:
            raise Lost

    def _beat(self, count: int) -> None:
        self.parameters.storage.set_trial_user_attr(self.parameters._trial_id, "beat", count)

    def _frozen(self) -> FrozenTrial:
        return self.parameters.storage.get_trial(self.parameters._trial_id)


class _Unbooked:
    """A storage in which the pruner only thinks that it notes the value that a rung was reached
    with; all else it reads is the real one's."""

    def __init__(self, storage: optuna.storages.BaseStorage) -> None:
        self._storage, self.is_rung = storage, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self.is_rung = True
