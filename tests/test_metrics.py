"""Figures against scikit-learn and SciPy, and what must hold for any logits."""

import csv
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats
from sklearn import metrics as sklearn_metrics
from sklearn.neighbors import NearestCentroid

from capfinder.evaluation import metrics

NAMES = ["cap_0", "cap_1", "cap_2", "cap_2-1"]


def scored_reads(seed=0, reads=500, classes=4, sharpness=1.5):
    """Logits that are right more often than not, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, reads)
    logits = rng.normal(0, 1.5, (reads, classes))
    logits[np.arange(reads), labels] += sharpness
    return logits, labels


@st.composite
def any_reads(draw):
    classes = draw(st.integers(2, 5))
    reads = draw(st.integers(1, 30))
    logit = st.floats(-30, 30, width=32)
    rows = st.lists(logit, min_size=classes, max_size=classes)
    logits = draw(st.lists(rows, min_size=reads, max_size=reads))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=reads, max_size=reads))
    return np.array(logits), np.array(labels)


def test_figures_equal_those_of_scikit_learn():
    logits, labels = scored_reads()
    predicted = logits.argmax(axis=1)
    found = metrics.evaluate(logits, labels, class_names=NAMES, temperature=1.0)
    assert found["num_examples"] == 500
    assert found["accuracy"] == sklearn_metrics.accuracy_score(labels, predicted)
    assert found["balanced_accuracy"] == pytest.approx(
        sklearn_metrics.balanced_accuracy_score(labels, predicted), abs=1e-12
    )
    assert found["loss"] == pytest.approx(
        sklearn_metrics.log_loss(labels, special.softmax(logits, axis=1)), abs=1e-12
    )
    np.testing.assert_array_equal(
        found["confusion_matrix"], sklearn_metrics.confusion_matrix(labels, predicted)
    )
    precision, recall, f1, support = sklearn_metrics.precision_recall_fscore_support(
        labels, predicted
    )
    for key, golden in zip(
        ("precision", "recall", "f1", "support"), (precision, recall, f1, support), strict=True
    ):
        np.testing.assert_allclose([row[key] for row in found["per_class"]], golden, atol=1e-12)


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (0, 30), (7, 30), (812, 900)])
def test_interval_is_scipys_wilson_interval(successes, trials):
    golden = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert metrics.wilson_interval(successes, trials) == pytest.approx(
        (golden.low, golden.high), abs=1e-12
    )


def test_softmax_is_scipys_also_for_huge_logits():
    logits = np.array([[1e4, -1e4, 0.0], [1.0, 2.0, 3.0]])
    np.testing.assert_allclose(metrics.softmax(logits), special.softmax(logits, axis=1), atol=1e-15)
    np.testing.assert_allclose(metrics.log_softmax(logits), special.log_softmax(logits, axis=1))


def test_calibration_error_equals_a_plain_loop():
    logits, labels = scored_reads(seed=3)
    probabilities = special.softmax(logits, axis=1)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    golden = 0.0
    for low, high in zip(np.arange(15) / 15, np.arange(1, 16) / 15, strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            golden += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert metrics.expected_calibration_error(logits, labels) == pytest.approx(golden, abs=1e-12)


def test_a_model_that_is_right_as_often_as_it_says_is_calibrated():
    logits = np.log(np.tile([[0.75, 0.25]], (400, 1)))
    labels = np.repeat([0, 1], [300, 100])
    assert metrics.expected_calibration_error(logits, labels) == pytest.approx(0, abs=1e-12)


def test_temperature_is_the_one_scipy_finds():
    logits, labels = scored_reads(seed=1)
    golden = optimize.minimize_scalar(
        lambda t: sklearn_metrics.log_loss(labels, special.softmax(3 * logits / t, axis=1)),
        bounds=(0.1, 20),
        method="bounded",
        options={"xatol": 1e-8},
    ).x
    assert metrics.fit_temperature(3 * logits, labels) == pytest.approx(golden, rel=1e-4)


def test_overconfident_logits_get_their_old_scale_back():
    logits, labels = scored_reads(seed=2, reads=4000)
    plain = metrics.fit_temperature(logits, labels)
    assert metrics.fit_temperature(5 * logits, labels) == pytest.approx(5 * plain, rel=1e-4)


@pytest.mark.parametrize("label", [0, 1])
def test_temperature_stays_in_its_range_where_none_is_best(label):
    fitted = metrics.fit_temperature(np.array([[3.0, -3.0]]), np.array([label]))
    low, high = metrics.TEMPERATURE_RANGE
    assert low <= fitted <= high


def test_accuracy_at_coverage_keeps_the_most_confident_reads():
    logits, labels = scored_reads(seed=4)
    rows = metrics.accuracy_at_coverage(logits, labels)
    confidence = special.softmax(logits, axis=1).max(axis=1)
    order = np.argsort(-confidence)
    correct = logits.argmax(axis=1) == labels
    assert [row["coverage"] for row in rows] == pytest.approx(metrics.COVERAGES)
    for row in rows:
        kept = order[: round(row["coverage"] * 500)]
        assert row["accuracy"] == pytest.approx(correct[kept].mean(), abs=1e-12)
        assert row["threshold"] == pytest.approx(confidence[kept].min(), abs=1e-12)


def test_reads_of_equal_confidence_are_answered_together():
    rows = metrics.accuracy_at_coverage(np.zeros((10, 2)), np.repeat([0, 1], 5))
    assert rows == [{"coverage": 1.0, "accuracy": 0.5, "threshold": 0.5}]


@given(any_reads(), st.floats(0.05, 20))
@settings(max_examples=60, deadline=None)
def test_what_holds_for_any_logits(reads, temperature):
    logits, labels = reads
    names = [f"cap_{number}" for number in range(logits.shape[1])]
    found = metrics.evaluate(logits, labels, class_names=names, temperature=temperature)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    low, high = found["accuracy_interval"]
    assert 0 <= low <= found["accuracy"] <= high <= 1
    assert np.sum(found["confusion_matrix"]) == sum(r["support"] for r in found["per_class"])
    assert found["loss"] >= 0
    for key in ("ece", "ece_after"):
        assert 0 <= found["calibration"][key] <= 1
    assert sum(row["count"] for row in found["calibration"]["bins"]) == len(labels)
    assert found["coverage"][0]["coverage"] == 1
    assert found["coverage"][0]["accuracy"] == pytest.approx(found["accuracy"])
    fitted = metrics.fit_temperature(logits, labels)
    if fitted < metrics.TEMPERATURE_RANGE[1] * 0.99:
        assert metrics.log_loss(logits / fitted, labels) <= found["loss"] + 1e-9


@given(any_reads(), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_order_of_the_reads_does_not_matter(reads, random):
    logits, labels = reads
    order = list(range(len(labels)))
    random.shuffle(order)
    names = [f"cap_{number}" for number in range(logits.shape[1])]
    one = metrics.evaluate(logits, labels, class_names=names, temperature=2.0)
    two = metrics.evaluate(logits[order], labels[order], class_names=names, temperature=2.0)
    assert one["confusion_matrix"] == two["confusion_matrix"]
    assert one["loss"] == pytest.approx(two["loss"], abs=1e-9)
    assert one["calibration"]["ece"] == pytest.approx(two["calibration"]["ece"], abs=1e-9)


def test_a_class_never_predicted_has_no_precision_and_one_without_reads_no_recall():
    logits = np.array([[5.0, 0, 0], [5.0, 0, 0], [0, 0, 5.0]])
    labels = np.array([0, 1, 0])
    found = metrics.evaluate(logits, labels, class_names=["a", "b", "c"], temperature=1.0)
    first, second, third = found["per_class"]
    assert (first["precision"], first["recall"], first["f1"]) == (0.5, 0.5, 0.5)
    assert (second["precision"], second["recall"], second["f1"]) == (None, 0.0, 0.0)
    assert (third["precision"], third["recall"], third["f1"]) == (0.0, None, 0.0)
    assert found["balanced_accuracy"] == 0.25


def test_a_class_neither_there_nor_predicted_has_no_figures():
    rows = metrics.per_class(np.array([[3, 0], [0, 0]]), ["a", "b"])
    assert rows[1] == {
        "cap_class": 1, "cap": "b", "precision": None, "recall": None, "f1": None, "support": 0
    }  # fmt: skip


def test_a_single_read_is_enough():
    logits, labels = np.array([[0.2, 1.1]]), np.array([1])
    found = metrics.evaluate(logits, labels, class_names=["a", "b"], temperature=1.0)
    assert found["accuracy"] == 1.0
    assert found["accuracy_interval"][1] == 1.0
    assert found["accuracy_interval"][0] < 0.3


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (np.zeros((0, 2)), np.zeros(0, int)),
        (np.zeros((3, 2)), np.zeros(2, int)),
        (np.zeros((3, 3)), np.zeros(3, int)),
        (np.array([[np.nan, 0.0]]), np.array([0])),
        (np.zeros((1, 2)), np.array([2])),
        (np.zeros((1, 2)), np.array([-1])),
    ],
)
def test_what_can_not_be_scored_is_refused(logits, labels):
    with pytest.raises(ValueError):
        metrics.evaluate(logits, labels, class_names=["a", "b"], temperature=1.0)


def test_majority_is_that_of_the_training_reads():
    assert metrics.majority_accuracy(np.array([0, 1, 1]), np.array([1, 0, 0, 2]), 3) == 0.25
    assert metrics.majority_accuracy(np.array([2, 0, 0, 2]), np.array([0, 0, 2]), 3) == 2 / 3


def in_blocks(signals, labels, size):
    for start in range(0, len(labels), size):
        yield signals[start : start + size], labels[start : start + size]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_nearest_centroid_equals_that_of_scikit_learn_whatever_the_blocks(size):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    signals = (rng.normal(0, 1, (200, 40)) + 0.3 * labels[:, None]).astype(np.float32)
    golden = NearestCentroid().fit(signals[:120], labels[:120])
    centroids = metrics.class_centroids(in_blocks(signals[:120], labels[:120], size), 3)
    np.testing.assert_allclose(centroids, golden.centroids_, atol=1e-5)
    found = metrics.nearest_centroid_accuracy(
        in_blocks(signals[120:], labels[120:], size), centroids
    )
    assert found == golden.score(signals[120:], labels[120:])


def test_centroids_of_float16_signals_are_summed_in_float64():
    signals = np.full((5000, 2), 0.1, np.float16)
    centroids = metrics.class_centroids(in_blocks(signals, np.zeros(5000, int), 5000), 1)
    np.testing.assert_allclose(centroids, np.float64(np.float16(0.1)), rtol=1e-12)


def test_a_class_without_training_reads_is_never_the_nearest():
    signals, labels = np.eye(2), np.array([0, 2])
    centroids = metrics.class_centroids([(signals, labels)], 3)
    assert np.isnan(centroids[1]).all()
    assert metrics.nearest_centroid_accuracy([(signals, labels)], centroids) == 1.0


def test_no_block_is_an_error():
    with pytest.raises(ValueError):
        metrics.class_centroids([], 2)
    with pytest.raises(ValueError):
        metrics.nearest_centroid_accuracy([], np.zeros((2, 3)))


def test_tables_and_csv_show_the_matrix():
    matrix = [[1234, 5], [0, 7]]
    names = ["cap_0", "cap,1"]
    columns, rows = metrics.confusion_rows(matrix, names)
    assert columns == ["true \\ predicted", "cap_0", "cap,1", "reads"]
    assert rows == [["cap_0", "1,234", "5", "1,239"], ["cap,1", "0", "7", "7"]]
    read_back = list(csv.reader(io.StringIO(metrics.confusion_csv(matrix, names))))
    assert read_back == [
        ["true\\predicted", "cap_0", "cap,1"],
        ["cap_0", "1234", "5"],
        ["cap,1", "0", "7"],
    ]


def test_per_class_table_shows_a_dash_for_what_is_not_defined():
    columns, rows = metrics.per_class_rows(metrics.per_class(np.array([[3, 1], [0, 0]]), NAMES[:2]))
    assert columns == ["cap", "precision", "recall", "F1", "reads"]
    assert rows == [["cap_0", "100.0%", "75.0%", "85.7%", "4"], ["cap_1", "0.0%", "-", "0.0%", "0"]]
