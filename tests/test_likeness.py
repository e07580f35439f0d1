"""Warnings when signals don't look like those that a model was trained on."""

import copy
import csv
import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from capfinder import simulate
from capfinder.evaluation import likeness

SQUIGGLES = Path(__file__).parents[2] / "shared" / "data" / "squiggles"
READS = 200
CHANGES = {
    "raw picoamperes": lambda signal: signal * 15 + 90,
    "spread": lambda signal: (signal - signal.mean()) * 1.3 + signal.mean(),
    "scale": lambda signal: signal * 1.3,
    "level up": lambda signal: signal + 0.5,
    "level down": lambda signal: signal - 0.5,
    "half": lambda signal: signal[len(signal) // 4 : len(signal) // 4 + len(signal) // 2],
    "twice": lambda signal: np.repeat(signal, 2),
}


@functools.cache
def simulated(seed: int, cap_class: int, run: int) -> list[np.ndarray]:
    found = simulate.simulate_reads(cap_class=cap_class, run=run, chunk=0, effect=2.2, seed=seed)
    return found.signals[:READS]


def files(seed: int) -> dict[tuple[int, int], list[np.ndarray]]:
    """Four classes of two runs."""
    return {key: simulated(seed, *key) for key in itertools.product(range(4), (1, 2))}


def figures(name: str, signals: list[np.ndarray]) -> dict:
    means = np.array([signal.mean() for signal in signals])
    return {
        "file": name,
        "reads": len(signals),
        "mean": means.mean(),
        "between_reads": means.std(),
        "spread": np.mean([signal.std() for signal in signals]),
        "length": np.mean([len(signal) for signal in signals]),
        "beyond": np.mean(np.abs(np.concatenate(signals)) > 4),
    }


def quality_row(cap_class: int, signals: list[np.ndarray], *, is_test: bool = False) -> dict:
    """As the manifest has it."""
    found = figures("", signals)
    return {
        "dataset_class": cap_class,
        "is_test": is_test,
        "chosen": found["reads"],
        "length": {"mean": found["length"]},
        "signal": {
            "mean": found["mean"],
            "between_reads_sd": found["between_reads"],
            "within_read_sd": found["spread"],
        },
    }


@functools.cache
def known(seed: int) -> dict:
    return likeness.profile([quality_row(key[0], found) for key, found in files(seed).items()])


def warned(profile: dict | None, inputs: dict, change=lambda signal: signal) -> list[str]:
    rows = [figures(f"f{key}", list(map(change, found))) for key, found in inputs.items()]
    if len(rows) > 1:
        rows.append(likeness.pooled(rows, name="all files"))
    return likeness.warnings(profile, rows)


# Simulated reads


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_reads_of_the_same_kind_give_no_warning(seed):
    for other in (1, 2, 3, 4):
        assert warned(known(seed), files(other)) == []
        only = {key: found for key, found in files(other).items() if key[0] == other - 1}
        assert warned(known(seed), only) == []  # a directory of a single cap


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("seed", [1, 2])
def test_reads_of_another_kind_do(name, seed):
    found = warned(known(seed), files(3), CHANGES[name])
    assert found
    cause = {
        "raw picoamperes": "raw picoamperes",
        "spread": "another scaling",
        "scale": "raw picoamperes",  # a part of the samples lies beyond 4
        "level up": "another way of z-scoring",
        "level down": "another way of z-scoring",
        "half": "another region cut out",
        "twice": "another region cut out",
    }[name]
    assert any(cause in text for text in found), found


def test_a_warning_names_file_figure_and_what_was_expected():
    inputs = files(3) | {(0, 1): [signal[::2] for signal in simulated(3, 2, 1)]}
    (text,) = warned(known(1), inputs)
    assert "f(0, 1): length 18" in text and "expected about 3" in text and "samples" in text
    assert "f(0, 2)" not in text


def test_many_files_make_one_line():
    (text,) = warned(known(1), files(3), CHANGES["raw picoamperes"])
    assert text.count("f(") == 3 and "6 more likewise" in text


def test_without_a_profile_only_what_is_wrong_for_any_model_is_said():
    for profile in (None, {}, {"classes": []}):
        assert warned(profile, files(1)) == []
        assert warned(profile, files(1), CHANGES["half"]) == []
        (text,) = warned(profile, files(1), CHANGES["raw picoamperes"])
        assert "100% of the samples beyond +-4" in text
        assert any("lie beyond" in text for text in warned(profile, files(1), CHANGES["scale"]))


def test_few_reads_are_judged_for_the_gravest_alone():
    few = {(0, 1): simulated(1, 0, 1)[:20]}
    assert warned(known(2), few, CHANGES["half"]) == []
    assert warned(known(2), few, CHANGES["raw picoamperes"])


def test_a_model_that_was_trained_on_other_units_is_at_home_in_them():
    raw = {key: list(map(CHANGES["raw picoamperes"], found)) for key, found in files(1).items()}
    profile = likeness.profile([quality_row(key[0], found) for key, found in raw.items()])
    rows = [figures("f", raw[0, 1]) | {"beyond": 0.0}]
    assert likeness.warnings(profile, rows) == []
    assert warned(profile, files(1))


def test_runs_that_differ_much_allow_much():
    shifts = {key: 0.8 * (key[1] == 2) for key in files(1)}
    rows = [
        quality_row(key[0], [signal + shifts[key] for signal in found])
        for key, found in files(1).items()
    ]
    assert warned(likeness.profile(rows), files(2), CHANGES["level up"]) == []
    assert warned(known(1), files(2), CHANGES["level up"])


def test_reads_that_are_scaled_each_in_its_own_way_stand_out():
    rng = np.random.default_rng(0)
    found = warned(known(1), files(2), lambda signal: signal - signal.mean() + rng.normal(0.6, 1.5))
    assert any("the reads' means differ" in text for text in found)


# The profile


def test_the_profile_pools_the_runs_of_a_class_and_leaves_test_runs_out():
    one, other = simulated(1, 0, 1), simulated(1, 0, 2)[:50]
    test_run = quality_row(0, simulated(1, 2, 1), is_test=True)
    (found,) = likeness.profile([quality_row(0, one), quality_row(0, other), test_run])["classes"]
    expected = figures("", one + other)
    assert (found["runs"], found["reads"]) == (2, READS + 50)
    for name in ("mean", "spread", "length", "between_reads"):
        assert found[name] == pytest.approx(expected[name], abs=1e-4)
    assert likeness.profile([]) == {} and likeness.profile([test_run]) == {}


def test_a_profile_that_is_damaged_counts_as_none():
    whole = known(1)
    assert warned(whole, files(1), CHANGES["half"])
    for damage in (
        lambda value: value["classes"][0].update(mean="1"),
        lambda value: value["classes"][0].update(length=float("nan")),
        lambda value: value["classes"][1].pop("spread"),
        lambda value: value["classes"][1].update(runs=0),
        lambda value: value.update(classes={"0": 1}),
        lambda value: value.pop("between_runs_sd"),
        lambda value: value.update(between_runs_sd={"mean": -1.0}),
    ):
        value = copy.deepcopy(whole)
        damage(value)
        assert warned(value, files(1), CHANGES["half"]) == []


# Real reads


def squiggles(name: str) -> list[np.ndarray]:
    with (SQUIGGLES / f"data__{name}.csv").open() as stream:
        return [np.array(row["timeseries"].split(","), float) for row in csv.DictReader(stream)]


@pytest.mark.skipif(not SQUIGGLES.is_dir(), reason="the real squiggles aren't here")
def test_real_reads_are_like_others_of_their_kind_and_unlike_when_changed():
    runs = {number: squiggles(name) for number, name in enumerate(("rna", "dna"))}
    rng = np.random.default_rng(0)
    for _ in range(10):
        halves = {number: rng.permutation(len(found)) for number, found in runs.items()}
        profile = likeness.profile(
            [quality_row(k, [runs[k][at] for at in order[::2]]) for k, order in halves.items()]
        )
        others = {k: [runs[k][at] for at in order[1::2]] for k, order in halves.items()}
        assert warned(profile, others) == []
        for name in ("raw picoamperes", "half", "twice"):
            assert warned(profile, others, CHANGES[name]), name


# Parts


@given(
    arrays.arrays(np.float64, (3, 7), elements=st.floats(-9, 9)),
    st.sampled_from(["float16", "float32", "float64"]),
)
@settings(max_examples=40)
def test_samples_beyond_the_limit_are_counted(values, dtype):
    values[0, :3] = 4, -4, np.nextafter(np.array(4, dtype), np.inf)
    signals = values.astype(dtype)
    expected = (np.abs(signals.astype(float)) > 4).sum(axis=1)
    np.testing.assert_array_equal(likeness.beyond(signals), expected)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
@settings(max_examples=30)
def test_no_mixture_comes_nearer(seed, classes):
    rng = np.random.default_rng(seed)
    points, target = rng.normal(size=(3, classes)), rng.normal(size=3)
    weights = likeness.mixture(points, target)
    assert weights.min() >= 0 and weights.sum() == pytest.approx(1)
    reached = np.linalg.norm(points @ weights - target)
    for other in rng.dirichlet(np.full(classes, 0.5), 200):
        assert reached <= np.linalg.norm(points @ other - target) + 1e-6
    inside = points @ rng.dirichlet(np.ones(classes))
    assert np.linalg.norm(points @ likeness.mixture(points, inside) - inside) < 1e-9
