"""Kills the whole pipeline with SIGKILL at random moments of every stage, reruns the same command,
compares what is there with what an undisturbed run leaves.

python tests/faults/pipeline_kills.py --kills 100 [--seed S] [--directory D]
python tests/faults/pipeline_kills.py --at "train + 0.312 s, then evaluate step 2" [--begin train]
    [--often] [--command_line] [--own_programs]

A run is killed from outside, a random time after it was seen to begin a stage, or just before a
random one of the changes that it makes to files in the stage, for moments that are too short to
hit. Some reruns are killed too. Most runs begin where an undisturbed one had come to at the
beginning of the stage, some from nothing; most are forked from a process that has loaded the
libraries, some are commands like a user's; some compile their programs themselves."""

import argparse
import collections
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from kills import MAX_DRAWS, Place, parsed, shown
from pipeline_bench import Bench, Kill, Outcome
from pipeline_stages import STAGES, START
from warm_runs import WarmRuns

COMMAND_EVERY = 8  # kills: the run and its rerun are commands like a user's
OWN_PROGRAMS_EVERY = 20  # kills: nothing is compiled yet
START_UP_EVERY = 14  # kills: before the first stage


def run(bench: Bench, directory: Path, *, kills: int, seed: int) -> Iterator[Outcome]:
    """`kills` outcomes, each in the stage that has had the fewest. Equal seeds draw equal moments,
    as far as equal stages are hit; the seconds are those drawn times what the stage took when it
    was measured."""
    rng = random.Random(seed)
    hits: collections.Counter[str] = collections.Counter()
    for number in range(kills):
        turn = number + 1
        for _ in range(MAX_DRAWS):
            wanted = START if turn % START_UP_EVERY == 0 else min(STAGES, key=hits.__getitem__)
            kill = replace(
                bench.draw(wanted, rng),
                command_line=turn % COMMAND_EVERY == 0,
                own_programs=turn % OWN_PROGRAMS_EVERY == 0,
            )
            place = Place(directory / f"kill-{number}")
            outcome = bench.disturb(kill, place)
            if outcome is None or not outcome.problems:
                shutil.rmtree(place.directory)
            if outcome is not None:
                hits[outcome.stage] += 1
                yield outcome
                break
        else:
            raise SystemExit(f"{MAX_DRAWS} runs ended before their kill in {wanted}")


def row(number: int, outcome: Outcome) -> str:
    verdict = "BAD" if outcome.problems else "ok "
    kill = outcome.kill
    return (
        f"{number:3d}  {outcome.stage:8}  {verdict}  {shown(kill.moments):44}  "
        f"{kill.options():38}  {outcome.on_disk}"
    )


def summary(outcomes: list[Outcome]) -> list[str]:
    """A table with a row a stage: how many kills found a run in it, of which sorts."""
    columns: dict[str, Callable[[Outcome], bool]] = {
        "kills": lambda _: True,
        "by time": lambda outcome: not outcome.kill.moments[0].step,
        "before a change": lambda outcome: outcome.kill.moments[0].step > 0,
        "rerun killed too": lambda outcome: len(outcome.kill.moments) > 1,
        "from nothing": lambda outcome: not outcome.kill.begin,
        "command line": lambda outcome: outcome.kill.command_line,
        "own programs": lambda outcome: outcome.kill.own_programs,
        "with problems": lambda outcome: bool(outcome.problems),
    }
    lines = ["stage     " + "  ".join(columns)]
    for stage in (START, *STAGES, "all"):
        found = [outcome for outcome in outcomes if stage in (outcome.stage, "all")]
        counts = (f"{sum(map(test, found)):{len(name)}}" for name, test in columns.items())
        lines.append(f"{stage:8}  " + "  ".join(counts))
    return lines


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--kills", type=int, default=100)
    add("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    add("--directory", type=Path, help="an empty one, which is kept; default: a temporary one")
    add("--at", help="only this kill, as the table shows it, with the options beside it there")
    add("--begin", choices=STAGES, default="", help="the stage at whose beginning it starts")
    add("--often", action="store_true", help="checkpoints after every step")
    add("--command_line", action="store_true", help="runs are commands like a user's")
    add("--own_programs", action="store_true", help="nothing is compiled yet")
    return parser.parse_args()


def main() -> int:
    known = _parsed()
    print(f"seed {known.seed}", flush=True)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="pipeline_kills-") as temporary, WarmRuns() as warm:
        directory = known.directory or Path(temporary)
        bench = Bench(directory / "job", warm)
        bench.measure()
        bench.measure_begun()
        for stage, seconds in bench.seconds[""].items():
            begun, changes = bench.seconds.get(stage, bench.seconds[""]), bench.steps.get(stage, 0)
            print(
                f"{stage}: {seconds:.2f} s ({begun[stage]:.2f} s in a run that begins there), "
                f"{changes} changes to files",
                flush=True,
            )
        found: Iterable[Outcome] = run(bench, directory, kills=known.kills, seed=known.seed)
        if known.at:
            kill = Kill(
                tuple(parsed(known.at)),
                known.begin,
                known.often,
                known.command_line,
                known.own_programs,
            )
            at_once = bench.disturb(kill, Place(directory / "kill"))
            found = [at_once] if at_once else []
        for outcome in found:
            print(row(len(outcomes), outcome), flush=True)
            for problem in outcome.problems:
                print(f"     {problem}", flush=True)
            for path in outcome.by_keras:
                print(f"     left by Keras, not the pipeline: {path}", flush=True)
            outcomes.append(outcome)
    bad = sum(bool(outcome.problems) for outcome in outcomes)
    print("\n".join(["", *summary(outcomes)]))
    print(f"{len(outcomes)} kills, {bad} with problems (seed {known.seed})")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
