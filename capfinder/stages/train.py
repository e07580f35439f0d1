"""The final training: from hyperparameters to the best epoch's weights."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from capfinder import files, log, models, settings
from capfinder.data.versions import Dataset, open_dataset
from capfinder.errors import InputError, SettingsError
from capfinder.interrupts import Interrupt
from capfinder.log import logger
from capfinder.models import convolution, lstm
from capfinder.stages import assembly, memory, progress
from capfinder.stages.assembly import TrainedModel
from capfinder.stages.start import Start
from capfinder.tracking import Tracker
from capfinder.training import epoch, hosts, loop, schedules
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
    why: str  # how it came about, for the summary of a run

    def summary(self) -> str:
        best = self.history[self.model.best_epoch - 1]
        return (
            f"{log.counted(len(self.history), 'epoch')} ({STOPPED_TEXT[self.stopped]}); "
            f"best epoch {self.model.best_epoch}: val_loss {best['val_loss']:.4f}, "
            f"val_accuracy {best['val_accuracy']:.1%}"
        )


class Training:
    """One training and its checkpoints, keyed by all that its weights depend on."""

    def __init__(
        self,
        config: ConfigDict,
        *,
        dataset: Dataset,
        hyperparameters: Any,
        start: Start | None = None,
    ) -> None:
        self.config, self.dataset, self.hyperparameters = config, dataset, hyperparameters
        self.start = start
        self.about = {
            "dataset": dataset.fingerprint,
            "model_type": config.shared_params.model_type,
            "hyperparameters": dataclasses.asdict(hyperparameters),
            "settings": _what_matters(config),
        }
        if start is not None:
            self.about["start"] = start.key
        self.key = files.fingerprint(self.about)
        self.directory = Path(config.shared_params.output_dir) / "checkpoints" / self.key[:16]

    @property
    def _outcome_path(self) -> Path:
        return self.directory / "outcome.json"

    def is_finished(self) -> bool:
        """It ran to its end; after a Ctrl-C a rerun goes on."""
        if not self._outcome_path.exists():
            return False
        try:
            outcome = read_outcome(self._outcome_path)
        except InputError as error:
            logger.warning("%s", error)
            return False  # it is made again from the checkpoints
        if outcome["stopped"] == "interrupted":
            return False
        # One that is damaged is made again, too: `latest` holds the best weights.
        return Checkpoints(self.directory).has_best(outcome["best_epoch"])

    def run(self, *, tracker: Tracker, interrupt: Interrupt) -> TrainResult:
        """Trains, or goes on from the latest checkpoint, or gives a finished training again.

        Raises: loop.DivergedError; StageFailedError when checkpoints can't be written."""
        if self.is_finished():
            logger.info("This training has already run to its end; its best epoch is used")
            return self.load()
        # After a Ctrl-C it told of a best epoch that going on may replace.
        self._outcome_path.unlink(missing_ok=True)
        with (
            memory.explained(
                self.config, self.hyperparameters, every_process=True, prefix="Training: "
            ),
            interrupt.graceful("finishing with the best epoch so far"),
        ):
            fitted = self._fit(tracker, interrupt)
        ended = {
            "stopped": fitted.stopped,
            "best_epoch": fitted.best_epoch,
            "history": fitted.history,
            "about": self.about,
        }
        files.write_json(self._outcome_path, files.sealed(ended))
        return self.load(why=_why(fitted))

    def _fit(self, tracker: Tracker, interrupt: Interrupt) -> loop.FitResult:
        config = self.config
        train_batches = assembly.train_batches(config, self.dataset, every_process=True)
        validation_batches = assembly.evaluation_batches(
            config, self.dataset, "validation", placement=train_batches.placement
        )
        schedule = schedules.make_schedule(
            config.lr_scheduler_params.type,
            settings.schedule_params(config),
            learning_rate=self.hyperparameters.learning_rate,
            steps_per_epoch=train_batches.steps_per_epoch,
        )
        state = assembly.initial_state(
            config,
            self.hyperparameters,
            schedules.optimizer(schedule.learning_rate),
            seed=config.tune_params.seed,
            replace_weights=None if self.start is None else self.start.in_place_of,
            frozen_trunk=self.start is not None and self.start.is_frozen,
        )
        state = train_batches.placement.replicate(state)
        residency = train_batches.residency
        self._tell_others(residency)
        steps_per_call = epoch.steps_per_call(
            config.runtime_params.steps_per_call, train_batches.steps_per_epoch
        )
        max_epochs = config.train_params.max_epochs_final_model
        total = max_epochs * train_batches.steps_per_epoch
        minutes = config.train_params.checkpoint_minutes
        about = self.about | {"computed_with": _computed_with(steps_per_call)}
        with (
            Checkpoints(self.directory, minutes=minutes, about=about) as checkpoints,
            log.progress("Training", total=total, unit="steps") as bar,
        ):
            advice = progress.advice(
                residency,
                automatic=config.runtime_params.data_residency == "auto",
                platform=jax.default_backend(),
                steps_per_call=steps_per_call,
                steps_per_epoch=train_batches.steps_per_epoch,
            )
            reporter = progress.Reporter(bar, tracker, max_epochs, steps_per_call, advice)
            return loop.fit(
                state,
                train_batches=train_batches,
                validation_batches=validation_batches,
                schedule=schedule,
                max_epochs=max_epochs,
                patience=config.train_params.patience,
                checkpoints=checkpoints,
                interrupted=hosts.agreed(lambda: interrupt.requested),
                on_step=reporter.on_step,
                on_epoch=reporter.on_epoch,
                steps_per_call=steps_per_call,
                microbatch=config.runtime_params.microbatch,
                max_rollbacks=config.train_params.max_rollbacks,
                available_bytes=memory.available_bytes,
            )

    def _tell_others(self, residency: str) -> None:
        """The processes of `train_along` begin: what they read is on the disk by now."""
        config, directory = self.config, self.dataset.directory
        same = ("mesh", "steps_per_call", "microbatch")  # else they would run other programs
        told = {
            "about": self.about,
            "dataset": os.path.relpath(directory, config.shared_params.output_dir),
            "runtime": {name: config.runtime_params[name] for name in same}
            | {"data_residency": residency},
        }
        hosts.tell("training", told)

    def load(self, *, why: str = "reused: already trained to its end") -> TrainResult:
        """The best epoch, from disk. Raises: InputError when nothing was trained yet."""
        if not self._outcome_path.exists():
            raise InputError(
                f"{self.directory.parent}: holds no finished training of these settings; "
                "run the train stage first"
            )
        outcome = read_outcome(self._outcome_path)
        model = assembly.trained_model(
            self.config,
            self.hyperparameters,
            Checkpoints(self.directory).restore_variables(outcome["best_epoch"]),
            best_epoch=outcome["best_epoch"],
        )
        reached = [outcome["stopped"], outcome["best_epoch"], len(outcome["history"])]
        key = files.fingerprint([self.key, reached])
        return TrainResult(key, model, outcome["history"], outcome["stopped"], why)


def read_outcome(path: Path) -> dict[str, Any]:
    """What a training that has ended left: stopped, best_epoch, history, about.

    Raises: InputError when `path` holds something else."""
    try:
        outcome = files.unsealed(files.read_json(path))
        is_one = outcome["stopped"] in STOPPED_TEXT and isinstance(outcome["about"], dict)
        epoch, epochs = outcome["best_epoch"], len(outcome["history"])
        is_one = is_one and type(epoch) is int and 1 <= epoch <= epochs
    except (KeyError, TypeError, ValueError):  # ValueError: of a checksum that is wrong
        is_one = False
    if not is_one:
        raise InputError(f"{path}: doesn't tell how a training ended. Run the train stage again.")
    return outcome


def _why(fitted: loop.FitResult) -> str:
    if not fitted.resumed_at:
        return "new: no checkpoint of these settings and hyperparameters was there"
    epoch = 1 + sum(row["steps"] <= fitted.resumed_at for row in fitted.history)
    if epoch > len(fitted.history):
        return f"went on after epoch {epoch - 1}, which was the last"
    return f"went on from epoch {epoch}, after {fitted.resumed_at:,} steps"


def train_along(config: ConfigDict, *, start: Start | None, interrupt: Interrupt) -> None:
    """What a process does beside the main one: takes its part in the training, if there is one.

    Raises: SettingsError when its settings aren't those of the main one."""
    with interrupt.graceful("process 0 is asked what follows"):
        name, told = hosts.hear("training", "end")
    if name == "end":
        return
    about = told["about"]
    hyperparameters = models.parse_hyperparameters(
        config.shared_params.model_type,
        about["hyperparameters"],
        target_length=config.shared_params.target_length,
    )
    for name, value in told["runtime"].items():
        config.runtime_params[name] = value
    dataset = open_dataset(Path(config.shared_params.output_dir) / told["dataset"])
    training = Training(config, dataset=dataset, hyperparameters=hyperparameters, start=start)
    if training.key != files.fingerprint(about):
        raise SettingsError("runtime_params.distributed: process 0 was started with other settings")
    with interrupt.graceful("finishing with the best epoch so far, in all processes"):
        training._fit(Tracker(None), interrupt)
    with interrupt.graceful("process 0 is asked what follows"):
        hosts.hear("end")


def _what_matters(config: ConfigDict) -> dict[str, Any]:
    """The settings that change the weights (the dataset and hyperparameters stand beside them)."""
    return {
        "seed": config.tune_params.seed,
        "patience": config.train_params.patience,
        "max_epochs": config.train_params.max_epochs_final_model,
        "num_classes": config.shared_params.num_classes,
        "batch_size": config.shared_params.batch_size,
        "dtype": config.shared_params.dtype,
        "compute_dtype": config.runtime_params.compute_dtype,
        "microbatch": config.runtime_params.microbatch,
        "use_augmentation": config.shared_params.use_augmentation,
        "schedule": [config.lr_scheduler_params.type, settings.schedule_params(config)],
    }


def _computed_with(steps_per_call: int) -> dict[str, Any]:
    """What follows from the platform, and changes the weights by no more than rounding."""
    return {
        "platform": jax.default_backend(),
        "lstm": dataclasses.asdict(lstm.own_form()),
        "convolution": convolution.own_form().as_record(),
        "steps_per_call": steps_per_call,
    }
