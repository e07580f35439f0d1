"""One log file a run, a readable terminal, progress bars with an ETA.

Whatever is said here may hold names that somebody else chose, of a file, say: none of them can
steer a terminal or forge a line, and what was hidden is said nowhere."""

import contextlib
import io
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

logger = logging.getLogger("capfinder")
console = Console()
MEGABYTE = 10**6
PLAIN_LINE_SECONDS = 10.0  # between two progress lines when the output isn't a terminal
LEAST_SECRET = 6  # characters: a shorter one would stand in other words too

_secrets: set[str] = set()


def hide(secret: str | None) -> None:
    """From now on *** is said in its place."""
    if secret and len(secret) >= LEAST_SECRET:
        _secrets.add(secret)


def printable(text: str) -> str:
    r"""One line without secrets, all that isn't printed as itself written as \x1b, \n or \u202e."""
    for secret in _secrets:
        text = text.replace(secret, "***")
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def _printable_lines(text: str) -> str:
    return "\n".join(printable(line) for line in text.split("\n"))


class _Formatter(logging.Formatter):
    """Only the text of a message is ours: a line break in what is put into it is no line break."""

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple):
            record.args = tuple(_argument(value) for value in record.args)
        return _printable_lines(super().format(record))


def _argument(value: Any) -> Any:
    return printable(str(value)) if isinstance(value, str | Path | BaseException) else value


class _File(logging.FileHandler):
    """A disk that is full ends the run where results are written, in a line of its own, and not
    here in a traceback for each line of the log."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the same, of what it still had to write
            super().close()


class _Terminal(logging.Handler):
    """The message alone, without time or level, warnings and errors in colour."""

    def emit(self, record: logging.LogRecord) -> None:
        style = {logging.WARNING: "yellow", logging.ERROR: "red"}.get(record.levelno)
        # Long lines are the terminal's to wrap: a path must stay one word for copying.
        console.print(
            self.format(record),
            style=style,
            markup=False,
            emoji=False,
            highlight=False,
            soft_wrap=True,
        )


def start(logs_dir: Path | None, *, debug: bool = False, beside: bool = False) -> Path | None:
    """Logs to the terminal and, when `logs_dir` is given, to a new file there; returns its path.

    beside: of several processes not the one that says what goes on; warnings and errors alone."""
    global console
    stop()
    logger.setLevel(logging.DEBUG if debug else logging.WARNING if beside else logging.INFO)
    if beside:
        console = Console(force_terminal=False)  # no bars
    logger.propagate = False
    terminal = _Terminal()
    terminal.setFormatter(_Formatter())
    logger.addHandler(terminal)
    if logs_dir is None:
        return None
    logs_dir.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    stem = f"capfinder_v{version('capfinder')}_{stamp}"
    path, again = logs_dir / f"{stem}.log", 1
    while True:
        try:
            handler = _File(path, mode="x", encoding="utf-8")
            break
        except FileExistsError:  # two runs within a second
            again += 1
            path = logs_dir / f"{stem}_{again}.log"
    place = "%(filename)s:%(lineno)d %(funcName)s | " if debug else ""
    handler.setFormatter(_Formatter(f"%(asctime)s | %(levelname)-7s | {place}%(message)s"))
    logger.addHandler(handler)
    return path


def stop() -> None:
    """Closes every handler that `start` added."""
    logger.setLevel(logging.NOTSET)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    left: Sequence[int] = (0,),
) -> None:
    """A table on the terminal, and the same one as plain text in the log file.

    Columns are right-justified but for those in `left`."""
    rich_table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        header = Text(printable(column))
        rich_table.add_column(header, justify="left" if number in left else "right")
    for row in rows:
        # Text, not str: what looks like rich's markup in a file's name is none.
        rich_table.add_row(*(Text(printable(str(cell))) for cell in row))
    plain = Console(width=160, no_color=True, record=True, file=io.StringIO())
    plain.print(rich_table)
    text = plain.export_text().rstrip()
    if any(isinstance(handler, _Terminal) for handler in logger.handlers):
        if console.is_terminal:
            console.print(rich_table)
        else:
            console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
    file_only(logging.INFO, "\n" + text)


def file_only(level: int, text: str) -> None:
    """A line for the log file that the terminal shows in another form or not at all."""
    record = logger.makeRecord(logger.name, level, __file__, 0, text, (), None, "file_only")
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def log_settings(text: str) -> None:
    """The settings of the run, for the log file alone: on the terminal they would bury the rest."""
    file_only(logging.INFO, f"Settings:\n{text}")


def file_path() -> Path | None:
    """The log file being written, if any."""
    paths = [h.baseFilename for h in logger.handlers if isinstance(h, logging.FileHandler)]
    return Path(paths[0]) if paths else None


class Bar:
    """What `progress` yields: `advance` moves it, `note` shows the latest figures beside it."""

    def __init__(self, description: str, total: int, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = self._begun_at = 0
        self.text = ""
        self._started = time.monotonic()
        self._last_line = self._started
        self._rich: Progress | None = None
        if console.is_terminal:
            self._rich = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=console,
            )
            self._task = self._rich.add_task(description, total=total, text="")
            self._rich.start()

    def advance(self, steps: int = 1) -> None:
        self.done += steps
        self._show()

    def begin_at(self, done: int) -> None:
        """Counts what an earlier run did, without taking it for this one's speed."""
        self.done = self._begun_at = done
        if self._rich is not None:
            self._rich.reset(self._task, completed=done, total=self.total)

    def note(self, text: str) -> None:
        self.text = text
        self._show()

    def close(self) -> None:
        if self._rich is not None:
            self._rich.stop()

    def _show(self) -> None:
        if self._rich is not None:
            self._rich.update(self._task, completed=self.done, text=self.text)
            return
        now = time.monotonic()
        if now - self._last_line < PLAIN_LINE_SECONDS or not self.done:
            return
        self._last_line = now
        done_now = max(self.done - self._begun_at, 1)
        left = (now - self._started) * (self.total - self.done) / done_now
        logger.info(
            "%s: %d of %d %s (%d%%), ETA %s%s",
            self.description,
            self.done,
            self.total,
            self.unit,
            100 * self.done // max(self.total, 1),
            format_seconds(left),
            f", {self.text}" if self.text else "",
        )


@contextmanager
def progress(description: str, *, total: int, unit: str) -> Iterator[Bar]:
    """A bar with elapsed time and ETA on a terminal, a plain line every 10 s elsewhere."""
    bar = Bar(description, total, unit)
    try:
        yield bar
    finally:
        bar.close()


class ByteBar:
    """What `progress_bytes` yields: told bytes, it moves a bar of megabytes."""

    def __init__(self, bar: Bar) -> None:
        self._bar, self._bytes = bar, 0

    def advance(self, size: int) -> None:
        self._bytes += size
        self._bar.advance(_megabytes(self._bytes) - self._bar.done)


@contextmanager
def progress_bytes(description: str, *, total: int) -> Iterator[ByteBar]:
    """As `progress` of `total` bytes, shown in megabytes."""
    with progress(description, total=_megabytes(total), unit="MB") as bar:
        yield ByteBar(bar)


def _megabytes(size: int) -> int:
    return -(-size // MEGABYTE)


def format_seconds(seconds: float) -> str:
    """75 -> '1:15', 3700 -> '1:01:40'."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, seconds_left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds_left:02}" if hours else f"{minutes}:{seconds_left:02}"


def format_bytes(size: float) -> str:
    """1_234_567 -> '1.2 MB'."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size / 1e3:,.1f} kB"


def counted(count: int, noun: str) -> str:
    """'1 epoch', '1,200 reads'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def print_error(message: str) -> None:
    """The one line a failed command ends with, on standard error."""
    print(f"error: {printable(message)}", file=sys.stderr)
