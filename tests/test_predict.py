"""`capfinder predict`, the whole command, with a small model that the pipeline has trained."""

import gzip
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import predicting
import pytest
from csv_input import read_id, row, rows, write
from predicting import CLASSES, LENGTH, NAMES, Ended, predict, table, train, trained_run

from capfinder import files
from capfinder.etl import metadata as metadata_reader
from capfinder.evaluation import composition, metrics
from capfinder.stages import inference

TWO_DEVICES = "--xla_force_host_platform_device_count=2"


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with predicting.surroundings(tmp_path_factory) as root:
        yield root


@pytest.fixture(scope="module")
def caps(surroundings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory)[0]


@pytest.fixture(scope="module")
def run_dir(surroundings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory)[1]


@pytest.fixture(scope="module")
def predicted(run_dir: Path, caps: Path, surroundings: Path) -> Ended:
    ended = predict(run_dir, caps, surroundings / "predicted")
    assert ended.code == 0, ended.shown
    return ended


# What is predicted


def test_a_read_of_the_test_set_gets_the_very_line_of_the_evaluation(run_dir, predicted):
    known = (run_dir / "evaluation" / "predictions_test.csv").read_text("utf-8").splitlines()
    assert len(known) == 1 + CLASSES * 60
    assert known[0] == predicted.lines[0]
    assert set(known) < set(predicted.lines)


def test_every_read_has_its_row_in_the_order_of_the_files_and_their_lines(caps, predicted):
    expected = [
        tuple(line.split(",")[:2])
        for path in sorted(caps.iterdir())
        for line in path.read_text().splitlines()[1:]
    ]
    assert [(r["read_id"], r["cap_class"]) for r in predicted.rows] == expected
    assert len(expected) == CLASSES * 2 * 60


def test_the_predicted_class_is_the_likeliest_and_has_its_name(predicted):
    best = predicted.probabilities().argmax(axis=1)
    assert [int(r["predicted_cap_class"]) for r in predicted.rows] == best.tolist()
    assert {r["predicted_cap"] for r in predicted.rows} <= set(NAMES)
    np.testing.assert_allclose(predicted.probabilities().sum(axis=1), 1, atol=2e-6)


def test_names_are_the_users_and_those_of_the_classes_in_the_files(caps, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".capfinder").mkdir()
    mapping = tmp_path / ".capfinder" / "custom_mapping.json"
    mapping.write_text(json.dumps({"0": "a, b", "2": "deux"}))
    run = train(
        caps.parent,
        tmp_path / "run",
        etl_params={"class_map": {"2": 0, "0": 1}},
        shared_params={"num_classes": 2},
    )
    ended = predict(run, caps, tmp_path / "out")
    assert ended.code == 0, ended.shown
    names = {r["predicted_cap_class"]: r["predicted_cap"] for r in ended.rows}
    assert names.items() <= {"0": "deux", "1": "a, b"}.items() and names
    given = [path.name.split("_")[3] for path in sorted(caps.iterdir()) for _ in range(60)]
    own = {"0": "1", "1": "", "2": "0"}  # as the model numbers them; it doesn't know cap_1
    assert [r["cap_class"] for r in ended.rows] == [own[cap_class] for cap_class in given]
    assert "a, b" in ended.shown


def test_gzipped_files_give_the_same_and_others_in_the_directory_are_left_alone(
    run_dir, caps, predicted, tmp_path
):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for number, path in enumerate(sorted(caps.iterdir())):
        packed = gzip.compress(path.read_bytes())
        target = mixed / (f"{path.name}.gz" if number % 2 else path.name)
        target.write_bytes(packed if number % 2 else path.read_bytes())
    for name in ("metadata__cap_0.csv", ".hidden.csv", "notes.txt"):
        (mixed / name).write_text("no cap signals")
    ended = predict(run_dir, mixed, tmp_path / "out")
    assert ended.code == 0, ended.shown
    assert ended.lines == predicted.lines


def test_reads_without_a_label_or_with_that_of_an_unknown_cap_are_predicted_all_the_same(
    run_dir, predicted, tmp_path
):
    lines = rows(0, 0, 60)
    names = [line.split(",")[0] for line in lines]
    given = ["", "-99", '""', '"-99"', "7", '"1"']
    changed = [line.replace(",0,", f",{given[k % len(given)]},", 1) for k, line in enumerate(lines)]
    write(tmp_path / "caps" / "data.csv", changed)
    ended = predict(run_dir, tmp_path / "caps", tmp_path / "out")
    assert ended.code == 0, ended.shown
    shown = itertools.cycle(["", "-99", "", "-99", "7", "1"])
    assert [(r["read_id"], r["cap_class"]) for r in ended.rows] == list(
        zip(names, shown, strict=False)
    )
    labelled = {r["read_id"]: r for r in predicted.rows}
    assert all(labelled[r["read_id"]] | {"cap_class": ""} == r | {"cap_class": ""}
               for r in ended.rows)  # fmt: skip
    assert ended.rejects == []


def test_rows_that_cannot_be_used_are_kept_apart_with_their_reasons(run_dir, tmp_path):
    good = [row(read_id(9, k), 0, [0.5] * 30) for k in range(3)]
    bad = {
        3: (row("no-number", 0, "1.0,x,2.0"), "no-number", "not a number"),
        5: (row("too-large", 0, "1.0,70000,2.0"), "too-large", "not finite"),  # in float16
        6: (row("no-signal", "", ""), "no-signal", "empty signal"),
        7: (row("no-class", "cap_1", [1.0]), "no-class", "bad cap_class"),
        9: ('cut,,"1.0,2', "cut", "truncated line"),
    }
    lines = {2: good[0], 4: good[1], 8: good[2]} | {k: v[0] for k, v in bad.items()}
    path = write(tmp_path / "caps" / "b.csv", [lines[k] for k in sorted(lines)])
    path.write_bytes(path.read_bytes().removesuffix(b"\r\n"))
    write(tmp_path / "caps" / "a.csv", [bad[3][0], *good])
    ended = predict(run_dir, tmp_path / "caps", tmp_path / "out")
    assert ended.code == 0, ended.shown
    assert ended.rejects == [
        ("a.csv", "2", "no-number", "not a number"),
        *(("b.csv", str(line), name, reason) for line, (_, name, reason) in bad.items()),
    ]
    assert [r["read_id"] for r in ended.rows] == 2 * [line.split(",")[0] for line in good]
    assert "Rejects: 6 of 12 rows" in ended.shown
    assert "not a number" in ended.shown


def test_the_summary_counts_reads_per_cap_and_names_the_files(predicted):
    counts = {name: 0 for name in NAMES}
    sums = dict.fromkeys(counts, 0.0)
    for line, best in zip(predicted.rows, predicted.probabilities().max(axis=1), strict=True):
        counts[line["predicted_cap"]] += 1
        sums[line["predicted_cap"]] += best
    for name, count in counts.items():
        low, high = (f"{bound:.1%}" for bound in metrics.wilson_interval(count, 360))
        cells = [name, str(count), f"{count / 360:.1%}", f"{low} to {high}"]
        (found,) = [line for line in table(predicted) if line[:4] == cells]
        assert found[-1] == (f"{sums[name] / count:.1%}" if count else "-")
    assert "360 reads in" in predicted.shown and "MB/s" in predicted.shown
    for name in ("predictions.csv", "rejects.csv", "composition.json"):
        assert str(predicted.output_dir / name) in predicted.shown
    (log_path,) = (predicted.output_dir / "logs").iterdir()
    assert "Composition" in log_path.read_text()


# Where reads come from


def metadata(path: Path, header: str, lines: list[str]) -> None:
    path.write_text("\r\n".join([header, *lines, ""]), encoding="utf-8")


def test_parent_and_pod5_file_are_those_of_the_metadata(
    run_dir, caps, predicted, tmp_path, monkeypatch
):
    own = tmp_path / "caps"
    shutil.copytree(caps, own)
    names = [line["read_id"] for line in predicted.rows]
    both = [f'{name},parent-{k},"run,\n{k % 3}.pod5",x' for k, name in enumerate(names[:100])]
    header = "read_id,parent_read_id,pod5_file,read_type"
    metadata(own / "metadata__a.csv", header, [*both, f"{names[0]},another,y,z"])
    metadata(own / "metadata__b.csv", "pod5_file,read_id", [f"p,{name}" for name in names[100:200]])
    metadata(own / "metadata__c.csv", "parent_read_id,read_id", [f",{names[200]}", "é,other"])
    metadata(own / "metadata__d.csv", "read_id,fasta", ["x,ACGT"])
    packed = own / "metadata__b.csv"
    packed.with_suffix(".csv.gz").write_bytes(gzip.compress(packed.read_bytes()))
    packed.unlink()
    monkeypatch.setattr(metadata_reader, "BLOCK_BYTES", 1 << 10)  # several, each with a header
    ended = predict(run_dir, own, tmp_path / "out")
    assert ended.code == 0, ended.shown
    expected = [(f"parent-{k}", f"run,\n{k % 3}.pod5") for k in range(100)] + 100 * [("", "p")]
    expected += 160 * [("", "")]
    assert [(r["parent_read_id"], r["pod5_file"]) for r in ended.rows] == expected
    shared = predicted.rows[0].keys()
    assert [{name: r[name] for name in shared} for r in ended.rows] == predicted.rows
    assert ended.lines[0] == f"{predicted.lines[0]},parent_read_id,pod5_file"
    assert "metadata__d.csv: has no columns" in ended.shown
    assert "1 rows are of a read_id that came before" in ended.shown
    assert "parent_read_id" not in predicted.lines[0]


def test_fields_of_metadata_that_are_too_long_count_as_empty(run_dir, caps, predicted, tmp_path):
    own = tmp_path / "caps"
    shutil.copytree(caps, own)
    names = [line["read_id"] for line in predicted.rows]
    metadata(own / "metadata__a.csv", "read_id,pod5_file", [f"{names[9]},x.pod5"])
    lines = [f"{names[0]},p,q", f"{names[1]},{'p' * 257},q", f"{names[2]},{'p' * 256},{'é' * 129}"]
    lines += [f"{'r' * 10_000},p,q", f"{names[3]},p,q"]
    metadata(own / "metadata__b.csv", "read_id,parent_read_id,pod5_file", lines)
    ended = predict(run_dir, own, tmp_path / "out")
    assert ended.code == 0, ended.shown
    found = [(r["parent_read_id"], r["pod5_file"]) for r in ended.rows[:5]]
    assert found == [("p", "q"), ("", "q"), ("p" * 256, ""), ("p", "q"), ("", "")]
    (warning,) = [line for line in ended.shown.splitlines() if "taken for empty" in line]
    assert "metadata__b.csv, row 2 below the header: " in warning and ": 3)" in warning


def test_metadata_that_are_broken_in_the_middle_are_an_error_before_the_work(
    run_dir, caps, tmp_path
):
    own = tmp_path / "caps"
    shutil.copytree(caps, own)
    metadata(own / "metadata__a.csv", "read_id,pod5_file", ["a,b", "c,d,e,f", "g,h"])
    line = failed(predict(run_dir, own, tmp_path / "o"))
    assert "metadata__a.csv: can't be read as CSV" in line


# Which caps there are


def composed(ended: Ended) -> dict:
    return files.read_json(ended.output_dir / "composition.json")


def test_the_composition_is_that_of_the_predictions(run_dir, caps, predicted):
    found, rows_ = composed(predicted), predicted.rows
    confusion = files.read_json(run_dir / "evaluation" / "metrics.json")["test"]["confusion_matrix"]
    paths = sorted(caps.iterdir())
    sixth = [rows_[at : at + 60] for at in range(0, 360, 60)]
    parts = [(found["all"], rows_), *zip(found["files"], sixth, strict=True)]
    assert [part["file"] for part in found["files"]] == [path.name for path in paths]
    for part, of_part in parts:
        counts = [sum(r["predicted_cap"] == name for r in of_part) for name in NAMES]
        assert part["reads"] == len(of_part)
        assert [(cap["cap"], cap["reads"]) for cap in part["caps"]] == (
            list(zip(NAMES, counts, strict=True))
        )
        expected = zip(
            composition.counted(counts), composition.corrected(counts, confusion), strict=True
        )
        for cap, (counted, corrected) in zip(part["caps"], expected, strict=True):
            assert counted.items() <= cap.items() and corrected.items() <= cap.items()
            best = [
                float(r[f"p_{cap['cap_class']}"])
                for r in of_part
                if r["predicted_cap"] == cap["cap"]
            ]
            if best:
                assert cap["mean_confidence"] == pytest.approx(np.mean(best), abs=2e-6)
            else:
                assert cap["mean_confidence"] is None
    assert "the same kind" in found["correction"]
    corrected = next(line for line in table(predicted) if line[0] == "cap_1")
    assert corrected[4] == f"{found['all']['caps'][1]['corrected']:.1%}"
    assert "Shares by file, corrected" in predicted.shown


def test_what_is_not_known_of_the_test_set_is_not_made_up(run_dir, caps, predicted, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(run_dir, copied)
    shutil.rmtree(copied / "evaluation")
    ended = predict(copied, caps, tmp_path / "out")
    assert ended.code == 0 and ended.lines == predicted.lines
    found = composed(ended)
    assert "how the model's test set fared isn't known" in found["correction"]
    assert found["correction"] in ended.shown
    for part in (found["all"], *found["files"]):
        assert not any("corrected" in name for cap in part["caps"] for name in cap)
    assert "Shares by file, as counted" in ended.shown


def test_figures_of_the_signals_are_those_of_the_text(caps, predicted):
    for part in composed(predicted)["files"]:
        lines = (caps / part["file"]).read_text().splitlines()[1:]
        signals = [np.array(line.split('"')[1].split(","), float) for line in lines]
        means, lengths = [s.mean() for s in signals], [len(s) for s in signals]
        found = part["signals"]
        assert found["mean"] == pytest.approx(np.mean(means), abs=1e-4)
        assert found["between_reads"] == pytest.approx(np.std(means), abs=1e-3)
        assert found["spread"] == pytest.approx(np.mean([s.std() for s in signals]), abs=1e-4)
        assert found["length"]["mean"] == pytest.approx(np.mean(lengths), abs=0.05)
        assert found["length"]["max"] == max(lengths)
        assert found["beyond"] == 0


def test_signals_unlike_those_of_the_training_are_warned_of(run_dir, caps, predicted, tmp_path):
    assert composed(predicted)["warnings"] == [] and "Note:" not in predicted.shown
    signals = files.read_json(run_dir / "evaluation" / "metrics.json")["signals"]
    assert [one["cap_class"] for one in signals["classes"]] == [0, 1, 2]

    def changed(name: str, change) -> Ended:
        for path in caps.iterdir():
            lines = []
            for line in path.read_text().splitlines()[1:]:
                head, text, _ = line.split('"')
                values = change(np.array(text.split(","), float))
                lines.append(f'{head}"{",".join(f"{value:.6f}" for value in values)}"')
            write(tmp_path / name / path.name, lines)
        return predict(run_dir, tmp_path / name, tmp_path / f"{name}_out")

    raw = changed("raw", lambda signal: signal * 15 + 90)
    (warning,) = composed(raw)["warnings"]
    assert "raw picoamperes" in warning and "data__cap_0_run0.csv: mean 89.6" in warning
    assert "where about 0 and 1 are expected, 100% of the samples beyond" in warning
    assert f"Note: {warning}" in raw.shown
    (warning,) = composed(changed("half", lambda signal: signal[::2]))["warnings"]
    assert "all files: length 1" in warning and "another region" in warning


# Batches


def test_batch_size_is_what_is_compiled_and_changes_no_result(
    run_dir, caps, predicted, tmp_path, monkeypatch
):
    shapes, logits = [], inference._logits

    def noted(variables, signals, **more):
        shapes.append(signals.shape)
        return logits(variables, signals, **more)

    noted.lower = logits.lower
    noted.lower = logits.lower  # type: ignore[attr-defined]
    monkeypatch.setattr(inference, "_logits", noted)
    ended = predict(run_dir, caps, tmp_path, "--batch_size", 50)
    assert ended.code == 0, ended.shown
    assert shapes == [(50, LENGTH)] * 8  # 360 reads, the last batch filled up
    np.testing.assert_allclose(ended.probabilities(), predicted.probabilities(), atol=2e-6)
    assert [r["read_id"] for r in ended.rows] == [r["read_id"] for r in predicted.rows]
    shapes.clear()
    assert predict(run_dir, caps, tmp_path).code == 0
    assert shapes == [(inference.BATCH_SIZES["cpu"], LENGTH)]


def test_a_run_with_a_batch_size_of_its_own_predicts_with_it(run_dir, caps, tmp_path, monkeypatch):
    copied = tmp_path / "run"
    shutil.copytree(run_dir, copied)
    record = json.loads((copied / "run.json").read_text())
    record["settings"]["evaluate_params"]["batch_size"] = 48
    (copied / "run.json").write_text(json.dumps(record))
    ended = predict(copied, caps, tmp_path / "out")
    assert "in batches of 48 reads" in ended.shown
    ended = predict(copied, caps, tmp_path / "out", "--batch_size", 96)
    assert "in batches of 96 reads" in ended.shown


# What can go wrong


def failed(ended: Ended) -> str:
    """Its one line; nothing was written."""
    assert ended.code == 2, ended.shown
    assert not list(ended.output_dir.glob("*.csv")) and not list(ended.output_dir.glob(".partial*"))
    (line,) = [line for line in ended.shown.splitlines() if line.startswith("error: ")]
    return line


def test_a_model_that_is_none_is_said_in_one_line(run_dir, caps, tmp_path):
    line = failed(predict(tmp_path / "none", caps, tmp_path / "o"))
    assert "no such file or directory; expected a run's output directory" in line
    keras = tmp_path / "model.keras"
    keras.touch()
    assert str(keras) in failed(predict(keras, caps, tmp_path / "o"))
    assert "neither run.json nor" in failed(predict(caps, caps, tmp_path / "o"))
    copied = tmp_path / "run"
    shutil.copytree(run_dir, copied)
    shutil.rmtree(copied / "checkpoints")
    line = failed(predict(copied, caps, tmp_path / "o"))
    assert "no finished training" in line and "train stage" in line
    (copied / "run.json").write_text('{"settings": {"shared_params": {"target_lenght": 3}}}')
    assert "target_lenght" in failed(predict(copied, caps, tmp_path / "o"))
    (copied / "run.json").write_text("{}")
    assert "isn't a run's record" in failed(predict(copied, caps, tmp_path / "o"))


def test_input_that_is_none_is_said_in_one_line(run_dir, tmp_path):
    assert "no such directory" in failed(predict(run_dir, tmp_path / "none", tmp_path / "o"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no *.csv or *.csv.gz file" in failed(predict(run_dir, empty, tmp_path / "o"))
    write(empty / "a.csv", rows(0, 0, 2))
    (empty / "b.csv").write_text("a,b,c\n1,2,3\n")
    line = failed(predict(run_dir, empty, tmp_path / "o"))
    assert "b.csv, line 1" in line and "expected the header" in line
    write(empty / "a.csv", ["x,0,y"])
    write(empty / "b.csv", [])
    line = failed(predict(run_dir, empty, tmp_path / "o"))
    assert "the only row can't be used, first in a.csv at line 2, read_id 'x'" in line
    write(empty / "b.csv", ["z,0,y", "z,0,y"])
    line = failed(predict(run_dir, empty, tmp_path / "o"))
    assert "none of 3 rows can be used, first in a.csv at line 2, read_id 'x'" in line
    for name in ("a.csv", "b.csv"):
        write(empty / name, [])
    line = failed(predict(run_dir, empty, tmp_path / "o"))
    assert f"--caps_data_dir={empty}: its files hold no rows below their headers" in line
    assert "Correct the files" not in line
    (empty / "b.csv").rename(empty / "b.csv.gz")
    assert "can't be decompressed" in failed(predict(run_dir, empty, tmp_path / "o"))
    for size in (0, 10**20 - 1):
        line = failed(predict(run_dir, empty, tmp_path / "o", "--batch_size", size))
        assert f"--batch_size={size}: must be from 1 to 2147483647" in line


def test_the_input_directory_is_no_place_for_predictions(run_dir, caps):
    before = sorted(caps.iterdir())
    ended = predict(run_dir, caps, caps)
    assert ended.code == 2 and "choose another" in ended.shown
    assert sorted(caps.iterdir()) == before


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_an_output_directory_that_is_no_path_is_refused(run_dir, caps, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    for command, given in (
        ("predict", ("-m", run_dir, "-c", caps)),
        ("export", ("--run", run_dir)),
        ("import-model", ("--keras_file", "a.keras")),
        ("simulate", ()),
    ):
        ended = predicting.capfinder(tmp_path, command, *given, "--output_dir", path)
        assert ended.code == 2 and "is no path; name a directory" in ended.shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x" * 300, "file/out"])
def test_an_output_directory_that_cannot_be_made_is_said(run_dir, caps, tmp_path, name):
    (tmp_path / "file").touch()
    ended = predict(run_dir, caps, tmp_path / name)
    assert ended.code == 2 and "can't be written to (" in ended.shown


def test_what_is_not_its_own_is_neither_replaced_nor_removed(run_dir, caps, tmp_path):
    def refused(command, directory: Path, name: str) -> None:
        before = kept(tmp_path)
        ended = command(run_dir, tmp_path / "no caps", directory)  # said before anything is read
        assert ended.code == 2 and f"{directory / name}: " in ended.shown, ended.shown
        assert "choose another" in ended.shown and "unexpected" not in ended.shown
        assert kept(tmp_path) == before

    for name in ("metrics.json", "confusion_matrix.csv", "predictions.csv", "composition.json"):
        directory = tmp_path / name
        directory.mkdir()
        (directory / name).write_text('{"outputs": 1}')
        refused(predicting.evaluate, directory, name)
    for name in ("predictions.csv", "composition.json", ".unfinished/notes.txt"):
        directory = tmp_path / f"directory {name.partition('/')[0]}"
        (directory / name).mkdir(parents=True)
        refused(predict, directory, name)
    for name in (".unfinished", "logs"):
        directory = tmp_path / f"file {name}"
        directory.mkdir()
        (directory / name).touch()
        refused(predict, directory, name)
    mine = tmp_path / "metrics.json"
    (mine / "confusion_matrix.csv").write_text("mine")
    ended = predict(run_dir, caps, mine)
    assert ended.code == 0, ended.shown
    assert (mine / "metrics.json").read_text() == '{"outputs": 1}'
    assert (mine / "confusion_matrix.csv").read_text() == "mine"
    refused(predicting.evaluate, mine, "metrics.json")


def kept(directory: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in directory.rglob("*")}


@pytest.mark.parametrize("command", [predict, predicting.evaluate])
def test_the_evaluation_of_a_run_is_no_place_for_predictions(caps, tmp_path, command):
    (tmp_path / "run.json").write_text("{}")
    ended = command(tmp_path, caps, tmp_path / "evaluation")
    assert ended.code == 2 and "keeps its own evaluation; choose another" in ended.shown
    assert not (tmp_path / "evaluation").exists()


def test_reads_that_are_given_twice_are_warned_of(run_dir, caps, tmp_path):
    own = tmp_path / "caps"
    own.mkdir()
    sources = sorted(caps.iterdir())
    header, *lines = sources[0].read_text().splitlines()
    write(own / "a.csv", lines)
    write(own / "b.csv", lines[::-1])
    (own / "c.csv.gz").write_bytes(gzip.compress("\n".join([header, *lines]).encode()))
    shutil.copyfile(sources[1], own / "d.csv")
    (own / "d.csv.gz").write_bytes(gzip.compress("\n".join([header, *lines[:5]]).encode()))
    ended = predict(run_dir, own, tmp_path / "out")
    assert ended.code == 0, ended.shown
    same, packed = composed(ended)["warnings"][:2]
    assert same.startswith("a.csv, b.csv, c.csv.gz: hold the same 60 read_ids")
    assert "weigh 3 times as much" in same
    assert packed.startswith("d.csv, d.csv.gz: may be one file, packed and not")
    assert f"Note: {same}" in ended.shown and f"Note: {packed}" in ended.shown


def test_the_model_is_the_one_that_run_json_speaks_of(run_dir, caps, predicted, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(run_dir, copied)
    (own,) = (copied / "checkpoints").iterdir()
    other = own.with_name("0123456789abcdef")
    shutil.copytree(own, other)
    outcome = files.unsealed(files.read_json(other / "outcome.json"))
    outcome["about"]["settings"]["seed"] = 1
    files.write_json(other / "outcome.json", files.sealed(outcome))  # the newest
    shutil.rmtree(other / "best")
    outcome = files.unsealed(files.read_json(own / "outcome.json"))
    del outcome["about"]["settings"]["max_epochs"]
    outcome["about"]["settings"]["of_another_version"] = 1
    files.write_json(own / "outcome.json", files.sealed(outcome))
    os.utime(own / "outcome.json", (1, 1))
    ended = predict(copied, caps, tmp_path / "out")
    assert ended.code == 0, ended.shown
    assert ended.lines == predicted.lines
    shutil.rmtree(own)
    assert "no finished training" in failed(predict(copied, caps, tmp_path / "o"))


def test_a_process_of_its_own_with_two_devices_loads_no_library_it_has_no_use_for(
    run_dir, caps, predicted, tmp_path
):
    shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("dataset"))
    arguments = ["predict", "-m", tmp_path / "run", "-c", caps, "-o", tmp_path / "out"]
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "capfinder", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {TWO_DEVICES}"},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "Each of 2 devices takes 384 reads" in ended.stdout
    assert (tmp_path / "out" / "predictions.csv").read_text().splitlines() == predicted.lines
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in ended.stderr.splitlines()}
    assert "jax" in loaded
    heavy = {"tensorflow", "tensorflow_datasets", "keras", "comet_ml", "optuna", "polars"}
    assert not loaded & heavy
