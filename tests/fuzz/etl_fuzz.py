"""Fuzzes the ETL: its reader against a slow one, the whole stage on small files.

python tests/fuzz/etl_fuzz.py --cases 20000 [--seed S]     or     --repeat FILE

A case is spoiled text, real where real squiggles are there, or what Hypothesis makes up. It passes
when every row is good with the same identity and the same bits in its values, or a reject for a
reason that is true of it. The cases run in another process, so that a crash or a hang has a number
too. What fails is saved with all of its input, and the command that repeats it is printed."""

import argparse
import json
import logging
import queue
import random
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
from etl_cases import ReaderCase, make_reader_case
from etl_compare import Tally
from etl_mutations import corpus
from etl_strategies import reader_cases
from etl_whole import StageCase, make_stage_case

Case = ReaderCase | StageCase
KINDS = {"block or file": 0.775, "hypothesis": 0.2, "whole stage": 0.025}  # shares of all cases
FIRST_LIMIT_SECONDS, LIMIT_SECONDS = 300.0, 60.0  # the first case may have kernels to compile
MOST_FAILURES = 10


def cases(kind: str, seed: int, numbers: Sequence[int], scratch: Path) -> Iterator[Case]:
    """Hypothesis's own are run by `run_hypothesis`."""
    rows = corpus(scratch)
    make: Callable[..., Case] = make_stage_case if kind == "whole stage" else make_reader_case
    for number in numbers:
        yield make(seed, number, rows)


def prepare() -> None:
    """Any warning is an error; what the ETL says of its input isn't shown thousands of times."""
    warnings.simplefilter("error")
    logging.getLogger("capfinder").setLevel(logging.CRITICAL + 1)


def run_hypothesis(check: Callable[[ReaderCase], None], *, count: int, seed: int) -> None:
    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(reader_cases)
    def any_case(case: ReaderCase) -> None:
        check(case)

    any_case()


def work(kind: str, seed: int, first: int, count: int, saved: Path) -> None:
    """In the other process: one line of JSON before each case, one for each failure, the tally."""
    prepare()
    tally, number, failures = Tally(), first, 0

    def say(**values: Any) -> None:
        print(json.dumps(values), flush=True)

    def check(case: Case) -> None:
        nonlocal number
        say(case=number)
        number += 1
        tally.add(case.check(Path(scratch)))

    def keep(case: Case, error: Exception) -> None:
        path = saved / f"{kind.replace(' ', '-')}-{seed}-{number - 1}.json"
        told = f"{type(error).__name__}: {error}"
        path.write_text(json.dumps({"kind": kind, "error": told, **case.as_json()}))
        say(failed=told[:1500], saved=str(path))

    with tempfile.TemporaryDirectory(prefix="etl_fuzz-") as scratch:
        if kind == "hypothesis":
            last: list[ReaderCase] = []

            def check_and_note(case: ReaderCase) -> None:
                last[:] = [case]
                check(case)

            try:
                run_hypothesis(check_and_note, count=count, seed=seed + first)
            except Exception as error:
                keep(last[0], error)  # the smallest is tried last
        else:
            for case in cases(kind, seed, range(first, first + count), Path(scratch)):
                try:
                    check(case)
                except Exception as error:
                    keep(case, error)
                    failures += 1
                    if failures == MOST_FAILURES:
                        break
    say(good=tally.good, rejects=tally.rejects, errors=tally.errors, cases=number - first)


def follow(command: Sequence[str], *, first_limit: float, limit: float) -> Iterator[dict[str, Any]]:
    """The JSON that `command` says, line by line. A last {"died": ...} tells of one that crashed
    or said nothing for `limit` seconds (then it is killed)."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines: queue.Queue[str | None] = queue.Queue()
    assert process.stdout is not None
    stream = process.stdout

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    patience = first_limit
    died = ""
    while True:
        try:
            line = lines.get(timeout=patience)
        except queue.Empty:
            process.kill()
            died = f"no end within {patience:.0f} s"
            break
        if line is None:
            break
        said = json.loads(line)
        yield said
        patience = first_limit if said.get("case", -1) == 0 else limit
    code = process.wait()
    reader.join()
    stream.close()
    if died or code:
        yield {"died": died or f"exit code {code}"}


def run(count: int, seed: int, saved: Path, *, chunk: int = 2000) -> tuple[Tally, int, int]:
    """Tally, cases run, failures."""
    tally, done, failures, number, begun = Tally(), 0, 0, 0, time.monotonic()
    wanted = {kind: int(share * count) for kind, share in KINDS.items()}
    wanted["block or file"] += count - sum(wanted.values())
    for kind, of_kind in wanted.items():
        first = 0
        while first < of_kind and failures < MOST_FAILURES:
            last = first + min(chunk, of_kind - first) - 1
            command = _worker(kind, seed, first, last - first + 1, saved)
            for said in follow(command, first_limit=FIRST_LIMIT_SECONDS, limit=LIMIT_SECONDS):
                number = said.get("case", number)
                if "failed" in said:
                    failures += 1
                    print(f"FAILED {kind} {number}: {said['failed']}")
                    print(f"  repeat: {sys.executable} {__file__} --repeat {said['saved']}")
                elif "died" in said:
                    failures += 1
                    last = number  # go on behind it
                    print(f"DIED in {kind} {number} ({said['died']})")
                    print(f"  repeat: {shlex.join(_worker(kind, seed, number, 1, saved))}")
                elif "cases" in said:
                    done += said["cases"]
                    tally.add(
                        Tally(said["good"], Counter(said["rejects"]), Counter(said["errors"]))
                    )
            first = last + 1
            seconds = time.monotonic() - begun
            print(f"{done:,} of {count:,} cases, {kind}, {failures} failures, {seconds:.0f} s")
    return tally, done, failures


def _worker(kind: str, seed: int, first: int, count: int, saved: Path) -> list[str]:
    numbers = [str(number) for number in (seed, first, count)]
    return [sys.executable, "-X", "faulthandler", __file__, "--work", kind, *numbers, str(saved)]


def repeat(path: Path) -> None:
    prepare()
    values = json.loads(path.read_text())
    kind = values.pop("kind")
    print("it was:", values.pop("error")[:1500])
    case: Case = (StageCase if kind == "whole stage" else ReaderCase).from_json(values)
    with tempfile.TemporaryDirectory(prefix="etl_fuzz-") as scratch:
        print("it passes:", case.check(Path(scratch)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--repeat", type=Path, help="a saved case")
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.work:
        kind, seed, first, count, saved = known.work
        work(kind, int(seed), int(first), int(count), Path(saved))
        return 0
    if known.repeat:
        repeat(known.repeat)
        return 0
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    print(f"seed {known.seed}")
    saved = Path(tempfile.mkdtemp(prefix="etl_fuzz-failures-"))
    tally, done, failures = run(known.cases, known.seed, saved)
    print(f"\ncases                {done:9,}\ngood rows            {tally.good:9,}")
    for title, counts in (("rejects", tally.rejects), ("refused whole", tally.errors)):
        print(f"{title:20} {counts.total():9,}")
        for reason, number in counts.most_common():
            print(f"    {reason:24} {number:9,}")
    print(f"failures             {failures:9,} (seed {known.seed})")
    if not failures:
        saved.rmdir()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
