"""Every setting once: its default, type, allowed values, unit and meaning.

The JSON template, the ConfigDict, command-line overrides, help, the table in README and validation
are all made from `SETTINGS`."""

import ast
import contextlib
import difflib
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FieldReference

from capfinder import files
from capfinder.allowed import (
    ADDRESS,
    BOOLEAN,
    CLASS_MAP,
    FLAGS,
    FRACTION,
    MOST_NAME_LENGTH,
    PROJECT,
    RATE,
    STORAGE,
    VERSION,
    Allowed,
    integer,
    named_values,
    number,
    one_of,
    shortened,
    shown,
    some_of,
    text,
)
from capfinder.errors import SettingsError
from capfinder.models import ARCHITECTURES

DTYPES = ("float16", "float32", "float64")
COMPUTE_DTYPES = ("float16", "bfloat16", "float32", "float64")
EXPORT_FORMATS = ("keras", "h5", "saved_model", "onnx")
FREEZE = ("nothing", "trunk")
PLACEHOLDER_DIRECTORY = "/dir/"
MAX_SEED = 2**32 - 1
MOST_PROBLEMS = 5  # told at once
_PASSWORDS = (
    re.compile(r"(://[^:/@]*:)(.*)(?=@)"),  # to the last @: it may hold some itself
    re.compile(r"(pass(?:word|wd)?=)([^&]*)"),
)


@dataclass(frozen=True)
class Setting:
    """One line of the table; `key` is its dotted name in JSON and in the ConfigDict."""

    key: str
    default: Any
    allowed: Allowed
    meaning: str
    unit: str = ""
    nullable: bool = False

    @property
    def is_open(self) -> bool:
        """True for a group whose keys the user names."""
        return self.allowed.type is dict

    def allowed_text(self) -> str:
        return self.allowed.text + (", or null" if self.nullable else "")

    def convert(self, value: Any) -> Any:
        """Raises: SettingsError that names the key, the value and what is allowed."""
        if value is None and self.nullable:
            return None
        try:
            return self.allowed.convert(value)
        except ValueError as problem:
            safe = without_password(value) if isinstance(value, str) else value
            raise SettingsError(
                f"{self.key}={shown(safe)}: must be {self.allowed_text()}"
                + (f" ({self.unit})" if self.unit else "")
                + (f"; {problem}" if str(problem) else "")
            ) from None


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "etl_params.use_remote_dataset_version",
        "latest",
        VERSION,
        "which dataset version to use instead of building one: latest, the newest in Comet when "
        'caps_data_dir is absent; X.Y.Z always means that version; "" never asks Comet',
    ),
    Setting(
        "etl_params.caps_data_dir",
        PLACEHOLDER_DIRECTORY,
        text("a directory"),
        "directory of the cap-signal CSV files, one or more per class",
    ),
    Setting(
        "etl_params.examples_per_class",
        100_000,
        integer(3),
        "reads used of each class; null: as many as the smallest class has",
        unit="reads",
        nullable=True,
    ),
    Setting("etl_params.comet_project_name", "dataset", PROJECT, "Comet project of the dataset"),
    Setting(
        "etl_params.class_map",
        {},
        CLASS_MAP,
        "picks and renumbers classes, from the number in the files to the one to train; "
        "{}: as in the files",
    ),
    Setting(
        "etl_params.max_reject_fraction",
        0.01,
        number(at_least=0, at_most=1),
        "share of bad rows in a file above which the run stops",
        unit="of a file's rows",
    ),
    Setting(
        "etl_params.engine",
        "local",
        one_of("local", "beam"),
        "what reads and writes the bulk of the data: this machine, or the workers of Apache Beam "
        "(pip install '.[beam]'); the dataset is the same",
    ),
    Setting(
        "etl_params.beam_options",
        (),
        FLAGS,
        "beam only: Apache Beam's pipeline options; []: its DirectRunner on this machine",
    ),
    Setting("tune_params.comet_project_name", "capfinder_tune", PROJECT, "Comet project of tuning"),
    Setting(
        "tune_params.patience",
        0,
        integer(0),
        "a trial stops after this many epochs without a lower val_loss; 0: at the first",
        unit="epochs",
    ),
    Setting("tune_params.max_epochs_hpt", 3, integer(1), "longest a trial may train", "epochs"),
    Setting(
        "tune_params.max_trials",
        5,
        integer(0),
        "trials in all, over reruns and workers; 0: no tuning, model_params are trained",
        unit="trials",
    ),
    Setting(
        "tune_params.factor", 2, integer(2, 10), "hyperband: one in `factor` trials goes a rung up"
    ),
    Setting(
        "tune_params.seed",
        42,
        integer(0, MAX_SEED),
        "the one seed: splits, shuffling, augmentation, initial weights, dropout, trials",
    ),
    Setting(
        "tune_params.tuning_strategy",
        "hyperband",
        one_of("hyperband", "random_search", "bayesian_optimization"),
        "how trials are chosen and pruned",
    ),
    Setting("tune_params.overwrite", False, BOOLEAN, "true: start the study anew"),
    Setting(
        "tune_params.storage",
        None,
        STORAGE,
        "where the study is kept; null: a journal file in output_dir/tuner_models",
        nullable=True,
    ),
    Setting(
        "tune_params.timeout_minutes",
        None,
        number(above=0),
        "no new trial starts after this long; null: no limit",
        unit="minutes",
        nullable=True,
    ),
    Setting(
        "train_params.comet_project_name",
        "capfinder_train",
        PROJECT,
        "Comet project of training, evaluation and export",
    ),
    Setting(
        "train_params.patience",
        120,
        integer(0),
        "stop after this many epochs without a lower val_loss; 0: at the first",
        unit="epochs",
    ),
    Setting(
        "train_params.max_epochs_final_model", 300, integer(1), "longest training may go", "epochs"
    ),
    Setting(
        "train_params.checkpoint_minutes",
        10.0,
        number(above=0),
        "an epoch longer than this is also saved in its middle",
        unit="minutes",
    ),
    Setting(
        "train_params.max_rollbacks",
        2,
        integer(0),
        "this often a loss that is no longer a number takes training back to the last good epoch, "
        "with half the learning rate; then, or at 0, it ends",
    ),
    Setting(
        "train_params.init_from",
        None,
        text("a run's directory, an import or a .keras file"),
        "a model whose weights training starts from: an earlier run, an import, a .keras file; "
        "architecture and hyperparameters are then its own, and nothing is tuned",
        nullable=True,
    ),
    Setting(
        "train_params.freeze",
        "nothing",
        one_of(*FREEZE),
        "init_from only: trunk: all layers before the dense ones at the end stay as they are",
    ),
    Setting("shared_params.num_classes", 4, integer(2, 1000), "classes to tell apart", "classes"),
    Setting(
        "shared_params.model_type", "cnn_lstm", one_of(*ARCHITECTURES), "the model's architecture"
    ),
    Setting(
        "shared_params.batch_size",
        32,
        integer(1),
        "reads in a step; 1024 suits most models, 64 the encoder",
        unit="reads",
    ),
    Setting(
        "shared_params.target_length",
        500,
        integer(16, 32_768),
        "every signal is cut or zero-padded to this, centred",
        unit="samples",
    ),
    Setting(
        "shared_params.dtype",
        "float16",
        one_of(*DTYPES),
        "storage type of the dataset and precision policy",
    ),
    Setting(
        "shared_params.train_test_fraction",
        0.95,
        FRACTION,
        "share of each class for training and validation; the rest is the test set",
    ),
    Setting(
        "shared_params.train_val_fraction",
        0.8,
        FRACTION,
        "share of that for training; the rest is for validation",
    ),
    Setting(
        "shared_params.use_augmentation",
        False,
        BOOLEAN,
        "true: also train on a squished and an expanded version of each read",
    ),
    Setting(
        "shared_params.output_dir",
        PLACEHOLDER_DIRECTORY,
        text("a directory"),
        "everything is written here",
    ),
    Setting(
        "lr_scheduler_params.type",
        "reduce_lr_on_plateau",
        one_of("reduce_lr_on_plateau", "cyclic_lr", "sgdr"),
        "learning-rate schedule of the final training",
    ),
    Setting(
        "lr_scheduler_params.reduce_lr_on_plateau.factor", 0.5, FRACTION, "the rate is cut to this"
    ),
    Setting(
        "lr_scheduler_params.reduce_lr_on_plateau.patience",
        5,
        integer(0),
        "epochs without a lower val_loss before a cut",
        unit="epochs",
    ),
    Setting("lr_scheduler_params.reduce_lr_on_plateau.min_lr", 1e-6, RATE, "never below this"),
    Setting("lr_scheduler_params.cyclic_lr.base_lr", 1e-3, RATE, "lowest rate of a cycle"),
    Setting("lr_scheduler_params.cyclic_lr.max_lr", 5e-2, RATE, "highest rate of a cycle"),
    Setting(
        "lr_scheduler_params.cyclic_lr.step_size_factor",
        8,
        integer(1),
        "half a cycle, in epochs",
        unit="epochs",
    ),
    Setting(
        "lr_scheduler_params.cyclic_lr.mode",
        "triangular2",
        one_of("triangular", "triangular2", "exp_range"),
        "the amplitude stays, halves each cycle, or shrinks by gamma each step",
    ),
    Setting(
        "lr_scheduler_params.cyclic_lr.gamma",
        0.9999,
        number(above=0, at_most=1),
        "exp_range only: the amplitude's factor per step",
    ),
    Setting("lr_scheduler_params.sgdr.min_lr", 1e-3, RATE, "rate at the end of a cycle"),
    Setting("lr_scheduler_params.sgdr.max_lr", 2e-3, RATE, "rate at the start of the first cycle"),
    Setting(
        "lr_scheduler_params.sgdr.lr_decay",
        0.9,
        number(above=0, at_most=1),
        "factor on the starting rate from cycle to cycle",
    ),
    Setting("lr_scheduler_params.sgdr.cycle_length", 5, integer(1), "first cycle", unit="epochs"),
    Setting(
        "lr_scheduler_params.sgdr.mult_factor",
        1.5,
        number(at_least=1),
        "factor on the cycle's length from cycle to cycle, rounded up",
    ),
    Setting(
        "model_params",
        {},
        named_values("a mapping from hyperparameter to value"),
        "hyperparameters trained when tuning is off or gave nothing, and the study's first trial; "
        "{}: the architecture's own defaults",
    ),
    Setting(
        "search_params",
        {},
        named_values("a mapping from hyperparameter to its range"),
        'overrides of the search space, such as {"learning_rate": {"choices": [0.001]}, '
        '"*_filters": {"low": 32, "high": 64, "step": 32}}',
    ),
    Setting(
        "evaluate_params.batch_size",
        None,
        integer(1),
        "reads scored at once; null: chosen for the machine",
        unit="reads",
        nullable=True,
    ),
    Setting(
        "split_params.seed",
        None,
        integer(0, MAX_SEED),
        "seed of selection and splits alone; null: tune_params.seed",
        nullable=True,
    ),
    Setting(
        "split_params.group_by",
        "read",
        one_of("read", "parent_read", "file"),
        "what goes to one split as a whole: a read, all windows of a parent read, a sequencing run",
    ),
    Setting(
        "split_params.test_caps_data_dir",
        None,
        text("a directory"),
        "its CSV files are the test set, whole; caps_data_dir is then training and validation",
        nullable=True,
    ),
    Setting(
        "split_params.keep_all",
        False,
        BOOLEAN,
        "true: use every read of every class, examples_per_class at most",
    ),
    Setting(
        "runtime_params.compute_dtype",
        None,
        one_of(*COMPUTE_DTYPES),
        "arithmetic of the model; null: from dtype and platform",
        nullable=True,
    ),
    Setting(
        "runtime_params.data_residency",
        "auto",
        one_of("auto", "device", "host", "stream"),
        "where training data lie: on the device; in a mapped file on the host (a copy of the "
        "dataset); in the dataset itself, read again every epoch; auto: on the device if they fit, "
        "else on the host",
    ),
    Setting(
        "runtime_params.steps_per_call",
        None,
        integer(1),
        "steps that the device takes at a time; Ctrl-C waits for them; null: 1 on a CPU, else 16",
        unit="steps",
        nullable=True,
    ),
    Setting(
        "runtime_params.microbatch",
        None,
        integer(8),
        "less memory: a step goes through its batch this many reads at a time; batch norm then "
        "sees these alone; null: the whole batch at once",
        unit="reads",
        nullable=True,
    ),
    Setting(
        "runtime_params.compilation_cache_dir",
        None,
        text("a directory"),
        'compiled programs are kept here; null: the user\'s cache directory, "": nowhere',
        nullable=True,
    ),
    Setting(
        "runtime_params.mesh",
        None,
        integer(1),
        "devices that share each batch, of all hosts together; null: all that there are",
        unit="devices",
        nullable=True,
    ),
    Setting(
        "runtime_params.distributed",
        False,
        BOOLEAN,
        "true: one of several processes, on one host or more, that train one model and were "
        "started with this same command (docs/cluster.md)",
    ),
    Setting(
        "runtime_params.coordinator_address",
        None,
        ADDRESS,
        "distributed: where process 0 listens for the others; null: as Slurm, Open MPI or the TPU "
        "pod says",
        nullable=True,
    ),
    Setting(
        "runtime_params.num_processes",
        None,
        integer(1),
        "distributed: how many there are; null: as the cluster says",
        unit="processes",
        nullable=True,
    ),
    Setting(
        "runtime_params.process_id",
        None,
        integer(0),
        "distributed: the number of this one, from 0; null: as the cluster says",
        nullable=True,
    ),
    Setting(
        "tracking_params.mode",
        "auto",
        one_of("auto", "online", "offline", "off"),
        "Comet: online with a key, else an offline archive; auto decides by the key",
    ),
    Setting(
        "export_params.formats",
        EXPORT_FORMATS,
        some_of(*EXPORT_FORMATS),
        "model files to write",
    ),
    Setting(
        "export_params.input_length",
        None,
        integer(16, 32_768),
        "signals that the exported models take, which then cut or zero-pad them themselves, "
        "centred; null: target_length. Capfinder 0.4.3 feeds 500",
        unit="samples",
        nullable=True,
    ),
    Setting("debug_code", False, BOOLEAN, "true: debug log with file and line, and tracebacks"),
)

BY_KEY: dict[str, Setting] = {setting.key: setting for setting in SETTINGS}
GROUPS: frozenset[str] = frozenset(
    ".".join(parts[:depth])
    for parts in (key.split(".") for key in BY_KEY)
    for depth in range(1, len(parts))
)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; an open group is one value."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in GROUPS:
            if not isinstance(value, Mapping):
                raise SettingsError(f"{key}={shown(value)}: must be a group of settings, {{...}}")
            yield from _flatten(value, f"{key}.")
        else:
            yield key, value


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *groups, name = key.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return nested


def nearest(name: str, known: Sequence[str]) -> str:
    """', did you mean X?' or ''; a key given without its group finds the whole key."""
    if len(name) > MOST_NAME_LENGTH:
        return ""
    candidates = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not candidates:
        tail: dict[str, str] = {}
        for key in known:
            tail.setdefault(key.rsplit(".", 1)[-1], key)
        close = difflib.get_close_matches(name.rsplit(".", 1)[-1], list(tail), n=1, cutoff=0.7)
        candidates = [tail[match] for match in close]
    return f", did you mean {candidates[0]}?" if candidates else ""


def _unknown(key: str) -> SettingsError:
    if key in GROUPS:
        first = next(known for known in BY_KEY if known.startswith(f"{key}."))
        return SettingsError(f"{key}: a group of settings; give one of them, such as {first}")
    return SettingsError(
        f"{shortened(key) or repr(key)}: no such setting{nearest(key, [*BY_KEY, *sorted(GROUPS)])} "
        "(`capfinder settings` lists them all)"
    )


def _check_together(flat: Mapping[str, Any]) -> None:
    """What no single setting can tell."""
    for low, high in (
        ("lr_scheduler_params.cyclic_lr.base_lr", "lr_scheduler_params.cyclic_lr.max_lr"),
        ("lr_scheduler_params.sgdr.min_lr", "lr_scheduler_params.sgdr.max_lr"),
    ):
        if flat[low] > flat[high]:
            raise SettingsError(f"{low}={flat[low]:g}: must be at most {high}={flat[high]:g}")
    class_map, num_classes = flat["etl_params.class_map"], flat["shared_params.num_classes"]
    if class_map and len(class_map) != num_classes:
        raise SettingsError(
            f"etl_params.class_map={shown(class_map)}: names {len(class_map)} classes, "
            f"shared_params.num_classes is {num_classes}"
        )
    process_id, num_processes = (
        flat[f"runtime_params.{n}"] for n in ("process_id", "num_processes")
    )
    if process_id is not None and num_processes is not None and process_id >= num_processes:
        raise SettingsError(
            f"runtime_params.process_id={process_id}: must be below "
            f"runtime_params.num_processes={num_processes}"
        )
    for name in ("coordinator_address", "num_processes", "process_id"):
        key = f"runtime_params.{name}"
        if flat[key] is not None and not flat["runtime_params.distributed"]:
            raise SettingsError(f"{key}: only for runtime_params.distributed=true")
    if flat["etl_params.beam_options"] and flat["etl_params.engine"] != "beam":
        raise SettingsError("etl_params.beam_options: only for etl_params.engine=beam")
    if flat["train_params.freeze"] != "nothing" and flat["train_params.init_from"] is None:
        raise SettingsError(
            f"train_params.freeze={flat['train_params.freeze']}: only with train_params.init_from, "
            "whose weights are to stay"
        )
    _check_processes(flat)
    _check_fractions(flat)


def _check_processes(flat: Mapping[str, Any]) -> None:
    """What would only show once they train together."""
    processes, mesh = flat["runtime_params.num_processes"], flat["runtime_params.mesh"]
    if processes is None:
        return
    if mesh is not None and mesh < processes:
        raise SettingsError(
            f"runtime_params.mesh={mesh}: must be at least runtime_params.num_processes={processes}"
        )
    if flat["shared_params.batch_size"] % processes:
        raise SettingsError(
            f"shared_params.batch_size={flat['shared_params.batch_size']}: must be a multiple of "
            f"runtime_params.num_processes={processes}, which share each batch"
        )


def _check_fractions(flat: Mapping[str, Any]) -> None:
    """As the splits of `etl.splits`: what is left for training of the reads that may be used."""
    reads = flat["etl_params.examples_per_class"]
    if reads is None or flat["split_params.group_by"] != "read":
        return
    fractions = {
        f"shared_params.{name}": flat[f"shared_params.{name}"]
        for name in ("train_test_fraction", "train_val_fraction")
        if name == "train_val_fraction" or flat["split_params.test_caps_data_dir"] is None
    }
    left = reads
    for fraction in fractions.values():
        left = math.floor(Fraction(repr(fraction)) * left)
    if left < 1:
        given = ", ".join(f"{key}={value:g}" for key, value in fractions.items())
        raise SettingsError(
            f"{given}: of etl_params.examples_per_class={reads} reads of a class none is left for "
            "training; raise one of them"
        )


def check(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, each given one checked and converted, the others at their default.

    Raises: SettingsError with the first few problems, in one line."""
    flat = {setting.key: setting.default for setting in SETTINGS}
    given = set()
    problems = []
    for key, value in _flatten(values):
        try:
            if key not in BY_KEY:
                raise _unknown(key)
            if key in given:
                raise SettingsError(f"{key}: given twice, within its group and by its whole name")
            given.add(key)
            flat[key] = BY_KEY[key].convert(value)
        except SettingsError as problem:
            problems.append(str(problem))
        if len(problems) == MOST_PROBLEMS:
            break
    if problems:
        raise SettingsError("; ".join(problems))
    _check_together(flat)
    return _nest(flat)


def _field(setting: Setting, value: Any) -> Any:
    """A typed field where null is allowed, so that the ConfigDict takes both."""
    return FieldReference(value, field_type=setting.allowed.type) if setting.nullable else value


def to_config(values: Mapping[str, Any]) -> ConfigDict:
    """The locked ConfigDict of checked settings; open groups take new keys."""
    flat = dict(_flatten(values))
    config = ConfigDict(
        _nest({key: _field(BY_KEY[key], value) for key, value in flat.items()}),
        convert_dict=True,
    )
    config.lock()
    for setting in SETTINGS:
        if setting.is_open:
            *groups, name = setting.key.split(".")
            place = config
            for group in groups:
                place = place[group]
            place[name].unlock()
    return config


def default_config() -> ConfigDict:
    return to_config(check({}))


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Plain nested values; tuples stay tuples."""
    return config.to_dict()


def to_shown(config: ConfigDict) -> dict[str, Any]:
    """`to_dict` for logs and records: without the password that a storage URL may hold."""
    values = to_dict(config)
    storage = values["tune_params"]["storage"]
    if storage is not None:
        values["tune_params"]["storage"] = without_password(storage)
    return values


def without_password(url: str) -> str:
    """Hides it where URLs have it, before the host or among the parameters behind "?"."""
    for pattern in _PASSWORDS:
        url = pattern.sub(r"\1***", url)
    return url


def passwords_in(url: str) -> list[str]:
    """What `without_password` hides."""
    return [found[2] for pattern in _PASSWORDS for found in pattern.finditer(url)]


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys and their values."""
    return dict(_flatten(values))


def schedule_params(config: ConfigDict) -> dict[str, Any]:
    """The settings of the schedule that is chosen; {} for one that has none."""
    groups = to_dict(config)["lr_scheduler_params"]
    return dict(groups.get(groups["type"], {}))


def of_other_schedules(flat: Mapping[str, Any]) -> set[str]:
    """Which of these dotted keys belong to a schedule that isn't chosen."""
    group, chosen = "lr_scheduler_params.", flat.get("lr_scheduler_params.type")
    of_schedules = {
        key: key.removeprefix(group).split(".") for key in flat if key.startswith(group)
    }
    return {key for key, names in of_schedules.items() if len(names) > 1 and names[0] != chosen}


def checked(config: ConfigDict, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """The config with dotted `overrides` on top, all of it validated."""
    return to_config(check(_overridden(to_dict(config), overrides or {})))


def _overridden(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, changed: the dotted `overrides` are in it."""
    for key, value in overrides.items():
        values.pop(key, None)  # a key may be there by its whole name
        *groups, name = key.split(".")
        place = values
        for group in groups:
            inner = place.setdefault(group, {})
            if not isinstance(inner, dict):
                raise SettingsError(f"{shortened(key)}: {group}={shown(inner)} holds no settings")
            place = inner
        place[name] = value
    return values


def parse_override(key: str, literal: str) -> tuple[str, Any]:
    """One `--config.a.b=v` of the command line as (key, checked value).

    A key inside an open group takes any literal; the architecture checks it later."""
    setting = BY_KEY.get(key)
    if setting is None:
        if any(key.startswith(f"{open_.key}.") for open_ in SETTINGS if open_.is_open):
            return key, _literal(literal)
        raise _unknown(key)
    if setting.nullable and literal.lower() in ("none", "null"):
        return key, None
    if setting.allowed.type is str:
        return key, setting.convert(literal)
    if setting.allowed.type is tuple and not literal.startswith(("(", "[")):
        return key, setting.convert(tuple(filter(None, map(str.strip, literal.split(",")))))
    return key, setting.convert(_literal(literal))


def _literal(literal: str) -> Any:
    """A JSON or Python literal, else the text itself."""
    lowered = literal.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    if lowered in ("none", "null"):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's, of odd spellings
        for read in (_parsed_json, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                return read(literal)
    return literal


def _parsed_json(text: str) -> Any:
    """Raises: ValueError, RecursionError; SettingsError for a key that is given twice."""
    return json.loads(text, object_pairs_hook=_once_each)


def template() -> str:
    """The JSON template, every setting at its default."""
    nested = _nest({setting.key: setting.default for setting in SETTINGS})
    return json.dumps(nested, indent=4) + "\n"


def read_json_config(path: Path, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """The file's settings with dotted `overrides` on top, which have to go together with it.

    Raises: InputError for an unreadable file, SettingsError that names the file."""
    try:
        # "utf-8-sig": with the byte-order mark that Windows' editors write, or without.
        values = files.read_json(path, parse=_parsed_json, encoding="utf-8-sig")
        if not isinstance(values, dict):
            raise SettingsError("must hold one JSON object with the settings' groups")
        return to_config(check(_overridden(values, overrides or {})))
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from None


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise SettingsError(f"{shortened(name)}: given twice in its group")
        values[name] = value
    return values


def describe_default(setting: Setting) -> str:
    return json.dumps(setting.default)


def markdown_table() -> str:
    """The settings as README shows them."""
    lines = ["| setting | default | allowed | meaning |", "|---|---|---|---|"]
    for setting in SETTINGS:
        unit = f" [{setting.unit}]" if setting.unit else ""
        cells = (
            f"`{setting.key}`",
            f"`{describe_default(setting)}`",
            setting.allowed_text() + unit,
            setting.meaning,
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def help_lines() -> Iterator[str]:
    """The settings as `--help` and `capfinder settings` show them."""
    for setting in SETTINGS:
        unit = f" [{setting.unit}]" if setting.unit else ""
        yield f"  {setting.key} = {describe_default(setting)}"
        yield f"      {setting.meaning}; {setting.allowed_text()}{unit}"
