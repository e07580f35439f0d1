"""`capfinder inspect` on datasets of real shards: what it prints, draws and finds wrong."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from html_page import Page

from capfinder import files, log
from capfinder.data import records
from capfinder.data.records import SPLITS
from capfinder.errors import InputError, SettingsError
from capfinder.etl import hashing
from capfinder.etl.quality import RunStatistics
from capfinder.inspection import command, integrity, plot

CLASSES, TARGET_LENGTH = 3, 60
READS = {"train": 10, "validation": 4, "test": 3}  # of each class; class 2 has 2 in train
NASTY = '<script>alert("$x$&")</script>--><b>$\\frac{'


def reads_of(split: str, cap_class: int) -> list[tuple[bytes, int, np.ndarray]]:
    """read_id, length and the whole signal of each read; lengths on both sides of the target's."""
    count = 2 if (split, cap_class) == ("train", 2) else READS[split]
    rng = np.random.default_rng([SPLITS.index(split), cap_class])
    lengths = rng.integers(20, 90, count)
    return [
        (f"{split}-{cap_class}-{i}".encode(), int(n), rng.normal(1, 1, n))
        for i, n in enumerate(lengths)
    ]


def stored(signal: np.ndarray) -> np.ndarray:
    """(length,) -> (TARGET_LENGTH,): the centre, or zeros round it, the odd one on the right."""
    surplus = max(signal.size - TARGET_LENGTH, 0)
    kept = signal[surplus // 2 :][:TARGET_LENGTH]
    left = (TARGET_LENGTH - kept.size) // 2
    return np.pad(kept, (left, TARGET_LENGTH - kept.size - left))


def write_split(directory: Path, split: str, reads: list, num_shards: int = 2) -> list[dict]:
    """Shards of (cap_class, (read_id, length, signal)); their entries for the manifest."""
    entries = []
    for number, part in enumerate(reads[i::num_shards] for i in range(num_shards)):
        name = records.shard_name(split, number, num_shards)
        written = records.write_shard(
            directory / name,
            signals=np.array([stored(signal) for _, (_, _, signal) in part], np.float16),
            cap_classes=np.array([cap_class for cap_class, _ in part]),
            read_ids=np.array([read_id for _, (read_id, _, _) in part]),
            lengths=np.array([length for _, (_, length, _) in part]),
        )
        entries.append({"name": name, "sha256": written.sha256, "num_examples": len(part)})
    return entries


def write_dataset(directory: Path, *, version: str = "1.0.0", word: str = "data") -> Path:
    """A version as the ETL leaves it; `word` stands where a file's name or a reason may stand."""
    directory.mkdir(parents=True)
    counts, shards, statistics = {}, [], RunStatistics(CLASSES)
    for split in SPLITS:
        of_class = [reads_of(split, cap_class) for cap_class in range(CLASSES)]
        counts[split] = {str(label): len(reads) for label, reads in enumerate(of_class)}
        mixed = [
            (label, reads[place])
            for place in range(max(map(len, of_class)))
            for label, reads in enumerate(of_class)
            if place < len(reads)
        ]
        shards += write_split(directory, split, mixed)
        for label, reads in enumerate(of_class):
            lengths = np.array([length for _, length, _ in reads], np.int32)
            statistics.add_lengths(label, lengths)
            statistics.add_signals(
                np.full(len(reads), label),
                lengths,
                np.array([signal.sum() for _, _, signal in reads]),
                np.array([(signal**2).sum() for _, _, signal in reads]),
            )
    of_shards = {
        split: [shard for shard in shards if f"-{split}." in shard["name"]] for split in SPLITS
    }
    records.write_metadata(
        directory,
        version=version,
        target_length=TARGET_LENGTH,
        dtype="float16",
        shard_lengths={s: [e["num_examples"] for e in of_shards[s]] for s in SPLITS},
        shard_bytes={
            s: [(directory / e["name"]).stat().st_size for e in of_shards[s]] for s in SPLITS
        },
    )
    (directory / "rejects.csv").write_text("file,line,read_id,reason\n")
    sources = [
        {"file": f"{word}_{label}.csv", "size": 2_345_678, "sha256": f"{label}a" * 32}
        | {"run": f"{label}b" * 16, "cap_class": label + 5, "dataset_class": label}
        | {"is_test": False, "rows": 1003 + label, "good": 1000}
        for label in range(CLASSES)
    ]
    manifest = {
        "version": version,
        "fingerprint": "f00d" * 16,
        "created": "2026-11-24T10:00:00+00:00",
        "code_version": "1.2.3",
        "settings": {"class_map": {"5": 0, "6": 1, "7": 2}, "group_by": "read", "seed": 42},
        "hash": hashing.HASH,
        "num_classes": CLASSES,
        "target_length": TARGET_LENGTH,
        "dtype": "float16",
        "sources": sources,
        "counts": counts,
        "rejects": {f"not a number {word}": 1234},
        "quality": statistics.rows(sources),
        "shards": shards,
        "warnings": [f"The input is odd {word}"],
    }
    files.write_json(directory / "manifest.json", manifest)
    return directory


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("original") / "1.0.0")


@pytest.fixture
def dataset(original, tmp_path):
    """A copy to be damaged."""
    directory = tmp_path / "dataset" / "cap_data" / "1.0.0"
    shutil.copytree(original, directory)
    return directory


@pytest.fixture(autouse=True)
def mapping(tmp_path, monkeypatch):
    """Names of the caps as in the files: 5, 6 and 7."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / "home" / ".capfinder" / "custom_mapping.json"
    files.write_json(path, {"5": "cap_five", "6": "cap_six", "7": "cap_seven"})
    return path


@pytest.fixture
def inspect(capsys):
    """Runs the command; returns what it printed, and the error it ended with, if any."""

    def run(path: Path, *, output: Path | None = None, verify: bool = False):
        log.start(None)
        error = None
        try:
            command.run(path, output=output, verify=verify)
        except InputError as raised:
            error = str(raised)
        finally:
            log.stop()
        return capsys.readouterr().out, error

    return run


def cells(printed: str) -> list[list[str]]:
    """The rows of all tables printed."""
    lines = [line for line in printed.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_counts_sources_rejects_quality_and_settings_are_printed(original, inspect):
    printed, error = inspect(original)
    assert error is None
    shown, digests = cells(printed), ("1b" * 6, "1a" * 6)
    for row in (
        ["0", "cap_five", "10", "4", "3", "17"],
        ["2", "cap_seven", "2", "4", "3", "9"],
        ["", "all", "22", "12", "9", "43"],
        ["data_1.csv", "cap_six", "6", "all splits", "2.3 MB", "1,004", "1,000", *digests],
        ["not a number data", "1,234"],
        ["group_by", '"read"'],
    ):
        assert row in shown
    for word in ("1.0.0", "f00d" * 16, "2026-11-24T10:00:00", "capfinder 1.2.3", "60 samples"):
        assert word in printed
    assert "Warning: The input is odd data" in printed
    assert "--output" in printed
    signals = [read[2] for split in SPLITS for read in reads_of(split, 2)]
    mean = np.mean([signal.mean() for signal in signals])
    (figures,) = (row for row in shown if row[0] == "data_2.csv" and f"{mean:.3f}" in row)
    assert figures[1:5] == ["cap_seven", "1,005", "1,000", "9"]


def test_shard_sizes_are_those_on_disk(original, inspect):
    printed, _ = inspect(original)
    sizes = [path.stat().st_size for path in original.glob("*-train.tfrecord-*")]
    (row,) = (row for row in cells(printed) if row[0] == "train")
    assert row[:4] == ["train", "2", "2", "22"]
    assert row[4] == f"{sum(sizes) / 1000:.1f} kB"


def test_a_run_directory_leads_to_the_version_its_run_used(dataset, inspect, tmp_path):
    write_dataset(dataset.parent / "1.10.0", version="1.10.0")
    newest, error = inspect(tmp_path)
    assert error is None and "1.10.0 (the newest version" in newest and "older: 1.0.0" in newest
    files.write_json(tmp_path / "run.json", {"dataset": {"directory": "dataset/cap_data/1.0.0"}})
    assert "1.0.0 (the version that the last run used" in inspect(tmp_path)[0]
    for path in (dataset.parent, dataset.parent.parent):
        assert "1.10.0 (the newest version" in inspect(path)[0]
    assert "(the version given)" in inspect(dataset)[0]


@pytest.mark.parametrize("content", [{}, {"dataset": None}, {"dataset": {"directory": "gone"}}, []])
def test_a_run_without_a_dataset_of_its_own_leads_to_the_newest(content, dataset, tmp_path):
    files.write_json(tmp_path / "run.json", content)
    assert command.find(tmp_path)[0] == dataset


def test_a_path_without_a_dataset_is_an_error_that_says_what_to_give(tmp_path):
    (tmp_path / "file").touch()
    for path, said in (("none", "no such"), ("file", "not a dir"), ("home", "output directory")):
        with pytest.raises(InputError, match=said):
            command.find(tmp_path / path)


def test_nothing_in_the_dataset_changes(dataset, inspect, tmp_path):
    def state():
        return {path: path.read_bytes() for path in sorted(dataset.iterdir())}

    before = state()
    inspect(dataset, verify=True)
    inspect(dataset, output=tmp_path / "a.html")
    assert state() == before


def test_examples_are_the_first_reads_of_each_class_without_padding(original):
    manifest = files.read_json(original / "manifest.json")
    examples = plot.read_examples(original, manifest["counts"]["train"])
    assert [len(of_class) for of_class in examples.values()] == [4, 4, 2]
    blocks = list(records.read_blocks(original, "train"))
    in_order = [read_id for block in blocks for read_id in block.read_ids.tolist()]
    for cap_class, of_class in examples.items():
        known = {read_id: (n, signal) for read_id, n, signal in reads_of("train", cap_class)}
        assert [each.read_id.encode() for each in of_class] == [
            read_id for read_id in in_order if read_id in known
        ][: len(of_class)]
        for each in of_class:
            length, signal = known[each.read_id.encode()]
            assert each.length == length
            surplus = max(length - TARGET_LENGTH, 0)
            kept = signal[surplus // 2 :][:TARGET_LENGTH].astype(np.float16)
            np.testing.assert_array_equal(each.signal, kept.astype(np.float64))


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def test_the_png_shows_each_class_in_a_row_of_its_own(original, inspect, tmp_path):
    path = tmp_path / "new" / "a.png"
    _, error = inspect(original, output=path)
    assert error is None
    picture = matplotlib.image.imread(path)[..., :3]
    heights = []
    for colour in plot.COLOURS[:CLASSES]:
        is_ours = (np.abs(picture - rgb(colour)) < 0.02).all(axis=2)
        rows, columns = np.nonzero(is_ours)
        heights.append((rows.min(), rows.max(), columns.max() / picture.shape[1]))
    assert heights[0][1] < heights[1][0] and heights[1][1] < heights[2][0]
    assert heights[0][2] > 0.75 and heights[1][2] > 0.75 > 0.6 > heights[2][2]  # 4, 4, 2 reads
    assert [path.name for path in path.parent.iterdir()] == ["a.png"]


def test_a_class_in_picoamperes_leaves_the_others_their_scale(tmp_path):
    rng = np.random.default_rng(0)

    def height(factor: float) -> int:
        """Pixels that the first class's traces reach over, the second one's values times factor."""
        examples = {
            label: [plot.Example("a", 50, rng.uniform(-2, 2, 50) * (factor if label == 1 else 1))]
            for label in range(CLASSES)
        }
        plot.write_png(tmp_path / "a.png", examples, ["a", "b", "c"])
        picture = matplotlib.image.imread(tmp_path / "a.png")[..., :3]
        rows = np.nonzero((np.abs(picture - rgb(plot.COLOURS[0])) < 0.02).all(axis=2))[0]
        return int(rows.max() - rows.min())

    assert height(40.0) == pytest.approx(height(1.0), rel=0.1)


@pytest.mark.parametrize("suffix", [".png", ".html"])
def test_equal_input_gives_equal_bytes_whatever_matplotlibrc_says(
    suffix, original, inspect, tmp_path, monkeypatch
):
    inspect(original, output=tmp_path / f"one{suffix}")
    monkeypatch.setitem(matplotlib.rcParams, "lines.antialiased", False)
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "red")
    inspect(original, output=tmp_path / f"two{suffix}")
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()
    assert matplotlib.rcParams["axes.facecolor"] == "red"


def test_the_drawing_library_is_loaded_only_to_draw():
    code = (
        "import sys, capfinder.inspection.command;"
        "print([m for m in ('matplotlib', 'tensorflow', 'jax') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_the_page_holds_the_tables_and_the_drawing_and_asks_for_nothing(
    original, inspect, tmp_path
):
    inspect(original, output=tmp_path / "a.html")
    html = (tmp_path / "a.html").read_text("utf-8")
    page = Page(html)
    for said in (
        "cap_seven",
        "1,234",
        "The input is odd data",
        "data_1.csv",
        "2.3 MB",
        "group_by",
    ):
        assert said in page.text
    assert page.tags.count("svg") == 1
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    for name, value in page.attributes:
        if name in ("href", "src", "xlink:href"):
            assert value.startswith("#")
    assert not re.search("https?:|@import", html)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_everything_from_disk_is_escaped(tmp_path, mapping, inspect):
    files.write_json(mapping, {"5": NASTY, "6": "--><b>\n\0$_{", "7": "帽子"})
    dataset = write_dataset(tmp_path / "1.0.0", word=NASTY.replace("/", "\N{FRACTION SLASH}"))
    printed, error = inspect(dataset, output=tmp_path / "a.html")
    assert error is None and NASTY in printed
    html = (tmp_path / "a.html").read_text("utf-8")
    assert "<script" not in html and "script" not in Page(html).tags
    assert html.count("&lt;script&gt;") > 5
    assert inspect(dataset, output=tmp_path / "a.png")[1] is None


def test_verify_finds_a_whole_dataset_whole(dataset, inspect):
    printed, error = inspect(dataset, verify=True)
    assert error is None and "Verified" in printed and "Wrong" not in printed
    assert "Verified" not in inspect(dataset)[0]


def replace_manifest(dataset: Path, **changes: object) -> None:
    manifest = files.read_json(dataset / "manifest.json")
    files.write_json(dataset / "manifest.json", manifest | changes)


def test_a_changed_byte_is_found_by_verify(dataset, inspect):
    name = records.shard_name("validation", 1, 2)
    content = bytearray((dataset / name).read_bytes())
    content[len(content) // 2] ^= 1
    (dataset / name).write_bytes(content)
    assert inspect(dataset)[1] is None
    printed, error = inspect(dataset, verify=True)
    assert name in error and "SHA-256" in error
    assert "Verified" not in printed and "record" in printed


def test_records_exchanged_for_other_whole_ones_are_found(dataset, inspect):
    """Checksums within the shard are right: only the manifest's tell."""
    write_split(dataset, "test", [(0, reads_of("test", 0)[0]), (0, reads_of("test", 0)[1])])
    printed, error = inspect(dataset, verify=True)
    assert "SHA-256" in error
    assert "test: holds 2 reads of class 0, the manifest says 3" in printed
    assert "test: holds 0 reads of class 2, the manifest says 3" in printed


def rewrite_test_split(dataset: Path, reads: list) -> None:
    """Other test reads, with a manifest that fits them."""
    entries = write_split(dataset, "test", reads)
    manifest = files.read_json(dataset / "manifest.json")
    others = [entry for entry in manifest["shards"] if "-test." not in entry["name"]]
    labels = [cap_class for cap_class, _ in reads]
    counts = {str(label): labels.count(label) for label in range(CLASSES)}
    replace_manifest(dataset, shards=others + entries, counts=manifest["counts"] | {"test": counts})


def test_a_read_in_two_splits_is_found_by_name(dataset, inspect):
    leaked = (1, reads_of("train", 1)[3])
    rewrite_test_split(dataset, [(0, reads_of("test", 0)[0]), leaked])
    printed, error = inspect(dataset, verify=True)
    assert "1 read_ids are more than once" in error and "train-1-3 in train and test" in error
    assert printed.count("Wrong:") == 1


def test_a_read_twice_in_one_split_is_found_too(dataset, inspect):
    twice = (1, reads_of("test", 1)[0])
    rewrite_test_split(dataset, [twice, (0, reads_of("test", 0)[0]), twice])
    assert "test-1-0 in test, twice" in inspect(dataset, verify=True)[1]


def test_two_read_ids_of_one_hash_are_no_leak(original):
    ids = np.array([reads_of("train", 0)[0][0]])
    word = hashing.keyed_hash(ids, seed=0)[:, hashing.IDENTITY]
    assert integrity._repeated_reads(original, {"train": word, "test": word}) == []


def test_missing_and_strange_files_are_found_without_reading(dataset, inspect):
    missing, strange = records.shard_name("train", 1, 2), records.shard_name("train", 7, 9)
    (dataset / missing).rename(dataset / strange)
    printed, error = inspect(dataset)
    assert missing in error and "1 more" in error
    assert f"{strange} not in the manifest" in printed
    (row,) = (row for row in cells(printed) if row[0] == "train")
    assert row[1:4] == ["2", "1", "22"]


def test_a_page_is_written_even_when_no_signal_can_be_read(dataset, inspect, tmp_path):
    (dataset / records.shard_name("train", 0, 2)).unlink()
    printed, error = inspect(dataset, output=tmp_path / "a.html", verify=True)
    assert "missing" in error and printed.count("Wrong:") == 1
    page = Page((tmp_path / "a.html").read_text("utf-8"))
    assert "Not there:" in page.text and "svg" not in page.tags
    assert "Wrong with its files" in page.text
    assert inspect(dataset, output=tmp_path / "a.png")[1] and not (tmp_path / "a.png").exists()


def test_an_output_of_another_kind_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(SettingsError, match=r"a\.pdf: .*\.html or \.png"):
        command.run(tmp_path / "none", output=tmp_path / "a.pdf", verify=False)


@pytest.mark.parametrize("suffix", [".png", ".html"])
def test_an_output_that_cannot_be_written_is_one_line(suffix, original, inspect, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / f"directory{suffix}").mkdir()
    for name in (f"file/a{suffix}", f"directory{suffix}"):
        _, error = inspect(original, output=tmp_path / name)
        assert "--output" in error and name in error and "\n" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"directory{suffix}",
        "file",
        "home",
    ]


def test_any_key_of_the_manifest_may_be_absent_or_of_another_kind(dataset, inspect):
    whole = json.loads((dataset / "manifest.json").read_text())
    for key in whole:
        for changed in (
            {name: value for name, value in whole.items() if name != key},
            whole | {key: 7},
        ):
            files.write_json(dataset / "manifest.json", changed)
            _, error = inspect(dataset)
            assert error is None or "manifest" in error
    (dataset / "manifest.json").write_text("{ broken")
    assert "not valid JSON" in inspect(dataset)[1]


def test_versions_before_quality_control_are_shown_without_it(dataset, inspect):
    manifest = files.read_json(dataset / "manifest.json")
    del manifest["quality"]
    files.write_json(dataset / "manifest.json", manifest)
    printed, error = inspect(dataset)
    assert error is None and "Quality control" not in printed


def test_a_test_directory_is_told_from_the_training_files(dataset, inspect):
    manifest = files.read_json(dataset / "manifest.json")
    manifest["sources"][2]["is_test"] = True
    files.write_json(dataset / "manifest.json", manifest)
    uses = [row[3] for row in cells(inspect(dataset)[0]) if len(row) == 9 and "MB" in row[4]]
    assert uses == ["train, validation", "train, validation", "test"]
