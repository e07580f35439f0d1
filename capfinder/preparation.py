"""What is checked before anything is written, and --dry_run, which stops there."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from capfinder import capmap, log, models, settings, tracking
from capfinder.allowed import shown
from capfinder.errors import InputError, SettingsError
from capfinder.log import logger
from capfinder.run_record import RunRecord

if TYPE_CHECKING:
    from capfinder.stages.start import Start

KEPT_START = "init_from"  # below output_dir


def prepared(config: ConfigDict) -> ConfigDict:
    """The config checked, its directories absolute: what is relative or `~` here is so everywhere.

    Raises: SettingsError."""
    config = settings.checked(config)
    for group, name, must_be_set in (
        ("etl_params", "caps_data_dir", True),
        ("shared_params", "output_dir", True),
        ("split_params", "test_caps_data_dir", False),
        ("runtime_params", "compilation_cache_dir", False),
        ("train_params", "init_from", False),
    ):
        value = config[group][name]
        if must_be_set and value in ("", settings.PLACEHOLDER_DIRECTORY):
            raise SettingsError(
                f"{group}.{name}={value!r}: a placeholder; set it to a directory of yours"
            )
        if value:
            config[group][name] = _absolute(f"{group}.{name}", value)
    if config.split_params.test_caps_data_dir == config.etl_params.caps_data_dir:
        raise SettingsError(
            f"split_params.test_caps_data_dir={config.split_params.test_caps_data_dir}: is "
            "etl_params.caps_data_dir, whose reads can't be both trained on and tested with"
        )
    if config.train_params.init_from == config.shared_params.output_dir:
        raise SettingsError(
            f"train_params.init_from={config.train_params.init_from}: is shared_params.output_dir, "
            "where the new model goes; choose another output_dir"
        )
    if config.tune_params.storage is not None and config.tune_params.max_trials:
        config.tune_params.storage = _usable_storage(config.tune_params.storage)
    return config


def _absolute(key: str, value: str) -> str:
    try:
        path = Path(value).expanduser().resolve()
        path.is_dir()  # too long a name, or a directory above that may not be looked into
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, ~nobody
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(f"{key}={shown(value)}: can't be used ({reason})") from None
    return str(path)


def _usable_storage(url: str) -> str:
    """The URL, that of a SQLite file with its whole path.

    Raises: SettingsError when the database can't be opened: else it would show after hours of ETL.
    A SQLite file isn't made."""
    import sqlalchemy

    reason = ""
    try:
        engine = sqlalchemy.create_engine(url)
        database = engine.url.database or ""
        if engine.url.get_backend_name() != "sqlite":
            engine.connect().close()
        elif not Path(database).parent.is_dir():
            reason = f"no directory {Path(database).parent}"
        elif database and not database.startswith((":", "file:")):
            whole = engine.url.set(database=str(Path(database).resolve()))
            url = whole.render_as_string(hide_password=False)
    except Exception as error:  # of the database's driver, when that is imported, any
        reason = " ".join(f"{type(error).__name__}: {error}".split())
    if reason:
        safe = settings.without_password(url)
        raise SettingsError(
            f"tune_params.storage={shown(safe)}: can't be opened ({reason.replace(url, safe)})"
        )
    return url


def check_devices(config: ConfigDict) -> None:
    """Raises: SettingsError when runtime_params.mesh asks for more than there are."""
    if config.runtime_params.mesh is not None:
        from capfinder.training import devices

        devices.check_limit(config.runtime_params.mesh)


def class_names(config: ConfigDict) -> list[str]:
    """Of the classes to train, by their number."""
    return capmap.class_names(
        config.etl_params.class_map.to_dict(), config.shared_params.num_classes
    )


def check_model_settings(config: ConfigDict) -> None:
    """What only the architecture and the schedule can judge: a mistake must not show after hours of
    ETL.

    Raises: SettingsError."""
    from capfinder.stages import search_check
    from capfinder.training import schedules

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
    schedule = config.lr_scheduler_params.type
    try:
        schedules.make_schedule(
            schedule, settings.schedule_params(config), learning_rate=1e-3, steps_per_epoch=1
        )
    except ValueError as error:
        raise SettingsError(f"lr_scheduler_params.{schedule}: {error}") from None


def say_what_is_unused(config: ConfigDict) -> None:
    """Settings that were given and change nothing."""
    values = settings.flat(settings.to_dict(config))
    for key in sorted(settings.of_other_schedules(values)):
        if values[key] != settings.BY_KEY[key].default:
            logger.warning(
                "%s=%s: not used, as lr_scheduler_params.type is %s",
                key,
                shown(values[key]),
                config.lr_scheduler_params.type,
            )
    if config.search_params and (why := why_not_tuned(config)):
        logger.warning("search_params: not used, as nothing is tuned (%s)", why)


def why_not_tuned(config: ConfigDict) -> str:
    if config.train_params.init_from is not None:
        return "train_params.init_from: the hyperparameters are those of the model there"
    if config.tune_params.max_trials == 0:
        return "tune_params.max_trials=0: model_params are trained"
    return ""


def start(config: ConfigDict, *, keep: bool = False) -> "Start | None":
    """The model that train_params.init_from names, if any; once it is gone, the run's copy of it.

    keep: the run gets that copy.
    Raises: InputError, SettingsError when it can't be gone on from; StageFailedError when it can't
    be kept."""
    if config.train_params.init_from is None:
        return None
    from capfinder.stages import assembly
    from capfinder.stages import start as starting
    from capfinder.trained import kept

    path, output_dir = config.train_params.init_from, config.shared_params.output_dir
    try:
        source = kept.source(Path(path), Path(output_dir) / KEPT_START, keep=keep)
    except InputError as error:
        raise InputError(f"{starting.SETTING}: {error}") from None
    assembly.configure_jax(config)  # the other model may be of another dtype
    found = starting.from_model(
        config, source.model, class_names=source.class_names, class_map=source.class_map
    )
    logger.info("Training is %s", found.sentence())
    return found


def explain(config: ConfigDict, *, stages: tuple[str, ...]) -> None:
    """--dry_run: checks all that can be checked without writing, and says what would run."""
    config = prepared(config)
    output_dir = Path(config.shared_params.output_dir)
    tracking.check(config.tracking_params.mode)
    if stages != ("etl",):
        check_model_settings(config)
    _check_writable(output_dir)
    log.start(None)
    say_what_is_unused(config)
    if "etl" in stages:
        _explain_input(config)
    else:
        RunRecord(output_dir).dataset_for(config)
    if stages != ("etl",):
        if not config.runtime_params.distributed:  # else there are those of the others, too
            check_devices(config)
        start(config)
    logger.info("Stages: %s", ", ".join(stages))
    tune = config.tune_params
    logger.info(
        "Model: %s, schedule %s, %s, then at most %d epochs",
        config.shared_params.model_type,
        config.lr_scheduler_params.type,
        "no tuning"
        if why_not_tuned(config)
        else f"at most {log.counted(tune.max_trials, 'trial')} of "
        f"{log.counted(tune.max_epochs_hpt, 'epoch')}",
        config.train_params.max_epochs_final_model,
    )
    logger.info("Output: %s. Nothing was written (dry run).", output_dir)


def _explain_input(config: ConfigDict) -> None:
    """As the ETL chooses its input. Raises: InputError, SettingsError when there would be none."""
    from capfinder.data import versions
    from capfinder.stages import etl, remote

    root, caps_data_dir = etl.versions_root(config), Path(config.etl_params.caps_data_dir)
    wanted = config.etl_params.use_remote_dataset_version
    if wanted not in ("", "latest"):
        local = versions.named(root, wanted)
        if local is None:
            remote.required(config, root)
        where = "Comet" if local is None else local.directory
        logger.info("Input: version %s of the dataset, from %s", wanted, where)
    elif caps_data_dir.exists():
        etl.expect(config).check_space(_existing(Path(config.shared_params.output_dir)))
    else:
        local, comet = versions.latest(root), remote.connect(config, root)
        if local is None and comet is None:
            raise InputError(
                f"etl_params.caps_data_dir={caps_data_dir}: no such directory, and no dataset "
                f"version in {root} to use instead. Name the directory of the cap-signal CSV files."
            )
        places = ["Comet"] if comet is not None else []
        places += [str(local.directory)] if local is not None else []
        logger.warning(
            "Input: %s doesn't exist; the newest dataset would be used, from %s",
            caps_data_dir,
            " or ".join(places),
        )


def _existing(path: Path) -> Path:
    """The directory or file that is there already, of a path and those above it."""
    return next(each for each in (path, *path.parents) if each.exists())


def _check_writable(output_dir: Path) -> None:
    existing = _existing(output_dir)
    reason = ""
    if not existing.is_dir():
        reason = f"{existing} isn't a directory"
    elif not os.access(existing, os.W_OK | os.X_OK):
        reason = f"{existing} may not be written to"
    if reason:
        raise InputError(f"shared_params.output_dir={output_dir}: can't be written to ({reason})")
