"""What a dry run tells that would else show after hours; tests/fuzz has what it must not do."""

import pytest
from csv_input import write_classes

from capfinder import log, preparation, settings
from capfinder.errors import CapfinderError, SettingsError
from capfinder.run_record import STAGES


@pytest.fixture
def explain(tmp_path, capsys):
    """What --dry_run says of these settings, which are those of good data otherwise."""
    caps = write_classes(tmp_path / "caps")

    def run(*, stages=STAGES, **changed) -> str:
        values = {
            "etl_params.caps_data_dir": str(caps),
            "shared_params.output_dir": str(tmp_path / "out"),
            "shared_params.num_classes": 2,
            "tracking_params.mode": "off",
            **{key.replace("__", "."): value for key, value in changed.items()},
        }
        preparation.explain(settings.checked(settings.default_config(), values), stages=stages)
        return capsys.readouterr().out

    yield run
    log.stop()


def _refused(explain, message, **changed):
    with pytest.raises(CapfinderError) as error:
        explain(**changed)
    assert message in str(error.value)
    assert error.value.exit_code == 2
    return str(error.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:///nowhere/study.db", "can't be opened (no directory nowhere)"),
        ("nodatabase://me:s3cret@host/db", "nodatabase"),
        ("mysql+nodriver://me:s3cret@host/db", "nodriver"),
        ("postgresql://me:s3cret@host:port/db", "tune_params.storage="),
    ],
)
def test_a_study_that_cant_be_kept_is_told_before_the_dataset_is_built(explain, url, message):
    told = _refused(explain, message, tune_params__storage=url)
    assert "s3cret" not in told
    explain(tune_params__storage=url, tune_params__max_trials=0)


def test_a_study_in_a_file_isnt_made_by_a_dry_run(explain, tmp_path):
    explain(tune_params__storage=f"sqlite:///{tmp_path}/study.db")
    assert not (tmp_path / "study.db").exists()


@pytest.mark.parametrize("url", ["sqlite:///study.db", "sqlite:///./study.db?timeout=3"])
def test_a_study_in_a_file_is_known_by_its_whole_path(tmp_path, monkeypatch, url):
    """Workers and reruns may be started elsewhere."""
    monkeypatch.chdir(tmp_path)
    values = {
        "etl_params.caps_data_dir": str(tmp_path / "caps"),
        "shared_params.output_dir": str(tmp_path / "out"),
        "tune_params.storage": url,
    }
    config = preparation.prepared(settings.checked(settings.default_config(), values))
    rest = url.partition("study.db")[2]
    assert config.tune_params.storage == f"sqlite:///{tmp_path}/study.db{rest}"


def test_a_database_that_nobody_serves_is_told_at_once(explain, monkeypatch):
    """A driver of a database without a server: the connection is tried, and its error is shown."""
    import sqlite3

    from sqlalchemy.dialects import registry
    from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite

    class Served(SQLiteDialect_pysqlite):
        name = "served"

        def create_connect_args(self, url):
            return [], {}

        def connect(self, *arguments, **more):
            raise sqlite3.OperationalError("connection refused by s3cret")

    registry.impls["served"] = lambda: Served
    try:
        told = _refused(
            explain, "connection refused", tune_params__storage="served://me:s3cret@host/db"
        )
    finally:
        registry.impls.pop("served")
    assert told.startswith("tune_params.storage=")


def test_more_devices_than_there_are_is_told_at_once(explain):
    _refused(explain, "runtime_params.mesh=99: there ", runtime_params__mesh=99)
    assert "Nothing was written" in explain(stages=("etl",), runtime_params__mesh=99)


@pytest.mark.parametrize("key", ["etl_params.caps_data_dir", "shared_params.output_dir"])
def test_a_directory_that_cant_be_is_told_with_its_setting(explain, tmp_path, key):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for wrong in ("a" * 300, f"{tmp_path}/file/below", "~nobody-of-this-name/x"):
        _refused(explain, f"{key}=", **{key: wrong})
    if key == "etl_params.caps_data_dir":
        _refused(explain, f"{key}=", **{key: f"{tmp_path}/loop"})


def test_the_data_of_the_test_set_are_others_than_those_of_the_training(explain, tmp_path):
    same = f"{tmp_path}/other/../caps/"
    _refused(explain, "split_params.test_caps_data_dir=", split_params__test_caps_data_dir=same)


def test_without_data_there_must_be_a_dataset(explain, tmp_path):
    missing = str(tmp_path / "missing")
    told = _refused(explain, "no dataset version in", etl_params__caps_data_dir=missing)
    assert f"etl_params.caps_data_dir={missing}: no such directory" in told
    _refused(explain, "9.9.9", etl_params__use_remote_dataset_version="9.9.9")


def test_data_are_looked_at_only_when_the_etl_is_to_run(explain, tmp_path):
    (tmp_path / "caps" / "broken.csv").write_text("a,b\n")
    _refused(explain, "broken.csv")
    _refused(explain, "holds no dataset of these settings yet", stages=("train",))


def test_hyperparameters_are_judged_only_when_a_model_is_to_be_built(explain):
    with pytest.raises(SettingsError, match=r"model_params\.dense_unit:"):
        explain(model_params={"dense_unit": 8})
    assert "Nothing was written" in explain(stages=("etl",), model_params={"dense_unit": 8})


def test_a_schedule_that_cant_be_made_is_told_before_the_dataset_is_built(explain, monkeypatch):
    def refuse(*given, **more):
        raise ValueError("needs more steps")

    monkeypatch.setattr("capfinder.training.schedules.make_schedule", refuse)
    kind = "lr_scheduler_params__type"
    _refused(explain, "lr_scheduler_params.sgdr: needs more steps", **{kind: "sgdr"})


def test_settings_that_change_nothing_are_named(explain):
    cycle, search = "lr_scheduler_params.sgdr.cycle_length=9", {"dense_units": {"high": 48}}
    text = explain(lr_scheduler_params__sgdr__cycle_length=9, search_params=search)
    assert f"{cycle}: not used, as lr_scheduler_params.type is reduce_lr_on_plateau" in text
    assert "search_params" not in text and "at most 5 trials of 3 epochs" in text
    text = explain(
        lr_scheduler_params__type="sgdr",
        lr_scheduler_params__sgdr__cycle_length=9,
        search_params=search,
        tune_params__max_trials=0,
    )
    assert "search_params: not used, as nothing is tuned (tune_params.max_trials=0" in text
    assert cycle not in text and "no tuning, then at most" in text
