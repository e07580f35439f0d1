"""The search for hyperparameters: a study of short trainings, gone on with where it was left.

A study is found again by its data and settings. tune_params.overwrite throws the old one away at
the start of the stage, in every run that asks for it."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from capfinder import files, log, models
from capfinder.data.versions import Dataset
from capfinder.interrupts import Interrupt
from capfinder.log import logger
from capfinder.stages import search_check, search_params
from capfinder.stages.trial import row, show
from capfinder.stages.trials import BEST, keep_best, run_trials
from capfinder.tracking import Tracker

if TYPE_CHECKING:  # `best` and `without_study` do without Optuna
    from capfinder.stages.study import Study


@dataclass(frozen=True)
class TuneResult:
    """The hyperparameters to train with, and where they come from."""

    hyperparameters: Any  # of the architecture
    source: str  # "study", "model_params" or "init_from"
    best_value: float | None = None  # validation accuracy
    trial: int | None = None  # the best one's number
    trials: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # see trial.row
    directory: Path | None = None  # the study's
    interrupted: bool = False

    @property
    def num_finished(self) -> int:
        """Trials that count toward max_trials."""
        return sum(one["state"] in ("complete", "pruned") for one in self.trials)

    def summary(self) -> str:
        ended = ", ended by Ctrl-C" if self.interrupted else ""
        if self.source != "study":
            return self.source + (ended or ", no tuning")
        return (
            f"{log.counted(self.num_finished, 'trial')}{ended}; best: trial {self.trial}, "
            f"val_accuracy {self.best_value:.1%}"
        )

    def as_record(self, output_dir: Path) -> dict[str, Any]:
        """The same in JSON's types, the directory relative to output_dir."""
        record = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        record["hyperparameters"] = dataclasses.asdict(self.hyperparameters)
        record["directory"] = self.directory and str(self.directory.relative_to(output_dir))
        return record


def without_study(config: ConfigDict) -> TuneResult:
    """model_params, over the architecture's defaults."""
    return TuneResult(_model_params(config), "model_params")


def run(
    config: ConfigDict, *, dataset: Dataset, tracker: Tracker, interrupt: Interrupt
) -> TuneResult:
    """Runs trials until max_trials are complete or pruned, over all reruns and workers.

    A first Ctrl-C leaves the running trial to a rerun and gives the best so far.
    Raises: StageFailedError after max_trials failures; SettingsError for search_params or a
    storage that can't be used; InputError when `overwrite` would take another worker's study."""
    if config.tune_params.max_trials == 0:
        return without_study(config)
    ends = interrupt.graceful("ending the tuning with the best trial so far")
    with ends, open_study(config, dataset) as study:
        rows = search(config, dataset, study, tracker, interrupt)
        result = _result(config, study, rows, interrupted=interrupt.requested)
    tracker.log_parameters({"best": dataclasses.asdict(result.hyperparameters)})
    if result.best_value is not None:
        tracker.log_metrics({"best_val_accuracy": result.best_value})
    return result


def search(
    config: ConfigDict, dataset: Dataset, study: "Study", tracker: Tracker, interrupt: Interrupt
) -> list[dict[str, Any]]:
    """Runs trials and shows the table of all that there are then, whatever ended it."""
    try:
        run_trials(config, dataset, study, tracker, interrupt)
    finally:
        rows, found = [row(trial) for trial in study.trials()], study.best()
        show(rows, best=None if found is None else found.number)
    return rows


def best(config: ConfigDict, *, dataset: Dataset) -> TuneResult | None:
    """The best of the study of these settings, from disk; None when there is none."""
    directory = study_directory(config)
    if not (directory / BEST).exists():
        return None
    known = files.read_json(directory / BEST)
    if known["fingerprint"] != fingerprint(config, dataset):
        return None
    return TuneResult(
        _parsed(config, known["hyperparameters"]),
        "study",
        known["value"],
        known["trial"],
        known["trials"],
        directory,
    )


def _parsed(config: ConfigDict, values: dict[str, Any]) -> Any:
    return models.parse_hyperparameters(
        config.shared_params.model_type, values, target_length=config.shared_params.target_length
    )


def _model_params(config: ConfigDict) -> Any:
    return _parsed(config, config.model_params.to_dict())


def study_directory(config: ConfigDict) -> Path:
    name = f"{config.tune_params.comet_project_name}_{config.shared_params.model_type}"
    root = Path(config.shared_params.output_dir).expanduser().resolve() / "tuner_models"
    return root / re.sub(r"[^\w.-]", "_", name)


def fingerprint(config: ConfigDict, dataset: Dataset) -> str:
    return files.fingerprint(facts(config, dataset))


def facts(config: ConfigDict, dataset: Dataset) -> dict[str, Any]:
    """Equal for runs whose trials belong in one study.

    max_trials isn't part of it: with a higher one, the same study goes on."""
    tune, shared = config.tune_params, config.shared_params
    return {
        "dataset": dataset.fingerprint,
        "strategy": tune.tuning_strategy,
        "factor": tune.factor if tune.tuning_strategy == "hyperband" else None,
        "seed": tune.seed,
        "patience": tune.patience,
        "max_epochs": tune.max_epochs_hpt,
        "model_type": shared.model_type,
        "num_classes": shared.num_classes,
        "target_length": shared.target_length,
        "batch_size": shared.batch_size,
        "dtype": [shared.dtype, config.runtime_params.compute_dtype],
        "microbatch": config.runtime_params.microbatch,
        "use_augmentation": shared.use_augmentation,
        "model_params": config.model_params.to_dict(),
        "search_params": config.search_params.to_dict(),
    }


def open_study(config: ConfigDict, dataset: Dataset) -> "Study":
    from capfinder.stages.study import Plan, Study

    tune, directory = config.tune_params, study_directory(config)
    search_check.check(
        config.search_params.to_dict(),
        architecture=models.architecture(config.shared_params.model_type),
        model_type=config.shared_params.model_type,
        target_length=config.shared_params.target_length,
    )
    study = Study(
        directory,
        fingerprint=fingerprint(config, dataset),
        name_prefix=config.shared_params.model_type,
        storage=tune.storage,
        plan=Plan(
            strategy=tune.tuning_strategy,
            max_trials=tune.max_trials,
            max_epochs=tune.max_epochs_hpt,
            factor=tune.factor,
            seed=tune.seed,
        ),
        first=_first_trial(config),
        facts=facts(config, dataset),
        overwrite=tune.overwrite,
    )
    if tune.overwrite:
        (directory / BEST).unlink(missing_ok=True)
    return study


def _first_trial(config: ConfigDict) -> dict[str, Any] | None:
    """model_params as a trial's parameters, where the search space holds them."""
    try:
        return search_params.first_trial(
            _model_params(config),
            config.search_params.to_dict(),
            architecture=models.architecture(config.shared_params.model_type),
            target_length=config.shared_params.target_length,
        )
    except search_params.OutsideError as error:
        logger.info("model_params lie outside the search space (%s): trial 0 is drawn", error)
        return None


def _result(
    config: ConfigDict, study: "Study", rows: list[dict[str, Any]], *, interrupted: bool
) -> TuneResult:
    found = study.best()
    if found is None:
        logger.warning("No trial was finished: training goes on with model_params")
        hyperparameters, source = _model_params(config), "model_params"
        value = number = None
    else:
        keep_best(study)
        hyperparameters, source = _parsed(config, found.user_attrs["hyperparameters"]), "study"
        value, number = found.value, found.number
    return TuneResult(hyperparameters, source, value, number, rows, study.directory, interrupted)
