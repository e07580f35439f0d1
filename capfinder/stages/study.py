"""The Optuna study behind tuning: who may start a trial, what it draws, what happens to it.

Trials survive their worker. A running trial has a lock file that the kernel frees when its worker
dies, however it dies; the next worker that sees a running trial without an owner takes it up again
under its own number. Draws depend on the seed, the trial's number, the parameter's name and the
finished trials alone, so a study that was cut short draws what an undisturbed one would."""

import hashlib
import socket
import time
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from capfinder.errors import InputError, SettingsError
from capfinder.settings import without_password
from capfinder.stages import locks

MOST_STARTS = 2  # a trial whose worker died is taken up again once
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Plan:
    """How trials are chosen and pruned."""

    strategy: str  # "random_search", "bayesian_optimization" or "hyperband"
    max_trials: int  # complete and pruned ones, over all reruns and workers
    max_epochs: int
    factor: int  # hyperband: one in `factor` trials goes a rung up
    seed: int


class Waiting(Exception):
    """Every trial left is being run by another worker."""


class Trial:
    """A trial of ours: `parameters` to draw from, then reports, then one of the ends."""

    def __init__(self, trial: optuna.Trial, lock: IO[str], plan: Plan) -> None:
        self.parameters, self.number = trial, trial.number
        self._lock, self._plan = lock, plan
        frozen = trial.study.get_trials(deepcopy=False)[trial.number]
        self._reported = dict(frozen.intermediate_values)  # by an earlier worker
        self._starts = frozen.user_attrs.get("starts", 0)
        self._started = time.monotonic()
        self.note(starts=self._starts + 1)

    def note(self, **facts: Any) -> None:
        """Keeps JSON-able facts with the trial."""
        for name, value in facts.items():
            self.parameters.set_user_attr(name, value)

    def report(self, epoch: int, value: float) -> bool:
        """Reports the value of an epoch (1-based); True when the trial should be pruned now."""
        if epoch not in self._reported:
            self.parameters.report(value, epoch)
        if epoch < max(self._reported, default=0) or epoch >= self._plan.max_epochs:
            return False  # an earlier worker went on from here; or nothing is left to save
        return self.parameters.should_prune()

    def complete(self, value: float) -> None:
        self._end(TrialState.COMPLETE, value)

    def prune(self) -> None:
        self._end(TrialState.PRUNED)

    def fail(self, reason: str) -> None:
        self.note(reason=reason)
        self._end(TrialState.FAIL)

    def leave(self) -> None:
        """Stays a running trial, to be taken up again; the stop doesn't count against it."""
        with suppress(optuna.exceptions.UpdateFinishedTrialError):  # a signal came as it ended
            self.note(starts=self._starts)
        self._lock.close()

    def _end(self, state: TrialState, value: float | None = None) -> None:
        self.note(seconds=round(time.monotonic() - self._started, 1))
        self.parameters.study.tell(self.parameters, value, state=state)
        self._lock.close()


class Study:
    """One study under a fixed name; any number of workers may have it open."""

    def __init__(
        self,
        directory: Path,
        *,
        fingerprint: str,
        name_prefix: str,
        storage: str | None,
        plan: Plan,
        first: Mapping[str, Any] | None,
        overwrite: bool = False,
    ) -> None:
        """Opens the study, or makes it with `first` as its first trial's parameters.

        storage: an Optuna URL; None: a journal file in `directory`.
        Raises: SettingsError when the storage can't be used; InputError when `overwrite` would
        take a study away from another worker."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.directory, self.fingerprint = directory, fingerprint
        self.name = f"{name_prefix}-{fingerprint[:16]}"
        self._locks, self._plan = directory / "locks", plan
        self._locks.mkdir(parents=True, exist_ok=True)
        # Locks say nothing about workers that keep theirs elsewhere.
        self._home = f"{socket.gethostname()}:{directory.resolve()}" if storage else ""
        self._storage = _open_storage(directory, storage)
        with self.exclusively():
            if overwrite:
                self._delete()
            study = self._load()
            if first is not None and not study.get_trials(deepcopy=False):
                study.enqueue_trial(dict(first))

    def exclusively(self) -> AbstractContextManager[None]:
        """Holds the study for itself, for as long as it takes to look and act on it."""
        return locks.held(self._locks / f"{self.name}.lock")

    def trials(self) -> list[FrozenTrial]:
        """Those that were begun."""
        found = self._load().get_trials(deepcopy=False)
        return [trial for trial in found if trial.state != TrialState.WAITING]

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
            taken = 0  # by workers that are alive, as far as one can tell
            elsewhere = 0
            for frozen in self.trials():
                if frozen.state != TrialState.RUNNING:
                    continue
                if self._home and frozen.user_attrs.get("home", self._home) != self._home:
                    elsewhere += 1
                    continue
                lock = self._own(frozen.number)
                if lock is None:
                    taken += 1
                elif trial := self._take_up(frozen.number, lock):
                    return trial
            if self.finished() + taken + elsewhere < self._plan.max_trials:
                return self._start(self._load().ask())
            if taken:
                raise Waiting
            return None

    def _start(self, asked: optuna.Trial) -> Trial:
        lock = self._own(asked.number)
        assert lock is not None, "a new trial's lock is free"
        trial = Trial(asked, lock, self._plan)
        if self._home:
            trial.note(home=self._home)
        return trial

    def _take_up(self, number: int, lock: IO[str]) -> Trial | None:
        """The trial, unless its worker had just ended it or it has already been taken up."""
        study = self._load()
        frozen = study.get_trials(deepcopy=False)[number]
        if frozen.state == TrialState.RUNNING:
            if frozen.user_attrs.get("starts", 0) < MOST_STARTS:
                return Trial(optuna.Trial(study, frozen._trial_id), lock, self._plan)
            reason = f"its process died {MOST_STARTS} times: killed, perhaps for its memory"
            self._storage.set_trial_user_attr(frozen._trial_id, "reason", reason)
            study.tell(number, state=TrialState.FAIL)
        lock.close()
        return None

    def _own(self, number: int) -> IO[str] | None:
        """The trial's lock, or None while a living worker holds it."""
        return locks.take(self._locks / f"{self.name}.trial_{number}")

    def _delete(self) -> None:
        if self.name not in optuna.get_all_study_names(self._storage):
            return
        for frozen in self.trials():
            if frozen.state == TrialState.RUNNING:
                lock = self._own(frozen.number)
                if lock is None:
                    raise InputError(
                        f"tune_params.overwrite: another worker runs trial {frozen.number} of "
                        f"this study in {self._locks.parent}; wait for it to end, or stop it"
                    )
                lock.close()
        optuna.delete_study(study_name=self.name, storage=self._storage)

    def _load(self) -> optuna.Study:
        plan = self._plan
        pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
        if plan.strategy == "hyperband":
            pruner = optuna.pruners.HyperbandPruner(
                min_resource=1, max_resource=plan.max_epochs, reduction_factor=plan.factor
            )
        return optuna.create_study(
            study_name=self.name,
            storage=self._storage,
            direction="maximize",
            sampler=_ReproducibleSampler(plan),
            pruner=pruner,
            load_if_exists=True,
        )


class _ReproducibleSampler(optuna.samplers.BaseSampler):
    """A new sampler for each draw, seeded by (seed, trial number, parameter).

    One sampler for all would draw its first values again after a restart, and a trial taken up
    half drawn would get others than it had."""

    def __init__(self, plan: Plan) -> None:
        self._make = _tpe if plan.strategy != "random_search" else _random
        self._plan = plan

    def _fresh(self, trial: FrozenTrial, name: str) -> optuna.samplers.BaseSampler:
        key = f"{self._plan.seed}/{trial.number}/{name}".encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:4], "big")
        return self._make(self._plan, seed)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._fresh(trial, "").infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        sampler = self._fresh(trial, "")
        sampler.infer_relative_search_space(study, trial)  # TPE keeps its groups from this call
        return sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        sampler = self._fresh(trial, param_name)
        return sampler.sample_independent(study, trial, param_name, param_distribution)


def _random(plan: Plan, seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


def _tpe(plan: Plan, seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of `group`
        return optuna.samplers.TPESampler(
            # Its own 10 would make a study of 10 trials a random search.
            n_startup_trials=max(2, plan.max_trials // 3),
            multivariate=True,
            group=True,  # layers that only deep models have are modelled from those alone
            seed=seed,
        )


def _open_storage(directory: Path, url: str | None) -> optuna.storages.BaseStorage:
    if url is None:
        journal, lock = directory / "journal.log", directory / "locks" / "journal.lock"
        with locks.held(lock):
            locks.drop_unfinished_line(journal)
        backend = JournalFileBackend(str(journal), lock_obj=locks.KernelLock(lock))  # type: ignore[arg-type]
        return optuna.storages.JournalStorage(backend)
    try:
        return optuna.storages.get_storage(url)
    except Exception as error:
        shown = without_password(url)
        reason = str(error).strip().splitlines()[0].replace(url, shown)
        raise SettingsError(f"tune_params.storage={shown!r}: can't be opened ({reason})") from None
