"""Tuning with real, tiny trainings: what is searched, resumed, interrupted, failed and kept."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from capfinder import files, log, models, settings
from capfinder.data.versions import Dataset
from capfinder.errors import SettingsError, StageFailedError, StoppedError
from capfinder.interrupts import Interrupt
from capfinder.stages import assembly, memory, trial, tune
from capfinder.stages.tune import TuneResult
from capfinder.tracking import Tracker

LENGTH, BATCH = 32, 32
MODEL_PARAMS = {"units": (8,), "learning_rate": 0.02}
SEARCH_PARAMS = {"layers": {"choices": (1,)}, "units": {"choices": (8,)}}  # one shape to compile
REAL_MODEL = {  # a cnn_lstm that takes seconds to compile, not a minute
    "conv_layers": {"choices": (1,)},
    "conv_filters": {"choices": (4,)},
    "lstm_layers": {"choices": (1,)},
    "lstm_units": {"choices": (4,)},
    "dense_units": {"choices": (8,)},
}


class Recorder(Tracker):
    """Remembers what it was given; can act in the middle of a run, at a trial's epoch."""

    def __init__(self) -> None:
        super().__init__(None)
        self.metrics: list[tuple[str | None, int | None, dict[str, float]]] = []
        self.parameters: dict[str, Any] = {}
        self.at: dict[tuple[str, int], Any] = {}

    def log_metrics(self, metrics, *, step=None, epoch=None, prefix=None) -> None:
        self.metrics.append((prefix, epoch, dict(metrics)))
        if action := self.at.get((prefix, epoch)):
            action()

    def log_parameters(self, parameters) -> None:
        self.parameters.update(parameters)


def write_dataset(root: Path, *, broken: bool = False) -> Dataset:
    """Two classes that differ in a slow wave; no shards, only the arrays that training reads."""
    directory, fingerprint = root / "cap_data" / "1.0.0", "bad" if broken else "good"
    rng = np.random.default_rng(0)
    shards = []
    for split, n in (("train", 96), ("validation", 64)):
        cap_class = np.arange(n) % 2
        wave = np.sin(np.linspace(0, 6, LENGTH))[None, :] * (cap_class[:, None] - 0.5)
        signal = np.float32(wave + rng.normal(0, 0.7, (n, LENGTH)))
        if broken:
            signal[:] = np.inf
        cache = root / "cache" / fingerprint / split
        cache.mkdir(parents=True)
        np.save(cache / "signal.npy", signal)
        np.save(cache / "cap_class.npy", cap_class.astype(np.int32))
        np.save(cache / "length.npy", np.full(n, LENGTH, np.int32))
        np.save(cache / "read_id.npy", np.array([f"read_{i}".encode() for i in range(n)]))
        shards.append({"name": f"cap_data-{split}.tfrecord-00000-of-00001", "num_examples": n})
    directory.mkdir(parents=True)
    manifest = {"fingerprint": fingerprint, "shards": shards}
    files.write_json(directory / "manifest.json", manifest)
    return Dataset(directory=directory, version="1.0.0", fingerprint=fingerprint, manifest=manifest)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module", autouse=True)
def tiny_architecture() -> Iterator[None]:
    """cnn_lstm is another architecture here, one line in the registry away."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(models.ARCHITECTURES, "cnn_lstm", "tiny_architecture")
        yield


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Each trial compiles anew; on disk, what was compiled stays."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(tmp_path_factory.mktemp("xla")))
    jax.config.update(names[1], 0.0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def make_config(output_dir: Path, **changes: Any) -> ConfigDict:
    """`changes`: keys of tune_params, or whole groups."""
    values: dict[str, Any] = {
        "shared_params.num_classes": 2,
        "shared_params.batch_size": BATCH,
        "shared_params.target_length": LENGTH,
        "shared_params.dtype": "float32",
        "shared_params.output_dir": str(output_dir),
        "tune_params.tuning_strategy": "random_search",
        "tune_params.max_trials": 3,
        "tune_params.max_epochs_hpt": 2,
        "tune_params.patience": 5,
        "model_params": MODEL_PARAMS,
        "search_params": SEARCH_PARAMS,
    }
    for name, value in changes.items():
        values[name if name.endswith("_params") else f"tune_params.{name}"] = value
    return settings.checked(settings.default_config(), values)


def run(config: ConfigDict, dataset: Dataset, tracker: Tracker | None = None) -> TuneResult:
    return tune.run(config, dataset=dataset, tracker=tracker or Recorder(), interrupt=Interrupt())


def outcome(result: TuneResult) -> list[tuple[Any, ...]]:
    """All of the trials but the time they took."""
    return [
        (row["number"], row["state"], row["value"], row["epochs"], tuple(row["params"].items()))
        for row in result.trials
    ]


@pytest.fixture(scope="module")
def undisturbed(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    return run(make_config(tmp_path_factory.mktemp("undisturbed")), dataset)


def test_the_first_trial_is_model_params_and_the_best_is_kept(dataset, undisturbed):
    first, *others = undisturbed.trials
    assert first["params"]["learning_rate"] == 0.02
    assert all(row["params"]["learning_rate"] != 0.02 for row in others)
    assert [row["state"] for row in undisturbed.trials] == ["complete"] * 3
    values = [row["value"] for row in undisturbed.trials]
    assert undisturbed.best_value == max(values) > 0.6
    assert undisturbed.trial == values.index(max(values))
    assert undisturbed.source == "study"
    best = undisturbed.trials[undisturbed.trial]
    assert undisturbed.hyperparameters.learning_rate == best["params"]["learning_rate"]
    known = json.loads((undisturbed.directory / tune.BEST).read_text())
    assert known["hyperparameters"]["learning_rate"] == best["params"]["learning_rate"]
    assert (known["value"], known["trial"]) == (undisturbed.best_value, undisturbed.trial)
    assert known["source"] == "study"
    assert {"fingerprint", "study"} <= known.keys()


def test_best_finds_the_study_of_the_same_settings_only(dataset, undisturbed):
    output_dir = undisturbed.directory.parent.parent
    found = tune.best(make_config(output_dir), dataset=dataset)
    assert found == undisturbed
    assert tune.best(make_config(output_dir, max_trials=9), dataset=dataset) == undisturbed
    assert tune.best(make_config(output_dir, seed=1), dataset=dataset) is None
    assert tune.best(make_config(output_dir, max_epochs_hpt=1), dataset=dataset) is None
    assert tune.best(make_config(output_dir / "other"), dataset=dataset) is None


def test_a_result_can_be_written_as_json_and_said_in_a_line(undisturbed):
    record = undisturbed.as_record(undisturbed.directory.parent.parent)
    assert json.loads(json.dumps(record))["directory"] == "tuner_models/capfinder_tune_cnn_lstm"
    assert undisturbed.summary().startswith("3 trials; best: trial")


def test_the_same_seed_gives_the_same_trials_and_a_rerun_adds_none(tmp_path, dataset, undisturbed):
    assert outcome(run(make_config(tmp_path), dataset)) == outcome(undisturbed)
    recorder = Recorder()
    again = run(make_config(tmp_path), dataset, recorder)
    assert outcome(again) == outcome(undisturbed)
    assert [prefix for prefix, _, _ in recorder.metrics] == [None]  # nothing was trained
    more = run(make_config(tmp_path, max_trials=4), dataset)
    assert outcome(more)[:3] == outcome(undisturbed)
    assert len(more.trials) == 4


@pytest.mark.parametrize("strategy", ("hyperband", "bayesian_optimization"))
def test_other_strategies_keep_to_the_cap_too(tmp_path, dataset, strategy):
    result = run(make_config(tmp_path, tuning_strategy=strategy), dataset)
    assert len(result.trials) == 3
    assert {row["state"] for row in result.trials} <= {"complete", "pruned"}
    assert result.source == "study"


def test_ctrl_c_before_the_first_trial_ends_gives_model_params(tmp_path, dataset, undisturbed):
    interrupt, recorder = Interrupt(), Recorder()
    recorder.at["trial_0", 1] = lambda: setattr(interrupt, "requested", True)
    config = make_config(tmp_path)
    result = tune.run(config, dataset=dataset, tracker=recorder, interrupt=interrupt)
    assert result.interrupted
    assert result.source == "model_params"
    assert result.hyperparameters == tune.without_study(config).hyperparameters
    assert [row["state"] for row in result.trials] == ["running"]
    assert tune.best(config, dataset=dataset) is None
    assert outcome(run(config, dataset)) == outcome(undisturbed)


def test_ctrl_c_later_gives_the_best_so_far_and_a_rerun_ends_the_study(
    tmp_path, dataset, undisturbed
):
    interrupt, recorder = Interrupt(), Recorder()
    recorder.at["trial_1", 1] = lambda: setattr(interrupt, "requested", True)
    config = make_config(tmp_path)
    result = tune.run(config, dataset=dataset, tracker=recorder, interrupt=interrupt)
    assert result.interrupted
    assert (result.source, result.trial) == ("study", 0)
    assert [row["state"] for row in result.trials] == ["complete", "running"]
    assert "ended by Ctrl-C" in result.summary()
    assert outcome(run(config, dataset)) == outcome(undisturbed)


def test_a_signal_in_a_trial_leaves_it_to_the_rerun(tmp_path, dataset, undisturbed):
    def stop() -> None:
        raise StoppedError("stopped by SIGTERM", 143)

    config = make_config(tmp_path)
    for _ in range(3):  # more often than a trial whose process died would be taken up again
        recorder = Recorder()
        recorder.at["trial_0", 2] = stop
        with pytest.raises(StoppedError):
            run(config, dataset, recorder)
    assert outcome(run(config, dataset)) == outcome(undisturbed)


def test_curves_and_the_best_hyperparameters_reach_the_tracker(tmp_path, dataset):
    recorder = Recorder()
    result = run(make_config(tmp_path, max_trials=1), dataset, recorder)
    curve = [(prefix, epoch) for prefix, epoch, _ in recorder.metrics]
    assert curve == [("trial_0", 1), ("trial_0", 2), (None, None)]
    assert {"loss", "val_loss", "val_accuracy", "learning_rate"} <= recorder.metrics[0][2].keys()
    assert recorder.metrics[-1][2] == {"best_val_accuracy": result.best_value}
    assert recorder.parameters["best"]["learning_rate"] == 0.02


def test_overwrite_starts_anew_every_time(tmp_path, dataset):
    run(make_config(tmp_path, max_trials=2), dataset)
    recorder = Recorder()
    result = run(make_config(tmp_path, max_trials=1, overwrite=True), dataset, recorder)
    assert len(result.trials) == 1
    assert len(recorder.metrics) == 3  # two epochs and the best value


def test_a_trial_that_runs_out_of_memory_fails_alone(tmp_path, dataset, monkeypatch):
    real = trial.loop.fit
    fits = []

    def fit(state, **arguments):
        fits.append(state)
        if len(fits) == 2:
            jnp.zeros((2**46,), jnp.float32).block_until_ready()  # XLA's own error
        if len(fits) == 3:
            raise MemoryError
        return real(state, **arguments)

    monkeypatch.setattr(trial.loop, "fit", fit)
    result = run(make_config(tmp_path), dataset)
    states = [row["state"] for row in result.trials]
    assert states == ["complete", "fail", "fail", "complete", "complete"]
    for row in result.trials[1:3]:
        assert "out of memory" in row["reason"]
        assert "more was needed than foretold" in row["reason"]
        assert "Try half: --config.runtime_params.microbatch=16" in row["reason"]
        assert row["reason"].endswith("shared_params.batch_size=16")


def test_a_trial_that_needs_more_than_there_is_fails_before_its_first_step(
    tmp_path, dataset, monkeypatch
):
    units = {"layers": {"choices": (1,)}, "units": {"choices": (8, 64)}}
    config, recorder = make_config(tmp_path, search_params=units), Recorder()
    needed = [
        memory.step_growth(config, models.parse_hyperparameters("cnn_lstm", {"units": (width,)}))
        for width in (8, 64)
    ]
    between = int(sum(growth.bytes(BATCH) for growth in needed) / 2)
    monkeypatch.setattr(memory, "available_bytes", lambda: between)
    result = run(config, dataset, recorder)
    ends = {(row["params"]["units_0"], row["state"]) for row in result.trials}
    assert ends == {(8, "complete"), (64, "fail")}
    begun = {prefix for prefix, _, _ in recorder.metrics}
    for row in result.trials:
        if row["state"] == "fail":
            assert "out of memory: a step of 32 reads needs about" in row["reason"]
            assert f"trial_{row['number']}" not in begun


def test_trials_take_their_steps_as_the_final_training_does(tmp_path, dataset, caplog, monkeypatch):
    def taken(name: str, **runtime: int) -> tuple[set[int], list[float]]:
        caplog.clear()
        config, recorder = make_config(tmp_path / name, max_trials=1, max_epochs_hpt=1), Recorder()
        config.runtime_params.update(runtime)
        run(config, dataset, recorder)
        steps = {int(step) for step in re.findall(r"Tuning: (\d+) of", caplog.text)}
        return steps, [figures["loss"] for prefix, _, figures in recorder.metrics if prefix]

    monkeypatch.setattr(log, "PLAIN_LINE_SECONDS", 0.0)  # each step of a bar is a line
    caplog.set_level("INFO", "capfinder")
    steps, losses = taken("alone")
    in_twos, same = taken("in twos", steps_per_call=2)
    assert {1, 2, 3} <= steps and {2, 3} <= in_twos and 1 not in in_twos
    assert same == pytest.approx(losses, rel=1e-4)
    _, in_parts = taken("in parts", microbatch=8)  # other draws of dropout
    assert in_parts != pytest.approx(losses, rel=1e-4)
    assert in_parts == pytest.approx(losses, rel=0.3)


def test_a_study_is_one_of_its_microbatch(dataset, undisturbed):
    config = make_config(undisturbed.directory.parent.parent)
    config.runtime_params.steps_per_call = 2
    assert tune.best(config, dataset=dataset) == undisturbed
    config.runtime_params.microbatch = 8
    assert tune.best(config, dataset=dataset) is None


def test_max_trials_failures_end_the_stage_with_advice(tmp_path):
    broken = write_dataset(tmp_path / "dataset", broken=True)
    config = make_config(tmp_path, max_trials=2)
    with pytest.raises(StageFailedError, match="2 trials failed; the last") as caught:
        run(config, broken)
    assert "learning rates" in str(caught.value)
    assert "epoch 1" in str(caught.value)
    assert tune.best(config, dataset=broken) is None


def test_failures_of_earlier_runs_count_until_max_trials_is_raised(tmp_path):
    broken = write_dataset(tmp_path / "dataset", broken=True)
    earlier = r"trials failed, 2 of them in earlier runs or other workers; the last one: .* epoch 1"
    with pytest.raises(StageFailedError):
        run(make_config(tmp_path, max_trials=2), broken)
    for max_trials, failed in ((2, 2), (3, 3)):
        with pytest.raises(StageFailedError, match=f"{failed} {earlier}") as caught:
            run(make_config(tmp_path, max_trials=max_trials), broken)
        assert "A higher tune_params.max_trials goes on" in str(caught.value)


def test_an_error_that_is_not_the_trials_own_ends_the_run_and_loses_nothing(
    tmp_path, dataset, undisturbed, monkeypatch
):
    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(assembly, "initial_state", fail)
        with pytest.raises(ZeroDivisionError):
            run(make_config(tmp_path), dataset)
    assert outcome(run(make_config(tmp_path), dataset)) == outcome(undisturbed)


def test_an_error_that_comes_again_fails_its_trial_and_the_study_goes_on(
    tmp_path, dataset, monkeypatch
):
    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(assembly, "initial_state", fail)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                run(make_config(tmp_path), dataset)
    result = run(make_config(tmp_path), dataset)
    assert [row["state"] for row in result.trials] == ["fail"] + 3 * ["complete"]
    assert result.trials[0]["reason"].endswith("died 2 times: ZeroDivisionError: a bug")


def test_each_trial_is_told_as_it_ends_and_the_best_marked(
    tmp_path, dataset, undisturbed, monkeypatch
):
    monkeypatch.setattr(log.logger, "propagate", log.logger.propagate)  # as it is, afterwards
    path = log.start(tmp_path / "logs")
    run(make_config(tmp_path), dataset)
    log.stop()
    told = [line.split(" | ")[-1] for line in path.read_text().splitlines()]
    best = None
    for row in undisturbed.trials:
        best = row if best is None or row["value"] > best["value"] else best
        value, best_value = f"{row['value']:.1%}", f"{best['value']:.1%}"
        line = f"trial {row['number']}: complete, 2 epochs, val_accuracy {value}; best so far: "
        assert told.count(f"{line}trial {best['number']}, {best_value}") == 1
    (marked,) = [line for line in told if "complete (best)" in line]
    assert re.split(r"\W+", marked)[1] == str(undisturbed.trial)


def another_worker(config: ConfigDict, dataset: Dataset) -> Any:
    return tune.open_study(config, dataset)


def test_what_another_worker_does_is_told_and_may_be_the_best(tmp_path, dataset, caplog):
    def work() -> None:
        other = another_worker(config, dataset).next_trial()
        other.note(hyperparameters={"units": [4], "learning_rate": 0.5})
        other.complete(1.01)  # nothing is better

    config, recorder = make_config(tmp_path, max_trials=2), Recorder()
    recorder.at["trial_0", 1] = work
    caplog.set_level("INFO", "capfinder")
    result = run(config, dataset, recorder)
    assert [row["state"] for row in result.trials] == ["complete", "complete"]
    assert (result.trial, result.best_value, result.hyperparameters.units) == (1, 1.01, (4,))
    assert re.search(r"trial 0: .*; best so far: trial 1, 101\.0%", caplog.text)
    assert re.search(r"trial 1 \(by process \d+ on .*\): complete", caplog.text)


def test_a_trial_lost_to_another_worker_is_let_go(tmp_path, dataset, undisturbed, caplog):
    def steal() -> None:
        recorder.at.clear()
        study = another_worker(config, dataset)
        (running,) = [each for each in study.trials() if each.state.name == "RUNNING"]
        study._storage.set_trial_user_attr(running._trial_id, "worker", "elsewhere:1:x")

    config, recorder = make_config(tmp_path), Recorder()
    recorder.at["trial_1", 1] = steal
    result = run(config, dataset, recorder)
    assert "trial 1: another worker has it now" in caplog.text
    assert outcome(result) == outcome(undisturbed)  # as that worker isn't there


def test_the_time_is_over_also_for_who_waits_for_other_workers(tmp_path, dataset, caplog):
    config = make_config(tmp_path, timeout_minutes=0.005)
    study = another_worker(config, dataset)
    taken = [study.next_trial() for _ in range(3)]
    caplog.set_level("INFO", "capfinder")
    result = run(config, dataset)
    assert result.source == "model_params"
    assert "Waiting for other workers" in caplog.text and "timeout_minutes" in caplog.text
    for each in taken:
        each.leave()


def test_no_time_means_no_trial(tmp_path, dataset):
    result = run(make_config(tmp_path, timeout_minutes=1e-9), dataset)
    assert result.trials == []
    assert result.source == "model_params"


def test_no_trials_asked_for_means_model_params_and_no_study(tmp_path, dataset):
    result = run(make_config(tmp_path, max_trials=0), dataset)
    assert result.hyperparameters.units == (8,)
    assert result.summary() == "model_params, no tuning"
    assert not (tmp_path / "tuner_models").exists()


def test_wrong_search_params_stop_before_anything_is_written(tmp_path, dataset):
    config = make_config(tmp_path, search_params={"untis": {"low": 4}})
    with pytest.raises(SettingsError, match="did you mean units"):
        run(config, dataset)
    assert not (tmp_path / "tuner_models").exists()


def test_search_params_change_what_is_drawn_and_model_params_outside_are_no_trial(
    tmp_path, dataset
):
    config = make_config(tmp_path, max_trials=1, search_params={"units": {"choices": (5,)}})
    result = run(config, dataset)
    assert result.trials[0]["params"]["units_0"] == 5
    assert result.trials[0]["params"]["learning_rate"] != 0.02


def test_a_real_architecture_is_searched_from_its_defaults_on(tmp_path, dataset, monkeypatch):
    monkeypatch.setitem(models.ARCHITECTURES, "cnn_lstm", "capfinder.models.cnn_lstm")
    config = make_config(
        tmp_path, max_trials=1, max_epochs_hpt=1, model_params={}, search_params=REAL_MODEL
    )
    result = run(config, dataset)
    assert result.hyperparameters.conv_filters == (4,)
    assert result.trials[0]["num_parameters"] > 200
    assert tune.best(config, dataset=dataset) == result
