"""Nothing that somebody else has made, be it data, settings, a dataset, a run or a model, can run
code, write elsewhere, steer a terminal or a browser; and no secret is written anywhere."""

import ast
import csv
import io
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax_settings
import numpy as np
import pytest
from csv_input import row, rows, write
from html_page import Page
from hypothesis import given
from hypothesis import strategies as st
from in_process import shown_by

from capfinder import capmap, cli, log, models, settings
from capfinder.data import versions
from capfinder.errors import InputError
from capfinder.etl.beam import encoding
from capfinder.exporting import keras as keras_files

PACKAGE = Path(__file__).parents[1] / "capfinder"
KEY = "k3yThatMustNeverBeSeenAnywhere1"
PASSWORD = "s3cretOfTheDatabase"
CLASSES = 3
SCRIPT, FORMULA = "<script>alert(1)</script>", '=HYPERLINK("http://x","y")'
ESCAPES = "\x1b]0;owned\x07\x1b[31mred"
CAP_NAMES = [SCRIPT, FORMULA, f"../../{ESCAPES}\nerror: forged"]
FILE_NAME = f"data_{ESCAPES}<img src=x onerror=alert(1)>\nerror: forged.csv"
READ_IDS = ["=1+1", "@SUM(A1)", SCRIPT, "../../x", "-2+3"]
VALUES: dict[str, Any] = {
    "etl_params": {
        "use_remote_dataset_version": "",
        "examples_per_class": None,
        "max_reject_fraction": 0.1,
        "comet_project_name": "/../../../dataset",
    },
    "tune_params": {
        "tuning_strategy": "random_search",
        "max_trials": 1,
        "max_epochs_hpt": 1,
        "comet_project_name": "/../../../tuning",
    },
    "train_params": {"max_epochs_final_model": 1, "comet_project_name": "../\n../training"},
    "shared_params": {
        "num_classes": CLASSES,
        "batch_size": 16,
        "target_length": 24,
        "train_test_fraction": 0.5,
        "dtype": "float32",
    },
    "tracking_params": {"mode": "offline"},
    "export_params": {"formats": ["keras"]},
    "debug_code": True,
}


# What the code doesn't do

FORBIDDEN_MODULES = {
    "pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "torch",
    "subprocess", "pty", "code", "xmlrpc", "http.server", "telnetlib", "ftplib",
}  # fmt: skip
ALLOWED_MODULES = {"exporting/fresh_process.py": {"subprocess"}}  # our own program, in this Python
FORBIDDEN_BUILTINS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {
    "system", "popen", "fork", "execv", "execvp", "spawnv", "extractall", "unpack_archive",
    "mktemp", "enable_unsafe_deserialization", "from_string",
}  # fmt: skip
ALLOWED_CALLS = {
    # configs/*.py, the user's own code; libraries
    "exec_module": {"commands/training.py", "libraries.py"},
    "import_module": {"models/__init__.py"},  # of the registry alone
    "Markup": {"evaluation/charts.py", "evaluation/svg.py", "inspection/plot.py"},
}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield getattr(node.func, "attr", getattr(node.func, "id", "")), node


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_no_module_unpickles_evaluates_or_starts_programs(path: Path) -> None:
    name, tree = str(path.relative_to(PACKAGE)), ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported = {alias.name for alias in node.names} | {getattr(node, "module", "") or ""}
            roots = {module.split(".")[0] for module in imported} | imported
            allowed = ALLOWED_MODULES.get(name, set())
            assert not (roots & FORBIDDEN_MODULES) - allowed, f"{name}, line {node.lineno}"
    for called, node in calls(tree):
        is_builtin = isinstance(node.func, ast.Name) and called in FORBIDDEN_BUILTINS
        is_allowed = name in ALLOWED_CALLS.get(called, {name})
        assert is_allowed and not is_builtin and called not in FORBIDDEN_CALLS, (
            f"{name}, line {node.lineno}: {called}"
        )
        keywords = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        assert not keywords.get("allow_pickle") and not keywords.get("shell")
        if called == "load_model":
            assert keywords["safe_mode"] is True
        if called == "Environment":
            assert keywords["autoescape"] is True


# A run on names as bad as can be


class Ended:
    def __init__(self, *arguments: object, command: Callable[[list[str]], int] = cli.main) -> None:
        words = [str(argument) for argument in arguments]
        self.code, self.shown = shown_by(lambda: command(words))

    @property
    def error(self) -> str:
        """The one line that it ended with."""
        (line,) = (line for line in self.shown.splitlines() if line.startswith("error: "))
        return line


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("security")
    with pytest.MonkeyPatch.context() as patched, jax_settings.restored():
        for name in [name for name in os.environ if name.startswith("COMET_")]:
            patched.delenv(name)
        patched.setenv("COMET_API_KEY", KEY)
        patched.setenv("HOME", str(root / "home"))
        patched.delenv("XDG_CACHE_HOME", raising=False)
        (root / "home" / ".capfinder").mkdir(parents=True)
        names = {str(number): name for number, name in enumerate(CAP_NAMES)}
        capmap.mapping_path().write_text(json.dumps(names))
        (root / "here").mkdir()
        patched.chdir(root / "here")
        patched.setitem(models.ARCHITECTURES, "cnn_lstm", "tiny_architecture")
        patched.setattr(log, "_secrets", set())
        yield root


def write_caps(directory: Path) -> None:
    for cap_class in range(CLASSES):
        lines = rows(cap_class, 0, 40)
        signal = np.linspace(-1, 1, 20)
        if not cap_class:
            lines += [row(name, cap_class, signal) for name in READ_IDS]
            lines.append(row("=2+5", cap_class, "1.0,nan"))
        name = FILE_NAME if not cap_class else f"data__cap_{cap_class}.csv"
        write(directory / name, lines)


def settings_file(root: Path, **changes: Any) -> Path:
    values = json.loads(json.dumps(VALUES))
    values["etl_params"]["caps_data_dir"] = str(root / "caps")
    values["shared_params"]["output_dir"] = str(root / "out")
    for key, value in changes.items():
        group, _, name = key.partition("__")
        values.setdefault(group, {})[name] = value
    path = root / "train.json"
    path.write_text(json.dumps(values))
    return path


@pytest.fixture(scope="module")
def finished(root: Path) -> Ended:
    write_caps(root / "caps")
    ended = Ended("train-model", "--config_file", settings_file(root))
    assert ended.code == 0, ended.shown
    return ended


@pytest.fixture
def copy(root: Path, finished: Ended, tmp_path: Path) -> Path:
    """The run, as somebody may have sent it."""
    return Path(shutil.copytree(root / "out", tmp_path / "run"))


def everything(directory: Path) -> Iterator[tuple[Path, bytes]]:
    """All bytes of all files, of those in archives too."""
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            yield path, os.fsencode(path.name) + path.read_bytes()
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    for name in archive.namelist():
                        yield path / name, name.encode() + archive.read(name)


def listing(directory: Path) -> set[str]:
    """Of the files and directories below it; the user's own cache is no one else's business."""
    found = (str(path.relative_to(directory)) for path in directory.rglob("*"))
    return {name for name in found if not name.startswith(("home/.cache", "out/"))}


def test_project_names_lead_nowhere(root: Path, finished: Ended) -> None:
    made = listing(root) - {f"caps/{FILE_NAME}"}
    own = {"caps", "home", "here", "out", "train.json"}
    own |= {f"caps/data__cap_{number}.csv" for number in (1, 2)}
    own.add("home/.capfinder/custom_mapping.json")
    assert {name for name in made if not name.startswith("home/")} <= own
    (study,) = (root / "out" / "tuner_models").iterdir()
    assert (study / "best_hyperparameters.json").is_file()


def test_pages_hold_names_as_text(root: Path, finished: Ended, tmp_path: Path) -> None:
    page = tmp_path / "inspect.html"
    ended = Ended("inspect", root / "out", "--output", page, "--verify")
    assert ended.code == 0 and "\x1b" not in ended.shown
    for path in (root / "out" / "report.html", page):
        html = path.read_text("utf-8")
        assert not {"script", "img", "iframe", "a" if path == page else ""} & set(Page(html).tags)
        assert not any(name.startswith("on") for name, _ in Page(html).attributes)
        assert SCRIPT in Page(html).text and "<img src=x" in Page(html).text


def test_no_name_steers_the_terminal_or_forges_a_line(root: Path, finished: Ended) -> None:
    (path,) = (root / "out" / "logs").iterdir()
    for text in (finished.shown, path.read_text("utf-8")):
        assert r"\x1b[31mred" in text and "\x1b" not in text and "\x07" not in text
        assert not any(line.lstrip("│ ").startswith("error: forged") for line in text.splitlines())


def test_tables_for_machines_hold_names_as_they_are(
    root: Path, finished: Ended, tmp_path: Path
) -> None:
    """A spreadsheet may take =1+1 for a formula, as README says; to join tables by read_id it must
    be as it was."""
    (rejects,) = (root / "out").glob("dataset/cap_data/*/rejects.csv")
    with rejects.open(newline="") as stream:
        assert [line[:3:2] for line in csv.reader(stream)][1:] == [[FILE_NAME, "=2+5"]]
    ended = Ended("predict", "-m", root / "out", "-c", root / "caps", "-o", tmp_path)
    assert ended.code == 0 and "\x1b" not in ended.shown, ended.shown
    with (tmp_path / "predictions.csv").open(newline="") as stream:
        predicted = {line["read_id"]: line["predicted_cap"] for line in csv.DictReader(stream)}
    assert set(READ_IDS) < predicted.keys() and set(predicted.values()) <= set(CAP_NAMES)


def test_the_api_key_is_written_nowhere(root: Path, finished: Ended) -> None:
    found = dict(everything(root / "out"))
    assert any(path.suffix == ".json" and ".zip" in str(path.parent) for path in found)
    for path, content in found.items():
        assert KEY.encode() not in content, path
    assert KEY not in finished.shown


def test_a_traceback_hides_the_api_key(root: Path, tmp_path: Path) -> None:
    (tmp_path / f"data__{KEY}.csv.gz").write_bytes(b"not packed")
    path = tmp_path / "train.json"
    values = json.loads(json.dumps(VALUES)) | {"debug_code": True}
    values["etl_params"]["caps_data_dir"] = str(tmp_path)
    values["shared_params"]["output_dir"] = str(tmp_path / "out")
    path.write_text(json.dumps(values))
    ended = Ended("train-model", "--config_file", path, "--stage=etl")
    assert ended.code == 2 and "data__***.csv.gz" in ended.error
    assert "Traceback" in ended.shown and KEY not in ended.shown


def test_a_setting_that_holds_the_api_key_is_refused_without_showing_it(
    root: Path, finished: Ended, tmp_path: Path
) -> None:
    path = settings_file(
        root,
        tune_params__comet_project_name=f"a{KEY}b",
        shared_params__output_dir=str(tmp_path / "o"),
    )
    ended = Ended("train-model", "--config_file", path)
    assert ended.code == 2 and KEY not in ended.shown
    assert "tune_params.comet_project_name: holds the Comet API key" in ended.error
    assert not (tmp_path / "o").exists()
    path = settings_file(root, tracking_params__api_key=KEY)
    ended = Ended("train-model", "--config_file", path)
    assert ended.code == 2 and "tracking_params.api_key: no such setting" in ended.error
    assert KEY not in ended.shown
    module = tmp_path / "config.py"
    module.write_text(
        "from capfinder import settings\n"
        "def get_config():\n"
        "    config = settings.default_config()\n"
        f"    config.tracking_params.api_key = {KEY!r}\n"
        "    return config\n"
    )
    ended = Ended(f"--config={module}", command=cli.launch)
    assert ended.code == 2 and KEY not in ended.shown


def test_the_password_of_a_storage_is_written_nowhere(
    root: Path, finished: Ended, tmp_path: Path
) -> None:
    output_dir = Path(shutil.copytree(root / "out", tmp_path / "out"))
    path = settings_file(
        root,
        shared_params__output_dir=str(output_dir),
        tune_params__storage=f"postgresql+nodriver://me:{PASSWORD}@127.0.0.1:1/study",
        tune_params__max_trials=2,
    )
    ended = Ended("train-model", "--config_file", path)
    assert ended.code in (1, 2) and "tune_params.storage" in ended.error
    assert "postgresql+nodriver://me:***@127.0.0.1:1/study" in ended.error
    assert PASSWORD not in ended.shown
    for path, content in everything(output_dir):
        assert PASSWORD.encode() not in content, path


# What others have made


class Touches:
    """Its unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def change(path: Path, *keys: str | int, to: Any) -> None:
    values = json.loads(path.read_text())
    place = values
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    path.write_text(json.dumps(values))


def own(root: Path, run_dir: Path, *options: str) -> Ended:
    """The run as one's own output directory."""
    path = settings_file(root, shared_params__output_dir=str(run_dir), tracking_params__mode="off")
    return Ended("train-model", "--config_file", path, *options)


@pytest.mark.parametrize("name", ["../elsewhere", "dataset/../../elsewhere", "{elsewhere}"])
def test_a_run_that_names_a_dataset_outside_of_it_is_refused(
    root: Path, copy: Path, tmp_path: Path, name: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(copy / "dataset" / "cap_data" / "1.0.0", elsewhere)
    before = listing(tmp_path)
    change(copy / "run.json", "dataset", "directory", to=name.format(elsewhere=elsewhere))
    for ended in (
        Ended("report", copy),
        Ended("inspect", copy),
        own(root, copy, "--stage=train,evaluate"),
    ):
        assert ended.code == 2, ended.shown
        assert "run.json: names" in ended.error and f"isn't in {copy}" in ended.error
    assert {name for name in listing(tmp_path) - before if "/logs/" not in name} == set()


def test_a_dataset_whose_manifest_names_paths_is_refused(copy: Path, tmp_path: Path) -> None:
    directory = copy / "dataset" / "cap_data" / "1.0.0"
    for keys, value in (
        (("fingerprint",), "../../../elsewhere"),
        (("fingerprint",), "/elsewhere"),
        (("shards", 0, "name"), "../../../../elsewhere"),
    ):
        manifest = json.loads((directory / "manifest.json").read_text())
        change(directory / "manifest.json", *keys, to=value)
        with pytest.raises(InputError, match=r"manifest\.json"):
            versions.open_dataset(directory)
        (directory / "manifest.json").write_text(json.dumps(manifest))


def test_a_run_s_own_compiled_programs_are_not_loaded(
    root: Path, copy: Path, tmp_path: Path, finished: Ended
) -> None:
    """They are code of the machine, and the settings that name them may be anybody's."""
    programs = tmp_path / "programs"
    programs.mkdir()
    place = ("settings", "runtime_params", "compilation_cache_dir")
    change(copy / "run.json", *place, to=str(programs))
    ended = Ended("predict", "-m", copy, "-c", root / "caps", "-o", tmp_path / "named")
    assert ended.code == 0, ended.shown
    assert not list(programs.iterdir())
    used = jax.config.values["jax_compilation_cache_dir"]
    assert used == str(root / "home" / ".cache" / "capfinder" / "programs")


def test_a_training_that_names_a_checkpoint_elsewhere_is_refused(
    root: Path, copy: Path, tmp_path: Path
) -> None:
    (outcome,) = copy.glob("checkpoints/*/outcome.json")
    for value in ("../../../elsewhere", "1", 1.0, 0, 99, True, None):
        change(outcome, "best_epoch", to=value)
        ended = Ended("predict", "-m", copy, "-c", root / "caps", "-o", tmp_path / "named")
        assert ended.code == 2, ended.shown
        assert "outcome.json: doesn't tell how a training ended" in ended.error
    assert own(root, copy).code == 0  # made again from the checkpoints


def test_pickled_arrays_are_not_loaded(root: Path, copy: Path, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    objects = np.array([Touches(touched)] * 100, dtype=object)
    for path in copy.glob("dataset/cache/*/*/*.npy"):
        with path.open("wb") as stream:
            np.lib.format.write_array(stream, objects, allow_pickle=True)
    assert Ended("report", copy).code == 0
    shutil.rmtree(copy / "evaluation")
    assert own(root, copy).code == 0  # the cache is built again
    assert (copy / "evaluation" / "metrics.json").exists()
    assert not touched.exists()


def test_findings_of_beam_s_workers_are_data_alone(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    objects = np.array([Touches(touched)], dtype=object)
    plain, pickled, with_objects = io.BytesIO(), io.BytesIO(), io.BytesIO()
    finding = {"rows": np.arange(3), "problems": {7: "not a number"}, "names": ["a", None]}
    encoding.write(plain, finding)
    plain.seek(0)
    found = encoding.read(plain)
    np.testing.assert_array_equal(found.pop("rows"), np.arange(3))
    assert found == {"problems": {7: "not a number"}, "names": ["a", None]}
    pickle.dump(Touches(touched), pickled)
    with_objects.write(plain.getvalue()[: plain.getvalue().index(b"\x93NUMPY")])
    np.lib.format.write_array(with_objects, objects, allow_pickle=True)
    of_no_kind = io.BytesIO()
    for text in (b'{"kind": "Path", "fields": {}}', b'{"error": "Any", "message": ""}', b"{}"):
        of_no_kind.write(len(text).to_bytes(8, "little") + text)
    for stream in (pickled, with_objects, of_no_kind, of_no_kind, of_no_kind):
        if stream is not of_no_kind or stream.tell() == len(stream.getvalue()):
            stream.seek(0)
        with pytest.raises(ValueError):
            encoding.read(stream)
    assert not touched.exists()


def test_a_keras_file_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    from capfinder import libraries

    keras, path = libraries.keras(), tmp_path / "model.keras"
    touched = tmp_path / "touched"
    code = compile(f"lambda x: (open({str(touched)!r}, 'w').close(), x)[1]", "", "eval")
    signal = keras.Input((4, 1))
    keras.Model(signal, keras.layers.Lambda(eval(code))(signal)).save(path)
    touched.unlink(missing_ok=True)  # by the first pass through the layer
    with pytest.raises(ValueError, match=r"unsafe|Lambda"):
        keras_files.run_keras(path, np.zeros((1, 4, 1), np.float32))
    assert not touched.exists()


def test_a_report_of_damaged_records_is_one_line(copy: Path) -> None:
    for name, text in (
        ("run.json", "[]"),
        ("run.json", '{"dataset": "x"}'),
        ("run.json", '{"stages": {"etl": 3}}'),
        ("evaluation/metrics.json", "[1]"),
    ):
        before = (copy / name).read_text()
        (copy / name).write_text(text)
        ended = Ended("report", copy)
        assert ended.code == 2 and f"{copy / name}: doesn't hold" in ended.error
        (copy / name).write_text(before)


# What is said


@given(st.text())
def test_what_is_said_is_one_printable_line(text: str) -> None:
    shown = log.printable(text)
    assert shown.isprintable()
    assert not text.isprintable() or shown == text


def test_a_file_s_name_that_is_no_text_can_be_said(tmp_path: Path) -> None:
    name = os.fsdecode(b"data_\xff.csv")
    path = log.start(tmp_path)
    assert path is not None
    log.logger.warning("%s and %s", Path(name), InputError(f"{name}\nforged"))
    log.table("Files", ("file",), [(name,)])
    log.stop()
    text = path.read_text("utf-8")
    assert text.count(r"data_\udcff.csv") == 3 and r"\nforged" in text


def test_what_is_hidden_is_said_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.hide("the-secret-word")
    log.hide("abc")  # too short: it would stand in other words
    path = log.start(tmp_path)
    assert path is not None
    log.logger.info("a %s b", "the-secret-word")
    log.logger.info("athe-secret-wordb abc")
    log.table("T", ("column",), [("x the-secret-word",)])
    log.file_only(20, "one\nthe-secret-word\n")
    log.stop()
    log.print_error("no the-secret-word")
    shown = capsys.readouterr()
    for text in (shown.out, path.read_text("utf-8")):
        assert "***" in text and "abc" in text and "secret" not in text
    assert shown.err == "error: no ***\n"


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://me:{PASSWORD}@host/db",
        f"postgresql://me:{PASSWORD}:x@host/db",
        f"postgresql://me:x/{PASSWORD}@host/db",
        f"postgresql://me:x@{PASSWORD}@host:5432/db",
        f"mysql+pymysql://:{PASSWORD}@host/db",
        f"postgresql://me@host/db?password={PASSWORD}",
    ],
)
def test_a_storage_is_shown_without_its_password(url: str) -> None:
    shown = settings.without_password(url)
    assert PASSWORD not in shown and "***" in shown and "host" in shown


@pytest.mark.parametrize("url", ["sqlite:////a/b:c/study.db", "postgresql://me@host/db?x=1"])
def test_a_storage_without_a_password_is_shown_as_it_is(url: str) -> None:
    assert settings.without_password(url) == url


def test_readme_says_what_is_trusted() -> None:
    text = " ".join((PACKAGE.parent / "README.md").read_text("utf-8").split())
    section = re.search(r"## Security (.*?) ## ", text)
    assert section is not None
    for said in ("configs/", "Python", "beam_options", "compilation_cache_dir", "read_id"):
        assert said in section[1]
