"""The ETL with Comet: what one machine built, another one fetches (the rest: test_remote)."""

import json
import shutil
from pathlib import Path

import pytest
from csv_input import write_classes

from capfinder import files, pipeline, settings
from tests.comet_server import Refused, Server
from tests.test_remote import log_file, server, shared_server  # noqa: F401

pytestmark = pytest.mark.usefixtures("log_file")


def run(data: Path, output_dir: Path, **overrides: object) -> dict:
    """The ETL stage through the pipeline; what run.json then says of the dataset."""
    values = {
        "etl_params.caps_data_dir": str(data),
        "etl_params.examples_per_class": None,
        "shared_params.output_dir": str(output_dir),
        "shared_params.num_classes": 2,
        "shared_params.target_length": 24,
        "shared_params.train_test_fraction": 0.8,
        **{key.replace("__", "."): value for key, value in overrides.items()},
    }
    pipeline.run(settings.checked(settings.default_config(), values), stages=("etl",))
    return files.read_json(output_dir / "run.json")["dataset"]


def content(output_dir: Path, version: str) -> dict[str, bytes]:
    directory = output_dir / "dataset" / "cap_data" / version
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_what_one_run_builds_another_fetches(server: Server, tmp_path: Path):  # noqa: F811
    data = write_classes(tmp_path / "caps")
    first = run(data, tmp_path / "one")
    assert first["why"].startswith("built from")
    assert first["artifact"].endswith("/cap_data:1.0.0")
    (version,) = server.artifacts["cap_data"]
    assert json.loads(version.metadata)["fingerprint"] == first["fingerprint"]

    same = run(data, tmp_path / "two")  # the CSV files again, on another machine
    assert same["why"].startswith(f"fetched {first['artifact']}")
    assert content(tmp_path / "two", "1.0.0") == content(tmp_path / "one", "1.0.0")
    assert len(server.artifacts["cap_data"]) == 1

    other = run(data, tmp_path / "three", split_params__seed=7)
    assert (other["version"], len(server.artifacts["cap_data"])) == ("1.1.0", 2)
    shutil.rmtree(data)
    newest = run(data, tmp_path / "four", split_params__seed=7)
    assert (newest["version"], newest["fingerprint"]) == ("1.1.0", other["fingerprint"])
    assert "the newest in Comet" in newest["why"]
    named = run(data, tmp_path / "five", etl_params__use_remote_dataset_version="1.0.0")
    assert named["why"] == f"asked for; fetched {first['artifact']}"
    assert content(tmp_path / "five", "1.0.0") == content(tmp_path / "one", "1.0.0")


def test_local_only_neither_fetches_nor_sends(server: Server, tmp_path: Path):  # noqa: F811
    data = write_classes(tmp_path / "caps")
    run(data, tmp_path / "one")
    server.artifacts["cap_data"][0].version = "7.0.0"
    alone = run(data, tmp_path / "two", etl_params__use_remote_dataset_version="")
    assert (alone["version"], "artifact" in alone) == ("1.0.0", False)
    assert alone["why"].startswith("built from")
    numbered = run(data, tmp_path / "three", split_params__seed=7)
    assert numbered["version"] == "7.1.0"


def test_an_upload_that_failed_is_tried_again_by_the_next_run(server: Server, tmp_path: Path):  # noqa: F811
    data = write_classes(tmp_path / "caps")

    def refuse(path: str) -> None:
        if "upload" in path:
            raise Refused(500, "out of order")

    server.fail = refuse
    first = run(data, tmp_path / "one")
    assert "artifact" not in first
    server.fail = lambda path: None
    server.artifacts.clear()
    again = run(data, tmp_path / "one")
    assert again["why"].startswith("reused")
    assert again["artifact"].endswith("/cap_data:1.0.0")
    assert not list((tmp_path / "one" / "dataset").glob("*unpublished*"))
