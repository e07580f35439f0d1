"""Each mistake ends in one clear line and exit code 2, with nothing half-written."""

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from capfinder import cli, log

READS = 12


def _row(read_id: str, cap_class: object, signal: str) -> str:
    return f'{read_id},{cap_class},"{signal}"\r\n'


def _file(path: Path, cap_class: object, *, rows: int = READS, bad: str = "") -> None:
    """A good CSV file; `bad` is appended as it is."""
    rng = np.random.default_rng(hash(path.name) % 2**32)
    good = "".join(
        _row(
            f"{path.stem}-{number:04}",
            cap_class,
            ",".join(f"{value:.8f}" for value in rng.normal(size=40)),
        )
        for number in range(rows)
    )
    path.write_text("read_id,cap_class,timeseries\r\n" + good + bad, newline="")


@pytest.fixture
def caps(tmp_path):
    """Two classes of a few reads."""
    directory = tmp_path / "caps"
    directory.mkdir()
    _file(directory / "data__cap_0.csv", 0)
    _file(directory / "data__cap_1.csv", 1)
    return directory


@pytest.fixture
def launch(tmp_path, caps, capsys):
    """Runs launch.py's function on `caps`; gives exit code, standard error, output directory."""

    def run(*options: str, caps_data_dir: object = caps) -> tuple[int, str, Path]:
        config = tmp_path / "config.json"
        output_dir = tmp_path / "out"
        config.write_text(
            json.dumps(
                {
                    "etl_params": {
                        "caps_data_dir": str(caps_data_dir),
                        "use_remote_dataset_version": "",
                        "examples_per_class": None,
                    },
                    "shared_params": {
                        "num_classes": 2,
                        "target_length": 48,
                        "train_test_fraction": 0.7,
                        "output_dir": str(output_dir),
                    },
                    "tracking_params": {"mode": "off"},
                }
            )
        )
        code = cli.launch([f"--config={config}", "--stage=etl", *options])
        return code, capsys.readouterr().err, output_dir

    return run


def _assert_one_clear_line(code: int, err: str, *words: str) -> None:
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in err
    for word in words:
        assert word in lines[0]


def _assert_nothing_half_written(output_dir: Path) -> None:
    leftovers = [
        path
        for path in output_dir.rglob("*")
        if path.is_file()
        and "logs" not in path.relative_to(output_dir).parts
        and path.name not in (".lock", "sources.json")
        and not path.name.endswith(".lock")
    ]
    assert leftovers == []


def test_the_good_input_goes_through(launch):
    code, err, output_dir = launch()
    assert code == 0, err
    assert (output_dir / "dataset" / "cap_data" / "1.0.0" / "manifest.json").exists()


def _remove_all(caps: Path) -> None:
    for path in caps.glob("*.csv"):
        path.unlink()


def _write(name: str, text: str):
    return lambda caps: (caps / name).write_text(text, newline="")


def _bad_rows(bad: str):
    return lambda caps: _file(caps / "data__cap_1.csv", 1, bad=bad)


SIGNAL = ",".join(["0.5"] * 40)
BAD_DATA = {
    "no CSV file": (_remove_all, ["*.csv"]),
    "empty file": (_write("data__cap_1.csv", ""), ["data__cap_1.csv", "empty"]),
    "header alone": (_write("data__cap_1.csv", "read_id,cap_class,timeseries\r\n"), ["cap_1"]),
    "wrong header": (_write("data__cap_1.csv", "a,b,c\r\n1,2,3\r\n"), ["data__cap_1.csv", "a,b,c"]),
    "absent class": (lambda caps: (caps / "data__cap_1.csv").unlink(), ["num_classes", "class"]),
    "surplus class": (lambda caps: _file(caps / "data__cap_2.csv", 2), ["num_classes", "class"]),
    "mixed classes": (_bad_rows(_row("x1", 0, SIGNAL)), ["x1", "line 14", "class", "'0'"]),
    "NaN": (_bad_rows(_row("x2", 1, "0.5,nan,0.5")), ["x2", "line 14", "'nan'"]),
    "a word": (_bad_rows(_row("x3", 1, "0.5,word")), ["x3", "'word'", "max_reject_fraction"]),
    "empty signal": (_bad_rows(_row("x4", 1, "")), ["x4", "empty"]),
    "truncated last line": (_bad_rows('x5,1,"0.5,0.'), ["x5", "truncated"]),
    "too few fields": (_bad_rows("x6,1\r\n"), ["field"]),
    "bad cap_class": (_bad_rows(_row("x7", "one", SIGNAL)), ["x7", "cap_class 'one'", "number"]),
    "one read in a class": (
        lambda caps: _file(caps / "data__cap_1.csv", 1, rows=1),
        ["at least one"],
    ),
}


@pytest.mark.parametrize("fault", BAD_DATA)
def test_bad_data_is_one_clear_line(launch, caps, fault):
    damage, words = BAD_DATA[fault]
    damage(caps)
    code, err, output_dir = launch()
    _assert_one_clear_line(code, err, *words)
    _assert_nothing_half_written(output_dir)


ROW_FAULTS = [
    "mixed classes",
    "NaN",
    "a word",
    "empty signal",
    "truncated last line",
    "too few fields",
    "bad cap_class",
]


@pytest.mark.parametrize("fault", ROW_FAULTS)
def test_the_same_fault_below_the_fraction_is_counted_and_the_run_goes_on(launch, caps, fault):
    BAD_DATA[fault][0](caps)
    code, err, output_dir = launch("--config.etl_params.max_reject_fraction=0.1")
    assert code == 0, err
    version = output_dir / "dataset" / "cap_data" / "1.0.0"
    manifest = json.loads((version / "manifest.json").read_text())
    assert sum(manifest["rejects"].values()) == 1
    rejects = (version / "rejects.csv").read_text().splitlines()
    assert len(rejects) == 2
    assert "data__cap_1.csv" in rejects[1] and ",14," in rejects[1]
    for split in manifest["counts"].values():
        assert len(set(split.values())) == 1  # classes balanced
    assert sum(sum(split.values()) for split in manifest["counts"].values()) == 2 * READS


BAD_OPTIONS = {
    "missing directory": (["--config.etl_params.caps_data_dir=/no/such/dir"], ["/no/such/dir"]),
    "unknown key": (["--config.train_params.patiense=3"], ["did you mean train_params.patience"]),
    "wrong type": (["--config.train_params.patience=many"], ["whole number", "'many'"]),
    "out of range": (["--config.shared_params.train_test_fraction=1.5"], ["below 1", "1.5"]),
    "misspelled choice": (
        ["--config.shared_params.model_type=Resent"],
        ["must be", "did you mean resnet?"],
    ),
    "misspelled choice of several": (
        ["--config.export_params.formats=keras,onxx"],
        ["a list of some of", "did you mean onnx?"],
    ),
    "no such choice": (["--config.shared_params.model_type=zzz"], ["| resnet"]),
    "unknown option": (["--stages=etl"], ["--stage"]),
    "unknown stage": (["--stage=elt"], ["did you mean etl"]),
    "unwritable output": (["--output_dir=/proc/capfinder"], ["/proc/capfinder", "output_dir"]),
    "placeholder output": (["--output_dir=/dir/"], ["placeholder"]),
    "unknown hyperparameter": (
        ["--stage=etl,train", "--config.model_params.dense_unit=8"],
        ["dense_units"],
    ),
    "one run when splitting by file": (["--config.split_params.group_by=file"], ["group_by"]),
    "remote version without a key": (
        [
            "--config.etl_params.use_remote_dataset_version=9.9.9",
            "--config.tracking_params.mode=auto",
        ],
        ["9.9.9", "COMET_API_KEY"],
    ),
    "remote version when Comet is never asked": (
        ["--config.etl_params.use_remote_dataset_version=9.9.9"],
        ["9.9.9", "tracking_params.mode=off"],
    ),
}


@pytest.mark.parametrize("fault", BAD_OPTIONS)
def test_a_bad_option_is_one_clear_line(launch, monkeypatch, fault):
    monkeypatch.delenv("COMET_API_KEY", raising=False)
    options, words = BAD_OPTIONS[fault]
    code, err, output_dir = launch(*options)
    _assert_one_clear_line(code, err, *words)
    _assert_nothing_half_written(output_dir)


def test_a_closed_output_ends_a_run_with_a_line_and_a_rerun_goes_on(launch, monkeypatch):
    monkeypatch.setattr(log.console, "quiet", False)  # and again afterwards: it is the module's
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as closed, contextlib.redirect_stdout(closed):
        code, err, output_dir = launch()
    assert code == 1
    assert err.startswith("error: the output was closed; the same command goes on from here [log: ")
    assert err.count("\n") == 1
    (path,) = (output_dir / "logs").glob("*.log")
    assert "the output was closed" in path.read_text().splitlines()[-1]
    log.console.quiet = False
    code, err, _ = launch()
    assert code == 0, err


def test_a_config_that_is_missing_or_broken_is_one_clear_line(tmp_path, capsys):
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config():\n    raise KeyError('nothing')\n")
    for path, word in ((tmp_path / "absent.py", "no such file"), (broken, "nothing")):
        code = cli.launch([f"--config={path}"])
        _assert_one_clear_line(code, capsys.readouterr().err, str(path), word)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train_params.patiense = 3", "train_params.patiense, did you mean train_params.patience?"),
        ("patience = 3", "as patience, did you mean tune_params.patience?"),
        ("nosuch.a = 3", "no such setting as nosuch"),
    ],
)
def test_a_config_with_a_misspelled_setting_is_one_clear_line(tmp_path, capsys, line, said):
    path = tmp_path / "mine.py"
    path.write_text(
        "from capfinder import settings\n"
        "def get_config():\n"
        "    config = settings.default_config()\n"
        f"    config.{line}\n"
        "    return config\n"
    )
    code = cli.launch([f"--config={path}"])
    _assert_one_clear_line(code, capsys.readouterr().err, f"{path}, line 4", said)


def test_create_train_config_writes_the_template_and_never_over_a_file(tmp_path, capsys):
    path = tmp_path / "train.json"
    assert cli.main(["create-train-config", "--file_path", str(path)]) == 0
    capsys.readouterr()
    edited = path.read_text().replace("300", "301")
    path.write_text(edited)
    code = cli.main(["create-train-config", "--file_path", str(path)])
    _assert_one_clear_line(code, capsys.readouterr().err, str(path), "--force")
    assert path.read_text() == edited
    assert cli.main(["create-train-config", "-f", str(path), "--force"]) == 0
    assert json.loads(path.read_text())["train_params"]["max_epochs_final_model"] == 300


def test_a_missing_config_file_of_train_model_is_one_clear_line(tmp_path, capsys):
    code = cli.main(["train-model", "--config_file", str(tmp_path / "absent.json")])
    _assert_one_clear_line(code, capsys.readouterr().err, "absent.json")


def test_a_misspelled_command_is_one_clear_line(capsys):
    code = cli.main(["train-modl"])
    _assert_one_clear_line(code, capsys.readouterr().err, "train-model")


def test_a_dry_run_checks_the_input_and_writes_nothing(launch):
    code, err, output_dir = launch("--dry_run")
    assert code == 0, err
    assert not output_dir.exists()
