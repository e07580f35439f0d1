"""The real commands, in processes of their own: CSV files in, classifier out."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from capfinder import simulate

ROOT = Path(__file__).parents[1]
READS = 240
LENGTH = 256
TRIALS = 2
SMALL = {"low": 32, "high": 64, "step": 32}  # quick to compile and to train, as are these
_CNN_LSTM = {
    "conv_filters": [32, 32, 32],
    "conv_kernels": [7, 5, 3],
    "conv_dropouts": [0.1, 0.1, 0.1],
    "lstm_units": [32],
    "lstm_dropouts": [0.1],
    "dense_units": 32,
}
MODEL_PARAMS: dict[str, dict[str, object]] = {
    "cnn_lstm": _CNN_LSTM,
    "attention_cnn_lstm": _CNN_LSTM,
    "encoder": {
        "d_model": 32,
        "num_heads": 2,
        "num_blocks": 2,
        "feed_forward_units": 64,
        "mlp_units": [32],
        "learning_rate": 2e-3,
    },
    "resnet": {
        "stem_filters": 32,
        "stage_filters": [32, 32],
        "stage_blocks": [1, 1],
        "dense_units": 32,
    },
}

ENVIRONMENT = {
    # As users have it: without what conftest.py sets for the tests' own process.
    **{key: value for key, value in os.environ.items() if not key.startswith(("COMET_", "XLA_"))},
    "NO_COLOR": "1",
    "COLUMNS": "200",
}


# To compile; by a third in all.
FASTER = ENVIRONMENT | {
    "XLA_FLAGS": "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false"
}
FORMATS = ("keras", "h5", "saved_model", "onnx")
FEW_FORMATS = FORMATS[:2]  # where the export isn't what is tested


def _run(
    *arguments: object, environment: Mapping[str, str] = ENVIRONMENT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


def _options(
    caps: Path, output_dir: Path, *, model_type: str = "cnn_lstm", **changes: object
) -> list[str]:
    values = {
        "etl_params.caps_data_dir": caps,
        "etl_params.use_remote_dataset_version": "",
        "etl_params.examples_per_class": READS,
        "tune_params.max_trials": TRIALS,
        "tune_params.max_epochs_hpt": 2,
        "tune_params.patience": 2,
        "train_params.max_epochs_final_model": 6,
        "shared_params.output_dir": output_dir,
        "shared_params.target_length": LENGTH,
        "shared_params.batch_size": 32,
        "shared_params.train_test_fraction": 0.75,
        "search_params": json.dumps({"conv_layers": {"low": 3, "high": 4}, "*_units": SMALL}),
        "tracking_params.mode": "offline",
        "export_params.formats": json.dumps(FEW_FORMATS),
        "model_params": json.dumps(MODEL_PARAMS[model_type]),
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--config.{key}={value}" for key, value in values.items()]


@pytest.fixture(scope="session")
def caps(tmp_path_factory) -> Path:
    """SIMULATED caps with effects large enough for a short training to see."""
    directory = tmp_path_factory.mktemp("caps")
    simulate.run(
        output_dir=directory,
        reads_per_class=READS,
        num_classes=4,
        runs_per_class=2,
        effect=3.0,
        seed=7,
    )
    return directory


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


def _metrics(output_dir: Path) -> dict:
    return _read(output_dir / "evaluation" / "metrics.json")


def _classifier(output_dir: Path) -> Path:
    (path,) = (output_dir / "best_model" / "classifier").glob("classifier_*.keras")
    return path


def _assert_is_complete(
    run: subprocess.CompletedProcess[str],
    output_dir: Path,
    formats: Sequence[str] = FEW_FORMATS,
) -> None:
    """Everything that a finished run promises, and a test accuracy clear of the majority's."""
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "Traceback" not in run.stdout + run.stderr
    metrics = _metrics(output_dir)
    assert metrics["test"]["num_examples"] == 4 * READS // 4
    assert (
        metrics["test"]["accuracy_interval"][0] >= 0.2 + metrics["baselines"]["majority_accuracy"]
    )
    logs = sorted((output_dir / "logs").glob("capfinder_v*.log"))
    text = logs[-1].read_text()
    for part in ("Confusion matrix, test reads", "Confusion matrix, train reads", "precision"):
        assert part in text and part in run.stdout
    for path in (
        _classifier(output_dir),
        output_dir / "report.html",
        output_dir / "evaluation" / "metrics.json",
    ):
        assert str(path) in run.stdout
    exports = _read(output_dir / "run.json")["exports"]
    assert [row["name"] for row in exports] == list(formats)
    assert all((output_dir / row["path"]).exists() for row in exports)
    best_model = output_dir / "best_model"
    assert (best_model / "best_model_weights.weights.h5").exists()
    assert (best_model / "saved_model" / "saved_model.pb").exists() is ("saved_model" in formats)
    assert not list(output_dir.rglob(".partial-*"))


def _assert_keras_agrees(output_dir: Path) -> None:
    """The exported file gives the classes of predictions_test.csv for every test read."""
    import keras

    from capfinder.data import loader

    directory = output_dir / _read(output_dir / "run.json")["dataset"]["directory"]
    split = loader.open_split(directory, "test")
    model = keras.models.load_model(_classifier(output_dir), compile=False)
    signals = np.asarray(split.signal, np.float32).reshape(len(split.read_id), -1, 1)
    probabilities = np.asarray(model.predict(signals, verbose=0))
    with (output_dir / "evaluation" / "predictions_test.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["read_id"] for row in rows] == [read_id.decode() for read_id in split.read_id]
    written = np.array([[float(row[f"p_{c}"]) for c in range(4)] for row in rows])
    np.testing.assert_allclose(probabilities, written, atol=1e-4)
    top = np.sort(written, axis=1)
    clear = top[:, -1] - top[:, -2] > 1e-4
    predicted = np.array([int(row["predicted_cap_class"]) for row in rows])
    assert (probabilities.argmax(axis=1) == predicted)[clear].all()


@pytest.fixture(scope="session")
def first_run(caps, tmp_path_factory):
    """cnn_lstm, hyperband, reduce_lr_on_plateau."""
    output_dir = tmp_path_factory.mktemp("runs") / "first"
    options = _options(caps, output_dir, export_params__formats=json.dumps(FORMATS))
    return _run("launch.py", "--config=configs/cnn_lstm.py", *options), output_dir


def test_cnn_lstm_with_hyperband_and_plateau(first_run):
    run, output_dir = first_run
    _assert_is_complete(run, output_dir, FORMATS)
    _assert_keras_agrees(output_dir)
    record = _read(output_dir / "run.json")
    assert [name for name in record["stages"]] == ["etl", "tune", "train", "evaluate", "export"]
    assert sum(row["state"] in ("complete", "pruned") for row in record["tuning"]["trials"]) == 2
    report = (output_dir / "report.html").read_text()
    for absent in ("<script src", "<link", "http://", "https://"):
        assert absent not in report.replace("http://www.w3.org/2000/svg", "")


def test_predict_gives_reads_of_the_test_set_the_very_lines_of_the_evaluation(
    first_run, caps, tmp_path
):
    _, output_dir = first_run
    run = _run("-m", "capfinder", "predict", "-m", output_dir, "-c", caps, "-o", tmp_path)
    assert run.returncode == 0, run.stderr
    known, predicted = (
        path.read_text().splitlines()
        for path in (
            output_dir / "evaluation" / "predictions_test.csv",
            tmp_path / "predictions.csv",
        )
    )
    assert len(known) == 1 + READS
    assert len(predicted) == 1 + 4 * READS
    columns = known[0].count(",")  # predict adds where each read comes from
    assert {",".join(line.split(",")[: columns + 1]) for line in predicted} > set(known)


def test_the_comet_archive_holds_the_run(first_run):
    _, output_dir = first_run
    content = ""
    names = []
    for archive in (output_dir / "comet").rglob("*.zip"):
        with zipfile.ZipFile(archive) as opened:
            names += opened.namelist()
            content += "".join(
                opened.read(name).decode("utf-8", "replace")
                for name in opened.namelist()
                if name.endswith((".json", ".jsonl", "messages.json"))
            )
    record = _read(output_dir / "run.json")
    for part in (
        "train_params.patience",
        "val_loss",
        "learning_rate",
        "confusion",
        record["dataset"]["fingerprint"],
        record["dataset"]["version"],
        _classifier(output_dir).name,
        "report.html",
    ):
        assert part in content, part
    assert names


def test_a_rerun_reuses_dataset_study_and_training(first_run, caps):
    _, output_dir = first_run
    before = {path: path.stat().st_mtime_ns for path in (output_dir / "best_model").rglob("*")}
    options = _options(caps, output_dir, export_params__formats=json.dumps(FORMATS))
    again = _run("launch.py", "--config=configs/cnn_lstm.py", *options)
    assert again.returncode == 0, again.stderr
    assert [path.name for path in (output_dir / "dataset" / "cap_data").glob("[0-9]*")] == ["1.0.0"]
    assert "already" in again.stdout
    after = {path: path.stat().st_mtime_ns for path in (output_dir / "best_model").rglob("*")}
    assert after == before
    assert len(_read(output_dir / "run.json")["tuning"]["trials"]) == TRIALS


def test_a_second_output_directory_gets_the_same_bytes_trials_and_weights(first_run, caps):
    _, first = first_run
    second = first.parent / "second"
    run = _run("launch.py", "--config=configs/cnn_lstm.py", *_options(caps, second))
    assert run.returncode == 0, run.stderr
    for path in (first / "dataset" / "cap_data" / "1.0.0").glob("*.tfrecord*"):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()

    def trials(output_dir: Path) -> list:
        rows = _read(output_dir / "run.json")["tuning"]["trials"]
        return [(row["params"], row["value"], row["state"]) for row in rows]

    assert trials(first) == trials(second)
    predictions = "evaluation/predictions_test.csv"
    assert (first / predictions).read_bytes() == (second / predictions).read_bytes()
    weights = [
        zipfile.ZipFile(_classifier(output_dir)).read("model.weights.h5")
        for output_dir in (first, second)
    ]
    assert weights[0] == weights[1]


def test_what_is_missing_is_made_again_and_a_new_stage_setting_moves_nothing(first_run, caps):
    _, output_dir = first_run
    metrics = (output_dir / "evaluation" / "metrics.json").read_bytes()
    (output_dir / "evaluation" / "metrics.json").unlink()
    (output_dir / "report.html").unlink()
    again = _run(
        "launch.py",
        "--config=configs/cnn_lstm.py",
        "--stage=evaluate",
        *_options(caps, output_dir, evaluate_params__batch_size=50),
    )
    assert again.returncode == 0, again.stderr
    made = _metrics(output_dir)
    assert made["history"] == json.loads(metrics)["history"]
    assert made["test"]["confusion_matrix"] == json.loads(metrics)["test"]["confusion_matrix"]
    assert (output_dir / "report.html").exists()
    assert not (output_dir / "previous").exists()


def test_attention_cnn_lstm_with_random_search_and_cyclic_lr(caps, tmp_path):
    options = _options(
        caps,
        tmp_path,
        model_type="attention_cnn_lstm",
        tune_params__tuning_strategy="random_search",
        lr_scheduler_params__type="cyclic_lr",
        lr_scheduler_params__cyclic_lr__base_lr=5e-4,
        lr_scheduler_params__cyclic_lr__max_lr=4e-3,
        lr_scheduler_params__cyclic_lr__step_size_factor=2,
    )
    run = _run("launch.py", "--config=configs/attention_cnn_lstm.py", *options, environment=FASTER)
    _assert_is_complete(run, tmp_path)
    _assert_keras_agrees(tmp_path)
    rates = [row["learning_rate"] for row in _metrics(tmp_path)["history"]]
    assert rates[1] > rates[0] and rates[3] < rates[1]


def test_resnet_with_bayesian_optimization_and_sgdr_from_json(caps, tmp_path):
    output_dir = tmp_path / "out"
    path = tmp_path / "config.json"
    made = _run("-m", "capfinder", "create-train-config", "--file_path", path)
    assert made.returncode == 0, made.stderr
    config = _read(path)
    for option in _options(
        caps,
        output_dir,
        model_type="resnet",
        tune_params__tuning_strategy="bayesian_optimization",
        lr_scheduler_params__type="sgdr",
        lr_scheduler_params__sgdr__cycle_length=2,
        shared_params__model_type="resnet",
        search_params=json.dumps(
            {"stages": {"choices": [2]}, "stage_blocks": {"choices": [1]}, "*_filters": SMALL}
        ),
    ):
        key, _, value = option.removeprefix("--config.").partition("=")
        *groups, name = key.split(".")
        place = config
        for group in groups:
            place = place[group]
        place[name] = value if isinstance(place[name], str) else json.loads(value)
    path.write_text(json.dumps(config))
    run = _run("-m", "capfinder", "train-model", "--config_file", path, environment=FASTER)
    _assert_is_complete(run, output_dir)
    _assert_keras_agrees(output_dir)
    rates = [row["learning_rate"] for row in _metrics(output_dir)["history"]]
    assert rates[2] > rates[1]  # a restart


def test_encoder_without_tuning_with_augmentation(caps, tmp_path):
    options = _options(
        caps,
        tmp_path,
        model_type="encoder",
        tune_params__max_trials=0,
        search_params="{}",
        shared_params__use_augmentation="true",
        export_params__formats=json.dumps(FORMATS),
    )
    run = _run("launch.py", "--config=configs/encoder.py", *options, environment=FASTER)
    _assert_is_complete(run, tmp_path, FORMATS)
    _assert_keras_agrees(tmp_path)
    assert _metrics(tmp_path)["hyperparameters"]["learning_rate"] == 2e-3


def _start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=FASTER,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _signal_after(process: subprocess.Popen[str], words: str, *signals: int) -> str:
    """Sends the signals once a line with `words` was printed; gives all that was printed."""
    assert process.stdout is not None
    shown = ""
    for line in process.stdout:
        shown += line
        if words in line:
            break
    for number in signals:
        process.send_signal(number)
        time.sleep(1)
    rest, _ = process.communicate(timeout=300)
    return shown + rest


def test_signals_end_training_cleanly_and_the_same_command_goes_on(caps, tmp_path):
    options = _options(
        caps,
        tmp_path,
        tune_params__max_trials=0,
        train_params__max_epochs_final_model=40,
        train_params__patience=40,
    )
    command = ("launch.py", "--config=configs/cnn_lstm.py", *options)

    process = _start(*command)
    shown = _signal_after(process, "epoch 2/40", signal.SIGTERM)
    assert process.returncode == 143, shown
    assert not (tmp_path / "evaluation").exists()

    process = _start(*command)
    shown = _signal_after(process, "epoch 5/40", signal.SIGINT)
    assert process.returncode == 0, shown
    assert "epoch 1/40" not in shown  # went on from where SIGTERM ended it
    metrics = _metrics(tmp_path)
    assert metrics["stopped"] == "interrupted"
    assert 5 <= len(metrics["history"]) < 40
    assert any("Ctrl-C" in warning for warning in metrics["warnings"])
    _assert_keras_agrees(tmp_path)


def test_ctrl_c_in_tuning_goes_on_with_the_best_so_far(caps, tmp_path):
    options = _options(
        caps,
        tmp_path,
        tune_params__max_trials=50,
        tune_params__tuning_strategy="random_search",
        train_params__max_epochs_final_model=2,
    )
    process = _start("launch.py", "--config=configs/cnn_lstm.py", *options)
    shown = _signal_after(process, "trial 0: ", signal.SIGINT)
    assert process.returncode == 0, shown
    tuning = _read(tmp_path / "run.json")["tuning"]
    assert tuning["interrupted"]
    assert len(tuning["trials"]) < 50
    assert len(_metrics(tmp_path)["history"]) == 2


def test_other_settings_move_earlier_results_aside(caps, tmp_path):
    changes = {"tune_params__max_trials": 0, "train_params__max_epochs_final_model": 1}
    stages = "--stage=etl,train,evaluate"
    config = "--config=configs/cnn_lstm.py"
    first = _run("launch.py", config, stages, *_options(caps, tmp_path, **changes))
    assert first.returncode == 0, first.stderr
    before = (tmp_path / "evaluation" / "metrics.json").read_text()
    mistaken = {**changes, "tune_params__seed": 1, "etl_params__max_reject_fraction": 0}
    (caps / "data__cap_9.csv").write_text("a,b,c\n")
    try:
        failed = _run("launch.py", config, "--stage=etl", *_options(caps, tmp_path, **mistaken))
    finally:
        (caps / "data__cap_9.csv").unlink()
    assert failed.returncode == 2
    assert (tmp_path / "evaluation" / "metrics.json").read_text() == before
    changes["tune_params__seed"] = 1
    other = _run("launch.py", config, "--stage=etl", *_options(caps, tmp_path, **changes))
    assert other.returncode == 0, other.stderr
    (kept,) = (tmp_path / "previous").iterdir()
    assert (kept / "evaluation" / "metrics.json").read_text() == before
    assert not (tmp_path / "evaluation").exists()
    versions = sorted(path.name for path in (tmp_path / "dataset" / "cap_data").glob("[0-9]*"))
    assert versions == ["1.0.0", "1.1.0"]


def test_help_answers_in_the_terminal():
    for command in (["launch.py", "--help"], ["-m", "capfinder", "--help"]):
        shown = _run(*command)
        assert shown.returncode == 0
        assert "usage" in shown.stdout
