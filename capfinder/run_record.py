"""run.json: what an output directory holds, and when its results are set aside."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from capfinder import files, settings
from capfinder.errors import InputError
from capfinder.log import logger

# Settings that change no result: all others key what an output directory holds.
WITHOUT_EFFECT = (
    "etl_params.comet_project_name",
    "tune_params.overwrite",
    "tune_params.timeout_minutes",
    "train_params.comet_project_name",
    "train_params.checkpoint_minutes",
    "shared_params.output_dir",
    "runtime_params.data_residency",
    "runtime_params.compilation_cache_dir",
    "tracking_params.mode",
    "debug_code",
)
RESULTS = ("evaluation", "best_model", "report.html", "run.json")
PACKAGES = (
    "capfinder",
    "jax",
    "flax",
    "optax",
    "orbax-checkpoint",
    "optuna",
    "keras",
    "tensorflow-cpu",
    "tensorflow",
    "polars",
    "numpy",
    "comet-ml",
)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def package_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # one of the two TensorFlow builds, say
    return found


def settings_fingerprint(config: ConfigDict) -> str:
    """Equal for two configs that must give the same results."""
    values = settings.to_dict(config)
    for key in WITHOUT_EFFECT:
        *groups, name = key.split(".")
        place = values
        for group in groups:
            place = place[group]
        del place[name]
    return files.fingerprint(values)


def prepare_output_dir(path: Path) -> None:
    """Raises: InputError when nothing can be written there."""
    probe = path / f"{files.PARTIAL}probe-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"shared_params.output_dir={path}: can't be written to ({error.strerror})"
        ) from None


class RunRecord:
    """The content of run.json; saved whole after each change."""

    def __init__(self, output_dir: Path, values: dict[str, Any]) -> None:
        self.output_dir = output_dir
        self.values = values

    def save(self) -> None:
        files.write_json(self.output_dir / "run.json", self.values)

    def update(self, **facts: Any) -> None:
        self.values.update(facts)
        self.save()

    def finish_stage(self, name: str, *, seconds: float, summary: str, key: str = "") -> None:
        """Notes that `name` is done; `key` says on what, for `is_done`."""
        self.values["stages"][name] = {
            "seconds": round(seconds, 1),
            "summary": summary,
            "finished": now(),
            "key": key,
        }
        self.save()

    def is_done(self, name: str, key: str) -> bool:
        return self.values["stages"].get(name, {}).get("key") == key


def open_record(config: ConfigDict, output_dir: Path, class_names: list[str]) -> RunRecord:
    """Goes on with the run.json of the same settings; results of other settings are set aside.

    Raises: InputError when results would have to be moved while another run writes them."""
    key = settings_fingerprint(config)
    path = output_dir / "run.json"
    values: dict[str, Any] = {}
    if path.exists():
        try:
            values = files.read_json(path)
        except InputError as error:
            logger.warning("%s; it is set aside", error)
    if values.get("settings_fingerprint") != key:
        values = {}
        if any((output_dir / name).exists() for name in RESULTS):
            with training_lock(output_dir):
                _set_aside(output_dir)
    values.setdefault("created", now())
    values.setdefault("stages", {})
    values.update(
        settings_fingerprint=key,
        settings=settings.to_shown(config),
        versions=package_versions(),
        seed=config.tune_params.seed,
        class_names=class_names,
    )
    return RunRecord(output_dir, values)


def training_lock(output_dir: Path) -> Any:
    """Training and what follows it are exclusive in an output directory; tuning is shared."""
    return files.exclusive_lock(output_dir / ".training.lock", holder="another training run")


def _set_aside(output_dir: Path) -> None:
    stamp = datetime.now().strftime("%Y%m%d_%H%M%S")
    previous, again = output_dir / "previous" / stamp, 1
    while previous.exists():  # two within a second
        again += 1
        previous = output_dir / "previous" / f"{stamp}_{again}"
    previous.mkdir(parents=True)
    for name in RESULTS:
        if (output_dir / name).exists():
            (output_dir / name).rename(previous / name)
    logger.warning("The settings differ from the last run's; its results are now in %s", previous)
