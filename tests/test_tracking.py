"""Comet tracking: the archive holds what was logged and nothing else, and no network is waited for.

The server is a small one on loopback; the client is the real one. Artifacts: test_remote.py."""

import json
import logging
import os
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from capfinder import log, tracking
from capfinder.errors import SettingsError
from capfinder.tracking import client, sender
from tests.comet_server import Server

KEY = "k3yThatMustNeverBeSeenAnywhere0"


@pytest.fixture(autouse=True)
def log_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No key and no Comet settings of whoever runs the tests; a debug log to read."""
    for name in [name for name in os.environ if name.startswith("COMET_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    path = log.start(tmp_path / "logs", debug=True)
    assert path is not None
    yield path
    log.stop()


def read_archive(directory: Path) -> tuple[list[dict], dict[str, bytes], bytes]:
    """The one archive's messages, its files by their logged names, and all of its bytes."""
    (path,) = directory.glob("*.zip")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    messages = [json.loads(line) for line in members["messages.json"].splitlines()]
    files = {}
    for message in messages:
        if message["type"] == "file_upload":
            payload = message["payload"]
            files[payload["additional_params"]["fileName"]] = members[payload["file_path"]]
    return messages, files, b"\n".join(members.values())


def parameters(messages: list[dict]) -> dict:
    found = [m["payload"]["param"] for m in messages if m["type"] == "parameter_msg"]
    return {p["paramName"]: p["paramValue"] for p in found if p["source"] == "manual"}


def points(messages: list[dict], name: str) -> list[tuple[int, float]]:
    found = [m["payload"]["metric"] for m in messages if m["type"] == "metric_msg"]
    return [(p["epoch"], p["metricValue"]) for p in found if p["metricName"] == name]


def test_the_archive_holds_what_was_logged_and_no_key_code_host_or_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_file: Path
):
    monkeypatch.setenv("COMET_API_KEY", KEY)
    monkeypatch.setenv("SOME_PASSWORD", "hunter2hunter2")
    logged = tmp_path / "run.log"
    logged.write_text("the log")
    model = tmp_path / "saved_model"
    (model / "variables").mkdir(parents=True)
    (model / "saved_model.pb").write_bytes(b"graph")
    (model / "variables" / "data").write_bytes(b"weights")

    with tracking.start(
        "offline", project="caps", output_dir=tmp_path / "out", name="first"
    ) as tracker:
        tracker.log_parameters(
            {"shared_params": {"batch_size": 32, "dtype": "float16"}, "classes": (0, 1), "no": None}
        )
        for epoch in (1, 2, 3):
            tracker.log_metrics(
                {"val_loss": 1 / epoch, "learning_rate": 0.001 * epoch},
                step=10 * epoch,
                epoch=epoch,
            )
        tracker.log_metrics({"loss": 0.5}, epoch=3, prefix="test")
        tracker.log_confusion_matrix([[5, 1], [2, 7]], ["cap_0", "cap_1"], name="test_matrix")
        tracker.log_file(logged)
        tracker.log_file(logged, name="other.log")
        tracker.log_model(model, name="classifier")

    messages, files, everything = read_archive(tmp_path / "out" / "comet")
    assert parameters(messages) == {
        "shared_params.batch_size": 32,
        "shared_params.dtype": "float16",
        "classes": "(0, 1)",
        "no": "null",
    }
    assert points(messages, "val_loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert points(messages, "learning_rate") == [(1, 0.001), (2, 0.002), (3, 0.003)]
    assert points(messages, "test_loss") == [(3, 0.5)]
    assert json.loads(files["test_matrix.json"])["matrix"] == [[5, 1], [2, 7]]
    assert json.loads(files["test_matrix.json"])["labels"] == ["cap_0", "cap_1"]
    assert files["run.log"] == files["other.log"] == b"the log"
    assert {b"graph", b"weights"} <= set(files.values())
    text = everything.decode()
    assert '"project_name": "caps"' in text
    assert '"value":"first"' in text
    host = f'"{socket.gethostname()}"'  # as a JSON value: the name alone may be two letters
    for secret in (KEY, "hunter2hunter2", host, str(Path.home()), __file__):
        assert secret not in text
    assert KEY not in log_file.read_text()
    assert f"comet upload {tmp_path}" in log_file.read_text()


def test_auto_without_a_key_goes_offline(tmp_path: Path):
    tracking.start("auto", project="caps", output_dir=tmp_path, name="n").end()
    assert len(list((tmp_path / "comet").glob("*.zip"))) == 1


def test_off_writes_nothing_and_takes_every_call(tmp_path: Path):
    with tracking.start("off", project="caps", output_dir=tmp_path / "out", name="n") as tracker:
        tracker.log_parameters({"a": 1})
        tracker.log_metrics({"loss": 1.0}, epoch=1)
        tracker.log_confusion_matrix([[1]], ["cap_0"], name="m")
        tracker.log_file(tmp_path / "absent")
        tracker.log_model(tmp_path / "absent", name="m")
    assert not (tmp_path / "out").exists()


def test_online_without_a_key_says_how_to_set_one(tmp_path: Path):
    with pytest.raises(SettingsError, match="COMET_API_KEY"):
        tracking.start("online", project="caps", output_dir=tmp_path, name="n")


def test_a_key_in_comets_own_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server = Server()
    Path(".comet.config").write_text(f"[comet]\napi_key = {KEY}\nurl_override = {server.url}\n")
    with tracking.start("online", project="caps", output_dir=tmp_path, name="n") as tracker:
        tracker.log_metrics({"loss": 0.25}, epoch=1)
    server.stop()
    assert server.saw("logger/experiment/metric")


def test_online_sends_to_the_server_and_leaves_no_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_file: Path
):
    server = Server()
    monkeypatch.setenv("COMET_API_KEY", KEY)
    monkeypatch.setenv("COMET_URL_OVERRIDE", server.url)
    with tracking.start("auto", project="caps", output_dir=tmp_path / "out", name="n") as tracker:
        tracker.log_parameters({"batch_size": 32})
        tracker.log_metrics({"loss": 0.25}, epoch=1)
        tracker.log_confusion_matrix([[1]], ["cap_0"], name="m")
    server.stop()
    for part in ("experiment/parameter", "experiment/metric", "fileName=m.json"):
        assert server.saw(part)
    assert not (tmp_path / "out" / "comet").exists()
    assert "Comet: online" in log_file.read_text()
    assert KEY not in log_file.read_text()


def test_a_network_lost_while_running_leaves_an_archive_and_never_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_file: Path
):
    server = Server()
    monkeypatch.setenv("COMET_API_KEY", KEY)
    monkeypatch.setenv("COMET_URL_OVERRIDE", server.url)
    monkeypatch.setenv("COMET_HTTP_SESSION_RETRY_TOTAL", "0")
    monkeypatch.setattr(sender, "START_DELAY_SECONDS", 0.0)
    tracker = tracking.start("auto", project="caps", output_dir=tmp_path, name="n")
    deadline = time.monotonic() + 20
    while not server.saw("log-other") and time.monotonic() < deadline:
        time.sleep(0.05)
    server.stop()
    tracker.log_metrics({"loss": 0.125}, epoch=7)
    time.sleep(5)  # training goes on; the client sees that nothing gets through
    tracker.end()
    messages, _, everything = read_archive(tmp_path / "comet")
    assert points(messages, "loss") == [(7, 0.125)]
    assert KEY not in everything.decode()
    text = log_file.read_text()
    assert "comet upload --force-reupload" in text
    assert text.count("| WARNING") == 1
    assert KEY not in text


def test_a_key_without_a_network_goes_offline_and_delays_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_file: Path
):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, never answers
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/clientlib/"
        monkeypatch.setenv("COMET_API_KEY", KEY)
        monkeypatch.setenv("COMET_URL_OVERRIDE", address)
        monkeypatch.setattr(client, "PROBE_SECONDS", 0.5)
        started = time.monotonic()
        tracker = tracking.start("online", project="caps", output_dir=tmp_path, name="n")
        tracker.log_metrics({"loss": 0.5}, epoch=1)
        assert time.monotonic() - started < 60  # an answer is not waited for
        tracker.end()
    messages, _, _ = read_archive(tmp_path / "comet")
    assert points(messages, "loss") == [(1, 0.5)]
    assert "no answer from" in log_file.read_text()


def test_a_server_that_refuses_the_run_gives_an_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_file: Path
):
    server = Server(status=400)
    monkeypatch.setenv("COMET_API_KEY", KEY)
    monkeypatch.setenv("COMET_URL_OVERRIDE", server.url)
    with tracking.start("auto", project="caps", output_dir=tmp_path, name="n") as tracker:
        tracker.log_metrics({"loss": 0.5}, epoch=1)
    server.stop()
    messages, _, _ = read_archive(tmp_path / "comet")
    assert points(messages, "loss") == [(1, 0.5)]
    assert log_file.read_text().count("| WARNING") == 1
    assert KEY not in log_file.read_text()


def test_a_call_that_fails_is_one_warning_and_the_rest_is_kept(tmp_path: Path, log_file: Path):
    with tracking.start("offline", project="caps", output_dir=tmp_path, name="n") as tracker:
        tracker.log_file(tmp_path / "absent_1")
        tracker.log_model(tmp_path / "absent_2", name="m")
        tracker.log_metrics({"loss": 0.5}, epoch=1)
    messages, _, _ = read_archive(tmp_path / "comet")
    assert points(messages, "loss") == [(1, 0.5)]
    assert log_file.read_text().count("| WARNING") == 1


def test_an_output_dir_that_cannot_be_written_is_one_warning(tmp_path: Path, log_file: Path):
    (tmp_path / "comet").write_text("a file where the directory should be")
    with tracking.start("offline", project="caps", output_dir=tmp_path, name="n") as tracker:
        tracker.log_metrics({"loss": 0.5}, epoch=1)
    assert log_file.read_text().count("| WARNING") == 1


def test_end_twice_and_calls_after_it_do_nothing(tmp_path: Path):
    tracker = tracking.start("offline", project="caps", output_dir=tmp_path, name="n")
    tracker.end()
    tracker.end()
    tracker.log_metrics({"loss": 1.0})
    assert len(list((tmp_path / "comet").glob("*.zip"))) == 1


def test_the_client_is_imported_late_quietly_and_patches_nothing(tmp_path: Path):
    program = """
import sys
from capfinder import tracking
assert "comet_ml" not in sys.modules
hook, finders = sys.excepthook, list(sys.meta_path)
tracking.start("off", project="p", output_dir=None, name="n").end()
assert "comet_ml" not in sys.modules
from pathlib import Path
tracking.start("offline", project="p", output_dir=Path(sys.argv[1]), name="n").end()
assert "comet_ml" in sys.modules
assert sys.excepthook is hook
assert not [f for f in sys.meta_path if "comet" in type(f).__module__], sys.meta_path
for heavy in ("tensorflow", "keras", "jax", "torch", "sklearn"):  # matplotlib is, where installed
    assert heavy not in sys.modules, heavy
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_the_client_says_reaches_the_debug_log_only(
    tmp_path: Path, log_file: Path, capfd: pytest.CaptureFixture[str]
):
    with tracking.start("offline", project="caps", output_dir=tmp_path, name="n") as tracker:
        tracker.log_metrics({"loss": 0.5}, epoch=1)
    assert logging.getLogger("comet_ml").handlers  # the client's own, silenced
    assert "COMET" not in capfd.readouterr().err
