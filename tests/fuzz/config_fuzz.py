"""Fuzzes the dry run with settings, options and directories of data that are right, odd or wrong.

python tests/fuzz/config_fuzz.py --cases 10000 [--seed S]     or     --seed S --repeat NUMBER

The cases run in another process, so that a crash or a hang has a number too; the first ones run a
second time through the command line. What fails is printed with the command that repeats it."""

import argparse
import json
import logging
import random
import shlex
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from config_cases import Place, make_case
from etl_fuzz import follow

CHUNK = 1000  # cases of one process
FIRST_LIMIT_SECONDS, LIMIT_SECONDS = 300.0, 90.0  # the first case may have kernels to compile
MOST_FAILURES = 20


def work(seed: int, first: int, count: int, *, command: bool) -> None:
    """In the other process: one line of JSON before each case and one behind it."""
    warnings.simplefilter("error")
    logging.raiseExceptions = True
    stdout = sys.stdout

    def say(**values: Any) -> None:
        print(json.dumps(values), file=stdout, flush=True)

    with tempfile.TemporaryDirectory(prefix="config_fuzz-") as scratch:
        place = Place(Path(scratch).resolve() / "here")
        for number in range(first, first + count):
            say(case=number)
            case = make_case(seed, number)
            try:
                ended = place.run_command(case) if command else place.run(case)
            except Exception as error:
                say(failed=f"{type(error).__name__}: {error}"[:2000], kind=case.kind)
            else:
                say(kind=case.kind, outcome=ended.outcome, seconds=ended.seconds)


class Outcomes:
    """What came of the cases so far."""

    def __init__(self, seed: int) -> None:
        self.seed, self.failures, self.begun = seed, 0, time.monotonic()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.slowest: dict[str, tuple[float, int]] = {}

    def run(self, first: int, count: int, *, command: bool = False) -> None:
        """Goes on behind what crashed or hung."""
        number, end = first, first + count
        while number < end and self.failures < MOST_FAILURES:
            size, at = min(CHUNK, end - number), number
            program = _worker(self.seed, number, size, command=command)
            for said in follow(program, first_limit=FIRST_LIMIT_SECONDS, limit=LIMIT_SECONDS):
                at = said.get("case", at)
                self._note(at, said, command)
                if "died" in said:
                    size = at + 1 - number
            number += size
            how = "through the command line" if command else "in process"
            seconds = time.monotonic() - self.begun
            print(f"{number:,} of {end:,} cases {how}, {self.failures} failures, {seconds:.0f} s")

    def _note(self, number: int, said: dict[str, Any], command: bool) -> None:
        if "outcome" in said:
            kind = f"command: {said['outcome']}" if command else said["kind"]
            self.counts[kind, said["outcome"]] += 1
            self.slowest[kind] = max(self.slowest.get(kind, (0.0, 0)), (said["seconds"], number))
        elif "failed" in said or "died" in said:
            self.failures += 1
            print(f"FAILED {number}, {said.get('kind', 'died')}: {said.get('failed', said)}")
            again = ["--seed", str(self.seed), "--repeat", str(number)]
            again += ["--command"] if command else []
            print(f"  repeat: {shlex.join([sys.executable, __file__, *again])}")

    def table(self) -> str:
        rows = {kind: [0, 0] for kind, _ in sorted(self.counts)}
        for (kind, outcome), count in self.counts.items():
            rows[kind][outcome == "refused"] += count
        lines = [f"{'kind':20} {'valid':>7} {'refused':>7}  slowest"]
        for kind, (valid, refused) in rows.items():
            seconds, number = self.slowest[kind]
            lines.append(f"{kind:20} {valid:7,} {refused:7,}  {seconds:.2f} s ({number})")
        valid, refused = (sum(column) for column in zip(*rows.values(), strict=True))
        return "\n".join([*lines, f"{'all':20} {valid:7,} {refused:7,}"])


def _worker(seed: int, first: int, count: int, *, command: bool) -> list[str]:
    numbers = [str(number) for number in (seed, first, count)]
    start = [sys.executable, "-X", "faulthandler", __file__, "--work", *numbers]
    return [*start, "--command"] if command else start


def repeat(seed: int, number: int, *, command: bool) -> None:
    """Shows the case and how it ends. Raises: what it raised before, if it still does."""
    warnings.simplefilter("error")
    case = make_case(seed, number)
    with tempfile.TemporaryDirectory(prefix="config_fuzz-") as scratch:
        place = Place(Path(scratch).resolve() / "here")
        print(f"case {number}, {case.kind}, to be {case.outcome}, with {case.words}")
        print(f"{case.program} {shlex.join(place.prepare(case))}")
        print(f"settings: {case.text[:3000]!r}\ndata: {case.data or 'in the settings'}")
        ended = place.run_command(case) if command else place.run(case)
        print(f"it passes: exit code {ended.code} after {ended.seconds:.2f} s")
        print(ended.out + ended.err)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--commands", type=int, default=50, help="of them through the command line")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--repeat", type=int, help="the number of a case")
    parser.add_argument("--command", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--work", nargs=3, type=int, help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.work:
        work(*known.work, command=known.command)
        return 0
    if known.repeat is not None:
        repeat(known.seed, known.repeat, command=known.command)
        return 0
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    print(f"seed {known.seed}")
    outcomes = Outcomes(known.seed)
    outcomes.run(0, known.cases)
    outcomes.run(0, known.commands, command=True)
    print(f"\n{outcomes.table()}\nfailures {outcomes.failures} (seed {known.seed})")
    return 1 if outcomes.failures else 0


if __name__ == "__main__":
    sys.exit(main())
