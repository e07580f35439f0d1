"""One job for the kills of the whole pipeline: what an undisturbed run of it leaves, how long its
stages are, and a kill in one of them with the run that has to put it right."""

import json
import random
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pipeline_stages
from etl_check import left_running
from kills import SECOND_KILL_SHARE, Moment, Place, Run, Watch, end_of, start, was_killed
from pipeline_check import Expected, left_by_keras, problems_after, problems_while_dead
from pipeline_input import OFTEN, SELDOM, arguments, write_caps
from pipeline_stages import STAGES, START
from warm_runs import WarmRuns

STEP_SHARE = 0.35  # of the kills: just before a change to files
FROM_NOTHING_SHARE = 0.2
OFTEN_SHARE = 0.5  # of the runs: checkpoints within an epoch


@dataclass(frozen=True)
class Kill:
    """begin: the stage at whose beginning the output directory is as an undisturbed run had it;
    "": nothing is there."""

    moments: tuple[Moment, ...]
    begin: str = ""
    often: bool = False  # checkpoints after every step
    command_line: bool = False
    own_programs: bool = False

    def options(self) -> str:
        """What main takes to do it again, but for the moments."""
        names = ("often", "command_line", "own_programs")
        begin = [f"--begin {self.begin}"] if self.begin else []
        return " ".join([*begin, *(f"--{name}" for name in names if getattr(self, name))])


@dataclass(frozen=True)
class Outcome:
    """kill: with the moments that came about; stage, on_disk: where the first found the run;
    by_keras: what that library, and not the pipeline, has left."""

    kill: Kill
    stage: str
    on_disk: str
    by_keras: list[str]
    problems: list[str]


class Bench:
    """The job, what an undisturbed run of it leaves and how long its stages are."""

    def __init__(self, directory: Path, warm: WarmRuns) -> None:
        self.directory, self.warm = directory, warm
        self.caps = directory / "caps"
        write_caps(self.caps)

    def measure(self) -> None:
        """Three undisturbed runs: a user's command; a fork when all is there already; and a fork
        from nothing, which must leave the same."""
        first, second = Place(self.directory / "undisturbed"), Place(self.directory / "measured")
        run = self.start(Kill((), command_line=True), first)
        pipeline_stages.follow(run, first.output, lambda stage: self._keep(stage, first))
        self._must_succeed(run, first)
        self.expected = Expected.of(first)
        self._must_succeed(self.start(Kill(()), first), first)
        self.expected = self.expected.also(first)
        self._must_leave_the_same(first)
        measured = self._measured(second)
        self.steps = {stage or START: changes for stage, changes in measured["steps"].items()}
        self.seconds = {"": {stage or START: took for stage, took in measured["seconds"].items()}}

    def measure_begun(self) -> None:
        """How long a stage takes in a run that begins with it, and has its programs to load."""
        for stage in STAGES[1:]:
            place = Place(self.directory / f"measured-{stage}")
            pipeline_stages.copy(self._begun(stage), place)
            seconds = self._measured(place)["seconds"]
            self.seconds[stage] = self.seconds[""] | {stage: seconds[stage]}

    def _measured(self, place: Place) -> dict[str, dict[str, float]]:
        report = place.directory / "report.json"
        run = self.start(Kill(()), place, Watch(self._roots(place), report=report))
        self._must_succeed(run, place)
        self._must_leave_the_same(place)
        return dict(json.loads(report.read_text()))

    def _must_leave_the_same(self, place: Place) -> None:
        if problems := problems_after(self.expected, place):
            raise SystemExit("\n".join(["undisturbed runs differ:", *problems]))

    def _keep(self, stage: str, place: Place) -> None:
        shutil.copytree(place.output_dir, self._begun(stage))

    def _begun(self, stage: str) -> Path:
        return self.directory / "begun" / stage

    def _must_succeed(self, run: Run, place: Place) -> None:
        if error := end_of(run, place):
            raise SystemExit(f"the undisturbed run: {error}")

    def _programs(self, place: Place, *, own: bool) -> Path:
        return (place.directory if own else self.directory) / "programs"

    def _roots(self, place: Place) -> tuple[Path, ...]:
        return place.output_dir, place.scratch, self._programs(place, own=True)

    def start(self, kill: Kill, place: Place, watch: Watch | None = None) -> Run:
        given = arguments(
            self.caps,
            place,
            programs=self._programs(place, own=kill.own_programs),
            checkpoint_minutes=OFTEN if kill.often else SELDOM,
        )
        return (start if kill.command_line else self.warm.start)(given, place, watch)

    def draw(self, stage: str, rng: random.Random) -> Kill:
        """A kill in `stage`, perhaps another one later. A second one within the search would have
        it give up the trial that had been killed before, as it should."""
        begin = rng.choice(STAGES) if stage == START else stage
        if rng.random() < FROM_NOTHING_SHARE or begin == "etl":
            begin = ""
        moments = [self._moment(stage, begin, rng)]
        if rng.random() < SECOND_KILL_SHARE:
            first = STAGES.index(stage) + (stage == "tune") if stage in STAGES else 0
            moments.append(self._moment(rng.choice(STAGES[first:]), begin, rng))
        return Kill(tuple(moments), begin, often=rng.random() < OFTEN_SHARE)

    def _moment(self, stage: str, begin: str, rng: random.Random) -> Moment:
        if self.steps.get(stage) and rng.random() < STEP_SHARE:
            return Moment(stage, 0.0, rng.randint(1, int(self.steps[stage])))
        seconds = self.seconds.get(begin, self.seconds[""])[stage]
        return Moment(stage, rng.uniform(0, seconds), 0)

    def kill(self, kill: Kill, moment: Moment, place: Place) -> list[str] | None:
        """Starts a run and kills it: what is wrong then; None when it ended before."""
        counted = replace(moment, phase="") if moment.phase == START else moment
        watch = Watch(self._roots(place), before=counted) if moment.step else None
        run = self.start(kill, place, watch)
        if not moment.step:
            if pipeline_stages.wait_for(run, moment.phase, place.output):
                time.sleep(moment.seconds)
            run.kill()
        if not was_killed(run):
            return None
        left = [f"outlives the killed run: process {pid}" for pid in left_running(run.pid)]
        return left + problems_while_dead(self.expected, place)

    def disturb(self, kill: Kill, place: Place) -> Outcome | None:
        """A kill, or two, and the run that has to put it right; None: nothing was killed."""
        if kill.begin:
            pipeline_stages.copy(self._begun(kill.begin), place)
        happened: list[Moment] = []
        problems: list[str] = []
        stage, on_disk = "", ""
        for moment in kill.moments:
            if stage == moment.phase == "tune":
                break  # see `draw`; it was to come before
            found = self.kill(kill, moment, place)
            if found is None:
                break
            problems += found
            if not happened:
                stage = pipeline_stages.stage_of(place.output)
                on_disk = pipeline_stages.on_disk(place.output_dir)
            happened.append(moment)
        if not happened:
            return None
        if error := end_of(self.start(kill, place), place):
            problems.append(f"the rerun: {error}")
        problems += problems_after(self.expected, place)
        came_about = replace(kill, moments=tuple(happened))
        return Outcome(came_about, stage, on_disk, left_by_keras(place.scratch), problems)
