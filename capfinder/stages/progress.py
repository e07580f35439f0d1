"""What a training tells while it goes on: bar, a line an epoch, advice, metrics for the tracker."""

from typing import Any

from capfinder import log
from capfinder.log import logger
from capfinder.tracking import Tracker

IDLE_SHARE = 0.05  # of an epoch's training; above it the epoch's line shows it
IDLE_SECONDS = 5.0  # an epoch shorter than this is over before anyone would act on advice


def advice(
    residency: str, *, automatic: bool, platform: str, steps_per_call: int, steps_per_epoch: int
) -> str | None:
    """What makes the device wait less for its data; None when no setting does.

    automatic: the residency is what "auto" came to, so that more wouldn't fit on the device."""
    if residency == "stream":
        return "runtime_params.data_residency=auto reads them from the shards only once"
    if residency == "host":
        on_device = "runtime_params.data_residency=auto holds them on the device if they fit"
        return None if automatic else on_device
    if platform == "cpu" or steps_per_call == steps_per_epoch:  # more a call are slower on a CPU
        return None
    return f"a larger runtime_params.steps_per_call ({steps_per_call} now) asks for them less often"


class Reporter:
    """Moves the bar, writes each epoch's line, and sends its figures to the tracker."""

    def __init__(
        self,
        bar: log.Bar,
        tracker: Tracker,
        max_epochs: int,
        steps_per_call: int,
        advice: str | None,
    ) -> None:
        self._bar, self._tracker, self._max_epochs = bar, tracker, max_epochs
        self._steps_per_call = steps_per_call
        self._advice = advice  # for a device that waits for its data; given once
        self._has_begun = False

    def on_step(self, step: int) -> None:
        self._begin_at(step - self._steps_per_call)
        self._bar.advance(step - self._bar.done)  # back after a rollback

    def _begin_at(self, step: int) -> None:
        if not self._has_begun:
            self._bar.begin_at(max(0, step))
            self._has_begun = True

    def on_epoch(self, row: dict[str, Any]) -> None:
        self._begin_at(row["steps"])  # resumed within a validation: no step came before
        is_idle = row["idle_share"] > IDLE_SHARE
        logger.info(
            "epoch %d/%d  loss %.4f  accuracy %.1f%%  val_loss %.4f  val_accuracy %.1f%%  "
            "learning rate %.3g  %.1f s%s%s",
            row["epoch"],
            self._max_epochs,
            row["loss"],
            100 * row["accuracy"],
            row["val_loss"],
            100 * row["val_accuracy"],
            row["learning_rate"],
            row["seconds"],
            f"  device idle up to {row['idle_share']:.0%}" if is_idle else "",
            "  best" if row["best_epoch"] == row["epoch"] else "",
        )
        if is_idle and row["seconds"] > IDLE_SECONDS and self._advice is not None:
            logger.info("The device waits for its data: %s", self._advice)
            self._advice = None
        self._bar.note(f"best val_loss {row['best_val_loss']:.4f}")
        figures = {name: value for name, value in row.items() if name not in ("epoch", "steps")}
        self._tracker.log_metrics(figures, step=row["steps"], epoch=row["epoch"])
