"""The whole ETL stage on small spoiled input, against what the slow reader says must come of it."""

import csv
import dataclasses
import gzip
import random
import shutil
import tempfile
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import etl_compare
import etl_reference
from etl_compare import Tally, must
from etl_mutations import HEADER, lines_of, mutated, some_rows
from etl_records import read_examples
from etl_reference import Row
from ml_collections import ConfigDict

from capfinder import settings
from capfinder.errors import InputError
from capfinder.stages import etl

NUM_CLASSES = 2
FEWEST_READS = 3  # of a class, for one in each split with the fractions below
# In output_dir/dataset; what comes after the stage takes .unpublished away.
KEPT = {".lock", ".unpublished", "cap_data", "sources.json", "cache"}
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class StageCase:
    """The files of one run and the settings that decide what comes of them."""

    files: dict[str, bytes]
    dtype: str
    target_length: int
    max_reject_fraction: float
    keep_all: bool
    by_parent: bool

    def check(self, scratch: Path) -> Tally:
        """Raises: Mismatch, or what a bug raises."""
        directory = scratch / "stage"
        shutil.rmtree(directory, ignore_errors=True)
        (directory / "caps").mkdir(parents=True)
        (directory / "tmp").mkdir()
        for name, content in self.files.items():
            (directory / "caps" / name).write_bytes(content)
        outlook = look_ahead(self)
        earlier, tempfile.tempdir = tempfile.tempdir, str(directory / "tmp")
        try:
            result = etl.run(self.config(directory))
        except InputError as error:
            must("\n" not in str(error), "more than one line", error)
            must(outlook.error or outlook.may_fail, "refused without a cause", error)
            tally = Tally(errors=Counter([outlook.error or "open to choice"]))
        else:
            must(not outlook.error, "taken in spite of", outlook.error)
            tally = _compare_dataset(self, outlook, result.dataset.directory)
        finally:
            tempfile.tempdir = earlier
        _look_for_debris(directory, has_version=not tally.errors)
        return tally

    def config(self, directory: Path) -> ConfigDict:
        values = {
            "etl_params.caps_data_dir": str(directory / "caps"),
            "etl_params.examples_per_class": None,
            "etl_params.max_reject_fraction": self.max_reject_fraction,
            "shared_params.output_dir": str(directory / "out"),
            "shared_params.num_classes": NUM_CLASSES,
            "shared_params.target_length": self.target_length,
            "shared_params.dtype": self.dtype,
            "shared_params.train_test_fraction": 0.7,
            "shared_params.train_val_fraction": 0.5,
            "split_params.keep_all": self.keep_all,
            "split_params.group_by": "parent_read" if self.by_parent else "read",
        }
        return settings.checked(settings.default_config(), values)

    def as_json(self) -> dict[str, Any]:
        files = {name: content.decode("latin-1") for name, content in self.files.items()}
        return {**dataclasses.asdict(self), "files": files}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "StageCase":
        files = {name: text.encode("latin-1") for name, text in values["files"].items()}
        return cls(**{**values, "files": files})


@dataclass(frozen=True)
class Outlook:
    """What must come of a case. `error`: why it must be refused; `may_fail`: it may be, by what
    the definition leaves open. sure, possible: read_id -> its good rows, when it must, or may,
    be used; bad: (file, line) that must be among the rejects; rows: of all files."""

    error: str
    may_fail: bool
    sure: dict[str, list[Row]]
    possible: dict[str, list[Row]]
    bad: set[tuple[str, int]]
    rows: int


def make_stage_case(seed: int, number: int, rows: Sequence[bytes]) -> StageCase:
    """Two classes in two to four files, most of them spoiled; equal arguments give equal cases."""
    rng = random.Random(f"{seed} stage {number}")
    files: dict[str, bytes] = {}
    ids: list[str] = []
    for cap_class in range(NUM_CLASSES):
        for run in range(rng.choice([1, 1, 2])):
            lines = []
            for line in some_rows(rng, rows, count=rng.randint(3, 12)):
                read_id = str(uuid.UUID(bytes=rng.randbytes(16)))
                if ids and rng.random() < 0.03:
                    read_id = rng.choice(ids)
                ids.append(read_id)
                lines.append(f'{read_id},{cap_class},"'.encode() + line.partition(b',"')[2])
            text = lines_of(rng, lines)
            if rng.random() < 0.7:
                text = mutated(rng, text)
            name, content = f"data__{cap_class}_{run}.csv", HEADER + b"\n" + text
            if rng.random() < 0.3:
                name, content = f"{name}.gz", gzip.compress(content, 1)
                if rng.random() < 0.1:
                    content = mutated(rng, content)
            files[name] = content
    by_parent = rng.random() < 0.15
    if by_parent:
        pairs = [f"{read_id},parent{rng.randrange(12)}".encode() for read_id in ids]
        text = b"\n".join([b"read_id,parent_read_id", *pairs, b""])
        files["metadata__all.csv"] = mutated(rng, text)
    return StageCase(
        files,
        rng.choice(["float16", "float32", "float64"]),
        rng.choice([16, 33, 100]),
        rng.choice([0.01, 0.3, 1.0, 1.0, 1.0]),
        rng.random() < 0.7,
        by_parent,
    )


def _look_for_debris(directory: Path, *, has_version: bool) -> None:
    must(not list((directory / "tmp").iterdir()), "left in the system's temporary directory")
    dataset = directory / "out" / "dataset"
    left = [path.name for path in dataset.rglob("*") if path.name.startswith(".partial-")]
    must(not left, "left behind", left)
    names = {path.name for path in dataset.iterdir()} if dataset.exists() else set()
    must(names <= KEPT, "left behind", names - KEPT)
    versions = [path.name for path in (dataset / "cap_data").glob("*")]
    must(versions == (["1.0.0"] if has_version else []), "versions", versions)


def _read_files(case: StageCase) -> Iterator[tuple[str, list[Row] | None]]:
    """Name and rows of each file; None: it can't be unpacked or has another header."""
    for name, stored in sorted(case.files.items()):
        if name.startswith("metadata__"):
            continue
        content = etl_compare.unpacked(stored) if name.endswith(".gz") else stored
        header, _, text = (content or b"").partition(b"\n")
        is_header = header.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\r") == HEADER
        rows = etl_reference.read_rows(text, first_line=2, dtype=case.dtype)
        yield name, rows if is_header else None


def look_ahead(case: StageCase) -> Outlook:
    error, by_id, classes, bad = "", defaultdict(list), set(), set()
    sizes, certain, uncertain = Counter[str](), Counter[str](), Counter[str]()
    for name, rows in _read_files(case):
        passed = [row for row in rows or () if not row.reasons or row.only_parsing_shows]
        if not passed:
            error = "a file without a good row" if rows is not None else "a file that can't be read"
            continue
        of_file = passed[0].cap_class
        classes.add(of_file)
        sizes[name] = len(rows or ())
        good = [row for row in passed if row.cap_class == of_file]
        for row in good:
            by_id[row.read_id].append((name, row))
        lines = {row.line for row in rows or ()} - {row.line for row in good}
        bad |= {(name, line) for line in lines}
        certain[name] += len(lines)
        uncertain[name] += sum(row.only_parsing_shows for row in good)
    sure, possible = {}, {}
    for read_id, found in by_id.items():
        if len({row.cap_class for _, row in found}) > 1:
            bad |= {(name, row.line) for name, row in found}
            certain.update(name for name, _ in found)
            continue
        copies = Counter(name for name, _ in found)
        for name, count in copies.items():
            certain[name] += count - 1
            uncertain[name] += len(copies) > 1
        usable = [row for _, row in found if not row.reasons]
        if usable:
            possible[read_id] = usable
        if len(usable) == len(found):
            sure[read_id] = usable
    if not error and classes != set(range(NUM_CLASSES)):
        error = "other classes"
    limit = Fraction(repr(case.max_reject_fraction))
    if not error and any(certain[name] > limit * sizes[name] for name in sizes):
        error = "too many rejects"
    may_fail = any(certain[name] + uncertain[name] > limit * sizes[name] for name in sizes)
    fewest, most = _smallest_class(sure), _smallest_class(possible)
    if not error and most < FEWEST_READS:
        error = "too few reads"
    may_fail = may_fail or fewest < FEWEST_READS or case.by_parent
    return Outlook(error, may_fail, sure, possible, bad, sum(sizes.values()))


def _smallest_class(reads: dict[str, list[Row]]) -> int:
    sizes = Counter(rows[0].cap_class for rows in reads.values())
    return min(sizes[cap_class] for cap_class in range(NUM_CLASSES))


def _compare_dataset(case: StageCase, outlook: Outlook, version: Path) -> Tally:
    stored = Counter[int]()
    seen: set[str] = set()
    for split in SPLITS:
        for path in sorted(version.glob(f"cap_data-{split}.tfrecord-*")):
            for example in read_examples(path):
                read_id = example["read_id"].decode()  # type: ignore[union-attr]
                must(read_id not in seen, "a read twice", read_id)
                must(read_id in outlook.possible, "a read that can't be used", read_id)
                seen.add(read_id)
                stored[_stored_class(case, outlook.possible[read_id], example)] += 1
    if case.keep_all:
        must(seen >= outlook.sure.keys(), "reads lost", outlook.sure.keys() - seen)
    else:
        fewest, most = _smallest_class(outlook.sure), _smallest_class(outlook.possible)
        counts = [stored[cap_class] for cap_class in range(NUM_CLASSES)]
        must(fewest <= counts[0] <= most and counts[0] == counts[1], "counts", counts, fewest, most)
    with (version / "rejects.csv").open(encoding="utf-8", newline="") as stream:
        rejects = [(row["file"], int(row["line"]), row["reason"]) for row in csv.DictReader(stream)]
    places = [(name, line) for name, line, _ in rejects]
    must(len(set(places)) == len(places), "a reject twice", places)
    must(outlook.bad <= set(places), "rejects lost", outlook.bad - set(places))
    if case.keep_all:
        must(len(places) + len(seen) == outlook.rows, "rows lost", places, seen, outlook.rows)
    return Tally(len(seen), Counter(reason for *_, reason in rejects))


def _stored_class(case: StageCase, rows: list[Row], example: dict[str, object]) -> int:
    """The class of a stored read, which must be one of `rows`, value for value."""
    found = (example["cap_class"], example["length"], example["signal"])
    wanted = [
        (
            row.cap_class,
            len(row.numbers),
            etl_reference.fitted(row.numbers, case.target_length, case.dtype).tobytes(),
        )
        for row in rows
    ]
    must(found in wanted, "stored values", found, wanted)
    return rows[0].cap_class
