"""A few kills of the whole pipeline, and proof that the harness would notice what one must not
leave."""

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from etl_check import left_running
from kills import Moment, Place, end_of
from pipeline_bench import Bench, Kill, Outcome
from pipeline_check import left_by_keras, problems_after, problems_while_dead
from pipeline_kills import run, summary
from pipeline_stages import STAGES, copy, stage_of
from warm_runs import WarmRuns

from capfinder import files
from capfinder.training.checkpoint import Checkpoints

SEED, KILLS = 7, 6


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with WarmRuns() as warm:
        bench = Bench(tmp_path_factory.mktemp("kills"), warm)
        bench.measure()
        yield bench


def test_a_killed_pipeline_that_is_rerun_ends_as_if_undisturbed(
    bench: Bench, tmp_path: Path
) -> None:
    outcomes = list(run(bench, tmp_path, kills=KILLS, seed=SEED))
    assert [outcome.problems for outcome in outcomes] == [[]] * KILLS, outcomes
    assert len({outcome.stage for outcome in outcomes} & {*STAGES}) >= 3  # a busy machine may miss


def test_the_job_has_trials_epochs_and_changes_to_files_in_every_stage(bench: Bench) -> None:
    out = bench.directory / "undisturbed" / "out"
    (best,) = out.glob("tuner_models/*/best_hyperparameters.json")
    assert len(json.loads(best.read_text())["trials"]) == 4
    assert len(json.loads((out / "evaluation" / "metrics.json").read_text())["history"]) == 6
    assert set(STAGES) <= {stage for stage, changes in bench.steps.items() if changes > 5}


def _flip_best_weight(out: Path) -> None:
    (directory,) = (out / "checkpoints").iterdir()
    checkpoints = Checkpoints(directory)
    meta = checkpoints.read_meta()
    assert meta is not None
    variables = checkpoints.restore_variables()
    bias = variables["params"]["head"]["bias"]
    variables["params"]["head"]["bias"] = bias.at[0].set(np.nextafter(bias[0], np.float32(9)))
    with checkpoints:
        checkpoints.save_best(meta["best_epoch"], variables, meta)


def _flip_exported_weight(out: Path) -> None:
    with h5py.File(out / "best_model" / "best_model_weights.weights.h5", "r+") as file:
        bias = next(item for item in _datasets(file) if item.ndim == 1)
        bias[0] = np.nextafter(bias[0], np.float32(9))


def _datasets(group: h5py.Group) -> Iterator[h5py.Dataset]:
    for item in group.values():
        if isinstance(item, h5py.Dataset):
            yield item
        else:
            yield from _datasets(item)


def _edit(pattern: str, old: str, new: str) -> Callable[[Path], None]:
    """The first match of `old` in the file."""

    def edit(out: Path) -> None:
        (path,) = out.glob(pattern)
        text, count = re.subn(old, new, path.read_text(), count=1)
        assert count == 1
        path.write_text(text)

    return edit


def _drop_last_line(out: Path) -> None:
    path = out / "evaluation" / "predictions_test.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def _empty_classifier(out: Path) -> None:
    (path,) = out.glob("best_model/classifier/*.keras")
    zipfile.ZipFile(path, "w").close()


def _second_classifier(out: Path) -> None:
    (path,) = out.glob("best_model/classifier/*.keras")
    shutil.copy(path, path.with_name("classifier_20000101_000000.keras"))


def _another_outcome(out: Path) -> None:
    (path,) = out.glob("checkpoints/*/outcome.json")
    outcome = files.unsealed(files.read_json(path))
    outcome["history"][0]["val_loss"] += 1
    files.write_json(path, files.sealed(outcome))


def _half_a_checkpoint(out: Path) -> None:
    next(out.glob("checkpoints/*/latest")).joinpath("99.orbax-checkpoint-tmp").mkdir()


SPOILT: dict[str, Callable[[Path], None]] = {
    "differs: best weights, epoch": _flip_best_weight,
    "differs: best_model/best_model_weights.weights.h5": _flip_exported_weight,
    "differs: best_model/classifier/classifier_*.keras": _empty_classifier,
    "one too many: best_model/classifier/classifier_*.keras": _second_classifier,
    "differs: study: trial": _edit("tuner_models/*/journal.log", r'"values":\[0\.', '"values":[1.'),
    "differs: best_hyperparameters.json": _edit(
        "tuner_models/*/best_hyperparameters.json", r'"value": 0\.', '"value": 1.'
    ),
    "differs: outcome.json": _another_outcome,
    "differs: evaluation/metrics.json": _edit(
        "evaluation/metrics.json", r'"num_examples": ', '"num_examples": 1'
    ),
    "differs: evaluation/predictions_test.csv": _drop_last_line,
    "missing: evaluation/predictions_test.csv": lambda out: (
        out / "evaluation" / "predictions_test.csv"
    ).unlink(),
    "missing: report.html": lambda out: (out / "report.html").unlink(),
    "other bytes: dataset/cap_data/1.0.0/features.json": _edit(
        "dataset/cap_data/1.0.0/features.json", "signal", "Signal"
    ),
    "debris: best_model/.partial-x": lambda out: (out / "best_model" / ".partial-x").touch(),
    "debris: checkpoints/": _half_a_checkpoint,
    "debris: previous/": lambda out: (out / "previous").mkdir(),
    "debris: tmpabc (system temp)": lambda out: (out.parent / "tmp" / "tmpabc").touch(),
}


@pytest.mark.parametrize("problem", SPOILT)
def test_what_a_kill_must_not_leave_is_noticed(bench: Bench, tmp_path: Path, problem: str) -> None:
    place = Place(tmp_path)
    shutil.copytree(bench.directory / "undisturbed" / "out", place.output_dir)
    SPOILT[problem](place.output_dir)
    found = problems_after(bench.expected, place)
    assert [text for text in found if text.startswith(problem)], found
    if problem.startswith("differs: evaluation/"):
        assert problems_while_dead(bench.expected, place)


def test_what_a_rerun_warns_of_is_noticed(bench: Bench, tmp_path: Path) -> None:
    place = Place(tmp_path)
    shutil.copytree(bench.directory / "undisturbed" / "out", place.output_dir)
    place.output.write_text("a line\nlibrary.py:12: UserWarning: Error reading an entry\n")
    (problem,) = problems_after(bench.expected, place)
    assert problem.endswith("UserWarning: Error reading an entry")


def test_only_directories_of_a_temporary_name_are_put_down_to_keras(tmp_path: Path) -> None:
    for name in ("tmpab12_xyz/assets", "tmpab12_xyz/other", "other"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("tmpafile123", "tmpab12_xyz/signals"):
        (tmp_path / name).touch()
    assert left_by_keras(tmp_path) == ["tmpab12_xyz/", "tmpab12_xyz/assets/"]


def test_a_forked_run_is_killed_in_the_stage_asked_for_or_ends_like_a_command(
    bench: Bench, tmp_path: Path
) -> None:
    place = Place(tmp_path)
    kill = Kill((), begin="evaluate")
    copy(bench.directory / "begun" / "evaluate", place)
    assert bench.kill(kill, Moment("evaluate", 0.0, 1), place) == []
    assert stage_of(place.output) == "evaluate"
    assert not (place.output_dir / "evaluation").exists()
    place.directory.joinpath("train.json").write_text("{")
    run = bench.warm.start(["train-model", "-c", str(tmp_path / "train.json")], place)
    assert end_of(run, place).startswith("exit code 2: error: ")
    assert left_running(run.pid) == []


def test_the_summary_counts_kills_by_where_they_found_the_run() -> None:
    by_time, by_step = Moment("tune", 0.1, 0), Moment("train", 0.0, 3)
    outcomes = [
        Outcome(Kill((by_time,)), "tune", "nothing", [], []),
        Outcome(
            Kill((by_time, by_step), "tune", command_line=True), "train", "dataset", [], ["bad"]
        ),
    ]
    rows = {line.split()[0]: line.split()[1:] for line in summary(outcomes)[1:]}
    assert rows["tune"] == ["1", "1", "0", "0", "1", "0", "0", "0"]
    assert rows["train"] == ["1", "1", "0", "1", "0", "1", "0", "1"]
    assert rows["all"] == ["2", "2", "0", "1", "1", "1", "0", "1"]
