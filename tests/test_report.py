"""The page: everything escaped, nothing from a network, and plain words for what isn't there."""

import json
import math
import re

import numpy as np
import pytest
from html_page import Page
from hypothesis import given
from hypothesis import strategies as st

from capfinder import interrupts, settings
from capfinder.errors import InputError
from capfinder.evaluation import charts, metrics, report, svg
from capfinder.evaluation.charts import Series

NASTY = '<script>alert("&")</script>'


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def make_run(run_dir, names=("cap_0", "cap_1", "cap_2"), caps_data_dir="/nowhere", word="x"):
    """A run's directory as the stages leave it; `word` stands wherever a text may stand."""
    rng = np.random.default_rng(0)
    classes = len(names)
    labels = np.arange(90) % classes
    logits = rng.normal(0, 1, (90, classes))
    logits[np.arange(90), labels] += 3
    scored = metrics.evaluate(logits, labels, class_names=list(names), temperature=1.2)
    values = settings.to_dict(settings.default_config())
    values["etl_params"]["caps_data_dir"] = str(caps_data_dir)
    values["shared_params"]["batch_size"] = 77
    history = [
        {
            "epoch": epoch,
            "loss": 1 / epoch,
            "accuracy": 0.5 + 0.1 * epoch,
            "val_loss": 1.2 / epoch,
            "val_accuracy": 0.45 + 0.1 * epoch,
            "learning_rate": 1e-3 / epoch,
            "seconds": 1.0,
            "examples_per_second": 100.0,
        }
        for epoch in range(1, 5)
    ]
    write(
        run_dir / "evaluation" / "metrics.json",
        {
            "test": scored,
            "train": scored,
            "baselines": {"majority_accuracy": 0.333, "nearest_centroid_accuracy": 0.4567},
            "best_epoch": 3,
            "num_parameters": 123456,
            "hyperparameters": {"lstm_units": 64, word: word},
            "history": history,
            "stopped": "patience",
            "model_type": word,
            "class_names": list(names),
            "dataset": {"version": "1.0.0", "fingerprint": "ab"},
            "warnings": [f"The test set is small {word}"],
        },
    )
    dataset = run_dir / "dataset" / "cap_data" / "1.0.0"
    write(
        dataset / "manifest.json",
        {
            "version": "1.0.0",
            "fingerprint": "abcd",
            "created": "2026-11-24",
            "examples_per_class": 100,
            "target_length": 50,
            "dtype": "float16",
            "sources": [
                {"file": word, "size": 2345678, "sha256": "ef" * 32, "cap_class": 0}
                | {"rows": 1003, "good": 1000}
            ],
            "counts": {
                split: {str(number): 30 for number in range(classes)}
                for split in ("train", "validation", "test")
            },
            "rejects": {word: 3},
            "warnings": [],
        },
    )
    cache = run_dir / "dataset" / "cache" / "abcd" / "test"
    cache.mkdir(parents=True)
    np.save(cache / "signal.npy", rng.normal(0, 1, (90, 50)).astype(np.float16))
    np.save(cache / "cap_class.npy", labels.astype(np.int32))
    np.save(cache / "length.npy", np.full(90, 40, np.int32))
    write(run_dir / "tuner" / "best_hyperparameters.json", {"dense_units": 32, word: word})
    (run_dir / "best_model" / "classifier").mkdir(parents=True)
    (run_dir / "best_model" / "classifier" / "classifier_20261124_000000.keras").touch()
    trial = {"number": 0, "state": "COMPLETE", "value": 0.81, "params": {"dense_units": 16}}
    write(
        run_dir / "run.json",
        {
            "settings": values,
            "versions": {"capfinder": "1.0.0", word: "1"},
            "class_names": list(names),
            "stages": {"etl": {"seconds": 75.0, "summary": word, "finished": "today", "key": ""}},
            "dataset": {"directory": "dataset/cap_data/1.0.0", "version": "1.0.0", "why": word},
            "tuning": {
                "directory": "tuner",
                "best_value": 0.9123,
                "source": word,
                "trials": [
                    {"number": 2, "state": "FAIL", "value": None, "params": {word: word}},
                    trial,
                    trial | {"number": 1, "value": 0.9123, "params": {"dense_units": 32}},
                ],
            },
            "exports": [{"name": word, "path": word, "max_abs_difference": 3.1e-8}],
        },
    )


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    make_run(run_dir)
    path = report.render(run_dir)
    assert path == run_dir / "report.html"
    return path.read_text("utf-8")


def test_the_headline_answers_a_biologists_questions(rendered):
    text = Page(rendered).text.replace("\u202f", " ")
    for said in (
        "of 90 reads that the model had never seen",
        "95 % interval",
        "nearest mean signal",
        "45.7%",
        "always the same cap",
        "Which caps are confused?",
        "The test set is small x",
        "Does it hold for a new sequencing run?",
        "classifier_20261124_000000.keras",
    ):
        assert said in text


SPLITS = {
    "read": ({}, ["Not measured here", "Three or more runs of each cap", "test_caps_data_dir"]),
    "file": ({"group_by": "file"}, ["this is the question that was measured", "runs that differ"]),
    "test directory": ({"test_caps_data_dir": "/t"}, ["this was measured", "runs that differ"]),
}


@pytest.mark.parametrize("split", SPLITS)
def test_how_reads_were_split_says_what_is_known_of_new_runs(tmp_path, split):
    changes, words = SPLITS[split]
    make_run(tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    record["settings"]["split_params"] |= changes
    write(tmp_path / "run.json", record)
    text = " ".join(Page(report.render(tmp_path).read_text("utf-8")).text.split())
    assert all(word in text for word in words)
    assert ("test runs that differ" in text) == (split != "read")


def test_every_section_shows_what_the_stages_left(rendered):
    text = Page(rendered).text.replace("\u202f", " ")
    for said in (
        "123,456",  # parameters
        "best epoch 3",
        "no lower validation loss",
        "1,003",  # rows of a source
        "2.35 MB",
        "1 min 15 s",
        "3.1e-08",
        "Best validation accuracy 91.2 %",
        "dense_units=32",
        "shared_params.batch_size",
        "77",
    ):
        assert said in text
    assert "Not there" not in text


def test_the_page_is_self_contained(rendered):
    page = Page(rendered)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("href", "src", "xlink:href"):
            assert value == "#files"
    assert "http://" not in rendered
    assert "https://" not in rendered
    assert "@import" not in rendered
    assert "url(" not in rendered


def test_trials_are_listed_best_first(rendered):
    text = Page(rendered).text
    assert text.index("dense_units=32") < text.index("dense_units=16") < text.index("fail")


def test_everything_from_disk_is_escaped(tmp_path):
    make_run(tmp_path, names=("cap_0", NASTY), word=NASTY)
    html = report.render(tmp_path).read_text("utf-8")
    assert "<script" not in html
    assert "script" not in Page(html).tags
    assert html.count("&lt;script&gt;") > 15


def test_a_rerun_replaces_the_page_and_a_failure_keeps_the_old_one(tmp_path):
    make_run(tmp_path)
    path = report.render(tmp_path)
    before = path.read_text("utf-8")
    (tmp_path / "run.json").write_text("{ broken")
    with pytest.raises(InputError, match=r"run\.json"):
        report.render(tmp_path)
    assert path.read_text("utf-8") == before


def test_a_directory_that_holds_no_run_is_an_error(tmp_path):
    with pytest.raises(InputError, match="nothing"):
        report.render(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("removed", "stage"),
    [
        ("evaluation/metrics.json", "evaluate stage"),
        ("dataset/cap_data/1.0.0/manifest.json", "etl stage"),
        ("dataset/cache/abcd/test/signal.npy", "cache"),
        ("run.json", "export stage"),
    ],
)
def test_what_is_missing_is_said_plainly(removed, stage, tmp_path):
    make_run(tmp_path)
    (tmp_path / removed).unlink()
    text = Page(report.render(tmp_path).read_text("utf-8")).text
    assert any(stage in sentence for sentence in re.findall(r"Not there: ([^.]*\.)", text))


def test_what_ctrl_c_ended_is_said_first_whatever_there_is(tmp_path):
    make_run(tmp_path)
    interrupted = {
        "tune": {"trials": 2, "max_trials": 5},
        "train": {"epochs": 4, "max_epochs": 9},
    }
    said = interrupts.sentences(interrupted)
    assert len(said) == 2 and "after 2 of 5 trials" in said[0] and "epoch 4 of 9" in said[1]
    path = tmp_path / "evaluation" / "metrics.json"
    metrics = json.loads(path.read_text())
    write(path, metrics | {"interrupted": interrupted, "warnings": said + metrics["warnings"]})
    text = Page(report.render(tmp_path).read_text("utf-8")).text
    assert text.index(said[0]) < text.index(said[1]) < text.index("The test set is small")
    assert "Ended by Ctrl-C after 2 of 5 trials." in text  # beside the trials
    path.unlink()
    run = json.loads((tmp_path / "run.json").read_text())
    write(tmp_path / "run.json", run | {"interrupted": interrupted})
    assert said[0] in Page(report.render(tmp_path).read_text("utf-8")).text


def test_any_key_of_run_json_may_be_absent(tmp_path):
    make_run(tmp_path)
    whole = json.loads((tmp_path / "run.json").read_text())
    for key in whole:
        write(tmp_path / "run.json", {name: whole[name] for name in whole if name != key})
        Page(report.render(tmp_path).read_text("utf-8"))
    write(tmp_path / "run.json", {"created": "today"})
    Page(report.render(tmp_path).read_text("utf-8"))


def test_any_key_of_metrics_json_may_be_absent(tmp_path):
    make_run(tmp_path)
    path = tmp_path / "evaluation" / "metrics.json"
    whole = json.loads(path.read_text())
    for key in whole:
        write(path, {name: whole[name] for name in whole if name != key})
        Page(report.render(tmp_path).read_text("utf-8"))


def test_any_key_of_the_manifest_may_be_absent(tmp_path):
    make_run(tmp_path)
    path = tmp_path / "dataset" / "cap_data" / "1.0.0" / "manifest.json"
    whole = json.loads(path.read_text())
    for key in whole:
        write(path, {name: whole[name] for name in whole if name != key})
        Page(report.render(tmp_path).read_text("utf-8"))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("group_by", "read", "Reads were split by read"),
        ("group_by", "parent_read", "Reads were split by parent_read"),
        ("group_by", "file", "runs that the model never saw"),
        ("test_caps_data_dir", "/held/out", "/held/out"),
    ],
)
def test_the_page_says_whether_new_runs_were_tested(key, value, said, tmp_path):
    make_run(tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    run["settings"]["split_params"][key] = value
    write(tmp_path / "run.json", run)
    assert said in Page(report.render(tmp_path).read_text("utf-8")).text


def test_a_loss_that_became_nan_leaves_a_gap(tmp_path):
    make_run(tmp_path)
    path = tmp_path / "evaluation" / "metrics.json"
    values = json.loads(path.read_text())
    values["history"][1]["loss"] = math.nan
    values["history"][2]["val_loss"] = math.inf
    write(path, values)
    html = report.render(tmp_path).read_text("utf-8")
    assert not re.search(r'd="[^"]*(nan|inf)', html)


def test_example_signals_are_shown_without_their_padding():
    stored = np.array([0, 0, 1, 2, 3, 0, 0, 0], np.float16)
    np.testing.assert_array_equal(report._unpadded(stored, 3), [1, 2, 3])
    np.testing.assert_array_equal(report._unpadded(np.arange(4.0), 900), [0, 1, 2, 3])


def test_confusions_are_the_largest_shares_of_a_true_class():
    found = report.confusions([[90, 10, 0], [0, 100, 0], [50, 0, 150]], ["a", "b", "c"])
    assert found == [
        {"true": "c", "predicted": "a", "count": 50, "share": 0.25},
        {"true": "a", "predicted": "b", "count": 10, "share": 0.1},
    ]
    assert report.confusions([[999, 1], [0, 0]], ["a", "b"]) == []


def test_settings_that_differ_from_their_default_are_marked():
    values = settings.to_dict(settings.default_config())
    assert not any(row["changed"] for row in report.settings_rows(values))
    values["train_params"]["patience"] = 7
    changed = [row for row in report.settings_rows(values) if row["changed"]]
    assert [(row["key"], row["value"]) for row in changed] == [("train_params.patience", 7)]
    assert changed[0]["meaning"]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_round_and_inside(low, width):
    high = low + width
    if high - low < 1e-9 * max(1.0, abs(low)):
        return
    found = svg.ticks(low, high)
    assert 1 <= len(found) <= 11
    assert all(low - 1e-6 * width <= tick <= high + 1e-6 * width for tick in found)


@given(st.floats(1e-9, 1), st.floats(1.5, 1e6))
def test_log_ticks_lie_inside(low, factor):
    found = svg.log_ticks(low, low * factor)
    assert 1 <= len(found) <= 20
    assert all(low <= tick <= low * factor for tick in found)


def test_a_line_passes_through_its_points():
    points = [(1.0, 0.0), (2.0, 1.0), (3.0, 0.5)]
    chart = str(charts.line_chart([Series("a", 0, points)], x_label="epoch", y_format=str))
    (path,) = re.findall(r'class="line c0" d="M([^"]*)"', chart)
    pairs = [tuple(map(float, pair.split())) for pair in path.split("L")]
    xs, ys = zip(*pairs, strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11)
    assert ys[1] < ys[2] < ys[0]  # SVG counts downwards
    assert ys[0] - ys[2] == pytest.approx(ys[2] - ys[1], abs=0.11)


def test_a_chart_without_a_finite_point_is_none():
    assert charts.line_chart([], x_label="", y_format=str) is None
    lost = [Series("a", 0, [(1.0, math.nan)])]
    assert charts.line_chart(lost, x_label="", y_format=str) is None
    single = [Series("a", 0, [(1.0, 2.0)])]
    assert charts.line_chart(single, x_label="", y_format=str) is not None
    assert charts.reliability([]) is None


@pytest.mark.parametrize("classes", [1, 2, 12, 32])
def test_a_heat_map_shows_every_count_and_share(classes):
    matrix = (np.arange(classes**2).reshape(classes, classes) * 7).tolist()
    chart = str(charts.heat_map(matrix, [f"cap_{number}" for number in range(classes)]))
    counts = re.findall(r'<text x="[^"]*" y="[^"]*" text-anchor="middle">([\d,]+)</text>', chart)
    assert [int(count.replace(",", "")) for count in counts] == np.ravel(matrix).tolist()
