"""How a study's trials are drawn and pruned.

Draws depend on the seed, the trial's number, the parameter's name and the finished trials alone,
so a study that was cut short draws what an undisturbed one would."""

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class Plan:
    """How trials are chosen and pruned."""

    strategy: str  # "random_search", "bayesian_optimization" or "hyperband"
    max_trials: int  # complete and pruned ones, over all reruns and workers
    max_epochs: int
    factor: int  # hyperband: one in `factor` trials goes a rung up
    seed: int


def make_pruner(plan: Plan) -> optuna.pruners.BasePruner:
    if plan.strategy != "hyperband":
        return optuna.pruners.NopPruner()
    return optuna.pruners.HyperbandPruner(
        min_resource=1, max_resource=plan.max_epochs, reduction_factor=plan.factor
    )


class Sampler(optuna.samplers.BaseSampler):
    """A new sampler for each draw, seeded by (seed, trial number, parameter).

    One sampler for all would draw its first values again after a restart, and a trial taken up
    half drawn would get others than it had."""

    def __init__(self, plan: Plan, first: Mapping[str, Any] | None) -> None:
        """first: the parameters of trial 0, None to draw them too. Enqueued instead, they would
        come twice where two hosts make the study at the same moment."""
        self._make = _tpe if plan.strategy != "random_search" else _random
        self._plan, self._first = plan, first or {}

    def _fresh(self, trial: FrozenTrial, name: str) -> optuna.samplers.BaseSampler:
        key = f"{self._plan.seed}/{trial.number}/{name}".encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:4], "big")
        return self._make(self._plan, seed)

    def _is_given(self, trial: FrozenTrial) -> bool:
        return trial.number == 0 and bool(self._first)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        if self._is_given(trial):
            return {}
        return self._fresh(trial, "").infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if self._is_given(trial):
            return {}
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
        if self._is_given(trial) and param_name in self._first:
            return self._first[param_name]
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
