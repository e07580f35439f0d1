"""What is known of a classifier beyond its weights: how its test set fared, what it was trained on.

Written by the evaluation, carried along by exported files and imports, used by whoever predicts."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from capfinder.allowed import is_count_matrix, is_number, is_text

TEST_FIGURES = (
    "accuracy",
    "accuracy_interval",
    "balanced_accuracy",
    "loss",
    "num_examples",
    "confusion_matrix",
)
_MOST_DEPTH = 8  # levels of lists and objects in a part; the evaluation writes three


@dataclass(frozen=True)
class Facts:
    """test: TEST_FIGURES of the held-out reads, `confusion_matrix` (C, C) with the true class in
    rows. baselines: accuracies of guessing. signals: the profile of the training reads. dataset:
    its version and fingerprint. init_from: what training started from. None: not known."""

    test: dict[str, Any] | None = None
    baselines: dict[str, Any] | None = None
    signals: dict[str, Any] | None = None
    dataset: dict[str, Any] | None = None
    init_from: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """Only what is known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def from_metrics(values: Mapping[str, Any], *, num_classes: int) -> Facts:
    """From what metrics.json holds."""
    test = values.get("test")
    if isinstance(test, Mapping):
        values = {**values, "test": {name: test.get(name) for name in TEST_FIGURES}}
    return from_json(values, num_classes=num_classes)


def from_json(values: Any, *, num_classes: int) -> Facts:
    """From any file, whoever wrote it: a part that isn't as it should be counts as unknown."""
    if not isinstance(values, Mapping):
        return Facts()
    known = {
        name: dict(part)
        for name in Facts.__dataclass_fields__
        if isinstance(part := values.get(name), Mapping) and _is_plain(part, _MOST_DEPTH)
    }
    if not _is_test(known.get("test", {}), num_classes):
        known.pop("test", None)
    return Facts(**known)


def _is_plain(value: Any, depth: int) -> bool:
    """Whether it can be copied and written down again: JSON also has numbers without end, halves
    of characters, and lists within lists within lists."""
    if isinstance(value, str):
        return is_text(value)
    if isinstance(value, Mapping):
        return depth > 0 and all(
            _is_plain(key, 0) and _is_plain(item, depth - 1) for key, item in value.items()
        )
    if isinstance(value, list):
        return depth > 0 and all(_is_plain(item, depth - 1) for item in value)
    return value is None or isinstance(value, bool) or is_number(value)


def _is_test(part: Mapping[str, Any], num_classes: int) -> bool:
    """Whether it has the figures that are shown and counted with, and the others are numbers."""
    interval = part.get("accuracy_interval")
    if not isinstance(interval, list) or len(interval) != 2:
        return False
    others = (part.get(name) for name in ("balanced_accuracy", "loss", "num_examples"))
    return (
        all(is_number(share) and 0 <= share <= 1 for share in (part.get("accuracy"), *interval))
        and all(other is None or is_number(other) for other in others)
        and is_count_matrix(part.get("confusion_matrix"), num_classes)
    )
