"""Hand-made CSV files that make the ETL do all it can do: packed files, bad rows, duplicates,
classes in conflict, reads that only pass two finds broken, parent reads."""

import gzip
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HEADER = "read_id,cap_class,timeseries"
ID_BYTES, NUMBER_BYTES = 42, 11.5  # of a row, about
FILES = (
    (0, "data__cap_0_run1.csv"),
    (0, "data__cap_0_run2.csv.gz"),
    (1, "data__cap_1_run1.csv"),
    (1, "data__cap_1_run2.csv"),
)
Row = tuple[str, int, str]  # read_id, cap_class, the signal's text


def _broken_number(row: Row, _: Row) -> str:
    """Only bytes that numbers have: pass two is the first to see it."""
    return f'{row[0]},{row[1]},"1.5,1.2.3,{row[2]}"'


def _duplicate(row: Row, earlier: Row) -> str:
    return f'{earlier[0]},{row[1]},"{row[2]}"'


def _bad_bytes(row: Row, _: Row) -> str:
    return f'{row[0]},{row[1]},"0.5,x,{row[2]}"'


def _field_missing(row: Row, _: Row) -> str:
    return f"{row[0]},{row[1]}"


def _other_class(row: Row, _: Row) -> str:
    return f'{row[0]},{1 - row[1]},"{row[2]}"'


def _empty(row: Row, _: Row) -> str:
    return f'{row[0]},{row[1]},""'


DEFECTS: tuple[Callable[[Row, Row], str], ...] = (
    _broken_number,
    _duplicate,
    _bad_bytes,
    _broken_number,
    _field_missing,
    _other_class,
    _empty,
)


def write_caps(
    directory: Path, *, megabytes: float, samples: tuple[int, int], bad_fraction: float, seed: int
) -> None:
    """Two classes of two runs each in about `megabytes` of text, signals of `samples` (from, to);
    `bad_fraction` of a file's rows have a defect, and one read is in both classes."""
    rng = np.random.default_rng(seed)
    numbers = np.array([f"{value:.8f}" for value in rng.normal(size=20_000)])
    row_bytes = ID_BYTES + NUMBER_BYTES * sum(samples) / 2
    per_file = max(60, int(megabytes * 1e6 / row_bytes / len(FILES)))
    directory.mkdir(parents=True)
    parents = ["read_id,parent_read_id"]
    in_conflict = str(uuid.UUID(bytes=rng.bytes(16)))
    for cap_class, name in FILES:
        rows: list[Row] = []
        parent = ""
        for number in range(per_file):
            read_id = str(uuid.UUID(bytes=rng.bytes(16)))
            if name.endswith("run1.csv") and number == 0:
                read_id = in_conflict  # the metadata lists it twice, so it must stay in conflict
            if not parent or rng.random() < 0.4:
                parent = str(uuid.UUID(bytes=rng.bytes(16)))
            parents.append(f"{read_id},{parent}")
            drawn = rng.integers(len(numbers), size=rng.integers(*samples))
            rows.append((read_id, cap_class, ",".join(numbers[drawn])))
        lines = [f'{read_id},{label},"{text}"' for read_id, label, text in rows]
        bad = rng.choice(np.arange(2, per_file), size=int(bad_fraction * per_file), replace=False)
        for kind, at in enumerate(bad.tolist()):
            lines[at] = DEFECTS[kind % len(DEFECTS)](rows[at], rows[at - 1])
        text = "\r\n".join([HEADER, *lines, ""]).encode()
        (directory / name).write_bytes(gzip.compress(text, 1) if name.endswith(".gz") else text)
    (directory / "metadata__all.csv").write_text("\n".join([*parents, ""]))


@dataclass(frozen=True)
class Scenario:
    """One input with one command. `settings` {}: make-train-dataset and its own defaults; else the
    etl stage of train-model with these, and no Comet archive. size: of the input, beside others';
    turns: how often it is killed, beside others."""

    name: str
    bad_fraction: float
    settings: dict[str, dict[str, object]]
    samples: tuple[int, int] = (300, 701)
    size: float = 1.0
    turns: int = 2

    def arguments(self, caps: Path, output_dir: Path) -> list[str]:
        """What follows `python -m capfinder`; writes the settings beside `output_dir`."""
        if not self.settings:
            options = {"-c": caps, "-o": output_dir, "--num_classes": 2, "-d": "float32"}
            given = [str(part) for option in options.items() for part in option]
            return ["make-train-dataset", *given, "-e", "null"]
        values = {group: dict(of_group) for group, of_group in self.settings.items()}
        values["etl_params"]["caps_data_dir"] = str(caps)
        values["shared_params"] |= {"output_dir": str(output_dir), "num_classes": 2}
        values["tracking_params"] = {"mode": "off"}
        config = output_dir.with_suffix(".json")
        config.write_text(json.dumps(values))
        return ["train-model", "--config_file", str(config), "--stage", "etl"]


SCENARIOS = (
    Scenario("make-train-dataset", 0.008, {}),
    Scenario(
        "by parent read, many rejects",
        0.1,
        {
            "etl_params": {"max_reject_fraction": 0.25, "examples_per_class": None},
            "split_params": {"group_by": "parent_read"},
            "shared_params": {"dtype": "float16", "train_test_fraction": 0.8},
        },
    ),
    Scenario(
        "wide signals, several shards",
        0.03,
        {
            "etl_params": {"max_reject_fraction": 0.1, "examples_per_class": None},
            "split_params": {"keep_all": True},
            "shared_params": {"dtype": "float64", "target_length": 4000},
        },
    ),
    Scenario(
        "many short reads, spilled",
        0.03,
        {
            "etl_params": {"max_reject_fraction": 0.1, "examples_per_class": None},
            "split_params": {"group_by": "parent_read"},
            "shared_params": {"target_length": 16},
        },
        samples=(1, 5),
        size=1.8,  # so many identities that the ETL spills them at the 20 MB of a long run
        turns=1,
    ),
)
