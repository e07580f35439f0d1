"""The study: exact cap, reproducible draws, trials that survive their worker. No training here."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from capfinder.errors import InputError, SettingsError
from capfinder.stages.study import Plan, Study, Trial, Waiting

STRATEGIES = ("random_search", "bayesian_optimization", "hyperband")
EPOCHS = 4
TRIALS = 6


def plan(strategy: str = "hyperband", *, max_trials: int = TRIALS, seed: int = 42) -> Plan:
    return Plan(strategy, max_trials=max_trials, max_epochs=EPOCHS, factor=2, seed=seed)


def open_study(directory: Path, the_plan: Plan, **changes: Any) -> Study:
    settings: dict[str, Any] = {"storage": None, "first": None, "overwrite": False} | changes
    return Study(directory, fingerprint="f" * 64, name_prefix="toy", plan=the_plan, **settings)


def draw(trial: Trial, *, only_part: bool = False) -> float:
    """A conditional space with a known best; gives the value an ideal training would reach."""
    p = trial.parameters
    rate = p.suggest_float("rate", 1e-4, 1e-1, log=True)
    depth = p.suggest_int("depth", 1, 3)
    if only_part:
        return 0.0
    widths = [p.suggest_int(f"width_{i}", 8, 64, step=8) for i in range(depth)]
    kernel = p.suggest_categorical("kernel", (3, 5, 7))
    return 1 / (1 + abs(rate - 0.01) * 20 + sum(widths) / 200 + (kernel - 5) ** 2)


def train(trial: Trial) -> None:
    value = draw(trial)
    for epoch in range(1, EPOCHS + 1):
        if trial.report(epoch, value * epoch / EPOCHS):
            trial.prune()
            return
    trial.complete(value)


def run_all(study: Study) -> None:
    while (trial := study.next_trial()) is not None:
        train(trial)


def told(study: Study) -> list[tuple[Any, ...]]:
    return [(t.number, t.state.name, t.value, tuple(t.params.items())) for t in study.trials()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Any, ...]]]:
    result = {}
    for strategy in STRATEGIES:
        study = open_study(tmp_path_factory.mktemp(strategy), plan(strategy))
        run_all(study)
        result[strategy] = told(study)
    return result


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_max_trials_counts_complete_and_pruned_trials_over_reruns(tmp_path: Path, strategy: str):
    for cap, expected in ((2, 2), (2, 2), (5, 5), (1, 5)):
        study = open_study(tmp_path, plan(strategy, max_trials=cap))
        run_all(study)
        assert study.finished() == len(study.trials()) == expected


def test_only_hyperband_prunes(undisturbed):
    pruned = {s: sum(t[1] == "PRUNED" for t in trials) for s, trials in undisturbed.items()}
    assert pruned["random_search"] == pruned["bayesian_optimization"] == 0
    assert 0 < pruned["hyperband"] < TRIALS


def test_strategies_and_seeds_draw_differently(tmp_path: Path, undisturbed):
    assert undisturbed["random_search"] != undisturbed["bayesian_optimization"]
    other = open_study(tmp_path, plan("random_search", seed=43))
    run_all(other)
    assert told(other)[0][3] != undisturbed["random_search"][0][3]
    drawn = [trial[3] for trial in undisturbed["random_search"]]
    assert len(set(drawn)) == len(drawn)


def test_bayesian_optimization_models_after_a_third_of_the_trials(undisturbed):
    """Up to then it draws what a random search draws; afterwards it doesn't."""
    guided = [t[3] for t in undisturbed["bayesian_optimization"]]
    random = [t[3] for t in undisturbed["random_search"]]
    assert guided[:2] == random[:2]
    assert all(a != b for a, b in zip(guided[2:], random[2:], strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_study_reopened_for_every_trial_draws_what_an_undisturbed_one_does(
    tmp_path: Path, undisturbed, strategy: str
):
    while (trial := open_study(tmp_path, plan(strategy)).next_trial()) is not None:
        train(trial)
    assert told(open_study(tmp_path, plan(strategy))) == undisturbed[strategy]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_trials_cut_short_anywhere_end_as_undisturbed_ones(
    tmp_path: Path, undisturbed, strategy: str
):
    def abandon(trial: Trial, moment: int) -> None:
        if moment == 1:
            draw(trial, only_part=True)
        if moment in (2, 3):
            value = draw(trial)
            for epoch in range(1, moment):
                if trial.report(epoch, value * epoch / EPOCHS):
                    trial.prune()
                    return
        trial._lock.close()  # what the kernel does when the process dies

    moment = 0
    while (trial := open_study(tmp_path, plan(strategy)).next_trial()) is not None:
        abandon(trial, moment)
        moment = (moment + 1) % 4
        if (again := open_study(tmp_path, plan(strategy)).next_trial()) is None:
            break
        train(again)
    assert told(open_study(tmp_path, plan(strategy))) == undisturbed[strategy]


def test_the_first_trial_is_the_one_given(tmp_path: Path):
    first = {"rate": 0.01, "depth": 1, "width_0": 16, "kernel": 5}
    open_study(tmp_path, plan(max_trials=2), first=first)
    study = open_study(tmp_path, plan(max_trials=2), first=first)  # given twice, taken once
    run_all(study)
    assert study.trials()[0].params == first
    assert study.trials()[1].params != first
    assert len(study.trials()) == 2


def test_two_workers_share_the_cap_and_the_last_one_waits(tmp_path: Path):
    ours, theirs = (open_study(tmp_path, plan(max_trials=3)) for _ in range(2))
    a, b, c = ours.next_trial(), theirs.next_trial(), ours.next_trial()
    assert a and b and c
    assert [a.number, b.number, c.number] == [0, 1, 2]
    with pytest.raises(Waiting):
        theirs.next_trial()
    a.fail("lost")  # a failed trial gives its place away
    d = theirs.next_trial()
    assert d and d.number == 3
    for trial in (b, c, d):
        train(trial)
    assert ours.next_trial() is theirs.next_trial() is None
    assert ours.finished() == 3


def test_a_trial_is_taken_up_once_and_then_fails_with_a_reason(tmp_path: Path):
    study = open_study(tmp_path, plan(max_trials=1))
    for _ in range(2):
        trial = study.next_trial()
        assert trial and trial.number == 0
        trial._lock.close()
    trial = study.next_trial()
    assert trial and trial.number == 1
    dead = study.trials()[0]
    assert dead.state.name == "FAIL"
    assert "died 2 times" in dead.user_attrs["reason"]
    trial.leave()


def test_a_trial_left_on_purpose_may_be_taken_up_again_and_again(tmp_path: Path):
    study = open_study(tmp_path, plan(max_trials=1))
    for _ in range(4):
        trial = study.next_trial()
        assert trial and trial.number == 0
        trial.leave()
    trial = study.next_trial()
    assert trial
    trial.complete(0.5)
    trial.leave()  # as after a signal in the last moment
    assert study.finished() == 1


def test_a_killed_process_leaves_its_trial_to_the_next_one(tmp_path: Path):
    program = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import test_study
trial = test_study.open_study(Path(sys.argv[1]), test_study.plan()).next_trial()
test_study.draw(trial)
print(trial.number, flush=True)
time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline().strip() == "0"
        study = open_study(tmp_path, plan())
        other = study.next_trial()
        assert other and other.number == 1  # the worker lives
        worker.send_signal(signal.SIGKILL)
    started = time.monotonic()
    mine = study.next_trial()
    assert mine and mine.number == 0
    assert time.monotonic() - started < 5
    for trial in (mine, other):
        trial.leave()


def test_overwrite_starts_anew_but_not_under_another_worker(tmp_path: Path):
    study = open_study(tmp_path, plan(max_trials=2))
    running = study.next_trial()
    assert running
    with pytest.raises(InputError, match="another worker runs trial 0"):
        open_study(tmp_path, plan(max_trials=2), overwrite=True)
    train(running)
    fresh = open_study(tmp_path, plan(max_trials=2), overwrite=True)
    assert fresh.trials() == []
    run_all(fresh)
    assert len(open_study(tmp_path, plan(max_trials=2)).trials()) == 2


def test_a_journal_cut_in_its_last_line_can_be_read_and_written(tmp_path: Path):
    run_all(open_study(tmp_path, plan(max_trials=2)))
    journal = tmp_path / "journal.log"
    journal.write_bytes(journal.read_bytes() + b'{"op_code":5,"wor')
    study = open_study(tmp_path, plan(max_trials=4))
    assert study.finished() == 2
    run_all(study)
    assert open_study(tmp_path, plan(max_trials=4)).finished() == 4


def test_best_prefers_complete_trials_and_the_earliest_of_equals(tmp_path: Path):
    study = open_study(tmp_path, plan("random_search", max_trials=4))
    assert study.best() is None
    trial = study.next_trial()
    assert trial
    trial.report(1, 0.9)
    trial.prune()
    assert study.best().number == 0
    for value in (0.5, 0.7, 0.7):
        trial = study.next_trial()
        assert trial
        trial.complete(value)
    assert study.best().number == 2


def test_a_database_url_holds_the_study_too(tmp_path: Path):
    url = f"sqlite:///{tmp_path}/study.db"
    run_all(open_study(tmp_path, plan(max_trials=1), storage=url))
    assert open_study(tmp_path, plan(max_trials=1), storage=url).finished() == 1
    assert not (tmp_path / "journal.log").exists()


@pytest.mark.parametrize(
    "url", ("nonsense", "postgresql://me:secret@nowhere.invalid/db", "sqlite:////absent/dir/x.db")
)
def test_a_storage_that_cannot_be_used_is_one_line_without_the_password(tmp_path: Path, url: str):
    with pytest.raises(SettingsError, match=r"tune_params\.storage=") as caught:
        open_study(tmp_path, plan(), storage=url)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
