"""`capfinder evaluate`, the whole command, with a small model that the pipeline has trained."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import predicting
import pytest
from csv_input import row, rows, write
from predicting import CLASSES, NAMES, Ended, evaluate, predict, trained_run
from sklearn import metrics as sklearn_metrics

from capfinder import files
from capfinder.errors import InputError
from capfinder.evaluation.predictions import NO_LABEL
from capfinder.prediction import labels, reads


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with predicting.surroundings(tmp_path_factory) as root:
        yield root


@pytest.fixture(scope="module")
def caps(surroundings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory)[0]


@pytest.fixture(scope="module")
def run_dir(surroundings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory)[1]


@pytest.fixture(scope="module")
def evaluated(run_dir: Path, caps: Path, surroundings: Path) -> Ended:
    ended = evaluate(run_dir, caps, surroundings / "evaluated")
    assert ended.code == 0, ended.shown
    return ended


def figures(ended: Ended) -> dict:
    return files.read_json(ended.output_dir / "metrics.json")


def test_the_run_s_own_test_reads_get_the_figures_of_its_own_evaluation(run_dir, caps, tmp_path):
    own = files.read_json(run_dir / "evaluation" / "metrics.json")["test"]
    with (run_dir / "evaluation" / "predictions_test.csv").open() as stream:
        tested = {line["read_id"] for line in csv.DictReader(stream)}
    for path in caps.iterdir():
        lines = path.read_text().splitlines()[1:]
        kept = [line for line in lines if line.split(",")[0] in tested]
        write(tmp_path / "caps" / path.name, kept)
    ended = evaluate(run_dir, tmp_path / "caps", tmp_path / "out")
    assert ended.code == 0, ended.shown
    found = figures(ended)["test"]
    for name in ("temperature", "ece_after"):  # it takes reads of its own to know them
        assert name not in found["calibration"]
        own["calibration"].pop(name)
    assert found.keys() == own.keys()
    assert found["confusion_matrix"] == own["confusion_matrix"]
    assert found["per_class"] == own["per_class"]
    for name in ("accuracy", "balanced_accuracy", "loss", "num_examples"):
        assert found[name] == pytest.approx(own[name], rel=1e-9)
    for name in ("calibration", "coverage"):
        assert json.dumps(rounded(found[name])) == json.dumps(rounded(own[name]))
    known = (run_dir / "evaluation" / "predictions_test.csv").read_text().splitlines()
    assert sorted(ended.lines) == sorted(known)
    assert figures(ended)["own_test"]["accuracy"] == own["accuracy"]
    assert f"on the model's own test reads {own['accuracy']:.1%}" in ended.shown


def rounded(value):
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return round(value, 9) if isinstance(value, float) else value


def test_figures_are_those_of_scikit_learn(evaluated):
    truth = [int(line["cap_class"]) for line in evaluated.rows]
    predicted = [int(line["predicted_cap_class"]) for line in evaluated.rows]
    found = figures(evaluated)["test"]
    matrix = sklearn_metrics.confusion_matrix(truth, predicted)
    np.testing.assert_array_equal(found["confusion_matrix"], matrix)
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(truth, predicted))
    likely = evaluated.probabilities()
    likely /= likely.sum(axis=1, keepdims=True)
    assert found["loss"] == pytest.approx(sklearn_metrics.log_loss(truth, likely), abs=1e-5)
    parts = sklearn_metrics.precision_recall_fscore_support(truth, predicted, zero_division=0)
    for number, name in enumerate(("precision", "recall", "f1", "support")):
        mine = [one[name] or 0 for one in found["per_class"]]
        np.testing.assert_allclose(mine, parts[number])


def test_files_tables_and_accuracies_say_the_same(evaluated, caps):
    found = figures(evaluated)
    text = (evaluated.output_dir / "confusion_matrix.csv").read_text().splitlines()
    assert text[0] == "true\\predicted," + ",".join(NAMES)
    assert [list(map(int, line.split(",")[1:])) for line in text[1:]] == (
        found["test"]["confusion_matrix"]
    )
    at = 0
    for one, path in zip(found["files"], sorted(caps.iterdir()), strict=True):
        part = evaluated.rows[at : at + one["reads"]]
        right = sum(line["cap_class"] == line["predicted_cap_class"] for line in part)
        assert (one["file"], one["reads"]) == (path.name, 60)
        assert one["accuracy"] == pytest.approx(right / 60)
        at += 60
    for title in ("Confusion matrix", "Reads by class", "Accuracy by file", "Composition"):
        assert title in evaluated.shown
    for name in ("metrics.json", "confusion_matrix.csv", "predictions.csv", "composition.json"):
        assert str(evaluated.output_dir / name) in evaluated.shown


def test_reads_get_the_probabilities_of_predict(run_dir, caps, evaluated, tmp_path):
    assert evaluated.lines == predict(run_dir, caps, tmp_path).lines


def test_reads_without_a_label_of_the_model_are_rejects(run_dir, evaluated, tmp_path):
    lines = rows(0, 0, 60)
    given = ["0", "", "-99", "7", "2"]
    lines = [line.replace(",0,", f",{given[k % 5]},", 1) for k, line in enumerate(lines)]
    write(tmp_path / "caps" / "a.csv", lines)
    ended = evaluate(run_dir, tmp_path / "caps", tmp_path / "out")
    assert ended.code == 0, ended.shown
    assert [line["cap_class"] for line in ended.rows] == 12 * ["0", "2"]
    reasons = [reason for *_, reason in ended.rejects]
    assert reasons == 12 * ["no label", "no label", "class not in the model"]
    assert figures(ended)["rejects"] == {"class not in the model": 12, "no label": 24}
    matrix = np.array(figures(ended)["test"]["confusion_matrix"])
    assert matrix.sum(axis=1).tolist() == [12, 0, 12]
    by_id = {line["read_id"]: line for line in evaluated.rows}
    assert all(by_id[line["read_id"]]["p_1"] == line["p_1"] for line in ended.rows)


def test_class_map_says_which_class_is_which(run_dir, caps, evaluated, tmp_path):
    ended = evaluate(run_dir, caps, tmp_path / "a", "--class_map", '{"2": 0, "0": 1}')
    assert ended.code == 0, ended.shown
    matrix = np.array(figures(ended)["test"]["confusion_matrix"])
    whole = np.array(figures(evaluated)["test"]["confusion_matrix"])
    np.testing.assert_array_equal(matrix[[1, 0]], whole[[0, 2]])
    assert matrix[2].sum() == 0 and figures(ended)["class_map"] == {"2": 0, "0": 1}
    assert figures(ended)["rejects"] == {"class not in the model": 120}
    some = evaluate(run_dir, caps, tmp_path / "d", "--class_map", '{"1": 2}')
    matrix = np.array(figures(some)["test"]["confusion_matrix"])
    assert matrix.sum(axis=1).tolist() == [0, 0, 120]
    assert {line["cap_class"] for line in some.rows} == {"2"}
    same = evaluate(run_dir, caps, tmp_path / "b", "--class_map", "None")
    assert same.code == 0 and figures(same)["test"] == figures(evaluated)["test"]
    wrong = evaluate(
        run_dir, caps, tmp_path / "c", "--class_map", '{"0": 0, "4": 1, "5": 2, "6": 3}'
    )
    assert wrong.code == 2 and "gives 6 to class 3; the model has 0 to 2" in wrong.shown
    assert not (tmp_path / "c" / "predictions.csv").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"7": 3}', {"7": 3}),
        ('{"07": 3, "8": 3}', {"7": 3, "8": 3}),
        ("{}", {}),
        ("None", None),
        ("null", None),
    ],
)
def test_class_map_may_name_any_of_the_model_s_classes(text, expected):
    assert labels.from_text(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "x", "[]", '[["0", 1]]', '{"-1": 0}', '{"x": 0}', '{"0": 0.5}', '{"0": true}',
     '{"0": "1"}', '{"0": 0, "00": 1}', '{"0": 0, "0": 0}', '{"1234567890": 0}', "[" * 10**5],
)  # fmt: skip
def test_a_class_map_that_is_none_is_said_to_be(text):
    with pytest.raises(InputError, match=r"^--class_map="):
        labels.from_text(text)


def test_without_any_label_it_ends_with_a_clear_line(run_dir, tmp_path):
    def said(label: str) -> str:
        changed = [line.replace(",0,", f",{label},", 1) for line in rows(0, 0, 9)]
        write(tmp_path / "caps" / "a.csv", changed)
        ended = evaluate(run_dir, tmp_path / "caps", tmp_path / "out")
        assert ended.code == 2
        assert not (tmp_path / "out" / ".unfinished").exists()
        assert not list((tmp_path / "out").glob("*.csv"))
        (line,) = [line for line in ended.shown.splitlines() if line.startswith("error: ")]
        return line

    assert "no read has a label: cap_class is empty or negative in 9 rows" in said("")
    assert "`capfinder predict`" in said("-99")
    line = said("7")
    assert "no read has the label of a class that the model has (9 have others)" in line
    assert "--class_map" in line
    write(tmp_path / "caps" / "a.csv", [row("x", 0, "y")])
    ended = evaluate(run_dir, tmp_path / "caps", tmp_path / "out")
    assert ended.code == 2 and "the only row can't be used" in ended.shown


def test_labels_are_mapped_read_by_read():
    given = np.array([0, 5, NO_LABEL, -99, 7, 5], np.int32)
    block = reads.Reads(
        file=0,
        read_ids=np.array([b"a", b"b", b"c", b"d", b"e", b"f"]),
        labels=given,
        lines=np.arange(6),
        signals=np.zeros((6, 2)),
        figures=np.zeros((6, 4)),
        origins=np.zeros((6, 0), "S1"),
        rejects=[],
        following=reads.Position(1),
        disk_bytes=0,
    )
    found = labels.parse({"5": 1, "7": 0}, num_classes=CLASSES).apply(block)
    assert found.labels.tolist() == [1, 0, 1]
    assert [(reject.read_id, reject.reason) for reject in found.rejects] == [
        ("a", labels.NOT_IN_MODEL),
        ("c", labels.NO_LABEL),
        ("d", labels.NO_LABEL),
    ]
