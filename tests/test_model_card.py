"""The model card: its code runs, its figures are those of the test, and nobody's name breaks it."""

import copy
import dataclasses
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from capfinder import models
from capfinder.etl.preprocess import fit_length
from capfinder.evaluation import facts, likeness
from capfinder.exporting import card as model_card
from capfinder.exporting import keras, onnx, saved_model
from capfinder.exporting.card import known, snippets
from capfinder.log import printable
from tests.small_models import CLASSES, LENGTH, SmallModel, small_model

NAMES = ["cap_0", "cap_1", "m2,7G"]
TEST = {
    "accuracy": 0.9,
    "accuracy_interval": [0.87, 0.92],
    "balanced_accuracy": 0.88,
    "loss": 0.3,
    "num_examples": 1200,
    "confusion_matrix": [[500, 50, 0], [20, 430, 50], [0, 0, 150]],
}
FACTS = {
    "test": TEST,
    "baselines": {"nearest_centroid_accuracy": 0.61, "majority_accuracy": 0.45},
    "signals": likeness.profile(
        [
            {
                "dataset_class": label,
                "is_test": False,
                "chosen": 100,
                "signal": {"mean": level, "within_read_sd": 1.25, "between_reads_sd": 0.5},
                "length": {"mean": 412.0},
            }
            for label, level in ((0, 0.1), (0, 0.3), (1, -0.5), (2, 0.25))
        ]
    ),
    "dataset": {
        "version": "1.2.0",
        "fingerprint": "cd" * 32,
        "group_by": "read",
        "counts": {
            split: {str(label): reads + label for label in range(3)}
            for split, reads in (("train", 8000), ("validation", 2000), ("test", 400))
        },
        "sources": [
            {"file": "data__cap_1_run2.csv", "dataset_class": 1, "chosen": 5201},
            {"file": "data__cap_2.csv", "dataset_class": 2, "chosen": 5202},
        ],
        "warnings": ["Runs and classes are confounded, class 2 from data__cap_2.csv alone."],
    },
}
ABOUT: dict[str, Any] = {
    "capfinder_version": "1.0.0",
    "model_type": "cnn_lstm",
    "hyperparameters": dataclasses.asdict(models.parse_hyperparameters("cnn_lstm", {})),
    "num_parameters": 349380,
    "class_names": NAMES,
    "preprocessing": {
        "signal": "current of the cap region, clipped to ±4",
        "target_length": LENGTH,
        "fitting": "centred; an odd sample goes to the right",
    },
    "weights_sha256": "ab" * 32,
    "facts": FACTS,
}
EXPORTS = [
    {"name": "keras", "file": "classifier.keras", "max_abs_difference": 1.24e-7},
    {"name": "h5", "file": "../best.weights.h5", "max_abs_difference": 0.0},
    {"name": "saved_model", "file": "../saved_model", "max_abs_difference": 3e-8},
    {"name": "onnx", "file": "classifier.onnx", "max_abs_difference": 2e-7, "opset": 17},
]
HOSTILE = [
    "a|b",
    "`x`",
    "``` \n```\n# forged",
    "[click](http://evil.example)",
    "<script>alert(1)</script>",
    "![x](http://evil.example/x.png)",
    "www.evil.example",
    "https://evil.example",
    "\x1b[31mred\u202e",
    '"""\nimport os\n',
    "back\\",
    "lone \ud800",
    "\\|",
    "- list",
    "#1 heading",
    "1. one",
    "*bold* _it_ ~~no~~ $x$",
    "&lt;b&gt;",
    "",
    " ",
    "x" * 10_000,
]


def changed(*path: str, to: Any) -> dict[str, Any]:
    """ABOUT with one value that is another."""
    about = copy.deepcopy(ABOUT)
    place = about
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = to
    return about


def card(about: Any = ABOUT, exports: Any = EXPORTS) -> str:
    return model_card.text(about, exports)


def tokens(text: str) -> list[Any]:
    """All, those within lines too, as a reader of Markdown with tables has them."""
    found = []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        found += [token, *(token.children or [])]
    return found


def tables(text: str) -> dict[str, list[list[str]]]:
    """Rows of plain cells by the first column's title and, where there are several, its second."""
    found: dict[str, list[list[str]]] = {}
    rows: list[list[str]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "table_open":
            rows = []
        elif token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and token.level > 3:
            rows[-1].append("".join(child.content for child in token.children))
        elif token.type == "table_close":
            found["/".join(rows[0][:2])] = rows[1:]
    return found


def code(text: str) -> list[str]:
    return [token.content for token in tokens(text) if token.type == "fence"]


def headings(text: str) -> list[str]:
    return [
        after.content
        for token, after in itertools.pairwise(tokens(text))
        if token.type == "heading_open"
    ]


def ran(*blocks: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "model_card.md", "exec"), values)
    return values


def test_each_part_stands_under_its_heading():
    assert headings(card()) == [
        "A classifier of RNA caps",
        "Which output is which cap",
        "What it takes",
        "How to use it",
        "Keras",
        "TensorFlow",
        "ONNX Runtime",
        "The weights alone",
        "How good it is",
        "What to be wary of",
        "What it was trained on",
        "How it came about",
        "What it is",
        "Files",
    ]


def test_what_is_known_is_told():
    text, told = card(), tables(card())
    assert (
        "right on 90.0% of 1,200 test reads, which it had never seen (95% interval: 87.0%" in text
    )
    assert told["output/cap"] == [[str(number), name] for number, name in enumerate(NAMES)]
    assert told["who answers/right"] == [
        ["this model", "90.0%"],
        ["it, every cap counted alike", "88.0%"],
        ["naming the cap whose mean signal is nearest", "61.0%"],
        ["always naming the commonest cap", "45.0%"],
    ]
    assert told["cap/recall"] == [
        ["cap_0", "90.9%", "96.2%", "550"],
        ["cap_1", "86.0%", "89.6%", "500"],
        ["m2,7G", "100.0%", "75.0%", "150"],
    ]
    assert told["true cap/called cap_0"][0] == ["cap_0", "500", "50", "0"]
    assert ["version", "1.2.0"] in told["dataset/"]
    assert told["reads of/train"][2] == ["m2,7G", "8,002", "2,002", "402"]
    assert told["file/cap"][0] == ["data__cap_1_run2.csv", "cap_1", "5,201"]
    assert told["signals of/runs"] == [
        ["cap_0", "2", "200", "0.2", "1.25", "412", "0.5099"],
        ["cap_1", "1", "100", "-0.5", "1.25", "412", "0.5"],
        ["m2,7G", "1", "100", "0.25", "1.25", "412", "0.5"],
        ["between runs", "", "", "0.1414", "0", "0", "-"],
    ]
    assert told["written by/"] == [
        ["capfinder version", "1.0.0"],
        ["weights sha256", "ab" * 32],
    ]
    assert told["model/"] == [["architecture", "cnn_lstm"], ["parameters", "349,380"]]
    assert ["learning_rate", "0.001", "Adam's step size at the start"] in told[
        "hyperparameter/value"
    ]
    assert [row[0::2] for row in told["file/what it is"]] == [
        ["classifier.keras", "1.2e-07"],
        ["../best.weights.h5", "0.0e+00"],
        ["../saved_model", "3.0e-08"],
        ["classifier.onnx", "2.0e-07"],
        ["labels.json", "-"],
    ]
    assert "opset 17" in text
    assert "current of the cap region, clipped to ±4" in text
    assert "centred; an odd sample goes to the right" in text
    assert "from scratch" in text


@pytest.mark.parametrize("model_type", sorted(models.ARCHITECTURES))
def test_every_architecture_is_described(model_type):
    about = changed("model_type", to=model_type)
    about["hyperparameters"] = dataclasses.asdict(models.parse_hyperparameters(model_type, {}))
    text = card(about)
    assert models.architecture(model_type).__doc__.split("\n")[0] in text
    rows = tables(text)["hyperparameter/value"]
    assert len(rows) == len(about["hyperparameters"]) and all(meaning for *_, meaning in rows)


def test_equal_arguments_give_equal_text():
    assert card() == card(copy.deepcopy(ABOUT), copy.deepcopy(EXPORTS))


def test_what_isnt_known_is_left_out():
    text = card({}, [])
    assert headings(text) == [
        "A classifier of RNA caps",
        "How good it is",
        "What to be wary of",
        "Files",
    ]
    assert "That isn't known" in text
    assert "None" not in text and "()" not in text and "from scratch" not in text


def test_limits_are_those_that_apply():
    text = card()
    for said in ("no caps but these", "Another pore", "Picoamperes", "Precision depends"):
        assert said in text
    assert "same sequencing runs" in text
    assert "Runs and classes are confounded" in text
    assert "simulated" not in text.lower()
    assert "same sequencing runs" not in card(changed("facts", "dataset", "group_by", to="file"))
    assert "isn't noted here" in card(changed("facts", "dataset", to={"version": "1.0.0"}))
    assert "Precision depends" not in card(changed("facts", to={}))
    simulated = "The input is SIMULATED (capfinder simulate): these figures say nothing."
    text = card(changed("facts", "dataset", "warnings", to=[simulated]))
    assert "**It was trained on SIMULATED reads" in text.split("\n## ")[0]
    assert f"- {simulated}" in text


@pytest.mark.parametrize(
    ("new_head", "freeze", "says"),
    [
        (True, "trunk", ["Its last layer is new", "Only the dense layers"]),
        (False, "nothing", ["Its last layer was kept", "All of it was trained"]),
    ],
)
def test_a_fine_tuned_model_says_what_it_started_from(new_head, freeze, says):
    start = {
        "path": "/data/earlier",
        "weights_sha256": "ef" * 32,
        "class_names": ["cap_0", "TMG"],
        "new_head": new_head,
        "freeze": freeze,
    }
    text = card(changed("facts", "init_from", to=start))
    assert all(said in text for said in says) and "from scratch" not in text
    assert tables(text)["started from/"] == [
        ["path", "/data/earlier"],
        ["weights sha256", "ef" * 32],
    ]
    assert "That model tells apart `cap_0`, `TMG`." in text


def test_only_formats_that_were_written_have_code():
    for number, titles in (
        ([0], ["Keras"]),
        ([1], []),
        ([0, 1], ["Keras", "The weights alone"]),
        ([2], ["TensorFlow"]),
        ([3], ["ONNX Runtime"]),
        ([], []),
    ):
        text = card(ABOUT, [EXPORTS[index] for index in number])
        below = [title for title in headings(text) if title not in headings(card(ABOUT, []))]
        assert below == (["How to use it", *titles] if titles else [])
        assert len(code(text)) == 1 + len(titles)


def test_of_many_classes_no_table_is_endless():
    many = 300
    about = changed("class_names", to=[f"cap_{number}" for number in range(many)])
    about["facts"]["test"]["confusion_matrix"] = np.eye(many, dtype=int).tolist()
    text = card(about)
    assert "... and 200 more." in text and "called what" not in text
    assert max(len(line) for line in text.splitlines()) < 500
    assert ran(code(text)[0])["CAPS"] == about["class_names"]


def test_a_class_without_reads_has_no_share():
    matrix = [[5, 0, 0], [0, 5, 0], [0, 0, 0]]
    about = changed("facts", "test", "confusion_matrix", to=matrix)
    assert tables(card(about))["cap/recall"][2] == ["m2,7G", "-", "-", "0"]


@given(st.integers(1, 3 * LENGTH), st.integers(LENGTH - 2, LENGTH + 1))
def test_the_card_fits_signals_as_the_dataset_does(samples, length):
    signal = np.arange(1, samples + 1, dtype="float32")
    source = snippets.prepare(length=length, dtype="float32", names=NAMES)
    fit = ran(source)["fit"]
    np.testing.assert_array_equal(fit(signal)[:, 0], fit_length(signal, length))


def test_the_card_scales_a_whole_read():
    given_ = np.random.default_rng(1).normal(90, 20, 5000)
    given_[7] = 1000
    scaled = ran(code(card())[0])["scale"](given_)
    expected = np.clip((given_ - np.mean(given_)) / np.std(given_), -4, 4)
    np.testing.assert_allclose(scaled, expected)
    assert scaled.max() == 4


def test_an_input_of_another_length_and_type_is_told():
    about = changed("preprocessing", "input_length", to=LENGTH + 8)
    text = card({**about, "dtype": "float64"})
    values = ran(code(text)[0])
    assert values["signals"].shape == (1, LENGTH + 8, 1)
    assert values["signals"].dtype == np.float64
    assert f"`(reads, {LENGTH + 8}, 1)` numbers of type float64" in text
    assert f"brings it to {LENGTH} samples" in text
    assert "brings it to" not in card()


@pytest.fixture(scope="module")
def model() -> Iterator[SmallModel]:
    jax.config.update("jax_disable_most_optimizations", True)
    yield small_model("cnn_lstm")
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def beside_the_card(model, tmp_path, monkeypatch) -> Path:
    """The files of EXPORTS; the card's own directory is the current one."""
    directory = tmp_path / "classifier"
    directory.mkdir()
    monkeypatch.chdir(directory)
    twin = keras.build_twin(
        "cnn_lstm",
        model.hyperparameters,
        num_classes=CLASSES,
        target_length=LENGTH,
        dtype="float32",
    )
    keras.copy_weights(twin, model.variables)
    keras.write_keras(twin, Path("classifier.keras"), ABOUT)
    keras.write_weights(twin, Path("../best.weights.h5"))
    onnx.write_onnx(twin, Path("classifier.onnx"), ABOUT)
    saved_model.write_saved_model(
        model.probabilities, model.variables, Path("../saved_model"), target_length=LENGTH
    )
    return directory


def test_the_code_runs_and_gives_what_the_model_gives(model, beside_the_card, capsys):
    about = keras.read_about(Path("classifier.keras"))
    prepare, with_keras, with_tensorflow, with_onnx, with_weights = code(card(about))
    for block in (with_keras, with_tensorflow, with_onnx):
        values = ran(prepare, block)
        expected = np.asarray(model.probabilities(model.variables, values["signals"]))
        np.testing.assert_allclose(values["probabilities"], expected, atol=1e-6)
        named = [NAMES[number] for number in expected.argmax(axis=1)]
        assert capsys.readouterr().out.splitlines()[-1] == str(named)
    loaded = ran(with_weights)["model"]
    np.testing.assert_allclose(
        np.asarray(loaded.predict(model.signals, verbose=0)), model.expected, atol=1e-6
    )


def test_names_of_anybody_mean_nothing_in_the_card():
    names = HOSTILE[: known.MOST_IN_MATRIX]
    plain = card(changed("class_names", to=["a"] * len(names)))
    about = changed("class_names", to=names)
    about["facts"]["test"]["confusion_matrix"] = np.eye(len(names), dtype=int).tolist()
    for name in ("model_type", "capfinder_version", "weights_sha256"):
        about[name] = HOSTILE[4]
    about["hyperparameters"] = {name: name for name in HOSTILE}
    about["facts"]["init_from"] = {"path": HOSTILE[2], "class_names": HOSTILE}
    about["facts"]["dataset"]["sources"] = [{"file": name} for name in HOSTILE]
    about["facts"]["signals"]["classes"] = [
        dict.fromkeys(("cap_class", "runs", "mean", "length"), name) for name in HOSTILE
    ]
    about["facts"]["dataset"]["version"] = HOSTILE[3]
    text = card(about)
    assert headings(text) == headings(plain)
    assert all(line.isprintable() for line in text.splitlines())
    assert set(_kinds(text)) <= set(_kinds(card()))
    told = tables(text)
    assert len(told["output/cap"]) == len(told["cap/recall"]) == len(names)
    assert told["output/cap"][0] == ["0", r"a\x7cb"]
    assert told["output/cap"][3] == ["3", HOSTILE[3]]
    assert all(len(row) == len(names) + 1 for row in told[r"true cap/called a\x7cb"])
    assert [row[1:] for row in told["signals of/runs"][:-1]] == [["-"] * 6] * len(HOSTILE)
    assert ran(code(text)[0])["CAPS"] == names
    assert len(code(text)) == len(code(plain))


@pytest.mark.parametrize("sentence", HOSTILE)
def test_sentences_of_anybody_mean_nothing_in_the_card(sentence):
    about = changed("facts", "dataset", "warnings", to=[sentence])
    about["preprocessing"] |= {"signal": sentence, "fitting": sentence}
    text = card(about)
    assert set(_kinds(text)) <= set(_kinds(card()))
    assert headings(text) == headings(card())
    shown = "".join(token.content for token in tokens(text) if token.type == "text")
    assert printable(" ".join(sentence.split())).removesuffix(".") in shown
    assert not re.search(r"(?<!\\)://|www\.", text)  # which some readers make links of


def _kinds(text: str) -> list[str]:
    return [token.type for token in tokens(text) if token.type != "softbreak"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["accuracy", "0", "train", "file", "version", "freeze", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
PLACES = [
    *((name,) for name in ABOUT),
    *(("preprocessing", name) for name in ABOUT["preprocessing"]),
    ("preprocessing", "input_length"),
    *(("facts", name) for name in (*facts.Facts.__dataclass_fields__,)),
    *(("facts", "test", name) for name in TEST),
    *(("facts", "baselines", name) for name in FACTS["baselines"]),
    *(("facts", "dataset", name) for name in FACTS["dataset"]),
    *(("facts", "signals", name) for name in FACTS["signals"]),
    ("facts", "test", "confusion_matrix"),
]


@given(st.sampled_from(PLACES), json_values)
def test_any_value_anywhere_gives_a_card(place, value):
    text = card(changed(*place, to=value))
    assert text.startswith("# A classifier of RNA caps\n") and text.endswith("|\n")
    assert "None" not in text and text.encode()
