"""Pass two for Beam's workers: the rows of a part of a file parsed, those of a shard written."""

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from capfinder.errors import CapfinderError
from capfinder.etl import shuffle
from capfinder.etl.beam import encoding
from capfinder.etl.beam.exchange import Exchange, WorkerFile, record
from capfinder.etl.plan import CHOSEN, Shard
from capfinder.etl.shuffle import ParsedBlock, WrittenShard

GROUP_BYTES = 1 << 25  # of parsed rows that a worker gathers by shard before it hands them on


@dataclass(frozen=True)
class Form:
    """Of the dataset and of the rows on their way to it."""

    id_bytes: int
    target_length: int
    dtype: str

    @property
    def row(self) -> np.dtype:
        return shuffle.bucket_dtype(
            id_bytes=self.id_bytes, target_length=self.target_length, dtype=self.dtype
        )


@dataclass(frozen=True)
class ParseRows:
    """Chosen rows of one file: `rows` are the names of files in the exchange that hold them, in
    parts that follow each other in the file, records of plan.CHOSEN."""

    name: str
    text: WorkerFile
    rows: tuple[str, ...]


def parse(task: ParseRows, exchange: Exchange, form: Form) -> Iterator[tuple[int, bytes]]:
    """Shard number and rows of the dtype `form.row`, as bytes, of all the task's rows; those that
    have a problem too, so that shards are whole. All but the signals is left in the exchange."""
    gathered: list[tuple[np.ndarray, np.ndarray]] = []
    size = 0
    exchange.check_open()
    with exchange.put(task.name) as stream:
        try:
            for parsed in exchange.while_open(_parsed(task, exchange, form)):
                encoding.write(stream, _without_signals(parsed))
                rows = shuffle.bucket_rows(parsed, form.row)
                gathered.append((parsed.rows["shard"], rows))
                size += rows.nbytes
                if size >= GROUP_BYTES:
                    yield from _by_shard(gathered)
                    gathered, size = [], 0
        except CapfinderError as error:  # raised where the user is
            encoding.write(stream, error)
    yield from _by_shard(gathered)


def _parsed(task: ParseRows, exchange: Exchange, form: Form) -> Iterator[ParsedBlock]:
    def groups() -> Iterator[np.ndarray]:
        for name in task.rows:
            with exchange.open(name) as stream:
                yield from shuffle.near_rows(np.frombuffer(stream.read(), CHOSEN))

    for rows, data in shuffle.read_groups(cast(Path, task.text), groups()):
        yield shuffle.parse_block(
            rows,
            data,
            id_bytes=form.id_bytes,
            target_length=form.target_length,
            dtype=form.dtype,
        )


def _without_signals(parsed: ParsedBlock) -> ParsedBlock:
    return replace(parsed, signals=replace(parsed.signals, fitted=parsed.signals.fitted[:, :0]))


def _by_shard(gathered: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[int, bytes]]:
    if not gathered:
        return
    shard = np.concatenate([numbers for numbers, _ in gathered])
    rows = np.concatenate([rows for _, rows in gathered])
    order = np.argsort(shard, kind="stable")
    numbers, starts = np.unique(shard[order], return_index=True)
    for number, group in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
        yield number, rows[group].tobytes()


@dataclass(frozen=True)
class WriteShard:
    """Writes one of the plan's shards into the exchange, and what is known of it beside it."""

    exchange: Exchange
    form: Form
    shards: tuple[Shard, ...]

    def __call__(self, group: tuple[int, Iterable[bytes]]) -> None:
        """group: the shard's number and all its rows, as `parse` gives them."""
        number, pieces = group
        if not self.exchange.has(result_name(number)):
            record(self.exchange, result_name(number), self._findings(number, pieces))

    def _findings(self, number: int, pieces: Iterable[bytes]) -> Iterator[WrittenShard]:
        rows = np.concatenate([np.frombuffer(piece, self.form.row) for piece in pieces])
        with tempfile.TemporaryDirectory() as directory:
            written = shuffle.write_shard(Path(directory), self.shards[number], rows)
            with (
                (Path(directory) / written.name).open("rb") as source,
                self.exchange.put(written.name) as target,
            ):
                shutil.copyfileobj(source, target, 1 << 20)
        yield written


def result_name(shard: int) -> str:
    return f"shard-{shard}"
