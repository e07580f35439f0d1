"""One trial of tuning: drawn hyperparameters, a short training, and how it ends."""

import dataclasses
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
from ml_collections import ConfigDict

from capfinder import log, models
from capfinder.errors import SettingsError
from capfinder.interrupts import Interrupt
from capfinder.stages import assembly, memory
from capfinder.stages.search_params import SearchTrial
from capfinder.tracking import Tracker
from capfinder.training import loop, schedules

if TYPE_CHECKING:
    from capfinder.stages.study import Trial


CLEAR_EVERY = 10  # trials; programs compiled for the shapes of past ones pile up until then
FAILS_ALONE = (loop.DivergedError, SettingsError, MemoryError, memory.OutOfMemoryError)


class _Pruned(Exception):
    """The trial isn't worth its remaining epochs."""


@dataclass
class Trainer:
    """Trains one trial after the other on the same batches."""

    config: ConfigDict
    train_batches: Any
    validation_batches: Any
    tracker: Tracker
    interrupt: Interrupt
    bar: log.Bar  # in steps
    best: Any  # the study's best trial so far, None at first
    trained: set[int] = field(default_factory=set)  # numbers of the trials

    def run(self, trial: "Trial") -> None:
        """Trains the trial and tells the study how it ended.

        A signal leaves it a running trial that a rerun takes up again; so does an error of a kind
        that isn't known to be the trial's own, but not for ever."""
        from capfinder.stages.study import Lost

        before, steps = self.bar.done, 0
        self.trained.add(trial.number)
        try:
            end, steps = self._train(trial)
            end()
            self.bar.advance(before + steps - self.bar.done)
        except Lost:
            log.logger.warning("trial %d: another worker has it now, or deleted it", trial.number)
            trial.close()
            self.trained.remove(trial.number)
            self.bar.advance(before - self.bar.done)
        except (KeyboardInterrupt, OSError):
            trial.leave()
            raise
        except BaseException as error:
            trial.abandon(" ".join(f"{type(error).__name__}: {error}".split()))
            raise
        finally:
            if not steps or len(self.trained) % CLEAR_EVERY == 0:
                jax.clear_caches()
            gc.collect()

    def _train(self, trial: "Trial") -> tuple[Callable[[], None], int]:
        """How the trial ends, and its share of the bar: a failed one gives its place away."""
        steps = self.config.tune_params.max_epochs_hpt * self.train_batches.steps_per_epoch
        try:
            value = self._best_accuracy(trial)
        except _Pruned:
            return trial.prune, steps
        except FAILS_ALONE as error:
            return partial(trial.fail, str(error)), 0
        if value is None:
            return trial.leave, 0
        return partial(trial.complete, value), steps

    def _best_accuracy(self, trial: "Trial") -> float | None:
        """The best epoch's validation accuracy; None when interrupted.

        Raises: _Pruned, and what drawing and training raise."""
        hyperparameters = draw(self.config, trial.parameters)
        with memory.explained(self.config, hyperparameters, every_process=False):
            return self._fit(trial, hyperparameters)

    def _fit(self, trial: "Trial", hyperparameters: Any) -> float | None:
        config, tune, before = self.config, self.config.tune_params, self.bar.done
        schedule = schedules.make_schedule(
            "constant",
            {},
            learning_rate=hyperparameters.learning_rate,
            steps_per_epoch=self.train_batches.steps_per_epoch,
        )
        state = assembly.initial_state(
            config, hyperparameters, schedules.optimizer(schedule.learning_rate), seed=tune.seed
        )
        state = self.train_batches.placement.replicate(state)
        trial.note(
            hyperparameters=dataclasses.asdict(hyperparameters),
            num_parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        )

        def on_epoch(row: Mapping[str, Any]) -> None:
            if self.interrupt.requested:
                return  # this may be an epoch cut short
            self._show(trial.number, row)
            if trial.report(row["epoch"], row["val_accuracy"]):
                raise _Pruned

        fitted = loop.fit(
            state,
            train_batches=self.train_batches,
            validation_batches=self.validation_batches,
            schedule=schedule,
            max_epochs=tune.max_epochs_hpt,
            patience=tune.patience,
            checkpoints=None,
            interrupted=lambda: self.interrupt.requested,
            on_step=lambda step: self.bar.advance(before + step - self.bar.done),
            on_epoch=on_epoch,
            steps_per_call=config.runtime_params.steps_per_call,
            microbatch=config.runtime_params.microbatch,
            available_bytes=memory.available_bytes,
        )
        if self.interrupt.requested:
            return None
        return max(float(row["val_accuracy"]) for row in fitted.history)

    def _show(self, number: int, row: Mapping[str, Any]) -> None:
        figures = {name: value for name, value in row.items() if name != "epoch"}
        self.tracker.log_metrics(
            figures, step=row["epoch"], epoch=row["epoch"], prefix=f"trial_{number}"
        )
        best = ""
        if self.best is not None:
            best = f", best so far {self.best.value:.1%} (trial {self.best.number})"
        self.bar.note(
            f"trial {number} epoch {row['epoch']}: val_accuracy {row['val_accuracy']:.1%}{best}"
        )


def draw(config: ConfigDict, parameters: Any) -> Any:
    """Hyperparameters from a trial's parameters, in the ranges of search_params.

    Raises: SettingsError when such a model can't take the dataset's signals."""
    model_type, length = config.shared_params.model_type, config.shared_params.target_length
    architecture = models.architecture(model_type)
    trial = SearchTrial(parameters, config.search_params.to_dict())
    hyperparameters = architecture.search_space(trial, target_length=length)
    shortest = architecture.minimum_length(hyperparameters)
    if length < shortest:
        raise SettingsError(f"needs signals of {shortest} samples, they have {length}")
    return hyperparameters


def row(trial: Any) -> dict[str, Any]:
    """A trial in JSON's types: its state in lower case, its value a validation accuracy."""
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "value": trial.value,
        "epochs": len(trial.intermediate_values),
        "seconds": trial.user_attrs.get("seconds"),
        "reason": trial.user_attrs.get("reason", ""),
        "params": dict(trial.params),
        "num_parameters": trial.user_attrs.get("num_parameters"),
    }


def show(rows: list[dict[str, Any]], *, best: int | None) -> None:
    """The table of trials, unfinished and failed ones included; best: the number of the best."""

    def shown(value: Any, form: str) -> str:
        return "" if value is None else format(value, form)

    log.table(
        "Trials",
        ("trial", "state", "epochs", "val_accuracy", "learning rate", "weights", "s", "reason"),
        [
            (
                one["number"],
                one["state"] + (" (best)" if one["number"] == best else ""),
                one["epochs"],
                shown(one["value"], ".1%"),
                shown(one["params"].get("learning_rate"), ".2g"),
                shown(one["num_parameters"], ","),
                shown(one["seconds"], ".1f"),
                one["reason"],
            )
            for one in rows
        ],
        left=(0, 1, 7),
    )
