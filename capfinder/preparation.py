"""What is checked before anything is written, and --dry_run, which stops there."""

from pathlib import Path

from ml_collections import ConfigDict

from capfinder import log, models, settings, tracking
from capfinder.errors import SettingsError
from capfinder.log import logger


def prepared(config: ConfigDict) -> ConfigDict:
    """The config checked, its directories absolute: what is relative or `~` here is so everywhere.

    Raises: SettingsError."""
    config = settings.checked(config)
    for group, name, must_be_set in (
        ("etl_params", "caps_data_dir", True),
        ("shared_params", "output_dir", True),
        ("split_params", "test_caps_data_dir", False),
        ("runtime_params", "compilation_cache_dir", False),
    ):
        value = config[group][name]
        if must_be_set and value in ("", settings.PLACEHOLDER_DIRECTORY):
            raise SettingsError(
                f"{group}.{name}={value!r}: a placeholder; set it to a directory of yours"
            )
        if value:
            config[group][name] = str(Path(value).expanduser().resolve())
    return config


def check_hyperparameters(config: ConfigDict) -> None:
    """What only the architecture can judge: a mistake must not show after hours of ETL."""
    from capfinder.stages import search_check

    model_type, target_length = config.shared_params.model_type, config.shared_params.target_length
    models.parse_hyperparameters(
        model_type, config.model_params.to_dict(), target_length=target_length
    )
    search_check.check(
        config.search_params.to_dict(),
        architecture=models.architecture(model_type),
        model_type=model_type,
        target_length=target_length,
    )


def explain(config: ConfigDict, *, stages: tuple[str, ...]) -> None:
    """--dry_run: checks all that can be checked without writing, and says what would run."""
    config = prepared(config)
    output_dir = Path(config.shared_params.output_dir)
    caps_data_dir = Path(config.etl_params.caps_data_dir)
    tracking.check(config.tracking_params.mode)
    check_hyperparameters(config)
    log.start(None)
    if caps_data_dir.is_dir():
        from capfinder.stages import etl

        etl.expect(config).check_space(_existing_parent(output_dir))
    else:
        logger.warning(
            "Input: %s doesn't exist; the newest dataset in %s would be used, if there is one",
            caps_data_dir,
            output_dir,
        )
    logger.info("Stages: %s", ", ".join(stages))
    logger.info(
        "Model: %s, schedule %s, at most %d trials of %d epochs, then at most %d epochs",
        config.shared_params.model_type,
        config.lr_scheduler_params.type,
        config.tune_params.max_trials,
        config.tune_params.max_epochs_hpt,
        config.train_params.max_epochs_final_model,
    )
    logger.info("Output: %s. Nothing was written (dry run).", output_dir)


def _existing_parent(path: Path) -> Path:
    return next(each for each in (path, *path.parents) if each.is_dir())
