"""Trials one after the other until the study has enough, and what is said of them meanwhile."""

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from capfinder import files, log
from capfinder.data.versions import Dataset
from capfinder.errors import StageFailedError
from capfinder.interrupts import Interrupt
from capfinder.log import logger
from capfinder.stages import assembly
from capfinder.stages.trial import Trainer, row
from capfinder.tracking import Tracker

if TYPE_CHECKING:  # who only wants the names below does without Optuna
    from capfinder.stages.study import Study, Trial

BEST = "best_hyperparameters.json"
WAIT_SECONDS = 1.0  # between two looks at what other workers are doing
ADVICE = (
    "If memory ran out, lower shared_params.batch_size; if the loss was no number, try lower "
    'learning rates, such as search_params={"learning_rate": {"choices": [0.001, 0.0001]}}. '
    "A higher tune_params.max_trials goes on with this study; tune_params.overwrite=true starts "
    "anew."
)


def run_trials(
    config: ConfigDict, dataset: Dataset, study: "Study", tracker: Tracker, interrupt: Interrupt
) -> None:
    """Until max_trials are finished, by whatever worker, the time is over or Ctrl-C came.

    Raises: StageFailedError when as many trials of the study have failed."""
    tune, finished = config.tune_params, study.finished()
    if finished >= tune.max_trials:
        logger.info("The study is finished: it has %d of %d trials", finished, tune.max_trials)
        return
    if finished:
        logger.info("The study goes on: %d of %d trials are finished", finished, tune.max_trials)
    train_batches = assembly.train_batches(config, dataset)
    steps = tune.max_epochs_hpt * train_batches.steps_per_epoch
    total = (tune.max_trials - finished) * steps
    with log.progress("Tuning", total=total, unit="steps") as bar:
        trainer = Trainer(
            config,
            train_batches,
            assembly.evaluation_batches(
                config, dataset, "validation", placement=train_batches.placement
            ),
            tracker,
            interrupt,
            bar,
            best=study.best(),
        )
        told = {trial.number for trial in study.trials() if trial.state.is_finished()}

        def look() -> None:
            trainer.best = study.best()
            for trial in study.trials():
                if trial.state.is_finished() and trial.number not in told:
                    told.add(trial.number)
                    is_ours = trial.number in trainer.trained
                    _tell(trial, trainer.best, is_ours=is_ours)
                    if not is_ours and trial.state.name != "FAIL":
                        bar.advance(steps)
            if study.finished() < tune.max_trials:
                _check_failures(study, tune.max_trials, ours=trainer.trained)

        for trial in _next_trials(study, interrupt, tune.timeout_minutes, look):
            trainer.run(trial)
            keep_best(study)


def _next_trials(
    study: "Study",
    interrupt: Interrupt,
    timeout_minutes: float | None,
    look: Callable[[], None],
) -> Iterator["Trial"]:
    """Trials to run, until none is left, time is over or Ctrl-C came; looks before each."""
    from capfinder.stages.study import Waiting

    deadline = time.monotonic() + 60 * timeout_minutes if timeout_minutes else float("inf")
    has_waited = False
    while True:
        look()
        if interrupt.requested:
            return
        if time.monotonic() >= deadline:
            logger.warning("tune_params.timeout_minutes is over: no new trial starts")
            return
        try:
            trial = study.next_trial()
        except Waiting as others:
            if not has_waited:
                logger.info("Waiting for other workers, who run the last trials: %s", others)
            has_waited = True
            time.sleep(WAIT_SECONDS)
            continue
        if trial is None:
            return
        yield trial


def _tell(trial: Any, best: Any, *, is_ours: bool) -> None:
    """A line on how a trial ended, with the best so far."""
    from capfinder.stages.study import worker_name

    ended = row(trial)
    by = "" if is_ours else f" (by {worker_name(trial)})"
    so_far = "" if best is None else f"; best so far: trial {best.number}, {best.value:.1%}"
    if ended["state"] == "fail":
        logger.warning("trial %d%s: failed, %s%s", trial.number, by, ended["reason"], so_far)
        return
    epochs = ended["epochs"]
    length = log.counted(epochs, "epoch")
    value = "" if trial.value is None else f", val_accuracy {trial.value:.1%}"
    logger.info("trial %d%s: %s, %s%s%s", trial.number, by, ended["state"], length, value, so_far)


def _check_failures(study: "Study", max_trials: int, *, ours: set[int]) -> None:
    """Those of earlier runs and other workers count: a run that is started again and again by a
    scheduler must come to an end."""
    failed = [trial for trial in study.trials() if trial.state.name == "FAIL"]
    if len(failed) < max_trials:
        return
    others = sum(trial.number not in ours for trial in failed)
    whose = f", {others} of them in earlier runs or other workers" if others else ""
    best = study.best()
    use = "" if best is None else " --stage=train,evaluate,export trains the best so far."
    raise StageFailedError(
        f"Tuning: {log.counted(len(failed), 'trial')} failed{whose}; the last one: "
        f"{failed[-1].user_attrs.get('reason', 'unknown reason')}. {ADVICE}{use}"
    )


def keep_best(study: "Study") -> None:
    """Writes the best trial to the study's directory, with all that were begun."""
    with study.exclusively():  # another worker may know of more trials
        found = study.best()
        if found is None:
            return
        record = {
            "hyperparameters": found.user_attrs["hyperparameters"],
            "value": found.value,
            "trial": found.number,
            "source": "study",
            "fingerprint": study.fingerprint,
            "study": study.name,
            "trials": [row(trial) for trial in study.trials()],
        }
        files.write_json(study.directory / BEST, record)
