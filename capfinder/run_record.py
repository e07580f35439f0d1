"""run.json: what an output directory holds, and when its results are set aside."""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from capfinder import files, log, settings
from capfinder.allowed import shortened
from capfinder.errors import InputError, SettingsError
from capfinder.log import logger

STAGES = ("etl", "tune", "train", "evaluate", "export")
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
    "export_params.input_length",
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
    "onnx",
    "onnxruntime",
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
    return files.fingerprint([_with_effect(values), dataset_fingerprint])


def _with_effect(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Of settings by dotted keys those that may change results."""
    unused = settings.of_other_schedules(flat)
    return {
        key: value for key, value in flat.items() if key not in WITHOUT_EFFECT and key not in unused
    }


def dataset_key(config: ConfigDict) -> str:
    """Equal for two runs that ask for the same dataset."""
    values = settings.flat(settings.to_dict(config))
    return files.fingerprint({key: values[key] for key in FOR_DATASET})


@dataclass(frozen=True)
class SetAside:
    """Results of another run that lay in the directory: where they are now, what made them other
    results than those of this run."""

    directory: Path
    differences: list[str]

    def __str__(self) -> str:
        return f"The earlier results are in {self.directory}: {', '.join(self.differences)}"


def differences(earlier: Mapping[str, Any], this: Mapping[str, Any]) -> list[str]:
    """In words, what makes the results of two runs differ, by what their run.json says."""
    before, after = (_of_effect(run.get("settings")) for run in (earlier, this))
    if not before:
        return ["no settings are known of the earlier results"]
    found = [
        f"{key}={shortened(value)} (was {shortened(before.get(key, 'no setting'))})"
        for key, value in after.items()
        if before.get(key) != value
    ]
    old, new = (run.get("dataset") or {} for run in (earlier, this))
    if old.get("fingerprint") != new.get("fingerprint"):
        found.append(f"dataset {new.get('version')} (was {old.get('version')})")
    return found or ["they are of another version of capfinder"]


def _of_effect(values: Any) -> dict[str, str]:
    """The settings in a record that may change results, by dotted keys, as JSON; {} for what isn't
    one."""
    try:
        flat = settings.flat(values)
    except (SettingsError, AttributeError):
        return {}
    return {key: json.dumps(value, sort_keys=True) for key, value in _with_effect(flat).items()}


def keep_secrets(config: ConfigDict) -> None:
    """To be called before anything is logged: hides the API key and the storage's password there.

    Raises: SettingsError when a setting holds the key: settings are written down."""
    for password in settings.passwords_in(config.tune_params.storage or ""):
        log.hide(password)
    key = os.environ.get("COMET_API_KEY", "").strip()
    log.hide(key)
    for name, value in settings.flat(settings.to_dict(config)).items():
        if len(key) >= log.LEAST_SECRET and key in json.dumps(value):
            raise SettingsError(
                f"{name}: holds the Comet API key, and settings are written to the log and the "
                "report. Take it out; the environment variable COMET_API_KEY is where it belongs."
            )


def prepare_output_dir(path: Path, *, setting: str = "shared_params.output_dir") -> None:
    """Raises: InputError, which names the `setting`, when nothing can be written there."""
    probe = path / f"{files.PARTIAL}probe-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        for directory in (path, *path.glob("tuner_models/*")):  # which no one lock guards
            files.remove_dead(directory)
    except OSError as error:
        raise InputError(f"{setting}={path}: can't be written to ({error.strerror})") from None


class RunRecord:
    """The content of run.json; saved whole after each change. Workers that tune one study together
    all write it."""

    def __init__(self, output_dir: Path) -> None:
        """Reads what the last run left, if anything."""
        self.output_dir = output_dir
        self.values: dict[str, Any] = self._on_disk()

    def _on_disk(self) -> dict[str, Any]:
        if not self._path.exists():
            return {}
        try:
            values = files.read_json(self._path)
            if is_record(values):
                return dict(values)
            logger.warning("%s: isn't a run's record; it is set aside", self._path)
        except InputError as error:
            logger.warning("%s; it is set aside", error)
        return {}

    @property
    def _path(self) -> Path:
        return self.output_dir / "run.json"

    def dataset_for(self, config: ConfigDict) -> dict[str, Any]:
        """What is noted of the dataset that these settings lead to.

        Raises: InputError when there is none."""
        known = self.values.get("dataset") or {}
        if known.get("asked") != dataset_key(config):
            raise InputError(
                f"{self.output_dir}: holds no dataset of these settings yet; run the etl stage "
                "first"
            )
        return dict(known)

    def begin(self, key: str, **facts: Any) -> SetAside | None:
        """Goes on with the results of `key`; those of other settings or data are set aside.

        Called once the dataset is there, so that a mistake in the input moves nothing.
        Raises: InputError when results would have to be moved while another run writes them."""
        aside = None
        self.values = self._on_disk()  # another run may have written it while this one waited
        if self.values.get("results_key") != key:
            earlier, self.values = self.values, {}
            if any((self.output_dir / name).exists() for name in RESULTS):
                with training_lock(self.output_dir):
                    aside = SetAside(_set_aside(self.output_dir), differences(earlier, facts))
                logger.warning("%s", aside)
        self.values.setdefault("created", now())
        self.values.setdefault("stages", {})
        self.update(results_key=key, versions=package_versions(), **facts)
        return aside

    def update(self, **facts: Any) -> None:
        self._refresh()
        self._save(**facts)

    def _save(self, **facts: Any) -> None:
        self.values.update(facts)
        files.write_json(self._path, self.values)

    def _refresh(self) -> None:
        """Takes in what other workers on the same results have written."""
        written = self._on_disk()
        if written and written.get("results_key") == self.values.get("results_key"):
            self.values = written

    def finish_stage(
        self,
        name: str,
        *,
        seconds: float,
        summary: str,
        why: str,
        is_reused: bool = False,
        key: Mapping[str, str] | None = None,
    ) -> None:
        """Notes that `name` is done; `key` says on what, part by part, `why` how its result came
        about. A result that is reused keeps the time that it took when it was made."""
        self._refresh()
        entry = {"seconds": round(seconds, 1), "finished": now()}
        if is_reused:
            entry |= {part: self.stage(name)[part] for part in entry if part in self.stage(name)}
        entry |= {"summary": summary, "why": why, "key": dict(key or {})}
        self._save(stages={**self.values["stages"], name: entry})

    def stage(self, name: str) -> dict[str, Any]:
        """What is noted of a stage; {} when it was never done on these results."""
        return dict(self.values.get("stages", {}).get(name, {}))


def is_record(values: Any) -> bool:
    """Whether its parts are of the kinds that are written: a run.json may be anybody's."""
    if not isinstance(values, dict):
        return False
    groups = [values.get(name) or {} for name in ("settings", "stages", "dataset", "tuning")]
    rows = [values.get("exports") or []]
    if not all(isinstance(group, dict) for group in groups) or not isinstance(rows[0], list):
        return False
    return all(isinstance(row, dict) for row in [*groups[1].values(), *rows[0]])


def inside(directory: Path, name: Any) -> Path:
    """directory/name, where the record of a directory names something in it.

    Raises: InputError when it leads elsewhere."""
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(
            f"{directory / 'run.json'}: names {name!r}, which isn't in {directory}. Was it changed "
            "by hand? Run the etl stage again."
        )
    return directory / name


def training_lock(output_dir: Path) -> Any:
    """Training and what follows it are exclusive in an output directory; tuning is shared."""
    return files.exclusive_lock(output_dir / ".training.lock", holder="another training run")


def _set_aside(output_dir: Path) -> Path:
    """Moves the results; returns where they are now."""
    stamp = datetime.now().strftime("%Y%m%d_%H%M%S")
    previous, again = output_dir / "previous" / stamp, 1
    while previous.exists():  # two within a second
        again += 1
        previous = output_dir / "previous" / f"{stamp}_{again}"
    previous.mkdir(parents=True)
    for name in RESULTS:
        if (output_dir / name).exists():
            (output_dir / name).rename(previous / name)
    return previous
