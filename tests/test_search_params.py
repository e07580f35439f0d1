"""search_params: what it changes, what it leaves, and every mistake in one line."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfinder import models
from capfinder.errors import SettingsError
from capfinder.stages import search_check
from capfinder.stages.search_params import OutsideError, SearchTrial, first_trial

LENGTH = 64


class RandomTrial:
    """Draws evenly from the values a trial may take, and keeps them."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.params: dict[str, Any] = {}

    def _keep(self, name: str, value: Any) -> Any:
        return self.params.setdefault(name, value)

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False):
        return self._keep(name, self._rng.randrange(low, high + 1, step))

    def suggest_float(self, name: str, low: float, high: float, *, step=None, log: bool = False):
        if step is None:
            return self._keep(name, self._rng.uniform(low, high))
        return self._keep(name, low + step * self._rng.randint(0, round((high - low) / step)))

    def suggest_categorical(self, name: str, choices: Any):
        return self._keep(name, self._rng.choice(choices))


def draw(model_type: str, overrides: dict[str, Any], rng: random.Random) -> Any:
    trial = SearchTrial(RandomTrial(rng), overrides)
    return models.architecture(model_type).search_space(trial, target_length=LENGTH)


def check(overrides: dict[str, Any], model_type: str = "cnn_lstm") -> None:
    search_check.check(
        overrides,
        architecture=models.architecture(model_type),
        model_type=model_type,
        target_length=LENGTH,
    )


@settings(deadline=None)  # of the first example, which imports JAX
@given(st.sampled_from(list(models.ARCHITECTURES)), st.randoms(use_true_random=False))
def test_whatever_a_trial_draws_can_be_the_first_trial_of_a_study(model_type, rng):
    trial = RandomTrial(rng)
    architecture = models.architecture(model_type)
    drawn = architecture.search_space(trial, target_length=LENGTH)
    first = first_trial(drawn, {}, architecture=architecture, target_length=LENGTH)
    assert first == pytest.approx(trial.params)


@settings(deadline=None, max_examples=30)
@given(st.randoms(use_true_random=False))
def test_draws_lie_in_the_given_ranges_and_the_others_in_their_own(rng):
    overrides = {
        "conv_layers": {"choices": (1, 2)},
        "conv_filters": {"low": 4, "high": 11, "step": 3},
        "conv_filters_1": {"choices": (8,)},
        "*_dropouts": {"high": 0.3},
        "learning_rate": {"low": 1e-3, "high": 5e-3, "log": True},
        "conv_kernels_*": {"low": 3, "high": 4},
    }
    check(overrides)
    drawn = draw("cnn_lstm", overrides, rng)
    assert len(drawn.conv_filters) in (1, 2)
    assert drawn.conv_filters[0] in (4, 7, 10)
    assert drawn.conv_filters[1:] in ((), (8,))
    assert all(0.1 <= rate <= 0.3 for rate in drawn.conv_dropouts + drawn.lstm_dropouts)
    assert all(kernel in (3, 4) for kernel in drawn.conv_kernels)
    assert 1e-3 <= drawn.learning_rate <= 5e-3
    assert all(units in (32, 64, 96, 128) for units in drawn.lstm_units)


rates = st.integers(0, 95).map(lambda percent: percent / 100)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(list(models.ARCHITECTURES)), rates, rates, st.randoms())
def test_rates_are_the_given_ones_not_rounded_to_the_usual_steps(model_type, one, other, rng):
    low, high = sorted((one, other))
    chosen = draw(model_type, {"*dropout*": {"choices": [one, other]}}, rng)
    within = draw(model_type, {"*dropout*": {"low": low, "high": high}}, rng)
    for found in (chosen, within):
        for name, value in vars(found).items():
            values = value if isinstance(value, tuple) else (value,)
            if "dropout" in name and found is chosen:
                assert set(values) <= {one, other}
            elif "dropout" in name:
                assert all(low <= rate <= high for rate in values)


def test_the_usual_step_stays_only_where_it_still_fits():
    def values(override: dict[str, Any]) -> set[int]:
        overrides = {"dense_units": override}
        rng = random.Random(1)
        return {draw("cnn_lstm", overrides, rng).dense_units for _ in range(300)}

    assert values({"high": 48}) == {16, 32, 48}
    assert values({"low": 14, "high": 18}) == {14, 15, 16, 17, 18}
    assert values({"low": 10, "high": 22, "step": 5}) == {10, 15, 20}


def test_model_params_outside_the_space_are_told_with_the_reason():
    architecture = models.architecture("cnn_lstm")
    default = architecture.Hyperparameters()
    with pytest.raises(OutsideError, match=r"learning_rate=0\.001 is not one of 0\.1"):
        first_trial(
            default,
            {"learning_rate": {"choices": (0.1,)}},
            architecture=architecture,
            target_length=LENGTH,
        )
    odd = architecture.Hyperparameters(dense_units=17)
    with pytest.raises(OutsideError, match="dense_units=17 is not 16 to 128 in steps of 16"):
        first_trial(odd, {}, architecture=architecture, target_length=LENGTH)


@pytest.mark.parametrize(
    ("overrides", "told"),
    (
        ({"conv_filtres": {"low": 1}}, "fits no parameter of cnn_lstm; did you mean conv_filters?"),
        ({"*zzz": {"low": 1}}, "fits no parameter of cnn_lstm; known: conv_dropouts, conv_filters"),
        ({"dense_units": 3}, "dense_units=3: must be {"),
        ({"dense_units": {}}, "must be {"),
        ({"dense_units": {"lo": 3}}, "dense_units.lo: no such key; did you mean low?"),
        ({"dense_units": {"choices": ()}}, "must be a list of numbers"),
        ({"dense_units": {"choices": ("a",)}}, "must be a list of numbers"),
        ({"dense_units": {"choices": (8,), "low": 1}}, "choices stand alone"),
        ({"dense_units": {"choices": (8.5,)}}, "must be a whole number"),
        ({"dense_units": {"choices": (8, 9999, 16)}}, "at most 4096"),
        ({"dense_units": {"low": "8"}}, "dense_units.low='8': must be a number"),
        ({"dense_units": {"low": 300}}, "low=300 is above high="),
        ({"dense_units": {"low": 2.5}}, "must be whole numbers"),
        ({"dense_units": {"step": 0}}, "must be above 0"),
        ({"dense_units": {"step": 2, "log": True}}, "step or log, not both"),
        ({"dense_units": {"log": 1}}, "must be true or false"),
        ({"conv_dropouts": {"low": 0.0, "log": True}}, "must be above 0 where log is true"),
        ({"conv_dropouts": {"high": 1.5}}, "at most 0.95"),
        ({"conv_layers": {"low": 0}}, "conv_layers=0 must be a whole number of at least 1"),
        ({"conv_layers": {"high": 9}}, "needs signals of 512 samples"),
        ({"conv_layers": {"high": 10**9}}, "conv_layers=1e+09 must be a whole number"),
        ({"lstm_layers": {"choices": (1, 65)}}, "lstm_layers=65 must be a whole number"),
        ({"dense_units": {"high": 10**400}}, "must be a number"),
        ({"dense_units": {"high": 1e300}}, "must be a number"),
        ({"conv_dropouts": {"low": 0.1, "high": 0.2, "step": 5e-324}}, "step=4.94066e-324 is too"),
        ({"dense_units": {"choices": ("x" * 10_000,)}}, "x...x"),
    ),
)
def test_each_mistake_is_named_before_a_trial_starts(overrides, told):
    with pytest.raises(SettingsError, match=r"^search_params") as caught:
        check(overrides)
    assert told in str(caught.value)


def test_a_model_of_a_hundred_thousand_layers_is_a_slip_not_a_number_of_samples():
    with pytest.raises(SettingsError, match="one or more numbers, 64 at most") as error:
        models.parse_hyperparameters(
            "cnn_lstm", {"conv_filters": [8] * 100_000}, target_length=LENGTH
        )
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("model_type", models.ARCHITECTURES)
def test_every_parameter_of_every_architecture_is_known_by_name(model_type):
    trial = RandomTrial(random.Random(3))
    for _ in range(50):
        models.architecture(model_type).search_space(trial, target_length=LENGTH)
        check({name: {"choices": (value,)} for name, value in trial.params.items()}, model_type)
        trial.params.clear()
