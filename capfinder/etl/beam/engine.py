"""The launching machine's side of Beam: tasks out, findings back in the order of the files."""

import contextlib
import hashlib
import itertools
import logging
import socket
import threading
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from capfinder import files, log
from capfinder.errors import StageFailedError
from capfinder.etl.beam import parts
from capfinder.etl.beam import ranges as scanning
from capfinder.etl.beam.encoding import RangeEnd
from capfinder.etl.beam.exchange import Exchange, WorkerFile, findings
from capfinder.etl.beam.options import BeamOptions, parse
from capfinder.etl.beam.parts import Form, ParseRows, WriteShard
from capfinder.etl.beam.ranges import Digest, ScanRange
from capfinder.etl.csv_files import is_gzip
from capfinder.etl.plan import Plan
from capfinder.etl.scan import FileFacts, ScannedBlock, file_of_segment
from capfinder.etl.shuffle import ParsedBlock, WrittenShard
from capfinder.etl.sources import Source

POLL_SECONDS = 2.0
POLL_TASKS = 200  # looked for at a time
CANCEL_SECONDS = 10.0


class BeamEngine:
    """Runs pipelines with what `etl_params.beam_options` says; see engines.Engine."""

    def __init__(self, beam_options: Sequence[str], scratch: Path) -> None:
        """scratch: for what the machines leave each other, unless --exchange_dir says where."""
        self._options = parse(beam_options)
        self._exchange = _exchange(self._options, scratch)
        self._passes: list[Exchange] = []

    def __enter__(self) -> "BeamEngine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exchange.remove()

    def scan_files(
        self, found: Sequence[Source], facts: Sequence[FileFacts], *, seed: int
    ) -> Generator[tuple[int, ScannedBlock | None]]:
        """As scan.scan_files. Raises: StageFailedError when Beam fails."""
        exchange = self._exchange.within("scan")
        of_file: list[list[ScanRange]] = []
        digests: list[Digest] = []
        for number, source in enumerate(found):
            text = worker_file(source, self._options)
            bounds = scanning.ranges(source.size, is_packed=is_gzip(source.path))
            of_file.append(
                [
                    ScanRange(
                        f"scan-{number}-{start}", number, text, source.cap_class, seed, start, end
                    )
                    for start, end in bounds
                ]
            )
            if len(bounds) > 1:
                digests.append(Digest(f"digest-{number}", text))
        tasks: list[Digest | ScanRange] = [*digests, *itertools.chain.from_iterable(of_file)]

        def build(pipeline: Any) -> None:
            import apache_beam as beam

            scan = partial(scanning.do, exchange=exchange.for_workers())
            _ = _spread(pipeline, tasks) | "Scan" >> beam.Map(scan)

        run_pipeline(
            self._options,
            build,
            title="Scanning CSV files on Beam",
            results=(exchange, [task.name for task in tasks]),
        )
        with log.progress("Gathering what they found", total=len(found), unit="files") as bar:
            for number, ranges in enumerate(of_file):
                yield from _blocks(exchange, number, ranges, facts[number])
                yield number, None
                bar.advance()
        exchange.remove()

    def pass_two(
        self,
        plan: Plan,
        found: Sequence[Source],
        *,
        target_length: int,
        dtype: str,
        scratch: Path,
    ) -> "BeamPassTwo":
        del scratch  # a plan's folder in the exchange goes with the exchange
        form = Form(plan.id_bytes, target_length, dtype)
        for earlier in self._passes:
            earlier.remove()
        exchange = self._exchange.within(f"pass-two-{len(self._passes)}")
        self._passes.append(exchange)
        return BeamPassTwo(plan, found, form, self._options, exchange)


class BeamPassTwo:
    """Pass two of one plan; see engines.PassTwo."""

    def __init__(
        self,
        plan: Plan,
        found: Sequence[Source],
        form: Form,
        options: BeamOptions,
        exchange: Exchange,
    ) -> None:
        self._plan, self._sources, self._form = plan, found, form
        self._options, self._exchange = options, exchange

    def parse(self) -> Iterator[ParsedBlock]:
        """The chosen rows, without their fitted signals: those are in shards by then.

        Raises: StageFailedError when Beam fails; InputError when a file has changed."""
        tasks = self._tasks()
        exchange, shards = self._exchange.for_workers(), tuple(self._plan.shards)

        def build(pipeline: Any) -> None:
            import apache_beam as beam

            parse = beam.FlatMap(partial(parts.parse, exchange=exchange, form=self._form))
            write = beam.Map(WriteShard(exchange, self._form, shards))
            rows = _spread(pipeline, tasks) | "Parse" >> parse.with_output_types(tuple[int, bytes])
            _ = rows | "Gather by shard" >> beam.GroupByKey() | "Write shards" >> write

        self._check_unchanged()
        names = [task.name for task in tasks]
        names += [parts.result_name(number) for number in range(len(shards))]
        run_pipeline(
            self._options,
            build,
            title="Parsing chosen reads on Beam",
            results=(self._exchange, names),
        )
        for task in tasks:
            yield from findings(self._exchange, task.name)
        self._check_unchanged()

    def write(self, directory: Path) -> list[WrittenShard]:
        """Brings the shards home. Raises: StageFailedError when one isn't what was written."""
        written = []
        with log.progress("Fetching shards", total=len(self._plan.rows), unit="reads") as bar:
            for number in range(len(self._plan.shards)):
                (shard,) = findings(self._exchange, parts.result_name(number))
                path = directory / Path(shard.name).name
                self._exchange.fetch(shard.name, path)
                if files.sha256_file(path) != shard.file.sha256:
                    raise StageFailedError(
                        f"{path}: isn't what a Beam worker wrote. Is {self._exchange.here} on a "
                        "file system that all machines see alike?"
                    )
                written.append(shard)
                bar.advance(shard.shard.num_examples)
        self._exchange.remove()
        return written

    def _tasks(self) -> list[ParseRows]:
        """A task for each part of a plain file; one for all of a compressed file, which can only
        be read from its start. Leaves the rows in the exchange."""
        tasks: list[ParseRows] = []
        rows = self._plan.rows
        for number, group in itertools.groupby(rows.parts(), file_of_segment):
            text, names = worker_file(self._sources[number], self._options), []
            for part in group:
                names.append(f"rows-{part}")
                with self._exchange.put(names[-1]) as stream:
                    stream.write(rows.read(part).tobytes())
            together = (
                [tuple(names)]
                if is_gzip(self._sources[number].path)
                else [(name,) for name in names]
            )
            tasks += [ParseRows(f"parsed-{each[0]}", text, each) for each in together]
        return tasks

    def _check_unchanged(self) -> None:
        for source in self._sources:
            source.check_unchanged()


def worker_file(source: Source, options: BeamOptions) -> WorkerFile:
    return WorkerFile(options.for_workers(source.path), str(source.path), source.size)


def _exchange(options: BeamOptions, scratch: Path) -> Exchange:
    if options.exchange_dir is None:
        folder = (scratch / "beam").absolute()
        return Exchange(str(folder), options.for_workers(folder))
    # A folder for this output directory of this machine, cleared of what a killed run left; its
    # workers may still be at work, so the name within is new.
    owner = hashlib.sha256(f"{socket.gethostname()}:{scratch.parent.absolute()}".encode())
    root = f"{options.exchange_dir.rstrip('/')}/capfinder-{owner.hexdigest()[:16]}"
    Exchange(root, root).remove()
    new = f"{root}/{uuid.uuid4().hex}"
    return Exchange(new, new)


def _blocks(
    exchange: Exchange, number: int, ranges: Sequence[ScanRange], facts: FileFacts
) -> Iterator[tuple[int, ScannedBlock]]:
    lines = 0
    for each in ranges:
        for finding in findings(exchange, each.name):
            if isinstance(finding, RangeEnd):
                lines += finding.lines
                facts.sha256 = finding.sha256 or facts.sha256
            else:
                yield number, scanning.shift(finding, lines)
    if not facts.sha256:
        (facts.sha256,) = findings(exchange, f"digest-{number}")


def _spread(pipeline: Any, tasks: Sequence[Any]) -> Any:
    """The tasks, each for whichever worker is free."""
    import apache_beam as beam

    return pipeline | beam.Create(tasks, reshuffle=False) | beam.Reshuffle()


def run_pipeline(
    options: BeamOptions,
    build: Callable[[Any], object],
    *,
    title: str,
    results: tuple[Exchange, Sequence[str]],
) -> None:
    """Runs the pipeline that `build` adds to, and waits for it, with a bar that moves as results
    (names in an exchange) appear.

    Raises: StageFailedError when Beam fails."""
    exchange, names = results
    log.logger.info("%s: %d tasks, %s", title, len(names), options.runner)
    exchange.set_open()
    run = _Run(options, build)
    try:
        with log.progress(title, total=len(names), unit="tasks") as bar:
            waiting = list(names)
            while not run.is_over.wait(POLL_SECONDS):
                looked_for, rest = waiting[:POLL_TASKS], waiting[POLL_TASKS:]
                missing = [name for name in looked_for if not exchange.has(name)]
                bar.advance(len(looked_for) - len(missing))
                waiting = missing + rest
    except KeyboardInterrupt:
        exchange.remove()
        run.cancel()
        raise
    if run.error is not None:
        lines = str(run.error).strip().splitlines() or [type(run.error).__name__]
        log.file_only(logging.ERROR, str(run.error))
        raise StageFailedError(f"{title}: {options.runner} failed: {lines[-1]}") from run.error
    if str(run.state) not in ("DONE", "None"):
        raise StageFailedError(f"{title}: {options.runner} ended in state {run.state}")


class _Run(threading.Thread):
    """A pipeline that has been started. In a thread of its own, since some runners do the work in
    the thread that starts them, and take a Ctrl-C that reaches it for a failure of the work."""

    def __init__(self, options: BeamOptions, build: Callable[[Any], object]) -> None:
        super().__init__(daemon=True, name="beam")
        self._options, self._build = options, build
        self._result: Any = None
        self.state: Any = None
        self.error: Exception | None = None
        # Not join(): after a Ctrl-C in it Python 3.11 takes the thread for one that has ended.
        self.is_over = threading.Event()
        self.start()

    def run(self) -> None:
        import apache_beam as beam

        try:
            pipeline = beam.Pipeline(options=self._options.pipeline_options())
            self._build(pipeline)
            self._result = pipeline.run()
            self.state = self._result.wait_until_finish()
        except Exception as error:
            self.error = error
        finally:
            self.is_over.set()

    def cancel(self) -> None:
        """Ends the job where the runner can; where it can't, workers find the exchange closed."""
        with contextlib.suppress(Exception):
            if self._result is not None:
                self._result.cancel()
        self.is_over.wait(CANCEL_SECONDS)
