"""Quality control: figures are numpy's whatever the order, warnings name what is off."""

import itertools
import warnings as python_warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfinder import simulate
from capfinder.etl import quality
from capfinder.etl.quality import RunStatistics
from capfinder.etl.quality_warnings import warnings


def source(file: str, cap_class: int, rows: int, *, is_test: bool = False) -> dict:
    """An entry of the manifest's "sources"; size and the like are there and not asked for."""
    facts = {"file": file, "dataset_class": cap_class, "is_test": is_test}
    return facts | {"rows": rows, "good": rows, "size": 1, "sha256": "ab"}


def measure(runs: dict[tuple[str, int], list[np.ndarray]], *, test: tuple[str, ...] = ()) -> list:
    """The rows for runs given as (file, class) -> signals, all of them chosen."""
    statistics = RunStatistics(len(runs))
    for file, signals in enumerate(runs.values()):
        lengths = np.array([signal.size for signal in signals], np.int32)
        statistics.add_lengths(file, lengths)
        statistics.add_signals(
            np.full(len(signals), file),
            lengths,
            np.array([signal.sum() for signal in signals]),
            np.array([(signal**2).sum() for signal in signals]),
        )
    return statistics.rows(
        [
            source(name, cap_class, len(signals), is_test=name in test)
            for (name, cap_class), signals in runs.items()
        ]
    )


@pytest.fixture(scope="module")
def simulated():
    """For each of 4 seeds: 4 classes of 3 runs, 150 reads each, as `capfinder simulate` has it."""

    def run(seed: int, cap_class: int, number: int) -> list[np.ndarray]:
        return simulate.simulate_reads(
            cap_class=cap_class,
            run=number,
            chunk=0,
            effect=simulate.DEFAULT_EFFECT,
            seed=seed,
        ).signals[:150]

    return [
        {
            (f"cap_{cap_class}_run{number}", cap_class): run(seed, cap_class, number)
            for cap_class in range(4)
            for number in (1, 2, 3)
        }
        for seed in range(4)
    ]


def only_runs(runs: dict, count: int) -> dict:
    return {key: signals for key, signals in runs.items() if int(key[0][-1]) <= count}


lengths_of_a_file = st.lists(st.integers(1, 2**31 - 1) | st.integers(1, 6000), min_size=1)


@given(lengths_of_a_file, st.integers(1, 5))
def test_lengths_are_numpys_and_quartiles_within_their_bins(lengths, parts):
    statistics = RunStatistics(2)
    for part in np.array_split(np.array(lengths, np.int32), parts):
        statistics.add_lengths(1, part)
    empty, row = statistics.rows([source("a", 0, 0), source("b", 0, len(lengths))])
    assert empty["length"] is None and empty["signal"] is None
    figures = row["length"]
    assert figures["min"] == min(lengths) and figures["max"] == max(lengths)
    assert figures["mean"] == round(sum(lengths) / len(lengths), 1)
    for key, fraction in (("lower_quartile", 0.25), ("median", 0.5), ("upper_quartile", 0.75)):
        exact = int(np.quantile(lengths, fraction, method="inverted_cdf"))
        if exact < 4096:
            assert figures[key] == exact
        else:
            assert 0 <= exact - figures[key] <= exact / 64


@pytest.mark.parametrize("scale", [1.0, 90.0, 600.0])
def test_signal_figures_are_numpys(scale):
    rng = np.random.default_rng(3)
    signals = [rng.normal(scale, 0.3 * scale, rng.integers(5, 60)) for _ in range(400)]
    (row,) = measure({("a", 0): signals})
    means = np.array([signal.mean() for signal in signals])
    spreads = np.array([signal.std() for signal in signals])
    assert row["chosen"] == 400
    assert row["signal"]["mean"] == pytest.approx(means.mean(), abs=6e-5)
    assert row["signal"]["between_reads_sd"] == pytest.approx(means.std(), abs=6e-5 * scale)
    assert row["signal"]["within_read_sd"] == pytest.approx(spreads.mean(), abs=6e-5)


@given(st.permutations(range(12)), st.integers(0, 2**32 - 1))
def test_the_order_of_calls_changes_no_figure(order, seed):
    """Sums of floats would differ in their last digits: the figures are held to equality."""
    rng = np.random.default_rng(seed)
    blocks = [
        (
            rng.integers(0, 3, 5),
            lengths := rng.integers(1, 5000, 5).astype(np.int32),
            total := rng.normal(0, 10.0 ** rng.integers(-3, 6), 5),
            total**2 / lengths * rng.uniform(1, 9, 5),
        )
        for _ in range(12)
    ]

    def gathered(blocks_in_order: list) -> RunStatistics:
        statistics = RunStatistics(3)
        for file, lengths, total, squares in blocks_in_order:
            statistics.add_signals(file, lengths, total, squares)
            for each in range(3):
                statistics.add_lengths(each, lengths[file == each])
        return statistics

    one, other = gathered(blocks), gathered([blocks[place] for place in order])
    sources = [source(name, 0, 1) for name in "abc"]
    assert one.rows(sources) == other.rows(sources)
    np.testing.assert_array_equal(one._sums, other._sums)


def test_a_second_pass_two_starts_from_nothing():
    statistics = RunStatistics(1)
    arguments = (np.zeros(2, int), np.array([2, 4]), np.array([1.0, 2.0]), np.array([9.0, 9.0]))
    statistics.add_signals(*arguments)
    once = statistics.rows([source("a", 0, 2)])
    statistics.clear_signals()
    assert statistics.rows([source("a", 0, 2)])[0]["chosen"] == 0
    statistics.add_signals(*arguments)
    assert statistics.rows([source("a", 0, 2)]) == once


def test_values_beyond_all_reason_are_cut_without_a_word():
    statistics = RunStatistics(1)
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("error")
        statistics.add_signals(
            np.zeros(3, int),
            np.array([1, 1, 1], np.int32),
            np.array([1e300, -1e308, 1.0]),
            np.array([np.inf, np.inf, 1.0]),
        )
        (row,) = statistics.rows([source("a", 0, 3)])
    assert all(np.isfinite(value) for value in row["signal"].values())


def test_memory_does_not_grow_with_reads():
    statistics = RunStatistics(1)
    held = sum(value.nbytes for value in vars(statistics).values())
    for _ in range(50):
        statistics.add_lengths(0, np.arange(1, 10_000, dtype=np.int32))
    assert sum(value.nbytes for value in vars(statistics).values()) == held < 50_000


def test_the_table_shows_class_names_and_dashes():
    rows = measure({("a.csv", 0): [np.array([1.0, 3.0])], ("b.csv", 1): []}, test=("b.csv",))
    first, second = quality.table(rows, ["cap_0", "cap_1"])
    assert len(first) == len(second) == len(quality.COLUMNS)
    assert first == ("a.csv", "cap_0", "1", "1", "1", "2 (2 to 2)", "2.000", "0.000", "1.000")
    assert second == ("b.csv (test)", "cap_1", "0", "0", "0", "-", "-", "-", "-")


@pytest.mark.parametrize("runs_per_class", [2, 3])
def test_simulated_runs_give_no_warning(simulated, runs_per_class):
    for runs in simulated:
        assert warnings(measure(only_runs(runs, runs_per_class))) == []


def test_single_simulated_runs_only_give_the_warning_of_confounding(simulated):
    for runs in simulated:
        (warning,) = warnings(measure(only_runs(runs, 1)))
        assert warning.startswith("Runs and classes are confounded")


CHANGES = {
    "picoamperes": lambda signal: 85 + 12 * signal,
    "doubled spread": lambda signal: signal.mean() + 2 * (signal - signal.mean()),
    "half the length": lambda signal: signal[: signal.size // 2],
}


@pytest.mark.parametrize(
    ("change", "runs_per_class"), list(itertools.product(CHANGES, (2, 3))), ids=str
)
def test_one_changed_run_is_named_alone(simulated, change, runs_per_class):
    for seed, runs in enumerate(simulated):
        runs = only_runs(runs, runs_per_class)
        key = list(runs)[seed * runs_per_class + seed % runs_per_class]  # another class each time
        changed = runs | {key: [CHANGES[change](signal) for signal in runs[key]]}
        (warning,) = warnings(measure(changed))
        assert "\n" not in warning
        assert [name for name, _ in runs if name in warning] == [key[0]]
        said = {"picoamperes": "z-score", "doubled spread": "spread", "half the length": "length"}
        assert said[change] in warning


def test_a_run_that_stands_out_is_shown_with_its_figure_and_the_others(simulated):
    runs = dict(simulated[0])
    key = ("cap_2_run1", 2)

    def median(of: tuple[str, int]) -> int:
        return int(np.quantile([s.size for s in runs[of]], 0.5, method="inverted_cdf"))

    others = median(("cap_2_run2", 2)), median(("cap_2_run3", 2))
    runs[key] = [signal[: signal.size // 2] for signal in runs[key]]
    (warning,) = warnings(measure(runs))
    assert warning.startswith(
        "cap_2_run1 stands out from the other runs of its class: median length "
        f"{median(key)} against {sum(others) / 2:.0f}. Check"
    )


def test_input_that_is_picoamperes_throughout_gives_one_warning(simulated):
    runs = {key: [85 + 12 * s for s in signals] for key, signals in simulated[0].items()}
    (warning,) = warnings(measure(runs))
    assert "all runs" in warning and "z-score each whole read" in warning


def test_few_reads_are_not_compared_with_others(simulated):
    runs = dict(simulated[0])
    runs["cap_0_run1", 0] = [s[: s.size // 2] for s in runs["cap_0_run1", 0][:40]]
    assert warnings(measure(runs)) == []


def test_runs_that_all_vary_much_hide_what_a_single_odd_one_would_show():
    """The tolerance grows with the spread of the runs: a run among equals doesn't stand out."""
    rng = np.random.default_rng(0)

    def runs(means):
        return {
            (f"run{number}", 0): [rng.normal(mean, 1, 50) for _ in range(150)]
            for number, mean in enumerate(means)
        }

    (warning,) = warnings(measure(runs([0, 0.05, 0.1, -0.05, 0.9])))
    assert warning.startswith("run4 stands out")
    assert warnings(measure(runs([0, 0.4, 0.8, -0.4, 0.9]))) == []


def test_a_class_of_one_run_is_compared_with_the_other_classes():
    rng = np.random.default_rng(1)
    lengths = {"a": 200, "b": 260, "c": 90, "d": 240}
    runs = {
        (name, number): [rng.normal(0, 1, length) for _ in range(120)]
        for number, (name, length) in enumerate(lengths.items())
    }
    first, second = warnings(measure(runs))
    assert first.startswith("c stands out from the other classes: median length 90 against 240")
    assert "confounded" in second


def one_read_runs(classes: dict[str, int], test: tuple[str, ...] = ()) -> list:
    signal = np.random.default_rng(0).normal(size=50)
    return measure({(name, label): [signal] for name, label in classes.items()}, test=test)


def test_classes_of_a_single_run_are_named_with_their_file():
    (warning,) = warnings(one_read_runs({"a.csv": 0, "b.csv": 1, "c.csv": 1}))
    assert "class 0 from a.csv" in warning and "b.csv" not in warning
    for advice in ("group_by=file", "test_caps_data_dir", "Add runs"):
        assert advice in warning


def test_a_test_directory_with_runs_of_its_own_lifts_the_confounding():
    runs = {"a.csv": 0, "b.csv": 1, "held/a.csv": 0, "held/b.csv": 1}
    assert warnings(one_read_runs(runs, test=("held/a.csv", "held/b.csv"))) == []
    assert "held/a.csv" not in warnings(one_read_runs(runs | {"c.csv": 2}, test=tuple(runs)[2:]))[0]


def test_many_files_are_named_by_a_few_and_a_count():
    runs = {f"{number}.csv": number for number in range(9)}
    (warning,) = warnings(one_read_runs(runs))
    assert "class 3 from 3.csv and 5 more" in warning and "4.csv" not in warning
