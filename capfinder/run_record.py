"""run.json: what an output directory holds, and when its results are set aside."""

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from capfinder import files, settings
from capfinder.errors import InputError
from capfinder.log import logger

# Settings that change no result: all others, with the dataset's fingerprint for what the paths
# lead to, key what an output directory holds. Evaluation and export have keys of their own.
WITHOUT_EFFECT = (
    "etl_params.use_remote_dataset_version",
    "etl_params.caps_data_dir",
    "etl_params.comet_project_name",
    "etl_params.engine",
    "etl_params.beam_options",
    "tune_params.comet_project_name",
    "tune_params.overwrite",
    "tune_params.storage",
    "tune_params.timeout_minutes",
    "train_params.comet_project_name",
    "train_params.checkpoint_minutes",
    "shared_params.output_dir",
    "evaluate_params.batch_size",
    "split_params.test_caps_data_dir",
    "runtime_params.data_residency",
    "runtime_params.steps_per_call",
    "runtime_params.compilation_cache_dir",
    "runtime_params.mesh",
    "runtime_params.distributed",
    "runtime_params.coordinator_address",
    "runtime_params.num_processes",
    "runtime_params.process_id",
    "tracking_params.mode",
    "export_params.formats",
    "debug_code",
)
# What the dataset stage depends on, paths included: whether a later stage alone may use its result.
FOR_DATASET = (
    "etl_params.caps_data_dir",
    "etl_params.use_remote_dataset_version",
    "etl_params.examples_per_class",
    "etl_params.class_map",
    "etl_params.max_reject_fraction",
    "tune_params.seed",
    "shared_params.num_classes",
    "shared_params.target_length",
    "shared_params.dtype",
    "shared_params.train_test_fraction",
    "shared_params.train_val_fraction",
    "split_params.seed",
    "split_params.group_by",
    "split_params.test_caps_data_dir",
    "split_params.keep_all",
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


def results_key(config: ConfigDict, dataset_fingerprint: str) -> str:
    """Equal for two runs that must give the same results."""
    values = settings.flat(settings.to_dict(config))
    kept = {key: value for key, value in values.items() if key not in WITHOUT_EFFECT}
    return files.fingerprint([kept, dataset_fingerprint])


def dataset_key(config: ConfigDict) -> str:
    """Equal for two runs that ask for the same dataset."""
    values = settings.flat(settings.to_dict(config))
    return files.fingerprint({key: values[key] for key in FOR_DATASET})


def prepare_output_dir(path: Path) -> None:
    """Raises: InputError when nothing can be written there."""
    probe = path / f"{files.PARTIAL}probe-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        files.remove_dead(path)
    except OSError as error:
        raise InputError(
            f"shared_params.output_dir={path}: can't be written to ({error.strerror})"
        ) from None


class RunRecord:
    """The content of run.json; saved whole after each change."""

    def __init__(self, output_dir: Path) -> None:
        """Reads what the last run left, if anything."""
        self.output_dir = output_dir
        self.values: dict[str, Any] = {}
        self._read()

    def _read(self) -> None:
        if self._path.exists():
            try:
                self.values = files.read_json(self._path)
            except InputError as error:
                logger.warning("%s; it is set aside", error)

    @property
    def _path(self) -> Path:
        return self.output_dir / "run.json"

    def begin(self, key: str, **facts: Any) -> None:
        """Goes on with the results of `key`; those of other settings or data are set aside.

        Called once the dataset is there, so that a mistake in the input moves nothing.
        Raises: InputError when results would have to be moved while another run writes them."""
        self._read()  # another run may have written it while this one waited
        if self.values.get("results_key") != key:
            self.values = {}
            if any((self.output_dir / name).exists() for name in RESULTS):
                with training_lock(self.output_dir):
                    _set_aside(self.output_dir)
        self.values.setdefault("created", now())
        self.values.setdefault("stages", {})
        self.update(results_key=key, versions=package_versions(), **facts)

    def update(self, **facts: Any) -> None:
        self.values.update(facts)
        files.write_json(self._path, self.values)

    def finish_stage(self, name: str, *, seconds: float, summary: str, key: str = "") -> None:
        """Notes that `name` is done; `key` says on what, for `is_done`."""
        entry = {
            "seconds": round(seconds, 1),
            "summary": summary,
            "finished": now(),
            "key": key,
        }
        self.update(stages={**self.values["stages"], name: entry})

    def is_done(self, name: str, key: str, outputs: Sequence[Path]) -> bool:
        """The stage was done on `key`, and what it wrote is still there."""
        entry = self.values.get("stages", {}).get(name, {})
        return entry.get("key") == key and all(path.exists() for path in outputs)


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
    logger.warning("Settings or data differ from the last run's, which is now in %s", previous)
