"""One trial of tuning: drawn hyperparameters, a short training, and how it ends."""

import dataclasses
import gc
from collections.abc import Mapping
from dataclasses import dataclass
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
    best: float | None  # validation accuracy of the study so far
    trained: int = 0

    def run(self, trial: "Trial") -> str | None:
        """Trains the trial and tells the study how it ended; the reason, when it failed alone.

        A signal leaves it a running trial that a rerun takes up again."""
        before = self.bar.done
        reason = None
        try:
            value = self._train(trial)
            if value is None:
                trial.leave()
                return None
            trial.complete(value)
            self.best = max(value, self.best or 0.0)
            self._tell(trial, f"val_accuracy {value:.1%}")
        except _Pruned:
            trial.prune()
            self._tell(trial, "pruned: others are ahead at this epoch")
        except FAILS_ALONE as error:
            reason = str(error)
            trial.fail(reason)
        except BaseException:
            trial.leave()
            raise
        finally:
            self.trained += 1
            if reason is not None or self.trained % CLEAR_EVERY == 0:
                jax.clear_caches()
            gc.collect()
        epochs = 0 if reason else self.config.tune_params.max_epochs_hpt
        planned = epochs * self.train_batches.steps_per_epoch
        self.bar.advance(before + planned - self.bar.done)  # a failed trial gives its place away
        return reason

    def _train(self, trial: "Trial") -> float | None:
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
        best = "" if self.best is None else f", best so far {self.best:.1%}"
        self.bar.note(
            f"trial {number} epoch {row['epoch']}: val_accuracy {row['val_accuracy']:.1%}{best}"
        )

    def _tell(self, trial: "Trial", outcome: str) -> None:
        best = "" if self.best is None else f"; best so far {self.best:.1%}"
        log.logger.info("trial %d: %s%s", trial.number, outcome, best)


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


def show(rows: list[dict[str, Any]]) -> None:
    """The table of trials, unfinished and failed ones included."""

    def shown(value: Any, form: str) -> str:
        return "" if value is None else format(value, form)

    log.table(
        "Trials",
        ("trial", "state", "epochs", "val_accuracy", "learning rate", "weights", "s", "reason"),
        [
            (
                one["number"],
                one["state"],
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
