"""What the stages of one run of the pipeline share."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from capfinder import settings
from capfinder.errors import StoppedError
from capfinder.interrupts import Interrupt
from capfinder.log import logger
from capfinder.run_record import RunRecord, SetAside

if TYPE_CHECKING:
    from capfinder.stages.start import Start
    from capfinder.tracking import Tracker


@dataclass
class Done:
    """What a stage has to say for itself when it has ended, as RunRecord.finish_stage takes it."""

    summary: str = ""
    why: str = ""  # how the result came about: what was reused, and why
    is_reused: bool = False
    key: Mapping[str, str] = field(default_factory=dict)  # what it depends on, by its name


@dataclass
class Context:
    """What every stage of one run shares, and what came of them."""

    config: ConfigDict
    output_dir: Path
    record: RunRecord
    interrupt: Interrupt
    stages: tuple[str, ...]
    class_names: list[str]
    ran: dict[str, float] = field(default_factory=dict)  # seconds, by stage of this run
    skipped: dict[str, str] = field(default_factory=dict)  # why, by stage
    interrupted: dict[str, dict[str, int]] = field(default_factory=dict)  # as in metrics.json
    set_aside: SetAside | None = None
    start: "Start | None" = None  # the model that training goes on from

    @contextmanager
    def timed(self, stage: str, done: Done) -> Iterator[None]:
        """Logs the stage's start and notes its end, with what `done` then says of it."""
        logger.info("== %s ==", stage)
        started = time.monotonic()
        try:
            yield
        except StoppedError as stopped:
            raise StoppedError(f"{stage}: {stopped}", stopped.exit_code) from stopped
        self.ran[stage] = time.monotonic() - started
        self.record.finish_stage(stage, seconds=self.ran[stage], **vars(done))

    def note_interrupted(self, stage: str, reached: dict[str, int] | None) -> None:
        """How far a stage came that Ctrl-C ended early; None for one that wasn't."""
        self.interrupted.pop(stage, None)
        if reached is not None:
            self.interrupted[stage] = reached
        self.record.update(interrupted=self.interrupted)

    @contextmanager
    def tracked(self, project: str, stage: str) -> Iterator["Tracker"]:
        from capfinder import tracking

        with tracking.start(
            self.config.tracking_params.mode,
            project=project,
            output_dir=self.output_dir,
            name=f"{self.output_dir.name}_{stage}",
        ) as tracker:
            tracker.log_parameters(settings.to_shown(self.config))
            yield tracker
