"""What a training tells while it goes on: its line per epoch, its bar, its advice, its metrics."""

import logging
from typing import Any

import pytest

from capfinder import log
from capfinder.stages import progress
from capfinder.tracking import Tracker


class Recorder(Tracker):
    """Keeps what would be sent."""

    def __init__(self) -> None:
        super().__init__(None)
        self.sent: list[tuple[dict[str, Any], int | None, int | None]] = []

    def log_metrics(self, values, *, step=None, epoch=None):
        self.sent.append((dict(values), step, epoch))


def row(epoch: int, val_loss: float, best_epoch: int, best: float, **more: Any) -> dict[str, Any]:
    values = {
        **{"epoch": epoch, "loss": 0.5, "accuracy": 0.5, "val_loss": val_loss},
        **{"val_accuracy": 0.5, "learning_rate": 0.1, "seconds": 9.0, "examples_per_second": 1.0},
        **{"idle_share": 0.0, "rollbacks": 0, "steps": 10 * epoch},
        **{"best_epoch": best_epoch, "best_val_loss": best},
    }
    return values | more


@pytest.fixture
def reported(caplog):
    caplog.set_level(logging.INFO, "capfinder")

    def report(*rows, advice=None):
        recorder = Recorder()
        with log.progress("Training", total=100, unit="steps") as bar:
            reporter = progress.Reporter(bar, recorder, 10, 4, advice)
            for one in rows:
                reporter.on_epoch(one)
            begun = (bar.done, bar._begun_at, bar.text)
        return recorder.sent, begun, [record.getMessage() for record in caplog.records]

    return report


def test_an_epoch_resumed_within_its_validation_is_reported_at_its_own_step(reported):
    sent, begun, _ = reported(row(3, 0.4, 3, 0.4))
    ((figures, step, epoch),) = sent
    assert (step, epoch) == (30, 3)
    assert figures["val_loss"] == 0.4 and not {"steps", "epoch"} & set(figures)
    assert begun == (30, 30, "best val_loss 0.4000")  # none of them was this run's


def test_the_best_is_what_the_training_itself_counts_as_such(reported):
    """Whatever other checkpoints lie on the disk, and from the first row after a resume on."""
    _, begun, lines = reported(row(3, 0.4, 1, 0.3), row(4, 0.2, 4, 0.2), row(5, 0.2, 4, 0.2))
    assert [line.endswith("  best") for line in lines if "epoch" in line] == [False, True, False]
    assert begun[2] == "best val_loss 0.2000"


def test_advice_comes_once_and_only_where_the_device_waits(reported):
    idle = row(3, 0.4, 1, 0.3, idle_share=0.5)
    _, _, lines = reported(row(2, 0.4, 1, 0.3), idle, idle, advice="do this")
    assert [line for line in lines if "waits" in line] == ["The device waits for its data: do this"]
    assert sum("device idle up to 50%" in line for line in lines) == 2
    assert not [line for line in reported(idle)[2][len(lines) :] if "waits" in line]


@pytest.mark.parametrize(
    ("residency", "automatic", "platform", "per_call", "expected"),
    [
        ("stream", False, "gpu", 16, "data_residency=auto"),
        ("host", False, "gpu", 16, "data_residency=auto"),
        ("host", True, "gpu", 16, None),  # on the device they don't fit
        ("host", False, "cpu", 1, "data_residency=auto"),
        ("device", True, "gpu", 16, "steps_per_call (16 now)"),
        ("device", True, "gpu", 100, None),  # a whole epoch already
        ("device", True, "cpu", 1, None),  # slower there
    ],
)
def test_advice_names_what_can_help(residency, automatic, platform, per_call, expected):
    advice = progress.advice(
        residency,
        automatic=automatic,
        platform=platform,
        steps_per_call=per_call,
        steps_per_epoch=100,
    )
    assert advice is None if expected is None else expected in advice
