"""Shares of the caps: as counted, and corrected by the test set's confusion matrix."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from capfinder.evaluation import composition

counts = st.lists(st.integers(0, 10**6), min_size=2, max_size=5).filter(any)


@st.composite
def problems(draw):
    """Shares of predicted classes (C,), and P(predicted | true) (C, C) of a useful model or not."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    classes = draw(st.integers(2, 5))
    skill = draw(st.sampled_from([0.0, 0.3, 1.0, 5.0, 100.0]))
    rows = rng.dirichlet(np.full(classes, 0.5), classes) + skill * np.eye(classes)
    if draw(st.booleans()):  # mistakes that are never made
        rows = np.where(rng.random(rows.shape) < 0.4, 0, rows) + 1e-3 * np.eye(classes)
    return rng.dirichlet(np.full(classes, 0.7)), rows / rows.sum(axis=1, keepdims=True)


def likelihood(shares, seen, rows) -> float:
    return float((seen * np.log(np.maximum(shares @ rows, 1e-300))).sum())


@given(counts)
def test_counted_shares_are_the_counts_with_wilsons_intervals(given_counts):
    found = composition.counted(given_counts)
    total = sum(given_counts)
    for one, count in zip(found, given_counts, strict=True):
        assert one["share"] == pytest.approx(count / total, abs=1e-6)
        interval = stats.binomtest(count, total).proportion_ci(method="wilson")
        np.testing.assert_allclose(one["interval"], interval, atol=2e-6)


@pytest.mark.parametrize("positive", [0, 40, 120, 300, 550, 930, 1000])
def test_two_classes_give_the_estimate_of_rogan_and_gladen(positive):
    confusion = [[180, 20], [15, 85]]
    specificity, sensitivity = 0.9, 0.85
    expected = (positive / 1000 + specificity - 1) / (sensitivity + specificity - 1)
    found = composition.corrected([1000 - positive, positive], confusion)
    assert found[1]["corrected"] == pytest.approx(np.clip(expected, 0, 1), abs=2e-6)
    assert found[0]["corrected"] == pytest.approx(1 - np.clip(expected, 0, 1), abs=2e-6)


@given(counts)
@settings(max_examples=20)
def test_without_mistakes_corrected_shares_are_the_counted_ones(given_counts):
    confusion = (100 * np.eye(len(given_counts), dtype=int)).tolist()
    found = composition.corrected(given_counts, confusion)
    expected = [one["share"] for one in composition.counted(given_counts)]
    np.testing.assert_allclose([one["corrected"] for one in found], expected, atol=2e-6)


@given(problems())
@settings(max_examples=40)
def test_no_shares_are_likelier(problem):
    seen, rows = problem
    (found,) = composition.shares(seen[None], rows[None])
    assert (found >= 0).all() and found.sum() == pytest.approx(1)
    other = optimize.minimize(
        lambda shares: -likelihood(shares, seen, rows),
        np.full(len(seen), 1 / len(seen)),
        method="SLSQP",
        bounds=[(0, 1)] * len(seen),
        constraints={"type": "eq", "fun": lambda shares: shares.sum() - 1},
        options={"maxiter": 500, "ftol": 1e-12},
    )
    assert likelihood(found, seen, rows) >= -other.fun - 1e-6


@given(problems())
@settings(max_examples=200)
def test_the_likelihood_rises_in_no_direction(problem):
    """For each true class the slope is at most what scaling all shares would give, which is 1."""
    seen, rows = problem
    (found,) = composition.shares(seen[None], rows[None])
    expected = found @ rows
    ratio = np.divide(seen, expected, out=np.zeros_like(seen), where=expected > 0)
    assert (rows @ ratio).max() <= 1 + 1e-8


@given(problems(), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_the_order_of_the_classes_does_not_matter(problem, random):
    seen, rows = problem
    rows = rows + np.eye(len(seen))  # one best answer
    rows /= rows.sum(axis=1, keepdims=True)
    order = list(range(len(seen)))
    random.shuffle(order)
    (found,) = composition.shares(seen[None], rows[None])
    (other,) = composition.shares(seen[order][None], rows[np.ix_(order, order)][None])
    np.testing.assert_allclose(other, found[order], atol=2e-5)


def test_intervals_hold_the_shares_and_are_the_same_every_time():
    confusion = [[90, 8, 2], [6, 80, 14], [1, 9, 90]]
    found = composition.corrected([500, 40, 3], confusion)
    assert found == composition.corrected([500, 40, 3], confusion)
    for one in found:
        low, high = one["corrected_interval"]
        assert 0 <= low <= one["corrected"] <= high <= 1


def test_intervals_narrow_with_more_reads_and_with_more_test_reads():
    def width(counts, confusion):
        low, high = composition.corrected(counts, confusion)[0]["corrected_interval"]
        return high - low

    small, large = [[45, 5], [5, 45]], [[4500, 500], [500, 4500]]
    few, many = [60, 40], [60_000, 40_000]
    assert width(few, small) > width(few, large) > 3 * width(many, large)
    assert width(many, small) > 3 * width(many, large)  # what the test set doesn't know stays


@pytest.mark.parametrize(
    ("tested", "reads", "shares"),
    [(100, 400, [0.6, 0.3, 0.1]), (300, 2000, [0.9, 0.1, 0.0])],
)
def test_intervals_hold_the_truth_as_often_as_they_say(tested, reads, shares):
    rng = np.random.default_rng(3)
    truth = np.array([[0.9, 0.07, 0.03], [0.05, 0.9, 0.05], [0.02, 0.08, 0.9]])
    inside, rounds = np.zeros(3), 150
    for _ in range(rounds):
        confusion = [rng.multinomial(tested, row).tolist() for row in truth]
        counted = rng.multinomial(reads, np.array(shares) @ truth).tolist()
        for number, one in enumerate(composition.corrected(counted, confusion)):
            low, high = one["corrected_interval"]
            inside[number] += low <= shares[number] <= high
    # 95 % of 150: 137 to 148 with a probability of 0.98
    assert (inside >= 0.89 * rounds).all(), inside / rounds


def test_what_cannot_be_corrected_is_said_and_left_out():
    names = ["a", "b"]
    assert "isn't known" in composition.why_not([1, 2], None, names)
    assert "no reads of b" in composition.why_not([1, 2], [[3, 1], [0, 0]], names)
    assert "taken for b" in composition.why_not([1, 2], [[3, 0], [2, 0]], names)
    assert composition.why_not([1, 0], [[3, 0], [2, 0]], names) == ""
    assert composition.why_not([1, 2], [[3, 1], [1, 3]], names) == ""
    with pytest.raises(ValueError, match="no reads of 1"):
        composition.corrected([1, 2], [[3, 1], [0, 0]])


def test_the_work_for_many_classes_and_files_is_bounded():
    assert composition.replicates(4) == composition.replicates(10) == composition.REPLICATES
    assert composition.most_files(2) is composition.most_files(10) is None
    for classes in range(11, composition.MOST_CLASSES + 1):
        count = composition.replicates(classes)
        assert 100 <= count <= composition.REPLICATES
        assert composition.most_files(classes) * count * classes**2 <= 5 * 10**7
    classes = composition.MOST_CLASSES + 1
    confusion = np.eye(classes, dtype=int).tolist()
    assert "more than 300 classes" in composition.why_not([1] * classes, confusion, ["x"] * classes)


def test_a_model_that_knows_nothing_gives_numbers_all_the_same():
    """Any shares are as likely there."""
    for confusion in ([[20, 0, 0], [20, 0, 0], [20, 0, 0]], [[0, 20], [0, 20]]):
        counts = [40 if any(column) else 0 for column in zip(*confusion, strict=True)]
        found = composition.corrected(counts, confusion)
        assert sum(one["corrected"] for one in found) == pytest.approx(1, abs=1e-5)
