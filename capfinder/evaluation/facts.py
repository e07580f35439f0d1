"""What is known of a classifier beyond its weights: how its test set fared, what it was trained on.

Written by the evaluation, carried along by exported files and imports, used by whoever predicts."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from capfinder.allowed import is_count_matrix

TEST_FIGURES = (
    "accuracy",
    "accuracy_interval",
    "balanced_accuracy",
    "loss",
    "num_examples",
    "confusion_matrix",
)


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
    parts = {name: values.get(name) for name in Facts.__dataclass_fields__}
    known = {name: dict(part) for name, part in parts.items() if isinstance(part, Mapping)}
    if not is_count_matrix(known.get("test", {}).get("confusion_matrix"), num_classes):
        known.pop("test", None)
    return Facts(**known)
