"""Models that somebody else has made, or damaged: each is one to use, or one clear error."""

import copy
import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax_settings
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfinder import files, trained
from capfinder import settings as capfinder_settings
from capfinder.data.versions import Dataset
from capfinder.errors import InputError
from capfinder.evaluation import facts, likeness, metrics
from capfinder.exporting.keras_archive import Archive
from capfinder.exporting.recognise import Recognised
from capfinder.prediction import labels
from capfinder.stages.train import Training
from capfinder.trained import imported, kept, stored
from capfinder.trained.classifier import Classifier
from capfinder.training.checkpoint import Checkpoints
from tests.sizes import TINY
from tests.small_models import CLASSES, LENGTH, small_model

NAMES = ["cap_0", "m6A, cap", "cap_2-1"]
CLASS_MAP = {"0": 0, "5": 1, "3": 2}
FACTS: dict[str, Any] = {
    "test": {
        "accuracy": 0.9,
        "accuracy_interval": [0.8, 0.95],
        "balanced_accuracy": 0.9,
        "loss": 0.3,
        "num_examples": 18,
        "confusion_matrix": [[5, 1, 0], [0, 6, 0], [1, 0, 5]],
    },
    "baselines": {"majority_accuracy": 0.33},
    "signals": {
        "classes": [
            {"cap_class": n, "runs": 2, "reads": 200, "mean": 0.1 * n}
            | {"spread": 1.1, "length": 300.0, "between_reads": 0.4}
            for n in range(CLASSES)
        ],
        "between_runs_sd": {"mean": 0.05, "spread": 0.04, "length": 3.5},
    },
    "dataset": {"version": "1.0.0", "sources": [{"file": "data.csv", "chosen": 5}]},
}
READS = {"file": "f.csv", "reads": 500, "mean": 0.1, "spread": 1.2, "length": 310.0}
READS |= {"between_reads": 0.4, "beyond": 0.0}
FIGURES = labels.figures(
    np.eye(CLASSES), np.arange(CLASSES), class_names=NAMES, files=[("f.csv", CLASSES)]
)


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("foreign")
    with pytest.MonkeyPatch.context() as patched, jax_settings.restored():
        patched.setenv("HOME", str(root / "home"))
        (root / "none").touch()  # compiled programs aren't kept
        patched.setenv("XDG_CACHE_HOME", str(root / "none"))
        yield root


@pytest.fixture(scope="module")
def own(surroundings: Path) -> Classifier:
    small = small_model("cnn_lstm")
    values = {"model_type": "cnn_lstm", "num_classes": CLASSES, "target_length": LENGTH}
    model = stored.trained_model(
        {**values, "dtype": "float32"}, small.hyperparameters, small.variables
    )
    known = facts.from_json(FACTS, num_classes=CLASSES)
    return Classifier(model, "float32", NAMES, CLASS_MAP, known)


@pytest.fixture(scope="module")
def whole(surroundings: Path, own: Classifier) -> Path:
    """A model that lies in a directory by itself."""
    stored.write(own, stored.record_of(own), surroundings / "whole")
    return surroundings / "whole"


@pytest.fixture(scope="module")
def run_dir(surroundings: Path) -> Path:
    """What a finished training leaves, of weights that were never trained."""
    path = surroundings / "run"
    values = {
        "shared_params.num_classes": CLASSES,
        "shared_params.target_length": LENGTH,
        "shared_params.dtype": "float32",
        "shared_params.output_dir": str(path),
        "etl_params.class_map": CLASS_MAP,
        "model_params": TINY["cnn_lstm"],
    }
    config = capfinder_settings.checked(capfinder_settings.default_config(), values)
    small = small_model("cnn_lstm")
    dataset = Dataset(path, "", "0" * 64, {})
    training = Training(config, dataset=dataset, hyperparameters=small.hyperparameters)
    with Checkpoints(training.directory) as checkpoints:
        checkpoints.save_best(1, small.variables, {})
    ended = {"stopped": "patience", "best_epoch": 1, "history": [{}], "about": training.about}
    files.write_json(training.directory / "outcome.json", files.sealed(ended))
    record = {
        "settings": capfinder_settings.to_shown(config),
        "class_names": NAMES,
        "dataset": {"fingerprint": "0" * 64},
    }
    files.write_json(path / "run.json", record)
    evaluated = {**FACTS, "best_epoch": 1, "history": [{}]}
    evaluated["hyperparameters"] = training.about["hyperparameters"]
    files.write_json(path / "evaluation" / "metrics.json", evaluated)
    return path


def write(path: Path, value: Any) -> None:
    """In ASCII: JSON may hold what no text in UTF-8 does."""
    path.write_text(json.dumps(value))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def use(classifier: Classifier) -> None:
    """Goes through all that predicting takes of it besides the weights' values."""
    model = classifier.model
    kinds = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(model.variables))
    assert gives(model.module, jax.tree.structure(model.variables), kinds, model.target_length) == (
        2,
        model.num_classes,
    )
    assert len(classifier.class_names) == model.num_classes
    metrics.confusion_csv(np.eye(model.num_classes, dtype=int).tolist(), classifier.class_names)
    "".join(classifier.class_names).encode()
    labels.parse(classifier.class_map, num_classes=model.num_classes)
    json.dumps(stored.record_of(classifier), ensure_ascii=False).encode()
    use_facts(classifier.facts)


@functools.cache
def gives(module: Any, tree: Any, kinds: tuple[Any, ...], target_length: int) -> tuple[int, ...]:
    """The shape of the logits for two reads, with weights of these shapes and types."""
    variables = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*kind) for kind in kinds])
    signal = jax.ShapeDtypeStruct((2, target_length, 1), "float32")
    logits = jax.eval_shape(functools.partial(module.apply, train=False), variables, signal)
    return tuple(logits.shape)


def use_facts(known: facts.Facts) -> None:
    assert all(np.isfinite(np.float64(text)) for text in numbers_in(known.as_json()))
    labels.show(FIGURES, NAMES, known.test)
    likeness.warnings(known.signals, [READS])


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(one)
    elif isinstance(value, float):
        yield value


# Any damage at all

NUMBERS = [0, -1, 2, 3, 4, 2**31, 10**400, 0.5, -0.0, 1e308, 5e-324, *map(float, ("nan", "-inf"))]
TEXTS = ["", "x", "\ud800", "a" * 300, "float16", "resnet"]
LISTS = [
    [],
    ["a"],
    ["a", "b", "c"],
    ["a", "b", "\ud800"],
    ["a", "b", " "],
    [1, 2, 3],
    [[1] * 3] * 3,
]
OBJECTS = [{}, {"a": 0}, {"1": "0"}, {"0": 0, "1": 1, "2": 2}, {"0": 0}, {"x": {}}]
odd = st.sampled_from([None, True, False, *NUMBERS, *TEXTS, *LISTS, *OBJECTS])
anything = st.recursive(
    odd | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def places(value: Any, most: int = 5) -> Iterator[tuple[Any, ...]]:
    """The way to each thing in a JSON value, itself included."""
    yield ()
    if isinstance(value, dict | list) and most:
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield from ((key, *rest) for rest in places(value[key], most - 1))


def damaged(value: Any, data: st.DataObject) -> Any:
    """With one thing in it replaced or left out."""
    way = data.draw(st.sampled_from(sorted(places(value), key=repr)), label="place")
    other = data.draw(anything, label="value")
    if not way:
        return other
    value = copy.deepcopy(value)
    place = value
    for key in way[:-1]:
        place = place[key]
    if isinstance(place, dict) and data.draw(st.booleans(), label="left out"):
        del place[way[-1]]
    else:
        place[way[-1]] = other
    return value


def use_or_refuse(path: Path) -> None:
    try:
        classifier = trained.load(path)
    except InputError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        use(classifier)


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_resealed_record_of_an_import_can_be_used_or_is_refused(whole, data):
    path = whole / "import.json"
    before = path.read_text()
    record = damaged(stored.read_record(whole), data)
    write(path, files.sealed(record) if isinstance(record, dict) else record)
    try:
        use_or_refuse(whole)
    finally:
        path.write_text(before)


@pytest.mark.parametrize("name", ["run.json", "evaluation/metrics.json", "outcome.json"])
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_a_damaged_record_of_a_run_can_be_used_or_is_refused(run_dir, name, data):
    (outcome,) = run_dir.glob("checkpoints/*/outcome.json")
    path = outcome if name == "outcome.json" else run_dir / name
    before = path.read_text()
    record = read(path)
    if name == "outcome.json":
        record = damaged(files.unsealed(record), data)
        write(path, files.sealed(record) if isinstance(record, dict) else record)
    else:
        write(path, damaged(record, data))
    try:
        use_or_refuse(run_dir)
    finally:
        path.write_text(before)


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_what_a_keras_file_claims_is_used_where_it_can_be(surroundings, own, data):
    about = damaged({"class_names": NAMES, "class_map": CLASS_MAP, "facts": FACTS}, data)
    if not isinstance(about, dict):
        about = {}
    version = data.draw(st.text(max_size=5))
    archive = Archive(Path("\udcff.keras"), "0" * 64, version, about, False, None)
    model = own.model
    found = Recognised(
        model.model_type, model.hyperparameters, CLASSES, LENGTH, LENGTH, "float32", {}, []
    )
    classifier = imported._classifier(archive, found, model)
    use(classifier)
    record = imported._record(archive, found, classifier, 0.0)
    files.write_json(surroundings / "record.json", record)
    assert read(surroundings / "record.json")["class_names"] == classifier.class_names


# What each of them is told


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copied"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"class_names": ["a"]}, "class_names isn't a list of 3 names"),
        ({"class_names": [1, 2, 3]}, "class_names isn't a list of 3 names"),
        ({"class_names": ["a", "b", "\ud800"]}, "class_names isn't a list of 3 names"),
        ({"class_map": {"a": 0}}, "etl_params.class_map="),
        ({"class_map": {"1": "0"}}, "etl_params.class_map="),
        (
            {"num_classes": 4, "class_names": list("abcd"), "class_map": {}},
            "its weights are of another model (params/head/bias is (3,), expected (4,))",
        ),
        ({"hyperparameters": []}, "hyperparameters aren't a JSON object"),
    ],
)
def test_an_import_says_what_does_not_fit(copied, changed, said):
    record = stored.read_record(copied)
    write(copied / "import.json", files.sealed({**record, **changed}))
    with pytest.raises(InputError) as refused:
        trained.load(copied)
    assert str(refused.value).startswith(f"{copied / 'import.json'}: {said}")
    with pytest.raises(InputError, match="is gone, and its copy can't be used"):
        kept.source(copied.parent / "gone", copied, keep=True)


@pytest.fixture
def run_copy(run_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_dir, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"dataset": "x"}, "isn't a run's record"),
        ({"dataset": [1]}, "isn't a run's record"),
        ({"settings": [1]}, "isn't a run's record"),
        ({"class_names": ["a", "b", "\ud800"]}, "class_names isn't a list of 3 names"),
    ],
)
def test_a_run_says_what_of_its_record_is_wrong(run_copy, changed, said):
    write(run_copy / "run.json", {**read(run_copy / "run.json"), **changed})
    with pytest.raises(InputError) as refused:
        trained.load(run_copy)
    assert str(refused.value).startswith(f"{run_copy / 'run.json'}: {said}")


def test_results_without_their_checkpoints_lead_to_what_was_exported_of_them(run_copy):
    assert trained.load(run_copy).class_names == NAMES
    checkpoints = run_copy / "checkpoints"
    (outcome,) = checkpoints.glob("*/outcome.json")
    outcome.unlink()  # a training that goes on

    def refused() -> str:
        with pytest.raises(InputError, match="holds no finished training") as error:
            trained.load(run_copy)
        return str(error.value)

    assert refused().endswith("run.json. Run its train stage first.")
    exported = run_copy / "best_model" / "classifier" / "classifier_20260101_000000.keras"
    exported.parent.mkdir(parents=True)
    exported.touch()
    assert "which may be of an earlier training" in refused() and str(exported) in refused()
    checkpoints.rename(run_copy.parent / "elsewhere")
    assert refused().endswith(f"What was exported of it is there: give that file, {exported}")


@pytest.mark.parametrize(
    "part",
    [
        {"accuracy": None},
        {"accuracy": "x"},
        {"accuracy": 1.5},
        {"accuracy_interval": None},
        {"accuracy_interval": [0.1]},
        {"loss": float("nan")},
        {"more": [[[[[[[[[1]]]]]]]]]},
        {"more": "\ud800"},
    ],
)
def test_ill_formed_figures_of_the_test_set_are_unknown(part):
    assert facts.from_json(FACTS, num_classes=CLASSES).as_json() == FACTS
    found = facts.from_json({**FACTS, "test": FACTS["test"] | part}, num_classes=CLASSES)
    assert found.test is None and found.signals == FACTS["signals"]


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in likeness.FIGURES for value in (-float("inf"), 1e308, 10**400)]
    + [("spread", 0), ("length", 0), ("length", 1e-300), ("runs", 10**400), ("mean", True)],
    ids=lambda value: str(value)[:9],
)
def test_figures_of_signals_that_can_not_be_counted_with_are_none(name, value):
    unlike = READS | {"length": 900.0}
    assert likeness.warnings(FACTS["signals"], [unlike])
    profile = copy.deepcopy(FACTS["signals"])
    profile["classes"][0][name] = value
    assert likeness.warnings(profile, [unlike]) == []


@pytest.mark.parametrize("name", ["x" * 5000, "y" * 300, "a/" * 3000], ids=lambda name: name[:2])
def test_a_path_that_is_too_long_is_said_to_be(tmp_path, name):
    with pytest.raises(InputError, match=r"File name too long; expected a run's output") as refused:
        trained.load(tmp_path / name)
    assert len(str(refused.value)) < 400
    with pytest.raises(InputError, match="File name too long"):
        kept.source(tmp_path / name, tmp_path / "copy", keep=True)


def test_a_suffix_in_capitals_is_no_keras_file(tmp_path):
    path = tmp_path / "X.KERAS"
    path.touch()
    with pytest.raises(InputError, match=r"X\.KERAS: isn't called \.keras; expected a run's"):
        trained.load(path)
