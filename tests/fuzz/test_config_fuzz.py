"""A few hundred cases of the fuzz run through the dry run, and proof that it would notice."""

import dataclasses
import json
import random
import sys

import config_directories
import config_fuzz
import config_mutations
import config_values
import pytest
from config_cases import (
    KINDS,
    Case,
    Ended,
    Place,
    check_ending,
    check_schedule,
    check_usable,
    make_case,
)
from etl_compare import Mismatch

from capfinder import allowed, preparation, settings
from capfinder.errors import SettingsError

SEED = 5
CASES = 25 * len(KINDS)
COMMANDS = 16
VALID = Case(b"{}", outcome="valid")
SAID = f"Stages: etl\n{preparation.__name__}. Nothing was written (dry run).\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("fuzz") / "here")


def _noted(number, run):
    try:
        return run(make_case(SEED, number)).outcome
    except Exception as error:
        error.add_note(f"tests/fuzz/config_fuzz.py --seed {SEED} --repeat {number}")
        raise


def test_the_dry_run_of_any_settings_and_data_says_what_would_run_or_what_is_wrong(place):
    outcomes = [_noted(number, place.run) for number in range(CASES)]
    assert outcomes.count("valid") > CASES / 6
    assert outcomes.count("refused") > CASES / 3


@pytest.mark.parametrize("name", config_directories.KINDS)
def test_every_kind_of_directory_is_taken_or_refused_as_it_should(place, name):
    kind = config_directories.KINDS[name]
    flat = {
        "etl_params.caps_data_dir": f"{config_values.HERE}/case/caps",
        "shared_params.output_dir": f"{config_values.HERE}/out",
        "shared_params.num_classes": len(config_directories.CLASSES),
        "tracking_params.mode": "off",
        **dict(kind.settings),
    }
    text = json.dumps(config_values.nested(flat)).encode()
    words = (kind.words,) if kind.outcome == "refused" else ()
    place.run(Case(text, outcome=kind.outcome, words=words, data=name, data_seed=name))


@pytest.mark.parametrize("setting", settings.SETTINGS, ids=lambda setting: setting.key)
def test_what_the_words_of_a_setting_allow_is_taken_and_what_they_dont_is_refused(setting):
    rng = random.Random(setting.key)
    for _ in range(20):
        if setting.key not in config_values.TOGETHER:
            value = config_values.value_of(rng, setting)
            assert setting.convert(setting.convert(value)) == setting.convert(value)
        with pytest.raises(SettingsError) as error:
            setting.convert(config_mutations.wrong_value(rng, setting))
        assert str(error.value).startswith(f"{setting.key}=")
        assert setting.allowed_text() in str(error.value)


def test_the_command_line_ends_with_0_or_2(place):
    codes = [_noted(number, place.run_command) for number in range(COMMANDS)]
    assert {"valid", "refused"} == set(codes)


@pytest.mark.parametrize(
    ("case", "ended", "told"),
    [
        (VALID, Ended(1, "", "error: x\n"), "neither valid nor a clear error"),
        (VALID, Ended(2, "", "error: x\n"), "not valid"),
        (VALID, Ended(0, SAID, "warning\n"), "on standard error"),
        (VALID, Ended(0, "", ""), "nothing is told"),
        (VALID, Ended(0, f"unexpected {SAID}", ""), "said 'unexpected '"),
        ("refused", Ended(0, SAID, ""), "not refused"),
        ("refused", Ended(2, "", "x\n"), "not one line"),
        ("refused", Ended(2, "", ""), "not one line"),
        ("refused", Ended(2, "", "error: x\ny\n"), "not one line"),
        ("refused", Ended(2, "", "error: \x1b[31m\n"), "control characters"),
        ("refused", Ended(2, "", "Traceback\n"), "said 'Traceback'"),
        ("refused", Ended(2, "", f"error: me:{config_mutations.SECRET}@host\n"), "said"),
        ("refused", Ended(2, "", f"error: {'x' * 7000}\n"), "too long"),
        ("refused", Ended(2, "", "error: no key\n"), "doesn't say 'the key'"),
    ],
)
def test_another_ending_is_noticed(case, ended, told):
    if case == "refused":
        case = dataclasses.replace(VALID, outcome="refused", words=("the key",))
    with pytest.raises(Mismatch, match=told):
        check_ending(case, ended, here="/here")


def _good(place):
    flat = {
        "etl_params.caps_data_dir": f"{config_values.HERE}/good4",
        "shared_params.output_dir": f"{config_values.HERE}/out",
        "tracking_params.mode": "off",
    }
    return dataclasses.replace(VALID, text=json.dumps(config_values.nested(flat)).encode())


@pytest.mark.parametrize("where", ["out", "case/beside.txt", "cwd/made"])
def test_what_a_dry_run_writes_is_noticed(place, where, monkeypatch):
    assert place.run(_good(place)).code == 0
    check = preparation.check_model_settings

    def write(config):
        (place.here / where).mkdir()
        check(config)

    monkeypatch.setattr(preparation, "check_model_settings", write)
    with pytest.raises(Mismatch, match="written"):
        place.run(_good(place))
    (place.here / where).rmdir()


def test_a_value_that_changes_when_it_is_read_again_is_noticed(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text('{"shared_params": {"batch_size": 2147483647}}')
    check_usable(path)
    setting = settings.BY_KEY["shared_params.batch_size"]
    longer = allowed.Allowed(int, setting.allowed.text, lambda value: value + 1)
    changed = dataclasses.replace(setting, allowed=longer)
    monkeypatch.setitem(settings.BY_KEY, setting.key, changed)
    with pytest.raises(Mismatch, match="differ"):
        check_usable(path)


@pytest.mark.parametrize(
    ("kind", "name"), [("cyclic_lr", "step_size_factor"), ("sgdr", "cycle_length")]
)
def test_a_cycle_longer_than_any_training_has_a_rate_at_every_step(kind, name):
    values = settings.check({"lr_scheduler_params": {"type": kind, kind: {name: allowed.MOST}}})
    check_schedule(values["lr_scheduler_params"])


def test_a_failure_is_told_with_the_command_that_repeats_it(capsys, monkeypatch):
    failing = [sys.executable, "-c", "print('{\"case\": 7}', flush=True); raise SystemExit(3)"]
    monkeypatch.setattr(config_fuzz, "_worker", lambda *_, **__: failing)
    monkeypatch.setattr(config_fuzz, "MOST_FAILURES", 1)
    outcomes = config_fuzz.Outcomes(SEED)
    outcomes.run(0, 20)
    told = capsys.readouterr().out
    assert outcomes.failures == 1
    assert "FAILED 7" in told and f"--seed {SEED} --repeat 7" in told
    config_fuzz.repeat(SEED, 7, command=False)
    assert "it passes" in capsys.readouterr().out


def test_equal_numbers_are_equal_cases_and_every_kind_comes_up():
    cases = [make_case(SEED, number) for number in range(len(KINDS))]
    assert cases == [make_case(SEED, number) for number in range(len(KINDS))]
    assert {case.kind for case in cases} == set(KINDS)
