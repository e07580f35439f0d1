"""Settings that are right, drawn from the words that describe each of them.

The words are those of README and of the error messages: where they and the checks don't agree, a
case fails."""

import dataclasses
import math
import random
import re
from typing import Any

from capfinder import models
from capfinder.settings import BY_KEY, SETTINGS, Setting
from capfinder.stages.search_check import explore

HERE = "@HERE@"  # stands for the directory that a case lies in
MOST_WHOLE = 2**31 - 1
WORDS = {"above", "below", "at least", "at most"}
# What a draw for itself gets wrong: they are set together, or name what must be there.
TOGETHER = (
    "etl_params.engine",
    "etl_params.beam_options",
    "etl_params.caps_data_dir",
    "etl_params.class_map",
    "etl_params.use_remote_dataset_version",
    "runtime_params.compilation_cache_dir",
    "runtime_params.coordinator_address",
    "runtime_params.distributed",
    "runtime_params.mesh",
    "runtime_params.num_processes",
    "runtime_params.process_id",
    "search_params",
    "model_params",
    "shared_params.num_classes",
    "shared_params.output_dir",
    "split_params.test_caps_data_dir",
    "tracking_params.mode",
    "train_params.freeze",  # both need a model that is there
    "train_params.init_from",
    "tune_params.storage",
)
Rng = random.Random
Flat = dict[str, Any]


def bounds_of(words: str) -> dict[str, float]:
    """'a number above 0 and at most 10' -> {"above": 0.0, "at most": 10.0}"""
    found = re.findall(rf"({'|'.join(sorted(WORDS))}) (\S+)", words)
    return {word: float(limit) for word, limit in found}


def whole_bounds(words: str) -> tuple[int, int]:
    """'a whole number from 2 to 10' -> (2, 10)"""
    if between := re.search(r"from (\d+) to (\d+)", words):
        return int(between[1]), int(between[2])
    (low,) = bounds_of(words).values()
    return int(low), MOST_WHOLE


def options_of(words: str) -> list[str]:
    """'a | b' -> ["a", "b"]; "a list of some of a, b" -> the same."""
    names = words.removeprefix("a list of some of ").replace(", ", " | ").split(" | ")
    return [name for name in names if name != "or null"]


def whole_number(rng: Rng, words: str) -> int | float:
    low, high = whole_bounds(words)
    spread = min(high - low, int(10 ** rng.uniform(0, 10)))
    value = rng.choice([low, min(low + 1, high), high, low + rng.randint(0, spread)])
    return float(value) if rng.random() < 0.1 else value


def real_number(rng: Rng, words: str) -> float | int:
    bounds = bounds_of(words)
    low = max(bounds.get("above", -math.inf), bounds.get("at least", -math.inf))
    high = min(bounds.get("below", math.inf), bounds.get("at most", math.inf))
    top = min(high, max(low, 1.0) * 1e6)
    inside = [low + (top - low) * rng.random() ** rng.choice([1, 4, 20])]
    edges = [bounds[word] for word in ("at least", "at most") if word in bounds]
    value = rng.choice(inside * 3 + edges)
    if value in (bounds.get("above"), bounds.get("below")):  # rounded onto an end that is outside
        value = low + (top - low) / 2
    return int(value) if value == int(value) and rng.random() < 0.5 else value


def value_of(rng: Rng, setting: Setting) -> Any:
    """A value that the words of a setting allow."""
    words = setting.allowed.text
    if setting.nullable and rng.random() < 0.3:
        return None
    if words == "true | false":
        return rng.random() < 0.5
    if words.startswith("a whole number"):
        return whole_number(rng, words)
    if words.startswith("a number"):
        return real_number(rng, words)
    if words.startswith("a list of some of"):
        names = options_of(words)
        return rng.sample(names, rng.randint(0, len(names)))
    if words == "text":
        return rng.choice(["", "my caps", "Kappen für RNA", "ㇰ", "a" * 60, 'a"b', "{}", "1"])
    assert " | " in words, f"{setting.key}: no draw for {words!r}"
    return rng.choice(options_of(words))


def settings_of(rng: Rng, *, share: float) -> Flat:
    """Settings that are right together, by dotted keys; about a `share` of them is given."""
    flat = {
        setting.key: value_of(rng, setting)
        for setting in SETTINGS
        if setting.key not in TOGETHER and rng.random() < share
    }
    flat |= _input(rng, flat)
    flat |= _processes(rng, flat, share)
    for low, high in (
        ("lr_scheduler_params.cyclic_lr.base_lr", "lr_scheduler_params.cyclic_lr.max_lr"),
        ("lr_scheduler_params.sgdr.min_lr", "lr_scheduler_params.sgdr.max_lr"),
    ):
        if low in flat or high in flat:
            flat[low], flat[high] = sorted([given(flat, low), given(flat, high)])
    if rng.random() < share:
        flat["model_params"] = model_params(rng, flat)
    if rng.random() < share:
        flat["search_params"] = search_params(rng, flat)
    return flat


def given(flat: Flat, key: str) -> Any:
    """The value, or the default."""
    return flat.get(key, BY_KEY[key].default)


def _input(rng: Rng, flat: Flat) -> Flat:
    """A directory that is there, with the classes that the settings ask for."""
    num_classes = rng.choice([2, 2, 3, 4, 4, 4, 7])
    in_files = num_classes + rng.choice([0, 0, 1])
    caps = f"{HERE}/good{in_files}"
    chosen = rng.sample(range(in_files), num_classes)
    class_map = {str(old): new for new, old in enumerate(chosen)}
    is_mapped = in_files > num_classes or rng.random() < 0.2
    changed: Flat = {
        "etl_params.caps_data_dir": caps,
        "shared_params.output_dir": f"{HERE}/{rng.choice(['out', 'new/out', 'out mit ü'])}",
        "shared_params.num_classes": num_classes,
        "etl_params.class_map": class_map if is_mapped else {},
        "etl_params.use_remote_dataset_version": rng.choice(["", "latest"]),
        "tracking_params.mode": rng.choice(["auto", "offline", "off"]),
    }
    for name in ("train_test_fraction", "train_val_fraction"):  # of the few reads that there are
        if f"shared_params.{name}" in flat:
            changed[f"shared_params.{name}"] = rng.uniform(0.3, 0.999)
    examples = given(flat, "etl_params.examples_per_class")
    if examples is not None and examples < 20:
        changed["etl_params.examples_per_class"] = rng.choice([None, 20, 1000.0])
    if rng.random() < 0.1:
        changed["split_params.test_caps_data_dir"] = f"{HERE}/more{in_files}"
    if rng.random() < 0.1:
        changed["tune_params.storage"] = f"sqlite:///{HERE}/study.db"
    if rng.random() < 0.1:
        changed["runtime_params.compilation_cache_dir"] = rng.choice(["", f"{HERE}/programs"])
    return changed


def _processes(rng: Rng, flat: Flat, share: float) -> Flat:
    processes = rng.choice([None, 1, 2, 5])
    mesh = rng.choice([None, processes or 1, (processes or 1) * 4])
    if rng.random() > share:
        alone = None if mesh is None else 1  # more aren't there, which the dry run tells
        return {"runtime_params.mesh": alone} if rng.random() < share else {}
    batch_size = int(given(flat, "shared_params.batch_size"))
    return {
        "runtime_params.distributed": True,
        "runtime_params.num_processes": processes,
        "runtime_params.process_id": processes and rng.randrange(processes),
        "runtime_params.coordinator_address": rng.choice([None, "localhost:1", "[::1]:65535"]),
        "runtime_params.mesh": mesh,
        "shared_params.batch_size": max(1, batch_size // 20) * 10,
    }


def architecture_of(flat: Flat) -> Any:
    return models.architecture(given(flat, "shared_params.model_type"))


def model_params(rng: Rng, flat: Flat) -> Flat:
    """Some of the architecture's hyperparameters, within their ranges."""
    fields = dataclasses.fields(architecture_of(flat).Hyperparameters)
    # Each convolution of the recurrent models halves the signal.
    most = min(int(math.log2(given(flat, "shared_params.target_length"))), 64)
    depths = {field.metadata["per"]: rng.randint(1, min(most, 6)) for field in fields}
    whole = {per for per in depths if per is not None and rng.random() < 0.5}
    values: Flat = {}
    for field in fields:
        per, is_tuple = field.metadata["per"], isinstance(field.default, tuple)
        low, high = field.metadata["low"], field.metadata["high"]
        if per in whole or (per is None and rng.random() < 0.5):
            default: Any = field.default
            example = default[0] if is_tuple else default
            count = depths[per] if is_tuple else 1
            drawn = [_between(rng, low, high, type(example)) for _ in range(count)]
            values[field.name] = drawn if is_tuple else drawn[0]
    return values


def _between(rng: Rng, low: float, high: float, kind: type) -> int | float:
    middle = rng.uniform(low, high)
    value = rng.choice([low, high, middle, middle])
    return math.floor(value) if kind is int else value


def search_params(rng: Rng, flat: Flat) -> Flat:
    """Ranges within those of the architecture, for some of what it draws."""
    architecture = architecture_of(flat)
    length = int(given(flat, "shared_params.target_length"))
    known = explore(lambda trial: architecture.search_space(trial, target_length=length))
    values: Flat = {}
    for name in rng.sample(sorted(known), rng.randint(0, 3)):
        low, high = min(known[name]), max(known[name])
        is_whole = isinstance(low, int)
        a, b = sorted(_between(rng, low, high, int if is_whole else float) for _ in range(2))
        values[name] = rng.choice(
            [{"low": a, "high": b}, {"choices": [a, b] if a < b else [a]}, {"choices": [b]}]
        )
        if "low" in values[name] and a > 0 and rng.random() < 0.3:
            values[name]["log"] = True
    return values


def nested(flat: Flat) -> Flat:
    """Dotted keys -> groups within groups; open groups stay as they are."""
    values: Flat = {}
    for key, value in flat.items():
        *groups, name = key.split(".") if key in BY_KEY else [key]
        place = values
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return values
