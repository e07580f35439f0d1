import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from capfinder import files, run_record, run_summary, settings
from capfinder.errors import InputError
from capfinder.run_record import RunRecord, SetAside


def test_a_run_that_waited_for_the_other_goes_on_with_its_results(tmp_path: Path) -> None:
    first, second = RunRecord(tmp_path), RunRecord(tmp_path)
    first.begin("key", dataset={"version": "1.0.0"})
    second.begin("key", dataset={"version": "1.0.0"})
    assert not (tmp_path / "previous").exists()
    second.begin("other", dataset={"version": "1.1.0"})
    assert list((tmp_path / "previous").glob("*/run.json"))


def test_settings_that_change_no_weights_leave_results_where_they_are() -> None:
    def key(**runtime: object) -> str:
        changes = {f"runtime_params.{name}": value for name, value in runtime.items()}
        return run_record.results_key(
            settings.checked(settings.default_config(), changes), "dataset"
        )

    assert key(steps_per_call=4) == key(mesh=2) == key()
    assert key(microbatch=16) != key()


def test_what_killed_writers_left_goes_and_what_live_ones_write_stays(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        text=True,
        capture_output=True,
        check=True,
    ).stdout.strip()
    here = f"{ended}+{socket.gethostname()}"
    left = [f"{files.PARTIAL}run.json-{ended}.json", f"{files.PARTIAL}probe-{ended}"]
    left += [f"{files.PARTIAL}notes-{here}-earlier", f"{files.PARTIAL}notes-{here}"]
    kept = [f"{files.PARTIAL}run.json-{os.getpid()}.json", "run-1.json", "notes"]
    for name in [*left, *kept]:
        (tmp_path / name).touch()
    (tmp_path / f"{files.PARTIAL}classifier-{ended}").mkdir()
    study = tmp_path / "tuner_models" / "project_cnn_lstm"
    study.mkdir(parents=True)
    for name in [*left, *kept]:
        (study / name).touch()
    run_record.prepare_output_dir(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "tuner_models"])
    assert sorted(path.name for path in study.iterdir()) == sorted(kept)


def test_a_writer_uses_a_name_that_remove_dead_understands(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from capfinder import files\n"
        "with files.atomic_path(Path(sys.argv[1]) / 'a.weights.h5') as p:\n"
        "    p.touch(); time.sleep(60)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    while not list(tmp_path.iterdir()):
        time.sleep(0.01)
    files.remove_dead(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    writer.kill()
    writer.wait()
    files.remove_dead(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_a_killed_writer_had_moved_away_comes_back(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from capfinder import files\n"
        "path = Path(sys.argv[1])\n"
        "with files.atomic_directory(path) as partial:\n"
        "    (partial / 'new').touch()\n"
        "    Path.replace = lambda old, new: (os.rename(old, new), os._exit(1))"
    )
    directory = tmp_path / "saved-1"
    directory.mkdir()
    (directory / "old").touch()
    subprocess.run([sys.executable, "-c", code, str(directory)], check=False)
    assert not directory.exists()
    files.remove_dead(tmp_path)
    assert list(tmp_path.rglob("*")) == [directory, directory / "old"]


def begin(
    output_dir: Path, fingerprint: str = "a", **changes: Any
) -> tuple[RunRecord, SetAside | None]:
    """A run of the default settings with `group__name=value` over them."""
    overrides = {key.replace("__", "."): value for key, value in changes.items()}
    config = settings.checked(settings.default_config(), overrides)
    record = RunRecord(output_dir)
    aside = record.begin(
        run_record.results_key(config, fingerprint),
        settings=settings.to_shown(config),
        dataset={"version": f"1.{ord(fingerprint)}.0", "fingerprint": fingerprint},
    )
    return record, aside


def test_results_are_set_aside_with_a_word_on_every_setting_that_differs(tmp_path: Path) -> None:
    assert begin(tmp_path)[1] is None
    no_effect: dict[str, Any] = {
        "debug_code": True,
        "tune_params__storage": "sqlite:///x.db",
        "lr_scheduler_params__sgdr__cycle_length": 9,  # the schedule is another one
    }
    assert begin(tmp_path, **no_effect)[1] is None
    units: dict[str, Any] = {"model_params": {"lstm_units": (8,)}, "train_params__patience": 7}
    _, aside = begin(tmp_path, **no_effect, **units)
    assert aside is not None
    assert sorted(aside.differences) == [
        'model_params={"lstm_units": [8]} (was {})',
        "train_params.patience=7 (was 120)",
    ]
    assert (aside.directory / "run.json").is_file()
    assert str(aside.directory) in str(aside) and "patience=7" in str(aside)
    assert begin(tmp_path, **units)[1] is None
    _, aside = begin(tmp_path, **units, lr_scheduler_params__reduce_lr_on_plateau__patience=9)
    assert aside is not None
    key = "lr_scheduler_params.reduce_lr_on_plateau.patience"
    assert aside.differences == [f"{key}=9 (was 5)"]
    begin(tmp_path, **units)
    _, aside = begin(tmp_path, "b", **units)
    assert aside is not None and aside.differences == ["dataset 1.98.0 (was 1.97.0)"]


def test_settings_that_differ_far_into_a_long_value_are_named(tmp_path: Path) -> None:
    def changes(last: int) -> dict[str, Any]:
        return {"model_params": {f"a_long_name_{n}": n for n in range(40)} | {"z": last}}

    begin(tmp_path, **changes(1))
    _, aside = begin(tmp_path, **changes(2))
    assert aside is not None
    (difference,) = aside.differences
    assert difference.startswith("model_params=") and len(difference) < 500


def test_results_of_unknown_settings_are_set_aside_too(tmp_path: Path) -> None:
    for text in (
        "{",
        "[" * 100_000,
        "1" * 5000,
        "[]",
        '{"stages": {"etl": 1}}',
        '{"settings": 3}',
        '{"exports": {}}',
        "{}",
    ):
        (tmp_path / "run.json").write_text(text)
        _, aside = begin(tmp_path)
        assert aside is not None and (aside.directory / "run.json").read_text() == text
        assert aside.differences == ["no settings are known of the earlier results"]
    record, _ = begin(tmp_path)
    record.update(results_key="of an earlier version")
    _, aside = begin(tmp_path)
    assert aside is not None
    assert aside.differences == ["they are of another version of capfinder"]
    old = record.values["settings"]
    del old["train_params"]["patience"]
    record.update(results_key="of an earlier version", settings=old)
    _, aside = begin(tmp_path)
    assert aside is not None
    assert aside.differences == ["train_params.patience=120 (was no setting)"]


def test_workers_on_the_same_results_keep_what_the_others_note(tmp_path: Path) -> None:
    (one, _), (other, _) = begin(tmp_path), begin(tmp_path)
    one.finish_stage("tune", seconds=3, summary="3 trials", why="new")
    other.finish_stage("train", seconds=2, summary="4 epochs", why="new")
    one.update(exports=[])
    noted = json.loads((tmp_path / "run.json").read_text())
    assert list(noted["stages"]) == ["tune", "train"] and noted["exports"] == []


def test_a_reused_result_keeps_its_time_and_the_summary_says_why(tmp_path: Path) -> None:
    record, _ = begin(tmp_path)
    record.finish_stage("etl", seconds=61.0, summary="dataset 1.0.0", why="built", key={"a": "k"})
    made = record.stage("etl")
    record.finish_stage("etl", seconds=0.1, summary="dataset 1.0.0", why="reused", is_reused=True)
    assert record.stage("etl") == made | {"why": "reused", "key": {}}
    record.finish_stage("tune", seconds=9.0, summary="3 trials", why="reused", is_reused=True)
    record.finish_stage("train", seconds=9.0, summary="4 epochs", why="new")
    rows = {
        stage: run_summary.row(
            record,
            stage,
            asked=("etl", "tune", "evaluate", "export"),
            ran={"etl": 0.1},
            skipped={"evaluate": "nothing to do"},
        )[1:]
        for stage in run_record.STAGES
    }
    finished = record.stage("tune")["finished"]
    assert rows == {
        "etl": ("0:00", "dataset 1.0.0", "reused"),
        "tune": ("earlier", "3 trials", f"reused: done {finished}"),
        "train": ("-", "4 epochs", f"not asked for, done {record.stage('train')['finished']}"),
        "evaluate": ("-", "", "nothing to do"),
        "export": ("earlier", "", "reused: it was there"),
    }


@pytest.mark.parametrize("name", ["/etc", "..", "a/../../b", None, 3, ["a"]])
def test_what_a_record_names_outside_of_its_directory_is_refused(
    tmp_path: Path, name: object
) -> None:
    assert run_record.inside(tmp_path, "a/b") == tmp_path / "a" / "b"
    with pytest.raises(InputError, match=r"run\.json: names .* which isn't in"):
        run_record.inside(tmp_path, name)
