"""Cases for the dry run: settings in a file or on the command line, and a directory of data.

A case is made from a seed and its number, and passes when the dry run ends in one of two ways: it
says what would run, or what is wrong, in one line; where the case knows which, that one. It writes
nothing, and what it calls valid can be used."""

import contextlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import config_directories
import config_mutations
import config_values
from config_mutations import SECRET
from config_values import HERE, Flat, Rng, nested
from etl_compare import must

from capfinder import cli, settings
from capfinder.settings import BY_KEY, SETTINGS
from capfinder.training import schedules

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 60  # in a test nothing is timed; this ends what hangs
MOST_LINE = 6000  # characters of an error: a path of 4,095 and what is wrong with it
ENDING = "Nothing was written (dry run)."


@dataclass(frozen=True)
class Case:
    """`text`: of the settings' file, HERE in it stands for where the case lies; `options` behind
    --dry_run; `outcome`: "valid", "refused" or "either"; `words`: all that an error must say;
    `data`: which of config_directories.KINDS, "" for none, and the seed of its making."""

    text: bytes
    program: str = "capfinder"
    options: tuple[str, ...] = ()
    outcome: str = "either"
    words: tuple[str, ...] = ()
    data: str = ""
    data_seed: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code and all that it said."""

    code: int
    out: str
    err: str
    seconds: float = 0.0

    @property
    def outcome(self) -> str:
        return {0: "valid", 2: "refused"}.get(self.code, f"exit code {self.code}")


def _text(rng: Rng, values: Any) -> bytes:
    return config_mutations.as_json(rng, values)


def _valid(rng: Rng) -> Case:
    flat = config_values.settings_of(rng, share=rng.choice([0.0, 0.1, 0.5, 1.0]))
    return Case(_text(rng, nested(flat)), program=_program(rng), outcome="valid")


def _program(rng: Rng) -> str:
    return rng.choice(["capfinder", "launch.py"])


def _wrong_value(rng: Rng) -> Case:
    setting = rng.choice(SETTINGS)
    flat = config_values.settings_of(rng, share=rng.choice([0.0, 0.5]))
    flat[setting.key] = value = config_mutations.wrong_value(rng, setting)
    words = (f"{setting.key}={_shown(value)}", setting.allowed_text())
    return Case(_text(rng, nested(flat)), program=_program(rng), outcome="refused", words=words)


def _shown(value: Any) -> str:
    """The beginning of what an error must show of a value."""
    text = repr(value)
    return text if len(text) <= 150 else text[:50]


def _misspelled_name(rng: Rng) -> Case:
    flat = config_values.settings_of(rng, share=rng.choice([0.0, 0.5]))
    key = config_mutations.misspelled(rng, rng.choice(SETTINGS).key)
    values = nested(flat)
    *groups, name = key.split(".")
    place = values
    for group in groups:
        place = place.setdefault(group, {})
    place[name] = 1
    return Case(_text(rng, values), outcome="refused", words=(key, "no such setting"))


def _odd_settings(rng: Rng) -> Case:
    flat = config_values.settings_of(rng, share=rng.choice([0.0, 0.5]))
    values = config_mutations.odd_settings(rng, nested(flat))
    return Case(_text(rng, values), program=_program(rng))


def _file_text(rng: Rng) -> Case:
    flat = config_values.settings_of(rng, share=rng.choice([0.0, 0.5]))
    text, outcome, words = config_mutations.file_text(rng, _text(rng, nested(flat)))
    told = ("config.json", words) if outcome == "refused" else ()
    return Case(text, program=_program(rng), outcome=outcome, words=told)


def _spelled(rng: Rng, key: str, value: Any) -> list[str]:
    """One setting on the command line, in one of its spellings."""
    option = f"--config.{key}"
    if value is True and rng.random() < 0.3:
        return [option]
    if value is None:
        text = rng.choice(["null", "None", "none"])
    elif isinstance(value, str):
        text = value
    elif isinstance(value, bool):
        text = rng.choice([str(value), str(value).lower()])
    elif isinstance(value, list) and rng.random() < 0.3 and all(isinstance(v, str) for v in value):
        text = ",".join(value)
    else:
        text = rng.choice([json.dumps, repr])(value)
    if text.startswith("--") or not text or rng.random() < 0.7:
        return [f"{option}={text}"]
    return [option, text]


def _valid_options(rng: Rng) -> Case:
    flat = config_values.settings_of(rng, share=0.3)
    moved = rng.sample(sorted(flat), min(len(flat), rng.randint(1, 6)))
    options = [part for key in moved for part in _spelled(rng, key, flat.pop(key))]
    return Case(_text(rng, nested(flat)), "launch.py", tuple(options), outcome="valid")


def _wrong_option(rng: Rng) -> Case:
    flat = config_values.settings_of(rng, share=0.1)
    setting = rng.choice([one for one in SETTINGS if one.allowed.type not in (str, tuple)])
    value: Any = None
    while type(value) not in (int, float) or value != value or abs(value) == math.inf:
        value = config_mutations.wrong_value(rng, setting)
    options = _spelled(rng, setting.key, value)
    words = (f"{setting.key}={_shown(value)}", setting.allowed_text())
    flat.pop(setting.key, None)
    return Case(
        _text(rng, nested(flat)), "launch.py", tuple(options), outcome="refused", words=words
    )


def _odd_options(rng: Rng) -> Case:
    text = _text(rng, nested(config_values.settings_of(rng, share=0.1)))
    if rng.random() < 0.2:
        return Case(text, _program(rng), tuple(config_mutations.odd_command(rng)))
    return Case(text, "launch.py", tuple(config_mutations.odd_arguments(rng)))


def _odd_model(rng: Rng) -> Case:
    flat = config_values.settings_of(rng, share=0.0) | config_mutations.odd_model(rng)
    return Case(_text(rng, nested(flat)), program=_program(rng))


def _odd_path(rng: Rng) -> Case:
    flat = config_values.settings_of(rng, share=0.0) | config_mutations.odd_path(rng)
    return Case(_text(rng, nested(flat)), program=_program(rng))


def _data_directory(rng: Rng) -> Case:
    name = rng.choice(config_directories.NAMES)
    kind = config_directories.KINDS[name]
    flat: Flat = {
        "etl_params.caps_data_dir": f"{HERE}/case/caps",
        "shared_params.output_dir": f"{HERE}/out",
        "shared_params.num_classes": len(config_directories.CLASSES),
        "shared_params.target_length": rng.choice([16, 500]),
        "etl_params.examples_per_class": rng.choice([None, 1000]),
        "tracking_params.mode": "off",
        **dict(kind.settings),
    }
    words = (kind.words,) if kind.outcome == "refused" else ()
    return Case(
        _text(rng, nested(flat)),
        program=_program(rng),
        outcome=kind.outcome,
        words=words,
        data=name,
        data_seed=str(rng.random()),
    )


MAKERS: dict[str, Callable[[Rng], Case]] = {
    "valid": _valid,
    "wrong value": _wrong_value,
    "misspelled name": _misspelled_name,
    "odd settings": _odd_settings,
    "file text": _file_text,
    "valid options": _valid_options,
    "wrong option": _wrong_option,
    "odd options": _odd_options,
    "odd model": _odd_model,
    "data directory": _data_directory,
    "odd path": _odd_path,
}
OFTEN = {"valid": 3, "wrong value": 4, "odd settings": 3, "file text": 3, "odd options": 3}
OFTEN |= {"odd model": 2, "data directory": 2}
# So that any 24 cases in a row are of all kinds.
KINDS = tuple(kind for kind in MAKERS for _ in range(OFTEN.get(kind, 1)))


def make_case(seed: int, number: int) -> Case:
    """Equal arguments give equal cases."""
    rng = random.Random(f"config {seed} {number}")
    kind = KINDS[number % len(KINDS)]
    return replace(MAKERS[kind](rng), kind=kind)


class Place:
    """Where cases lie, one after the other: directories that all share, and one of each."""

    def __init__(self, here: Path) -> None:
        self.here, self.case, self.cwd = here, here / "case", here / "cwd"
        self.cwd.mkdir(parents=True)
        for count in range(2, 9):
            classes = range(count)
            config_directories.good_directory(here / f"good{count}", classes)
            config_directories.good_directory(here / f"more{count}", classes, prefix="-test")
        (here / "file").touch()
        (here / "ümlaut").mkdir()
        (here / "loop").symlink_to("loop")
        (here / "dangling").symlink_to("nothing")
        os.mkfifo(here / "pipe")
        self.before = _seen(here)

    def prepare(self, case: Case) -> list[str]:
        """Makes the case's own files; the arguments of its command."""
        _remove(self.case)
        self.case.mkdir()
        path = self.case / "config.json"
        path.write_bytes(case.text.replace(HERE.encode(), os.fsencode(self.here)))
        if case.data:
            directory = self.case / "caps"
            config_directories.good_directory(directory, config_directories.CLASSES)
            config_directories.KINDS[case.data].make(random.Random(case.data_seed), directory)
        options = [option.replace(HERE, str(self.here)) for option in case.options]
        if case.program == "launch.py":
            return [f"--config={path}", "--dry_run", *options]
        return ["train-model", "--config_file", str(path), "--dry_run", *options]

    def run(self, case: Case) -> Ended:
        """In this process. Raises: Mismatch."""
        arguments = self.prepare(case)
        before = _seen(self.case)
        ended = in_process(case.program, arguments, cwd=self.cwd)
        self._check(case, ended, before)
        if ended.code == 0 and not case.options:
            check_usable(self.case / "config.json")
        return ended

    def run_command(self, case: Case) -> Ended:
        """As a command of its own. Raises: Mismatch."""
        arguments = self.prepare(case)
        before = _seen(self.case)
        start = [str(ROOT / "launch.py")] if case.program == "launch.py" else ["-m", "capfinder"]
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *start, *arguments],
            cwd=self.cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            timeout=5 * LIMIT_SECONDS,
        )
        seconds = time.perf_counter() - begun
        out, err = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
        ended = Ended(done.returncode, out, err, seconds)
        self._check(case, ended, before)
        return ended

    def _check(self, case: Case, ended: Ended, before: dict[str, Any]) -> None:
        check_ending(case, ended, here=str(self.here))
        must(_seen(self.case) == before, "written beside the settings or the data", self.case)
        must(_seen(self.here) == self.before, "written elsewhere", self.here)


def in_process(program: str, arguments: list[str], *, cwd: Path) -> Ended:
    run = cli.launch if program == "launch.py" else cli.main
    out, err = io.StringIO(), io.StringIO()
    begun = time.perf_counter()
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        _ended_in_time(),
    ):
        code = run(arguments)
    return Ended(code, out.getvalue(), err.getvalue(), time.perf_counter() - begun)


@contextlib.contextmanager
def _ended_in_time() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"no end within {LIMIT_SECONDS} s")

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


def check_ending(case: Case, ended: Ended, *, here: str) -> None:
    """One of the two ends, the right one if the case knows it. Raises: Mismatch."""
    said = (ended.code, ended.out[-1500:], ended.err[-1500:])
    must(ended.code in (0, 2), "neither valid nor a clear error", said)
    for word in ("Traceback", "unexpected ", SECRET):
        must(word not in ended.out + ended.err, f"said {word!r}", said)
    must(case.outcome in ("either", ended.outcome), f"not {case.outcome}", said)
    if ended.code == 0:
        must(not ended.err, "valid, but on standard error", said)
        must(ended.out.rstrip("\n").endswith(ENDING), "valid, but nothing is told", said)
        return
    lines = ended.err.removesuffix("\n").split("\n")
    must(len(lines) == 1 and lines[0].startswith("error: "), "not one line", said)
    must(not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lines[0]), "control characters", said)
    must(len(lines[0].replace(here, "")) <= MOST_LINE, "too long a line", len(lines[0]))
    for word in case.words:
        must(word.replace(HERE, here) in lines[0], f"doesn't say {word!r}", said)


def check_usable(path: Path) -> None:
    """Settings found valid: read again, written and read again they are the same, and what is made
    of them is of use. Raises: Mismatch."""
    config = settings.read_json_config(path)
    values = settings.to_dict(config)
    must(settings.check(values) == values, "checked again, they differ", values)
    must(settings.to_dict(settings.checked(config)) == values, "as a ConfigDict, they differ")
    text = json.dumps(values, allow_nan=False)
    must(settings.check(json.loads(text)) == values, "written and read, they differ", text)
    must(set(settings.flat(values)) == set(BY_KEY), "not every setting", values)
    check_schedule(values["lr_scheduler_params"])


def check_schedule(params: dict[str, Any]) -> None:
    """Every rate of the schedule is one, early and late. Raises: Mismatch."""
    kind = params["type"]
    made = schedules.make_schedule(kind, params[kind], learning_rate=1e-3, steps_per_epoch=100)
    if callable(made.learning_rate):
        rates = [float(made.learning_rate(step)) for step in (0, 1, 99, 100, 12_345, 2**30)]
        must(all(0 <= rate <= 10.01 for rate in rates), "no rates", rates, params)


def _seen(directory: Path) -> dict[str, Any]:
    """What lies in a directory, but for the case that lies there."""
    found: dict[str, Any] = {}
    for root, folders, names in os.walk(directory):
        if Path(root) == directory and "case" in folders:
            folders.remove("case")
        for name in (*folders, *names):
            path = os.path.join(root, name)
            try:
                info = os.lstat(path)
            except PermissionError:
                found[path] = None
                continue
            is_folder = os.path.isdir(path)
            found[path] = (info.st_mode, None if is_folder else (info.st_size, info.st_mtime_ns))
    return found


def _remove(directory: Path) -> None:
    for root, folders, _ in os.walk(directory):
        for name in folders:
            path = Path(root, name)
            if not path.is_symlink():
                path.chmod(0o700)
    shutil.rmtree(directory, ignore_errors=True)
