import os
import subprocess
import sys
import time
from pathlib import Path

from capfinder import files, run_record, settings
from capfinder.run_record import RunRecord


def test_a_run_that_waited_for_the_other_goes_on_with_its_results(tmp_path):
    first, second = RunRecord(tmp_path), RunRecord(tmp_path)
    first.begin("key", dataset={"version": "1.0.0"})
    second.begin("key", dataset={"version": "1.0.0"})
    assert not (tmp_path / "previous").exists()
    second.begin("other", dataset={"version": "1.1.0"})
    assert list((tmp_path / "previous").glob("*/run.json"))


def test_settings_that_change_no_weights_leave_results_where_they_are():
    def key(**runtime: object) -> str:
        changes = {f"runtime_params.{name}": value for name, value in runtime.items()}
        return run_record.results_key(
            settings.checked(settings.default_config(), changes), "dataset"
        )

    assert key(steps_per_call=4) == key(mesh=2) == key()
    assert key(microbatch=16) != key()


def test_what_killed_writers_left_goes_and_what_live_ones_write_stays(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        text=True,
        capture_output=True,
        check=True,
    ).stdout.strip()
    left = [f"{files.PARTIAL}run.json-{ended}.json", f"{files.PARTIAL}probe-{ended}"]
    kept = [f"{files.PARTIAL}run.json-{os.getpid()}.json", "run-1.json", "notes"]
    for name in [*left, *kept]:
        (tmp_path / name).touch()
    (tmp_path / f"{files.PARTIAL}classifier-{ended}").mkdir()
    run_record.prepare_output_dir(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_a_writer_uses_a_name_that_remove_dead_understands(tmp_path: Path):
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
