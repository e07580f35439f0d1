"""train_params.init_from and freeze: a training that goes on from another model's weights."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax_settings
import numpy as np
import pytest
from csv_input import write_classes
from flax.traverse_util import flatten_dict
from in_process import Ended, shown_by

from capfinder import cli, preparation, settings, trained
from capfinder.errors import SettingsError
from capfinder.models import ARCHITECTURES, architecture, parse_hyperparameters
from capfinder.models.layers import HEAD
from tests.sizes import TINY
from tests.small_models import LENGTH, SmallModel, small_model

SMALL = TINY["cnn_lstm"]
EPOCHS = 2


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("fine_tuning")
    with pytest.MonkeyPatch.context() as patched, jax_settings.restored():
        patched.setenv("HOME", str(root / "home"))
        patched.delenv("XDG_CACHE_HOME", raising=False)
        jax.config.update("jax_disable_most_optimizations", True)
        write_classes(root / "two", classes=2, runs=1, reads=40)
        write_classes(root / "three", classes=3, runs=1, reads=40)
        yield root
    jax.config.update("jax_disable_most_optimizations", False)


class Trained(Ended):
    def weights(self) -> dict[tuple[str, ...], np.ndarray]:
        return flatten_dict(trained.load(self.output_dir).model.variables)


def run(root: Path, name: str, *, caps: str = "two", **changed: Any) -> Trained:
    values: dict[str, Any] = {
        "etl_params.caps_data_dir": root / caps,
        "etl_params.examples_per_class": None,
        "shared_params.num_classes": 2 if caps == "two" else 3,
        "shared_params.batch_size": 16,
        "shared_params.target_length": LENGTH,
        "shared_params.train_test_fraction": 0.8,
        "shared_params.train_val_fraction": 0.75,
        "train_params.max_epochs_final_model": EPOCHS,
        "tune_params.max_trials": 2,
        "tracking_params.mode": "off",
        "runtime_params.compilation_cache_dir": root / "xla",
        "export_params.formats": [],
    } | {key.replace("__", "."): value for key, value in changed.items()}
    path = root / f"{name}.json"
    path.write_text(json.dumps(values, default=str))
    arguments = [f"--config={path}", f"--output_dir={root / name}"]
    code, shown = shown_by(lambda: cli.launch(arguments))
    return Trained(code, " ".join(shown.split()), root / name)


@pytest.fixture(scope="module")
def source(surroundings) -> Trained:
    """A run that others go on from."""
    ended = run(surroundings, "source", tune_params__max_trials=0, model_params=SMALL)
    assert ended.code == 0, ended.shown
    return ended


@pytest.fixture(scope="module")
def frozen(surroundings, source) -> Trained:
    ended = run(
        surroundings,
        "frozen",
        train_params__init_from=source.output_dir,
        train_params__freeze="trunk",
        model_params={"learning_rate": 0.01},
    )
    assert ended.code == 0, ended.shown
    return ended


def is_of_head(path: tuple[str, ...]) -> bool:
    return path[1] == HEAD or path[1].startswith("dense_")


def test_a_frozen_trunk_keeps_every_bit_and_the_head_learns(source, frozen):
    before, after = source.weights(), frozen.weights()
    assert before.keys() == after.keys()
    for path, value in before.items():
        assert np.array_equal(value, after[path]) is not is_of_head(path), path


def test_architecture_and_hyperparameters_are_the_source_s_and_nothing_is_tuned(source, frozen):
    found = frozen.read("evaluation/metrics.json")
    expected = source.read("evaluation/metrics.json")["hyperparameters"]
    assert found["hyperparameters"] == expected | {"learning_rate": 0.01}
    assert not list(frozen.output_dir.glob("tuner_models/*"))
    assert "tune" not in frozen.read("run.json")["stages"]


def test_what_it_started_from_is_reported(source, frozen):
    noted = frozen.read("evaluation/metrics.json")["init_from"]
    assert noted["path"] == str(source.output_dir)
    assert (noted["freeze"], noted["new_head"]) == ("trunk", False)
    sentence = (
        f"fine-tuned from {source.output_dir}: its last layer kept, all before the dense layers "
        "frozen"
    )
    assert sentence in frozen.shown
    assert "new: no checkpoint" in frozen.read("run.json")["stages"]["train"]["why"]
    assert sentence in frozen.read("run.json")["stages"]["train"]["why"]
    assert str(source.output_dir) in (frozen.output_dir / "report.html").read_text()
    assert source.read("evaluation/metrics.json")["init_from"] is None
    facts = trained.load(frozen.output_dir).facts
    assert facts.init_from == noted


def test_all_is_trained_when_nothing_is_frozen(surroundings, source):
    ended = run(surroundings, "whole", train_params__init_from=source.output_dir)
    assert ended.code == 0, ended.shown
    before, after = source.weights(), ended.weights()
    unchanged = {path[-1] for path in before if np.array_equal(before[path], after[path])}
    assert unchanged == {"steps"}  # as many of them, counted anew


@pytest.fixture(scope="module")
def three_caps(surroundings, source) -> Trained:
    ended = run(
        surroundings,
        "three_caps",
        caps="three",
        train_params__init_from=source.output_dir,
        train_params__freeze="trunk",
    )
    assert ended.code == 0, ended.shown
    return ended


def test_other_caps_get_a_new_last_layer_alone(source, three_caps):
    assert "a new last layer" in three_caps.shown
    before, after = source.weights(), three_caps.weights()
    assert after["params", HEAD, "kernel"].shape[1] == 3
    for path in before:
        if not is_of_head(path):
            np.testing.assert_array_equal(before[path], after[path])


def test_a_rerun_reuses_it_and_another_start_does_not(surroundings, source, frozen, three_caps):
    def rerun(init_from: Path) -> tuple[str, set[str]]:
        ended = run(
            surroundings,
            "frozen",
            train_params__init_from=init_from,
            train_params__freeze="trunk",
            model_params={"learning_rate": 0.01},
        )
        assert ended.code == 0, ended.shown
        return ended.shown, {path.name for path in (ended.output_dir / "checkpoints").iterdir()}

    shown, trainings = rerun(source.output_dir)
    assert "already done" in shown
    assert len(trainings) == 1
    shown, trainings = rerun(three_caps.output_dir)
    assert "The earlier results are in" in shown
    assert len(trainings) == 2


def test_a_run_goes_on_from_its_own_copy_once_the_source_is_gone(surroundings, source):
    moved = Path(shutil.copytree(source.output_dir, surroundings / "moved"))
    given = {"train_params__init_from": moved, "train_params__freeze": "trunk"}
    ended = run(surroundings, "kept", **given)
    assert ended.code == 0, ended.shown
    copy = ended.output_dir / "init_from"
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    assert run(surroundings, "kept", **given).code == 0
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
    shutil.rmtree(moved)

    again = run(surroundings, "kept", **given)
    assert again.code == 0, again.shown
    assert f"{moved} is gone; its copy in {copy} is used" in again.shown
    assert "already done" in again.shown  # the very weights
    shutil.rmtree(ended.output_dir / "checkpoints")
    before_head = ended.read("evaluation/metrics.json")["test"]
    anew = run(surroundings, "kept", **given)
    assert anew.code == 0, anew.shown
    assert anew.read("evaluation/metrics.json")["test"] == before_head

    other = {**given, "train_params__init_from": surroundings / "never"}
    assert f"the copy in {copy} is of {moved}" in run(surroundings, "kept", **other).shown
    (copy / "import.json").write_text("{}")
    assert "is gone, and its copy can't be used" in run(surroundings, "kept", **given).shown


def start_for(small: SmallModel, class_map: dict[str, int] | None = None, **changed: Any) -> Any:
    """As the pipeline makes it of a small model, whose classes are those of `class_map`."""
    from capfinder.stages import start
    from capfinder.stages.assembly import TrainedModel

    model = TrainedModel(
        model_type=small.model_type,
        hyperparameters=small.hyperparameters,
        module=small.module,
        variables=small.variables,
        num_classes=3,
        target_length=LENGTH,
        best_epoch=1,
        num_parameters=1,
    )
    config = settings.checked(
        settings.default_config(),
        {
            "shared_params.model_type": small.model_type,
            "shared_params.num_classes": 3,
            "shared_params.target_length": LENGTH,
            "train_params.init_from": "elsewhere",
        }
        | changed,
    )
    return start.from_model(config, model, class_names=["a", "b", "c"], class_map=class_map or {})


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_every_architecture_can_freeze_its_trunk(model_type):
    """The gradient of a step is 0 everywhere before the dense layers, and no average moves."""
    small = small_model(model_type)
    module = architecture(model_type).build(
        small.hyperparameters, num_classes=3, dtype=np.float32, frozen_trunk=True
    )
    rngs = {"dropout": jax.random.key(0)}

    def loss(params: Any) -> Any:
        logits, updated = module.apply(
            {**small.variables, "params": params},
            small.signals,
            train=True,
            mutable=["batch_stats"],
            rngs=rngs,
        )
        return jax.nn.log_softmax(logits)[:, 0].sum(), updated

    gradients, updated = jax.jit(jax.grad(loss, has_aux=True))(small.variables["params"])
    for path, gradient in flatten_dict({"params": gradients}).items():
        assert bool(np.abs(gradient).max() > 0) is is_of_head(path), path
    before = flatten_dict({"batch_stats": small.variables.get("batch_stats", {})})
    for path, value in flatten_dict(dict(updated)).items():
        np.testing.assert_array_equal(value, before[path])


def test_the_count_of_averaged_batches_starts_anew(surroundings):
    small = small_model("cnn_lstm")
    start = start_for(small)
    fresh = jax.tree.map(lambda leaf: np.zeros_like(leaf), small.variables)
    taken = flatten_dict(start.in_place_of(fresh))
    for path, value in flatten_dict(small.variables).items():
        expected = np.zeros_like(value) if path[-1] == "steps" else value
        np.testing.assert_array_equal(taken[path], expected)


def test_the_last_layer_is_kept_for_the_same_caps_alone():
    small = small_model("cnn_lstm")
    fresh = jax.tree.map(lambda leaf: np.zeros_like(leaf), small.variables)
    kernel = ("params", HEAD, "kernel")
    own = flatten_dict(small.variables)[kernel]
    others = {"0": 0, "1": 1, "7": 2}
    for of_model, to_train, kept in (
        ({}, {}, True),
        ({"0": 0, "1": 1, "2": 2}, {}, True),
        (others, others, True),
        (others, {}, False),
        ({}, {"0": 0, "2": 1, "1": 2}, False),
    ):
        start = start_for(small, of_model, **{"etl_params.class_map": to_train})
        assert start.has_new_head is not kept
        taken = flatten_dict(start.in_place_of(fresh))[kernel]
        np.testing.assert_array_equal(taken, own if kept else np.zeros_like(own))


def test_a_model_of_another_precision_is_taken_in_that_of_the_training():
    with jax.enable_x64(True):
        start = start_for(small_model("cnn_lstm", dtype="float64"))
    fresh = jax.tree.map(lambda leaf: np.zeros_like(leaf), small_model("cnn_lstm").variables)
    taken = jax.tree.leaves(start.in_place_of(fresh))
    assert {leaf.dtype for leaf in taken} == {np.dtype("float32")}
    assert any(np.any(leaf) for leaf in taken)


def test_dropout_and_learning_rate_may_be_changed_and_layers_may_not():
    small = small_model("cnn_lstm")
    changed = {"lstm_dropouts": [0.4, 0.4], "learning_rate": 1e-4}
    start = start_for(small, model_params=changed)
    expected = parse_hyperparameters("cnn_lstm", SMALL | changed)
    assert start.hyperparameters == expected
    with pytest.raises(SettingsError, match=r"would change the layers of train_params\.init_from"):
        start_for(small, model_params={"dense_units": 5})


def test_another_architecture_or_length_is_told():
    with pytest.raises(SettingsError, match="is of the architecture resnet; set model_type"):
        start_for(small_model("resnet"), **{"shared_params.model_type": "cnn_lstm"})
    with pytest.raises(SettingsError, match=f"takes {LENGTH} samples and has weights for each"):
        start_for(small_model("encoder"), **{"shared_params.target_length": 2 * LENGTH})
    # One whose weights are the same at every position takes any length.
    start_for(small_model("resnet"), **{"shared_params.target_length": 2 * LENGTH})


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"train_params__freeze": "trunk"}, "train_params.freeze=trunk: only with"),
        ({"train_params__init_from": "/nowhere"}, "train_params.init_from: /nowhere: no such"),
        ({"train_params__init_from": "{root}/wrong"}, "is shared_params.output_dir"),
        ({"train_params__init_from": "{root}"}, "holds neither run.json nor import.json"),
    ],
)
def test_a_start_that_cannot_be_used_ends_the_run_at_once(surroundings, changed, expected):
    changed = {key: value.format(root=surroundings) for key, value in changed.items()}
    ended = run(surroundings, "wrong", **changed)
    assert ended.code == 2
    assert expected in ended.shown
    assert not (surroundings / "wrong" / "dataset").exists()


def test_a_dry_run_looks_at_the_start(surroundings, source):
    overrides = {
        "etl_params.caps_data_dir": str(surroundings / "two"),
        "etl_params.examples_per_class": None,
        "shared_params.num_classes": 2,
        "shared_params.output_dir": str(surroundings / "dry"),
        "train_params.init_from": str(source.output_dir),
        "shared_params.model_type": "resnet",
    }
    config = settings.checked(settings.default_config(), overrides)
    with pytest.raises(SettingsError, match="is of the architecture cnn_lstm"):
        preparation.explain(config, stages=("etl", "train"))
