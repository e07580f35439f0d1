"""Kills the ETL with SIGKILL at random moments, reruns the same command, compares what is there.

python tests/faults/etl_kills.py --kills 50 [--seed S] [--megabytes M] [--directory D]
python tests/faults/etl_kills.py --scenario N --at "metadata + 0.026 s, then step 54"

Two ways of being killed, in turn: from outside, a random time after the run was seen to enter a
phase (by what lies on disk; every phase gets its share), and just before a random one of the
changes that it makes to files, for moments that are too short to hit. Some reruns are killed too.
A loss of power is another matter: it needs a file system that forgets what wasn't synced."""

import argparse
import collections
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import etl_phases
from etl_check import (
    Expected,
    left_by_comet,
    left_running,
    problems_after,
    problems_while_dead,
)
from etl_input import SCENARIOS, Scenario, write_caps

REPOSITORY = Path(__file__).parents[2]
LIMIT_SECONDS = 300.0  # a rerun that takes longer hangs
SECOND_KILL_SHARE = 0.25
MAX_DRAWS = 8  # a run may end before it can be killed in a short phase; then another is drawn


@dataclass(frozen=True)
class Moment:
    """`seconds` after `phase` was entered or, with a `step`, just before that one."""

    phase: str
    seconds: float
    step: int

    def __str__(self) -> str:
        return f"step {self.step}" if self.step else f"{self.phase} + {self.seconds:.3f} s"

    @classmethod
    def parse(cls, text: str) -> "Moment":
        if at_step := re.fullmatch(r"step (\d+)", text):
            return cls("", 0.0, int(at_step[1]))
        phase, _, seconds = text.removesuffix(" s").rpartition(" + ")
        return cls(phase, float(seconds), 0)


@dataclass(frozen=True)
class Outcome:
    """moments: as `--at` takes them; phase, files: where the (first) kill found the run; by_comet:
    what its client, and not the ETL, has left."""

    scenario: str
    moments: str
    phase: str
    files: int
    by_comet: list[str]
    problems: list[str]


class Place:
    """Where one run works: its output directory, its own system temporary directory, its words."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.output_dir = directory / "out"
        self.scratch = directory / "tmp"
        self.home = directory / "home"
        self.output = directory / "output.txt"
        for path in (self.scratch, self.home):
            path.mkdir(parents=True, exist_ok=True)


class Bench:
    """One scenario with its input, and what an undisturbed run of it gives and takes."""

    def __init__(self, scenario: Scenario, directory: Path, *, megabytes: float, seed: int) -> None:
        self.scenario, self.directory = scenario, directory
        self.caps = directory / "caps"
        write_caps(
            self.caps,
            megabytes=megabytes * scenario.size,
            samples=scenario.samples,
            bad_fraction=scenario.bad_fraction,
            seed=seed,
        )

    def measure(self) -> None:
        """Runs undisturbed, and once more, when the dataset is there already."""
        place, counted = Place(self.directory / "undisturbed"), self.directory / "steps"
        process = self.start(place, step=0, report=counted)
        self.seconds = etl_phases.timeline(process, place.output_dir, place.scratch)
        self._must_succeed(process, place)
        self.steps = int(counted.read_text())
        first = Expected.of(place.output_dir, place.scratch)
        self._must_succeed(self.start(place), place)
        self.expected = first.also(place.output_dir)

    def _must_succeed(self, process: "subprocess.Popen[bytes]", place: Place) -> None:
        if error := end_of(process, place):
            raise SystemExit(f"{self.scenario.name}: the undisturbed run: {error}")

    def start(
        self, place: Place, *, step: int | None = None, report: Path = Path(os.devnull)
    ) -> "subprocess.Popen[bytes]":
        environment = {k: v for k, v in os.environ.items() if not k.startswith("COMET")}
        # No key for Comet from the user's home; compiled kernels from the user's cache.
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        environment |= {"HOME": str(place.home), "XDG_CACHE_HOME": cache}
        environment["TMPDIR"] = str(place.scratch)
        command = [sys.executable, "-m", "capfinder"]
        if step is not None:
            launcher = str(Path(__file__).with_name("stop_at_step.py"))
            roots = [str(place.output_dir), str(place.scratch)]
            command = [sys.executable, launcher, str(step), str(report), *roots, "--"]
        with place.output.open("wb") as output:
            return subprocess.Popen(
                [*command, *self.scenario.arguments(self.caps, place.output_dir)],
                cwd=REPOSITORY,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def moments(self, rng: random.Random) -> Iterator[list[Moment]]:
        """Without end: each phase in turn, and a step after every second phase; for a share of
        them a second moment, for the rerun. Its phases hide behind what the first run left, so that
        one is a step or a time from the start."""
        phases = [name for name in self.seconds if name != etl_phases.START]
        rng.shuffle(phases)
        for count, phase in enumerate(itertools.cycle(phases)):
            drawn = [Moment(phase, rng.uniform(0, self.seconds[phase]), 0)]
            if count % 3 == 2:
                drawn = [Moment("", 0.0, rng.randint(1, self.steps))]
            if rng.random() < SECOND_KILL_SHARE:
                begin, end = self.seconds[etl_phases.START], sum(self.seconds.values())
                at_time = Moment(etl_phases.START, rng.uniform(begin, end), 0)
                at_step = Moment("", 0.0, rng.randint(1, self.steps))
                drawn.append(rng.choice([at_time, at_step]))
            yield drawn

    def kill(self, place: Place, moment: Moment) -> list[str] | None:
        """Starts a run and kills it: what is wrong then; None when it ended before."""
        process = self.start(place, step=moment.step or None)
        if not moment.step:
            if etl_phases.wait_for(process, moment.phase, place.output_dir, place.scratch):
                time.sleep(moment.seconds)
            process.kill()
        try:
            was_killed = process.wait(LIMIT_SECONDS) < 0
        finally:
            process.kill()
        if not was_killed:
            return None
        left = [f"outlives the killed run: process {pid}" for pid in left_running(process.pid)]
        return left + problems_while_dead(self.expected, place.output_dir)

    def disturb(self, moments: Sequence[Moment], place: Place) -> Outcome | None:
        """A kill, or two, and the run that has to put it right; None: nothing was killed."""
        phase, files, happened, by_comet, problems = "", 0, [], [], []
        for moment in moments:
            found = self.kill(place, moment)
            if found is None:
                break
            problems += found
            paths = etl_phases.paths_below(place.output_dir)
            if not happened:
                phase, files = etl_phases.phase_of(paths), len(paths)
            by_comet += left_by_comet(etl_phases.phase_of(paths), place.scratch)
            happened.append(moment)
        if not happened:
            return None
        if error := end_of(self.start(place), place):
            problems.append(f"the rerun: {error}")
        problems += problems_after(self.expected, place.output_dir, place.scratch, but=by_comet)
        shown = ", then ".join(map(str, happened))
        return Outcome(self.scenario.name, shown, phase, files, by_comet, problems)


def end_of(process: "subprocess.Popen[bytes]", place: Place) -> str:
    """Waits for the end of a run that should succeed; what is wrong with it, else ""."""
    try:
        code = process.wait(LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"no end within {LIMIT_SECONDS:.0f} s"
    last = place.output.read_text(errors="replace").strip().splitlines()[-1:]
    return f"exit code {code}: {' '.join(last)}" if code else ""


def run(benches: Sequence[Bench], directory: Path, *, kills: int, seed: int) -> Iterator[Outcome]:
    """`kills` outcomes. Equal seeds draw equal phases and steps; the seconds within a phase are
    those drawn times what the phase took when it was measured."""
    rng = random.Random(seed)
    moments = {bench: bench.moments(rng) for bench in benches}
    turns = [bench for bench in benches for _ in range(bench.scenario.turns)]
    for number, bench in enumerate(itertools.islice(itertools.cycle(turns), kills)):
        for _ in range(MAX_DRAWS):
            place = Place(directory / f"kill-{number}")
            outcome = bench.disturb(next(moments[bench]), place)
            if outcome is None or not outcome.problems:
                shutil.rmtree(place.directory)
            if outcome is not None:
                yield outcome
                break
        else:
            raise SystemExit(f"{bench.scenario.name}: {MAX_DRAWS} runs ended before their kill")


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--kills", type=int, default=50)
    add("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    add("--megabytes", type=float, default=20.0, help="of CSV in each scenario, about")
    add("--directory", type=Path, help="an empty one, which is kept; default: a temporary one")
    add("--scenario", type=int, choices=range(len(SCENARIOS)), help="only this one")
    add("--at", help="only this kill, as a table shows it; with --scenario")
    known = parser.parse_args()
    if known.at and known.scenario is None:
        parser.error("--at needs --scenario")
    return known


def main() -> int:
    known = _parsed()
    print(f"seed {known.seed}", flush=True)
    wanted = SCENARIOS if known.scenario is None else SCENARIOS[known.scenario :][:1]
    phases: collections.Counter[str] = collections.Counter()
    bad = 0
    with tempfile.TemporaryDirectory(prefix="etl_kills-") as temporary:
        directory = known.directory or Path(temporary)
        benches = []
        for scenario in wanted:
            bench = Bench(
                scenario,
                directory / f"scenario-{SCENARIOS.index(scenario)}",
                megabytes=known.megabytes,
                seed=known.seed,
            )
            warm = Place(bench.directory / "warm-up")  # kernels are compiled from here on
            end_of(bench.start(warm), warm)
            bench.measure()
            spent = ", ".join(f"{name} {took:.2f}" for name, took in bench.seconds.items())
            print(f"{scenario.name}: {bench.steps} steps; seconds: {spent}", flush=True)
            benches.append(bench)
        outcomes = run(benches, directory, kills=known.kills, seed=known.seed)
        if known.at:
            moments = [Moment.parse(text) for text in known.at.split(", then ")]
            found = benches[0].disturb(moments, Place(directory / "kill"))
            outcomes = iter([found] if found else [])
        for number, outcome in enumerate(outcomes):
            phases[outcome.phase] += 1
            bad += bool(outcome.problems)
            verdict = "BAD" if outcome.problems else "ok "
            print(
                f"{number:3d}  {outcome.phase:23}  {outcome.files:3d} files  {verdict}  "
                f"{outcome.scenario:29}  {outcome.moments}",
                flush=True,
            )
            for problem in outcome.problems:
                print(f"     {problem}", flush=True)
            for path in outcome.by_comet:
                print(f"     left by Comet's client, not the ETL: {path}", flush=True)
    counts = [f"{name} {phases[name]}" for name in etl_phases.NAMES if phases[name]]
    print(f"killed in: {', '.join(counts)}")
    print(f"{phases.total()} kills, {bad} with problems (seed {known.seed})")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
