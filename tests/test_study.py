"""The study: exact cap, reproducible draws, trials that survive their worker. No training here."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import pytest

from capfinder.errors import InputError, SettingsError, StageFailedError
from capfinder.stages import heartbeat, storage
from capfinder.stages.study import Lost, Plan, Study, Trial, Waiting

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


def test_looking_at_a_study_writes_nothing(tmp_path: Path):
    """Workers look every second while they wait."""
    study = open_study(tmp_path, plan(max_trials=2))
    train(study.next_trial())
    held = study.next_trial()
    before = (tmp_path / "journal.log").read_bytes()
    assert (study.finished(), len(study.trials())) == (1, 2) and study.best() is not None
    with pytest.raises(Waiting):
        open_study(tmp_path, plan(max_trials=2)).next_trial()
    lines = (tmp_path / "journal.log").read_bytes().removeprefix(before).splitlines()
    assert len(lines) == 0, lines
    held.leave()


def test_no_trial_is_taken_up_beyond_a_lowered_cap(tmp_path: Path):
    study = open_study(tmp_path, plan(max_trials=4))
    dead = [study.next_trial() for _ in range(4)]
    train(dead[0])
    for trial in dead[1:]:
        trial._lock.close()
    fewer = [open_study(tmp_path, plan(max_trials=2)) for _ in range(2)]
    trial = fewer[0].next_trial()
    assert trial and trial.number == 1
    with pytest.raises(Waiting, match="trial 1"):
        fewer[1].next_trial()
    train(trial)
    assert fewer[0].next_trial() is fewer[1].next_trial() is None


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
                    break  # dead before it is noted as pruned
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
    assert time.monotonic() - started < 60  # not after the minutes without a sign of life
    for trial in (mine, other):
        trial.leave()


def test_overwrite_starts_anew_but_not_under_another_worker(tmp_path: Path):
    study = open_study(tmp_path, plan(max_trials=2))
    running = study.next_trial()
    assert running
    with pytest.raises(InputError, match=r"another worker .* runs trial 0"):
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


def test_a_trial_that_ends_its_process_with_an_error_fails_the_second_time(tmp_path: Path):
    study = open_study(tmp_path, plan(max_trials=1))
    for _ in range(2):
        trial = study.next_trial()
        assert trial and trial.number == 0
        trial.abandon("XlaRuntimeError: no such convolution")
    trial = study.next_trial()
    assert trial and trial.number == 1
    trial.complete(0.5)
    reason = study.trials()[0].user_attrs["reason"]
    assert reason == "its process died 2 times: XlaRuntimeError: no such convolution"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/study.db"


@pytest.fixture
def quick_hearts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.25)


def on_host(name: str, tmp_path: Path, url: str, **changes: Any) -> Study:
    """Workers with other lock files are to each other as those on other hosts."""
    (tmp_path / name).mkdir(exist_ok=True)
    the_plan = changes.pop("plan", None) or plan("random_search", max_trials=3)
    return open_study(tmp_path / name, the_plan, storage=url, **changes)


def next_in_time(study: Study) -> Trial | None:
    """Waits for it as long as another worker may still live."""
    while True:
        try:
            return study.next_trial()
        except Waiting:
            time.sleep(0.01)


def fall_silent(trial: Trial) -> None:
    """As a worker does whose host has stopped."""
    assert trial._heart is not None
    trial._heart.stop()


def test_a_trial_of_a_silent_worker_elsewhere_is_taken_up_and_lost_to_it(
    tmp_path: Path, url: str, quick_hearts
):
    ours, theirs = (on_host(name, tmp_path, url, plan=plan(max_trials=1)) for name in "ab")
    sleeper = theirs.next_trial()
    assert sleeper and sleeper.number == 0
    sleeper.report(1, 0.1)
    for _ in range(2 * heartbeat.MISSED_BEATS):
        with pytest.raises(Waiting, match=r"trial 0 \(process \d+ on "):
            ours.next_trial()
        time.sleep(heartbeat.BEAT_SECONDS)
    fall_silent(sleeper)
    mine = next_in_time(ours)
    assert mine and mine.number == 0
    for end in (lambda: sleeper.report(2, 0.2), lambda: sleeper.complete(0.2), sleeper.prune):
        with pytest.raises(Lost):
            end()
    sleeper.leave()
    assert mine.report(1, 0.9) is False
    mine.complete(0.5)
    with pytest.raises(Lost):
        sleeper.fail("too late")
    (only,) = ours.trials()
    assert (only.value, only.intermediate_values, only.user_attrs["starts"]) == (0.5, {1: 0.1}, 2)
    assert next_in_time(theirs) is None


def test_a_trial_left_on_purpose_is_taken_up_elsewhere_at_once(tmp_path: Path, url: str):
    ours, theirs = (on_host(name, tmp_path, url) for name in "ab")
    trial = theirs.next_trial()
    assert trial
    trial.leave()
    mine = ours.next_trial()
    assert mine and (mine.number, ours.trials()[0].user_attrs["starts"]) == (0, 1)
    mine.leave()


def test_workers_on_many_hosts_keep_to_the_cap(tmp_path: Path, url: str):
    """None sees the locks of another; all see the last place free at the same moment."""
    studies = [on_host(f"host_{n}", tmp_path, url, plan=plan(max_trials=TRIALS)) for n in range(4)]
    together = threading.Barrier(len(studies))
    errors = []

    def work(study: Study) -> None:
        try:
            together.wait()
            while (trial := next_in_time(study)) is not None:
                time.sleep(0.01)
                trial.complete(0.5)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(study,)) for study in studies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [trial.state.name for trial in studies[0].trials()] == ["COMPLETE"] * TRIALS


def test_of_two_hosts_that_take_the_last_place_at_once_one_gets_it(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
):
    ask, both_saw_it_free = optuna.Study.ask, threading.Barrier(2)

    def ask_together(study: optuna.Study) -> optuna.Trial:
        both_saw_it_free.wait(60)
        return ask(study)

    monkeypatch.setattr(optuna.Study, "ask", ask_together)
    studies = [on_host(name, tmp_path, url, plan=plan(max_trials=1)) for name in "ab"]
    got: list[Trial] = []
    refused: list[Waiting] = []

    def take(study: Study) -> None:
        try:
            trial = study.next_trial()
            assert trial
            got.append(trial)
        except Waiting as others:
            refused.append(others)

    threads = [threading.Thread(target=take, args=(study,)) for study in studies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused), got[0].number) == (1, 1, 0)
    got[0].complete(0.5)
    assert [study.next_trial() for study in studies] == [None, None]
    assert [trial.number for trial in studies[0].trials()] == [0]  # no failure is counted either


def test_overwrite_waits_for_a_sign_of_life_from_elsewhere(tmp_path: Path, url: str, quick_hearts):
    theirs = on_host("a", tmp_path, url)
    running = theirs.next_trial()
    assert running
    with pytest.raises(InputError, match=r"another worker .* runs trial 0"):
        on_host("b", tmp_path, url, overwrite=True)
    fall_silent(running)
    assert on_host("b", tmp_path, url, overwrite=True).trials() == []
    with pytest.raises(Lost):
        running.complete(0.5)
    running.close()


def test_a_pause_of_the_looker_counts_as_one_look(monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    watch = heartbeat.Watch()
    assert not watch.is_dead(0, "a")
    now += 1000 * heartbeat.BEAT_SECONDS
    assert not watch.is_dead(0, "a")
    assert not watch.is_dead(0, "b")  # it beats again
    looks = []
    for _ in range(heartbeat.MISSED_BEATS):
        now += heartbeat.BEAT_SECONDS
        looks += [watch.is_dead(0, "b"), watch.is_dead(0, "b"), watch.is_dead(1, now)]
    assert looks == [False] * (3 * heartbeat.MISSED_BEATS - 3) + [True, True, False]


def test_a_database_that_is_away_for_a_while_is_waited_for(tmp_path: Path, caplog, monkeypatch):
    caplog.set_level("WARNING", "capfinder")
    monkeypatch.setattr(storage, "WAIT_SECONDS", 0.01)
    place = tmp_path / "place"
    place.mkdir()
    study = on_host("a", tmp_path, f"sqlite:///{place}/study.db", plan=plan(max_trials=1))
    place.rename(tmp_path / "away")
    study._storage._backend.engine.dispose()  # the connections are lost
    back = threading.Timer(0.3, lambda: (tmp_path / "away").rename(place))
    back.start()
    run_all(study)
    back.join()
    assert study.finished() == 1
    assert "can't be reached" in caplog.text


def test_a_database_that_is_lost_ends_the_work_in_a_line(tmp_path: Path, url: str):
    with (
        pytest.raises(StageFailedError, match=r"the study's database failed .*not a database"),
        on_host("a", tmp_path, url) as study,
    ):
        trial = study.next_trial()
        assert trial
        (tmp_path / "study.db").write_bytes(b"no database any more" * 1000)
        study._storage._backend.engine.dispose()
        try:
            trial.report(1, 0.5)
        except optuna.exceptions.StorageInternalError:
            trial.leave()  # says nothing more
            raise


def test_studies_are_known_by_name_and_settings_without_making_any(tmp_path: Path, url: str):
    for storage_url in (None, url):
        assert storage.studies(tmp_path, storage_url) == {}
        assert not any(tmp_path.iterdir()) or storage_url
        open_study(tmp_path, plan(), storage=storage_url, facts={"batch_size": 8})
        known = storage.studies(tmp_path, storage_url)
        assert known == {f"toy-{'f' * 16}": {"batch_size": 8}}
