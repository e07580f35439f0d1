"""Dataset versions to and from Comet: the real client against the server of comet_server.py.

Not exercised, as only the service itself has it: direct transfer of parts to its object store,
throttling, and the exact errors of its accounts and plans."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from capfinder import files, log, tracking
from capfinder.data import artifacts, versions
from capfinder.data.artifact_index import INDEX, chunk_name
from capfinder.errors import InputError, SettingsError
from capfinder.settings import default_config
from capfinder.stages import remote
from capfinder.stages.remote import Remote
from capfinder.tracking import CometError, Tracker, client, sender, store
from tests.comet_server import WORKSPACE, Refused, Server, Version
from tests.test_artifacts import FINGERPRINT, dataset_files, tree, write_dataset

KEY = "k3yThatMustNeverBeSeenAnywhere0"
OTHER = "cd" * 32


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def server(shared_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The one server, empty and well-behaved again; the environment leads to it."""
    shared_server.__dict__.update(artifacts={}, requests=[], status=200)
    shared_server.fail = lambda path: None
    shared_server.tamper = lambda name, data: data
    monkeypatch.setenv("COMET_API_KEY", KEY)
    monkeypatch.setenv("COMET_URL_OVERRIDE", shared_server.url)
    return shared_server


@pytest.fixture(autouse=True)
def log_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in [name for name in os.environ if name.startswith("COMET_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COMET_HTTP_SESSION_RETRY_TOTAL", "0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sender, "START_DELAY_SECONDS", 0.0)
    monkeypatch.setattr(store, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(store, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(artifacts, "CHUNK_BYTES", 1000)
    path = log.start(tmp_path / "logs", debug=True)
    assert path is not None
    yield path
    log.stop()
    assert KEY not in path.read_text()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Of the local versions; what a run may leave beside it are empty lock files."""
    root = tmp_path / "run" / "dataset" / "cap_data"
    root.mkdir(parents=True)
    return root


def config_of(wanted: str = "latest", mode: str = "auto") -> ConfigDict:
    config = default_config()
    config.etl_params.use_remote_dataset_version = wanted
    config.tracking_params.mode = mode
    return config


def connected(root: Path, wanted: str = "latest") -> Remote:
    found = remote.connect(config_of(wanted), root)
    assert found is not None
    return found


def packed(tmp_path: Path, **what: str) -> dict[str, bytes]:
    """The files of an artifact as `pack` makes them."""
    version = what.get("version", "1.2.0")
    directory = tmp_path / "packed" / version
    directory.mkdir(parents=True)
    dataset = write_dataset(tmp_path / "elsewhere", **what)
    artifacts.pack(dataset, directory, chunk_bytes=1000)
    return tree(directory)


def stored(
    server: Server,
    tmp_path: Path,
    version: str = "1.2.0",
    fingerprint: str = FINGERPRINT,
    **what: object,
) -> Version:
    """A version in the server, as somebody else's run would have left it."""
    metadata = json.dumps({"task": remote.TASK, "fingerprint": fingerprint})
    new = Version(version, metadata, **{"state": "CLOSED"} | what)  # type: ignore[arg-type]
    return server.add("cap_data", new, packed(tmp_path, version=version, fingerprint=fingerprint))


def left_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def online_tracker(tmp_path: Path) -> Tracker:
    return tracking.start("auto", project="dataset", output_dir=tmp_path / "run", name="n")


def warnings(log_file: Path) -> list[str]:
    return [line for line in log_file.read_text().splitlines() if "| WARNING" in line]


def test_a_version_goes_up_and_comes_back_byte_for_byte(
    server: Server, root: Path, tmp_path: Path, log_file: Path
):
    dataset = write_dataset(root)
    up = connected(root)
    assert (up.versions(), up.numbers(), up.fetch_latest()) == ([], [], None)
    with online_tracker(tmp_path) as tracker:
        tracker.log_parameters({"dataset_version": "1.2.0"})
        label = up.upload(dataset, tracker)
        assert left_in(root.parent) == [".upload.lock", "cap_data"]  # the parts are gone
    assert label == f"Comet artifact {WORKSPACE}/cap_data:1.2.0"

    (version,) = server.artifacts["cap_data"]
    assert version.state == "CLOSED"
    metadata = json.loads(version.metadata)
    assert metadata["fingerprint"] == FINGERPRINT
    assert metadata["task"] == "RNA caps classification"
    assert all(len(data) <= 1000 for name, (_, data) in version.files.items() if name != INDEX)
    assert len(version.files) > 5

    other = tmp_path / "other" / "dataset" / "cap_data"
    down = connected(other)
    assert down.numbers() == ["1.2.0"]
    back = down.fetch_latest()
    assert back is not None
    assert tree(back.directory) == dataset_files()
    assert back.directory == other / "1.2.0"
    assert left_in(other) == ["1.2.0"]
    assert warnings(log_file) == []
    # parameters and artifact are of one experiment, which was ended
    runs = [path for path, _ in server.requests if path.endswith("logger/add/run")]
    assert len(runs) == 1


def test_the_files_stay_until_the_last_of_them_has_arrived(
    server: Server, root: Path, tmp_path: Path
):
    """The original Capfinder deletes them while they are sent."""
    dataset = write_dataset(root)
    scratch = root.parent / "upload"
    slow = chunk_name(2)
    seen: list[bool] = []

    def delay(path: str) -> None:
        if f"fileName={slow}" in path:
            time.sleep(0.3)
            seen.append((scratch / slow).exists())

    server.fail = delay
    with online_tracker(tmp_path) as tracker:
        assert connected(root).upload(dataset, tracker)
    assert seen == [True]
    assert not scratch.exists()
    assert slow in server.artifacts["cap_data"][0].files


def test_a_file_that_cannot_be_sent_is_one_warning_and_the_dataset_stays(
    server: Server, root: Path, tmp_path: Path, log_file: Path, monkeypatch: pytest.MonkeyPatch
):
    dataset = write_dataset(root)

    def refuse(path: str) -> None:
        if f"fileName={chunk_name(1)}" in path:
            raise Refused(400, "disk quota")

    # The client tries for half a minute; the waits between are shortened, nothing else.
    monkeypatch.setattr("comet_ml.connection.connection_helpers.BACKOFF_MAX", 0.01)
    server.fail = refuse
    with online_tracker(tmp_path) as tracker:
        assert connected(root).upload(dataset, tracker) is None
    assert server.artifacts["cap_data"][0].state == "ERROR"
    assert any("stays local" in line for line in warnings(log_file))
    assert left_in(root.parent) == [".upload.lock", "cap_data"]
    assert tree(dataset.directory) == dataset_files()

    # its number is taken, but nobody is given it
    again = connected(root)
    assert again.numbers() == ["1.2.0"]
    assert again.fetch_same(FINGERPRINT) is None
    assert again.fetch_latest() is None
    with pytest.raises(InputError, match="never finished"):
        again.fetch_named("1.2.0")
    with online_tracker(tmp_path) as tracker:
        assert again.upload(dataset, tracker) == ""


def test_an_upload_that_stalls_is_given_up(
    server: Server, root: Path, tmp_path: Path, log_file: Path, monkeypatch: pytest.MonkeyPatch
):
    release = threading.Event()
    monkeypatch.setattr(store, "STALL_SECONDS", 0.3)

    def hang(path: str) -> None:
        if f"fileName={chunk_name(1)}" in path:
            release.wait(20)

    server.fail = hang
    with online_tracker(tmp_path) as tracker:
        assert connected(root).upload(write_dataset(root), tracker) is None
        release.set()
    assert any("nothing arrived for 0.3 s" in line for line in warnings(log_file))


def test_a_version_that_is_never_closed_is_given_up(
    server: Server, root: Path, tmp_path: Path, log_file: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(store, "CLOSE_SECONDS", 0.3)

    def refuse(path: str) -> None:
        if "write/artifacts/state" in path:
            raise Refused(400, "not now")

    server.fail = refuse
    with online_tracker(tmp_path) as tracker:
        assert connected(root).upload(write_dataset(root), tracker) is None
    assert any("not closed for 0.3 s" in line for line in warnings(log_file))


def test_what_arrives_changed_is_noticed(
    server: Server, root: Path, tmp_path: Path, log_file: Path
):
    def spoil(path: str) -> None:
        if "artifacts/version/files" in path and (found := server.artifacts["cap_data"][0].files):
            name = min(found)
            found[name] = (found[name][0], b"short")

    server.fail = spoil
    with online_tracker(tmp_path) as tracker:
        assert connected(root).upload(write_dataset(root), tracker) is None
    assert any("isn't what was sent" in line for line in warnings(log_file))


def test_the_same_content_is_not_sent_twice(server: Server, root: Path, tmp_path: Path):
    stored(server, tmp_path)
    with online_tracker(tmp_path) as tracker:
        label = connected(root).upload(write_dataset(root), tracker)
    assert label == f"Comet artifact {WORKSPACE}/cap_data:1.2.0"
    assert not server.saw("upsert")


def test_a_number_taken_by_another_content_is_never_overwritten(
    server: Server, root: Path, tmp_path: Path, log_file: Path
):
    stored(server, tmp_path, fingerprint=OTHER)
    before = dict(server.artifacts["cap_data"][0].files)
    with online_tracker(tmp_path) as tracker:
        assert connected(root).upload(write_dataset(root), tracker) == ""
    assert server.artifacts["cap_data"][0].files == before
    assert any("another content" in line for line in warnings(log_file))


def test_a_number_taken_meanwhile_is_refused_by_the_server(
    server: Server, root: Path, tmp_path: Path, log_file: Path
):
    def race(path: str) -> None:
        if "upsert" in path:
            server.artifacts.setdefault("cap_data", [Version("1.2.0", None)])

    server.fail = race
    with online_tracker(tmp_path) as tracker:
        assert connected(root).upload(write_dataset(root), tracker) is None
    assert any("exists already" in line for line in warnings(log_file))


def test_two_uploads_of_one_directory_do_not_mix(
    server: Server, root: Path, tmp_path: Path, log_file: Path
):
    dataset = write_dataset(root)
    with (
        files.exclusive_lock(root.parent / ".upload.lock", holder="another upload"),
        online_tracker(tmp_path) as tracker,
    ):
        assert connected(root).upload(dataset, tracker) is None
    assert any("in use by another upload" in line for line in warnings(log_file))


def test_what_a_killed_upload_left_is_cleared_but_not_under_a_running_one(root: Path):
    left = root.parent / "upload"
    left.mkdir()
    (left / chunk_name(0)).write_bytes(b"x")
    with files.exclusive_lock(root.parent / ".upload.lock", holder="another upload"):
        remote.clear_upload(root)
        assert left.exists()
    remote.clear_upload(root)
    assert not left.exists()


def test_an_offline_run_uploads_nothing(server: Server, root: Path, tmp_path: Path, log_file: Path):
    dataset = write_dataset(root)
    with tracking.start("off", project="p", output_dir=tmp_path, name="n") as tracker:
        assert connected(root).upload(dataset, tracker) is None
    assert not server.saw("upsert")
    assert any("isn't online" in line for line in warnings(log_file))


def test_versions_are_numbered_as_numbers_and_others_are_left_out(server: Server, root: Path):
    for number in ("1.9.0", "1.10.0", "2.0.0-beta", "1.2.0"):
        server.add("cap_data", Version(number, None, "CLOSED", ["best"]), {"a": b""})
    assert connected(root).numbers() == ["1.2.0", "1.9.0", "1.10.0"]
    assert versions.next_version(connected(root).numbers()) == "1.11.0"
    assert connected(root).versions()[0].aliases == ("best",)


def test_latest_is_the_highest_number_not_the_last_written(
    server: Server, root: Path, tmp_path: Path
):
    stored(server, tmp_path, "1.10.0", "10" * 32)
    stored(server, tmp_path, "1.9.0", "09" * 32)
    found = connected(root).fetch_latest()
    assert found is not None
    assert (found.version, found.fingerprint) == ("1.10.0", "10" * 32)
    assert left_in(root) == ["1.10.0"]  # a number, never the word "latest"


def test_latest_passes_over_what_another_program_wrote_and_says_so(
    server: Server, root: Path, tmp_path: Path, log_file: Path
):
    stored(server, tmp_path)
    server.add("cap_data", Version("3.0.0", '{"task": "x"}', "CLOSED"), {"dataset.tar.gz.000": b""})
    found = connected(root).fetch_latest()
    assert found is not None
    assert found.version == "1.2.0"
    assert any("3.0.0: passed over" in line for line in warnings(log_file))


def test_the_original_capfinders_artifact_is_recognised_without_fetching_it(
    server: Server, root: Path
):
    original = {"dataset.tar.gz.000": b"x" * 100, "tar_hash.json": b'{"tar_hash": "0"}'}
    server.add("cap_data", Version("0.3.0", '{"task": "x"}', "CLOSED"), original)
    for ask in (
        lambda: connected(root).fetch_latest(),
        lambda: connected(root).fetch_named("0.3.0"),
    ):
        with pytest.raises(InputError, match=r"cap_data:0\.3\.0: is in the CSV format of Capf"):
            ask()
    assert not server.saw("get-asset")


def test_an_alias_becomes_a_number(server: Server, root: Path, tmp_path: Path):
    stored(server, tmp_path, "1.2.0", aliases=["paper"])
    stored(server, tmp_path, "1.3.0", OTHER)
    found = connected(root).fetch_named("paper")
    assert found.version == "1.2.0"
    assert left_in(root) == ["1.2.0"]


def test_a_version_that_is_nowhere_is_an_error_that_lists_both_places(
    server: Server, root: Path, tmp_path: Path
):
    stored(server, tmp_path)
    write_dataset(root, version="1.4.0")
    with pytest.raises(InputError, match=r"=9\.0\.0.*there: 1\.4\.0.*lab \(there: 1\.2\.0\)"):
        connected(root).fetch_named("9.0.0")


def test_the_version_with_the_same_fingerprint_is_fetched_the_newest_of_several(
    server: Server, root: Path, tmp_path: Path
):
    stored(server, tmp_path, "1.0.0")
    stored(server, tmp_path, "1.2.0")
    stored(server, tmp_path, "1.3.0", OTHER)
    found = connected(root).fetch_same(FINGERPRINT)
    assert found is not None
    assert found.version == "1.2.0"
    assert connected(root).fetch_same("ef" * 32) is None


def test_a_local_version_of_the_same_content_is_used_without_fetching(
    server: Server, root: Path, tmp_path: Path
):
    stored(server, tmp_path)
    local = write_dataset(root)
    (local.directory / "note.txt").write_text("mine")
    found = connected(root).fetch_named("1.2.0")
    assert found.directory == local.directory
    assert (local.directory / "note.txt").exists()
    assert sum("get-asset" in path for path, _ in server.requests) == 1  # the index alone


def test_a_local_version_of_another_content_is_an_error_that_names_both(
    server: Server, root: Path, tmp_path: Path
):
    stored(server, tmp_path, fingerprint=OTHER)
    write_dataset(root)
    with pytest.raises(InputError) as caught:
        connected(root).fetch_named("1.2.0")
    for part in (FINGERPRINT, OTHER, str(root / "1.2.0"), f"{WORKSPACE}/cap_data:1.2.0"):
        assert part in str(caught.value)
    assert tree(root / "1.2.0") == dataset_files()


def test_a_version_that_holds_another_number_is_refused(server: Server, root: Path, tmp_path: Path):
    version = stored(server, tmp_path)
    version.version = "1.5.0"
    with pytest.raises(InputError, match=r"holds version 1\.2\.0"):
        connected(root).fetch_named("1.5.0")
    assert left_in(root) == []


def test_metadata_that_claim_another_fingerprint_are_not_believed(
    server: Server, root: Path, tmp_path: Path, log_file: Path
):
    stored(server, tmp_path).metadata = json.dumps({"fingerprint": OTHER})
    assert connected(root).fetch_same(OTHER) is None
    assert left_in(root) == []
    assert any("than its metadata says" in line for line in warnings(log_file))


TAMPERING: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("how", TAMPERING)
def test_a_damaged_download_leaves_nothing(
    server: Server, root: Path, tmp_path: Path, how: str, log_file: Path
):
    stored(server, tmp_path)
    server.tamper = lambda name, data: TAMPERING[how](data) if name == chunk_name(2) else data
    with pytest.raises(InputError, match="damaged"):
        connected(root).fetch_named("1.2.0")
    with pytest.raises(InputError, match="damaged"):
        connected(root).fetch_latest()
    assert left_in(root) == []
    assert connected(root).fetch_same(FINGERPRINT) is None  # built instead, with a warning
    assert len(warnings(log_file)) == 1


def test_a_file_of_the_wrong_size_is_refused_before_it_is_fetched(
    server: Server, root: Path, tmp_path: Path
):
    version = stored(server, tmp_path)
    asset, data = version.files[chunk_name(0)]
    version.files[chunk_name(0)] = (asset, data + b"more")
    with pytest.raises(InputError, match="size differs"):
        connected(root).fetch_named("1.2.0")
    assert left_in(root) == []


def test_a_missing_part_is_noticed_before_anything_is_fetched(
    server: Server, root: Path, tmp_path: Path
):
    version = stored(server, tmp_path)
    del version.files[chunk_name(3)]
    with pytest.raises(InputError, match=f"lacks {chunk_name(3)}"):
        connected(root).fetch_named("1.2.0")


def test_a_download_that_breaks_off_is_tried_again(server: Server, root: Path, tmp_path: Path):
    stored(server, tmp_path)
    tries = {"cut": 0, "fail": 0}

    def cut(name: str, data: bytes) -> bytes:
        if name == chunk_name(1) and tries["cut"] < 2:
            tries["cut"] += 1
            return data[: len(data) // 2]
        return data

    def fail(path: str) -> None:
        if "get-asset" in path and tries["fail"] < 1:
            tries["fail"] += 1
            raise Refused(503, "busy")

    server.tamper, server.fail = cut, fail
    found = connected(root).fetch_named("1.2.0")
    assert tree(found.directory) == dataset_files()
    assert tries == {"cut": 2, "fail": 1}


def test_bytes_that_are_thrown_away_do_not_count_as_progress(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stored(server, tmp_path)
    monkeypatch.setattr(store, "BLOCK_BYTES", 100)
    broken = iter((True, False))
    server.tamper = lambda name, data: data[:770] if next(broken, False) else data
    kept = tracking.ArtifactStore.open("cap_data")
    assert kept is not None
    file = kept.files("1.2.0")[chunk_name(0)]
    steps: list[int] = []
    kept.download(file, tmp_path / "part", steps.append)
    assert sum(steps) == file.size == 1000
    assert min(steps) < 0
    assert (tmp_path / "part").read_bytes() == server.artifacts["cap_data"][0].files[file.name][1]


def test_a_file_larger_than_announced_is_not_written_on(server: Server, root: Path, tmp_path: Path):
    stored(server, tmp_path)
    files_of = server._artifacts_version_files

    def less(query: dict[str, str]) -> dict:
        reply = files_of(query)
        return {"files": [file | {"fileSize": 10} for file in reply["files"]]}

    server._artifacts_version_files = less  # type: ignore[method-assign]
    try:
        kept = tracking.ArtifactStore.open("cap_data")
        assert kept is not None
        file = kept.files("1.2.0")[chunk_name(0)]
        with pytest.raises(CometError, match="more than the 10 bytes"):
            kept.download(file, tmp_path / "part", lambda size: None)
        assert (tmp_path / "part").stat().st_size <= 10
    finally:
        del server._artifacts_version_files
    index = kept.files("1.2.0")[INDEX]
    with pytest.raises(CometError, match="100 at most"):
        kept.read(index, limit=100)


def test_latest_says_when_a_local_version_is_newer(
    server: Server, root: Path, tmp_path: Path, log_file: Path
):
    stored(server, tmp_path, "1.2.0")
    write_dataset(root, version="1.10.0", fingerprint=OTHER)
    found = connected(root).fetch_latest()
    assert found is not None
    assert found.version == "1.2.0"
    assert any("1.10.0 is newer" in line for line in warnings(log_file))


def test_a_download_that_never_succeeds_is_an_error_or_a_warning(
    server: Server, root: Path, tmp_path: Path, log_file: Path
):
    stored(server, tmp_path)
    server.tamper = lambda name, data: data[:10] if name == chunk_name(1) else data
    with pytest.raises(CometError, match=chunk_name(1)):
        connected(root).fetch_named("1.2.0")
    assert connected(root).fetch_latest() is None
    assert left_in(root) == []
    assert len(warnings(log_file)) == 1


def test_answers_that_make_no_sense_are_one_line(server: Server, root: Path, tmp_path: Path):
    stored(server, tmp_path)
    for reply in ([], {"versions": 3}, {"versions": [{}]}, "text", None):
        server._artifacts_get = lambda query, reply=reply: reply  # type: ignore[method-assign]
        try:
            with pytest.raises(CometError) as caught:
                connected(root).versions()
        finally:
            del server._artifacts_get
        assert "\n" not in str(caught.value)


def test_a_link_to_somewhere_else_is_not_followed(server: Server, root: Path, tmp_path: Path):
    stored(server, tmp_path)
    whole = server._artifacts_version_files

    def with_link(query: dict[str, str]) -> dict:
        reply = whole(query)
        reply["files"][0] |= {"remote": True, "link": "s3://somewhere/else"}
        return reply

    server._artifacts_version_files = with_link  # type: ignore[method-assign]
    try:
        with pytest.raises(CometError, match="is a link"):
            connected(root).fetch_named("1.2.0")
    finally:
        del server._artifacts_version_files


def test_a_lost_network_is_one_warning_and_the_run_goes_on(
    root: Path, monkeypatch: pytest.MonkeyPatch, log_file: Path, tmp_path: Path
):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, never answers
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/clientlib/"
        monkeypatch.setenv("COMET_API_KEY", KEY)
        monkeypatch.setenv("COMET_URL_OVERRIDE", address)
        monkeypatch.setattr(client, "PROBE_SECONDS", 0.3)
        lost = connected(root)
        assert lost.fetch_same(FINGERPRINT) is None
        assert lost.numbers() == []
        assert lost.fetch_latest() is None
        assert len(warnings(log_file)) == 1
        assert "no answer from" in warnings(log_file)[0]
        with pytest.raises(CometError, match="no answer from"):
            lost.fetch_named("1.2.0")
        assert lost.upload(write_dataset(root), Tracker(None)) is None


def test_a_refused_key_is_one_line_without_the_key(server: Server, root: Path):
    def refuse(path: str) -> None:
        if "/rest/" in path:
            raise Refused(401, f"key {KEY} is unknown")

    server.fail = refuse
    with pytest.raises(CometError) as caught:
        connected(root).fetch_named("1.2.0")
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["off", "offline"])
def test_off_and_offline_never_ask_comet(server: Server, root: Path, mode: str):
    assert remote.connect(config_of(mode=mode), root) is None
    with pytest.raises(SettingsError, match=f"tracking_params.mode={mode} never asks Comet"):
        remote.required(config_of("1.2.0", mode), root)
    assert server.requests == []


def test_local_only_never_asks_comet(server: Server, root: Path):
    assert remote.connect(config_of(""), root) is None
    assert server.requests == []


def test_without_a_key_latest_is_local_and_a_number_says_how_to_set_one(root: Path):
    assert remote.connect(config_of("latest"), root) is None
    write_dataset(root, version="1.4.0")
    with pytest.raises(
        SettingsError, match=r"=1\.2\.0.*there: 1\.4\.0.*COMET_API_KEY.*comet login"
    ):
        remote.required(config_of("1.2.0"), root)


def test_the_workspace_of_the_environment_counts(
    server: Server, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stored(server, tmp_path)
    monkeypatch.setenv("COMET_WORKSPACE", "elsewhere")
    assert connected(root).versions() == []
    assert server.saw("artifacts/get?workspace=elsewhere")
    assert not server.saw("account-details")
