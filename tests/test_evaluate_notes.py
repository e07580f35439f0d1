"""What a reader of a run's figures is told before trusting them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfinder.stages.evaluate import notes

MAJORITY, NEAREST = "always naming the commonest class", "the nearest mean signal"
accuracies = st.floats(0, 1)


def figures(
    interval: tuple[float, float],
    majority: float = 0.0,
    nearest: float = 0.0,
    *,
    train: float = 0.0,
    group_by: str = "read",
    is_test: bool = False,
) -> dict[str, Any]:
    test = {"accuracy": sum(interval) / 2, "accuracy_interval": interval, "num_examples": 16}
    return {
        "test": test,
        "train": {"accuracy": train},
        "baselines": {"majority_accuracy": majority, "nearest_centroid_accuracy": nearest},
        "best_epoch": 1,
        "history": [{}, {}],
        "stopped": "patience",
        "dataset": {"group_by": group_by, "sources": [{"is_test": False}, {"is_test": is_test}]},
    }


@given(st.tuples(accuracies, accuracies).map(sorted), accuracies, accuracies)
def test_each_baseline_is_told_of_by_where_the_interval_lies(interval, majority, nearest):
    low, high = interval
    found = [note for note in notes(figures((low, high), majority, nearest)) if "than" in note]
    expected = []
    for what, accuracy in ((MAJORITY, majority), (NEAREST, nearest)):
        how = "worse" if high < accuracy else "not clearly better"
        if low <= accuracy:
            expected.append(f"The model is {how} than {what}, which scores {accuracy:.1%}.")
    assert found == expected


@pytest.mark.parametrize(
    ("group_by", "is_test"),
    [("read", False), ("parent_read", False), ("file", False), ("read", True)],
)
def test_a_gap_between_training_and_test_reads_may_be_one_between_runs(group_by, is_test):
    values = figures((0.6, 0.7), train=0.8, group_by=group_by, is_test=is_test)
    (note,) = [note for note in notes(values) if note.startswith("Training reads score 80.0%")]
    assert "by heart" in note
    assert ("sequencing runs differ" in note) == (group_by == "file" or is_test)
