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
import json
import random
import shutil
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
from kills import (
    MAX_DRAWS,
    SECOND_KILL_SHARE,
    Moment,
    Place,
    Run,
    Watch,
    end_of,
    parsed,
    shown,
    start,
    was_killed,
)


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
        place, report = Place(self.directory / "undisturbed"), self.directory / "steps.json"
        run = self.start(place, Watch(self._roots(place), report=report))
        self.seconds = etl_phases.timeline(run, place.output_dir, place.scratch)
        self._must_succeed(run, place)
        self.steps = sum(json.loads(report.read_text())["steps"].values())
        first = Expected.of(place.output_dir, place.scratch)
        self._must_succeed(self.start(place), place)
        self.expected = first.also(place.output_dir)

    def _must_succeed(self, run: Run, place: Place) -> None:
        if error := end_of(run, place):
            raise SystemExit(f"{self.scenario.name}: the undisturbed run: {error}")

    def _roots(self, place: Place) -> tuple[Path, ...]:
        return place.output_dir, place.scratch

    def start(self, place: Place, watch: Watch | None = None) -> Run:
        return start(self.scenario.arguments(self.caps, place.output_dir), place, watch)

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
        watch = Watch(self._roots(place), before=moment) if moment.step else None
        run = self.start(place, watch)
        if not moment.step:
            if etl_phases.wait_for(run, moment.phase, place.output_dir, place.scratch):
                time.sleep(moment.seconds)
            run.kill()
        if not was_killed(run):
            return None
        left = [f"outlives the killed run: process {pid}" for pid in left_running(run.pid)]
        return left + problems_while_dead(self.expected, place.output_dir)

    def disturb(self, moments: Sequence[Moment], place: Place) -> Outcome | None:
        """A kill, or two, and the run that has to put it right; None: nothing was killed."""
        phase, files = "", 0
        happened: list[Moment] = []
        by_comet: list[str] = []
        problems: list[str] = []
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
        return Outcome(self.scenario.name, shown(happened), phase, files, by_comet, problems)


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
            found = benches[0].disturb(parsed(known.at), Place(directory / "kill"))
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
