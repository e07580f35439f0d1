"""The final training: from hyperparameters to the best epoch's weights."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from capfinder import files, log
from capfinder.data.versions import Dataset
from capfinder.errors import InputError, StageFailedError
from capfinder.interrupts import Interrupt
from capfinder.log import logger
from capfinder.stages import assembly
from capfinder.stages.assembly import TrainedModel
from capfinder.tracking import Tracker
from capfinder.training import loop, schedules
from capfinder.training.checkpoint import Checkpoints

STOPPED_TEXT = {
    "max_epochs": "all epochs done",
    "patience": "val_loss had stopped falling",
    "interrupted": "ended by Ctrl-C",
}


@dataclass(frozen=True)
class TrainResult:
    key: str  # equal for equal weights that came about in the same way
    model: TrainedModel
    history: list[dict[str, Any]]  # one row an epoch, as loop.fit documents
    stopped: str

    def summary(self) -> str:
        best = self.history[self.model.best_epoch - 1]
        return (
            f"{len(self.history)} epochs ({STOPPED_TEXT[self.stopped]}); best epoch "
            f"{self.model.best_epoch}: val_loss {best['val_loss']:.4f}, "
            f"val_accuracy {best['val_accuracy']:.1%}"
        )


class Training:
    """One training and its checkpoints, keyed by all that its weights depend on."""

    def __init__(self, config: ConfigDict, *, dataset: Dataset, hyperparameters: Any) -> None:
        self.config, self.dataset, self.hyperparameters = config, dataset, hyperparameters
        self.about = {
            "dataset": dataset.fingerprint,
            "model_type": config.shared_params.model_type,
            "hyperparameters": dataclasses.asdict(hyperparameters),
            "settings": _what_matters(config),
        }
        self.key = files.fingerprint(self.about)
        self.directory = Path(config.shared_params.output_dir) / "checkpoints" / self.key[:16]

    @property
    def _outcome_path(self) -> Path:
        return self.directory / "outcome.json"

    def is_finished(self) -> bool:
        """It ran to its end; after a Ctrl-C a rerun goes on."""
        if not self._outcome_path.exists():
            return False
        outcome = files.read_json(self._outcome_path)
        best = self.directory / "best" / str(outcome["best_epoch"])
        return bool(outcome["stopped"] != "interrupted" and best.is_dir())

    def run(self, *, tracker: Tracker, interrupt: Interrupt) -> TrainResult:
        """Trains, or goes on from the latest checkpoint, or gives a finished training again.

        Raises: loop.DivergedError; StageFailedError when checkpoints can't be written."""
        if self.is_finished():
            logger.info("This training has already run to its end; its best epoch is used")
            return self.load()
        # After a Ctrl-C it told of a best epoch that going on may replace.
        self._outcome_path.unlink(missing_ok=True)
        try:
            with interrupt.graceful("finishing with the best epoch so far"):
                fitted = self._fit(tracker, interrupt)
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if reason := assembly.out_of_memory(error, self.config):
                raise StageFailedError(f"Training: {reason}") from error
            raise
        files.write_json(
            self._outcome_path,
            {
                "stopped": fitted.stopped,
                "best_epoch": fitted.best_epoch,
                "history": fitted.history,
                "about": self.about,
            },
        )
        return self.load()

    def _fit(self, tracker: Tracker, interrupt: Interrupt) -> loop.FitResult:
        config = self.config
        train_batches = assembly.train_batches(config, self.dataset)
        validation_batches = assembly.evaluation_batches(config, self.dataset, "validation")
        scheduler = config.lr_scheduler_params
        schedule = schedules.make_schedule(
            scheduler.type,
            scheduler[scheduler.type].to_dict(),
            learning_rate=self.hyperparameters.learning_rate,
            steps_per_epoch=train_batches.steps_per_epoch,
        )
        state = assembly.initial_state(
            config,
            self.hyperparameters,
            schedules.optimizer(schedule.learning_rate),
            seed=config.tune_params.seed,
        )
        max_epochs = config.train_params.max_epochs_final_model
        total = max_epochs * train_batches.steps_per_epoch
        with (
            Checkpoints(
                self.directory, minutes=config.train_params.checkpoint_minutes, about=self.about
            ) as checkpoints,
            log.progress("Training", total=total, unit="steps") as bar,
        ):
            reporter = _Reporter(bar, tracker, max_epochs, checkpoints.read_meta())
            return loop.fit(
                state,
                train_batches=train_batches,
                validation_batches=validation_batches,
                schedule=schedule,
                max_epochs=max_epochs,
                patience=config.train_params.patience,
                checkpoints=checkpoints,
                interrupted=lambda: interrupt.requested,
                on_step=reporter.on_step,
                on_epoch=reporter.on_epoch,
            )

    def load(self) -> TrainResult:
        """The best epoch, from disk. Raises: InputError when nothing was trained yet."""
        if not self._outcome_path.exists():
            raise InputError(
                f"{self.directory.parent}: holds no finished training of these settings; "
                "run the train stage first"
            )
        outcome = files.read_json(self._outcome_path)
        model = assembly.trained_model(
            self.config,
            self.hyperparameters,
            Checkpoints(self.directory).restore_variables(outcome["best_epoch"]),
            best_epoch=outcome["best_epoch"],
        )
        reached = [outcome["stopped"], outcome["best_epoch"], len(outcome["history"])]
        key = files.fingerprint([self.key, reached])
        return TrainResult(key, model, outcome["history"], outcome["stopped"])


def _what_matters(config: ConfigDict) -> dict[str, Any]:
    """The settings that change the weights (the dataset and hyperparameters stand beside them)."""
    scheduler = config.lr_scheduler_params
    return {
        "seed": config.tune_params.seed,
        "patience": config.train_params.patience,
        "max_epochs": config.train_params.max_epochs_final_model,
        "num_classes": config.shared_params.num_classes,
        "batch_size": config.shared_params.batch_size,
        "dtype": config.shared_params.dtype,
        "compute_dtype": config.runtime_params.compute_dtype,
        "use_augmentation": config.shared_params.use_augmentation,
        "schedule": [scheduler.type, scheduler[scheduler.type].to_dict()],
    }


class _Reporter:
    """Moves the bar, writes each epoch's line, and sends its figures to the tracker."""

    def __init__(
        self, bar: log.Bar, tracker: Tracker, max_epochs: int, resumed: dict[str, Any] | None
    ) -> None:
        self._bar, self._tracker, self._max_epochs = bar, tracker, max_epochs
        self._best = float("inf") if resumed is None else resumed["best_val_loss"]
        self._has_begun = False

    def on_step(self, step: int) -> None:
        if not self._has_begun:
            self._bar.begin_at(step - 1)
            self._has_begun = True
        self._bar.advance(step - self._bar.done)

    def on_epoch(self, row: dict[str, Any]) -> None:
        is_best = row["val_loss"] < self._best
        self._best = min(self._best, row["val_loss"])
        logger.info(
            "epoch %d/%d  loss %.4f  accuracy %.1f%%  val_loss %.4f  val_accuracy %.1f%%  "
            "learning rate %.3g  %.1f s%s",
            row["epoch"],
            self._max_epochs,
            row["loss"],
            100 * row["accuracy"],
            row["val_loss"],
            100 * row["val_accuracy"],
            row["learning_rate"],
            row["seconds"],
            "  best" if is_best else "",
        )
        self._bar.note(f"best val_loss {self._best:.4f}")
        figures = {name: value for name, value in row.items() if name != "epoch"}
        self._tracker.log_metrics(figures, step=self._bar.done, epoch=row["epoch"])
