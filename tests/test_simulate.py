"""Simulated reads keep the input contract, follow their assumptions and are the same each time."""

import csv
import re

import numpy as np
import pytest

from capfinder import simulate
from capfinder.errors import InputError, SettingsError

BASE = {"runs_per_class": 2, "num_classes": 4, "effect": 1.0, "seed": 7}


def run(directory, reads_per_class=10, **changes):
    return simulate.run(
        output_dir=directory, reads_per_class=reads_per_class, **{**BASE, **changes}
    )


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    directory = tmp_path_factory.mktemp("simulated")
    return directory, run(directory, reads_per_class=25)


def test_files_are_named_as_capfinder_names_them(simulated):
    directory, written = simulated
    caps = ["cap_0", "cap_1", "cap_2", "cap_2-1"]
    names = [f"{cap}_run{number}.csv" for cap in caps for number in (1, 2)]
    assert [path.name for path in written] == [f"data__{name}" for name in names]
    assert sorted(path.name for path in directory.iterdir()) == sorted(
        ["README.txt", *(f"{kind}__{name}" for kind in ("data", "metadata") for name in names)]
    )


def test_data_rows_are_in_the_exact_input_format(simulated):
    _, written = simulated
    number = rb"-?\d\.\d{8}"
    row = rb'[0-9a-f-]{36},3,"' + number + rb"(," + number + rb')*"\r\n'
    whole = rb"read_id,cap_class,timeseries\r\n(" + row + rb")+"
    assert re.fullmatch(whole, written[-1].read_bytes())


def test_signals_are_clipped_and_about_eleven_bases_long(simulated):
    _, written = simulated
    signals = [np.array(r["timeseries"].split(","), float) for p in written for r in rows_of(p)]
    assert max(np.abs(signal).max() for signal in signals) <= 4
    assert 180 < np.mean([signal.size for signal in signals]) < 340


def test_reads_are_shared_evenly_over_the_runs_and_no_id_comes_twice(simulated):
    _, written = simulated
    rows = [rows_of(path) for path in written]
    assert [len(some) for some in rows] == [13, 12] * 4
    assert [{row["cap_class"] for row in some} for some in rows] == [
        {str(cap_class)} for cap_class in (0, 0, 1, 1, 2, 2, 3, 3)
    ]
    assert len({row["read_id"] for some in rows for row in some}) == 100


def test_metadata_tells_of_each_read(simulated):
    directory, written = simulated
    for path in written:
        stem = path.name.removeprefix("data__")
        metadata = rows_of(directory / f"metadata__{stem}")
        with (directory / f"metadata__{stem}").open(newline="", encoding="utf-8") as stream:
            assert stream.readline() == (
                "read_id,parent_read_id,pod5_file,read_type,roi_fasta,roi_start,roi_end,"
                "fasta_length,fasta\r\n"
            )
        assert [row["read_id"] for row in metadata] == [row["read_id"] for row in rows_of(path)]
        for row in metadata:
            start, end = int(row["roi_start"]), int(row["roi_end"])
            assert row["fasta"][start:end] == row["roi_fasta"]
            assert row["roi_fasta"].startswith(simulate.ADAPTER_FLANK)
            assert len(row["fasta"]) == int(row["fasta_length"])
            assert row["read_type"] == "good_read"
            assert row["pod5_file"] == f"simulated_{stem[:-4]}.pod5"


def test_some_reads_share_a_parent_but_never_with_another_run():
    parents = [
        simulate.simulate_reads(
            cap_class=cap_class, run=number, chunk=0, effect=1.0, seed=1
        ).parent_read_ids
        for cap_class in (0, 1)
        for number in (1, 2)
    ]
    assert all(300 < len(set(some)) < 450 for some in parents)  # of 500
    assert len(set().union(*parents)) == sum(len(set(some)) for some in parents)


def test_the_readme_says_simulated_and_lists_the_assumptions(simulated):
    directory, _ = simulated
    text = (directory / "README.txt").read_text("utf-8")
    assert text.startswith("SIMULATED")
    assert "--reads_per_class 25 --num_classes 4 --runs_per_class 2 --effect 1.0 --seed 7" in text
    for said in ("shape 1.8", "mean 21 samples", "0.3 on each sample", "segshape", "-0.8 e"):
        assert said in text
    assert "{" not in text


def test_the_same_command_gives_the_same_bytes(simulated, tmp_path):
    directory, _ = simulated
    run(tmp_path / "again", reads_per_class=25)
    assert contents(tmp_path / "again") == contents(directory)


def test_another_seed_gives_other_reads(simulated, tmp_path):
    directory, _ = simulated
    run(tmp_path, reads_per_class=25, seed=8)
    assert not {row["read_id"] for p in tmp_path.glob("data__*") for row in rows_of(p)} & {
        row["read_id"] for p in directory.glob("data__*") for row in rows_of(p)
    }


def test_more_reads_or_classes_leave_the_first_reads_as_they_were(simulated, tmp_path):
    _, written = simulated
    run(tmp_path, reads_per_class=40, num_classes=5)
    for path in written:
        start = path.read_bytes()
        assert (tmp_path / path.name).read_bytes().startswith(start)
    assert (tmp_path / "data__cap_4_run1.csv").is_file()


def test_a_stopped_simulation_goes_on_with_what_is_missing(simulated, tmp_path):
    directory, _ = simulated
    run(tmp_path, reads_per_class=25)
    kept = tmp_path / "data__cap_0_run1.csv"
    before = kept.stat().st_mtime_ns
    (tmp_path / "data__cap_1_run1.csv").unlink()
    (tmp_path / "metadata__cap_2_run2.csv").unlink()
    run(tmp_path, reads_per_class=25)
    assert contents(tmp_path) == contents(directory)
    assert kept.stat().st_mtime_ns == before


def test_other_csv_files_are_never_overwritten(tmp_path):
    (tmp_path / "data__cap_1_run1.csv").write_text("mine")
    with pytest.raises(InputError, match=r"data__cap_1_run1\.csv.*choose another"):
        run(tmp_path)
    assert contents(tmp_path) == {"data__cap_1_run1.csv": b"mine"}


def test_another_simulation_is_not_overwritten(tmp_path):
    run(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(InputError, match="did not make"):
        run(tmp_path, seed=8)
    assert contents(tmp_path) == before


def test_a_readme_of_someone_else_is_not_overwritten(tmp_path):
    (tmp_path / "README.txt").write_text("my notes")
    with pytest.raises(InputError, match=r"README\.txt"):
        run(tmp_path)
    assert contents(tmp_path) == {"README.txt": b"my notes"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_classes": 0}, "num_classes is 0"),
        ({"num_classes": 33}, "1 to 32"),
        ({"runs_per_class": 0}, "runs_per_class is 0"),
        ({"reads_per_class": 1}, "reads_per_class is 1"),
        ({"effect": -0.1}, "effect is -0.1"),
        ({"effect": float("nan")}, "effect is nan"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_an_argument_out_of_range_is_one_clear_line_and_writes_nothing(changes, said, tmp_path):
    with pytest.raises(SettingsError, match=said) as error:
        run(tmp_path / "new", **changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_file_in_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not a directory"):
        run(tmp_path / "file")
    with pytest.raises(InputError, match="can't be written"):
        run(tmp_path / "file" / "below")


def test_methylation_shifts_levels_and_stretches_dwells_as_assumed():
    n1 = simulate.N1
    shift, stretch = simulate.cap_effect(1, 2.0)  # N1
    assert shift[n1 - 1 : n1 + 2] == pytest.approx([-0.7, -1.6, 0.6])
    assert stretch[n1 - 1 : n1 + 2] == pytest.approx([1.8, 2.6, 1.0])
    assert np.count_nonzero(shift) == 3
    both, both_stretch = simulate.cap_effect(2, 1.0)  # N1 and N2
    assert both[n1 - 1 : n1 + 3] == pytest.approx([-0.35, -0.8 - 0.35, 0.3 - 0.8, 0.3])
    assert both_stretch[n1 - 1 : n1 + 2] == pytest.approx([1.4, 1.8 * 1.4, 1.8])
    none, no_stretch = simulate.cap_effect(0, 1.0)
    assert not none.any()
    assert (no_stretch == 1).all()


def test_every_class_has_its_own_methylations():
    positions = [simulate.methylated_positions(number) for number in range(simulate.MAX_CLASSES)]
    assert positions[:5] == [(), (1,), (1, 2), (2,), (3,)]
    assert len(set(positions)) == simulate.MAX_CLASSES
    names = {simulate.cap_name(number) for number in range(simulate.MAX_CLASSES)}
    assert len(names) == simulate.MAX_CLASSES


def test_without_an_effect_classes_do_not_differ_but_for_chance():
    lengths = [
        np.mean([
            signal.size
            for signal in simulate.simulate_reads(
                cap_class=cap_class, run=1, chunk=0, effect=0.0, seed=3
            ).signals
        ])
        for cap_class in (0, 2)
    ]  # fmt: skip
    # 11 bases of gamma(1.8) dwells: sd of a read about 52 samples, of a mean over 500 about 2.3
    assert lengths == pytest.approx([232, 232], abs=9)


def test_methylated_reads_are_longer_by_what_the_stretch_says():
    signals = simulate.simulate_reads(cap_class=2, run=1, chunk=0, effect=1.0, seed=3).signals
    # N0, N1, N2 dwell 1.4, 1.8 * 1.4 and 1.8 times 21 samples
    expected = 232 + 21 * (0.4 + 1.52 + 0.8)
    assert np.mean([signal.size for signal in signals]) == pytest.approx(expected, abs=13)


def test_two_runs_of_a_class_stand_apart():
    def run_mean(number):
        reads = simulate.simulate_reads(cap_class=0, run=number, chunk=0, effect=1.0, seed=5)
        return np.concatenate(reads.signals).mean()

    means = [run_mean(number) for number in range(1, 13)]
    # 500 reads of one run alone would spread their mean by about 0.02
    assert np.std(means) > 0.03


def test_time_runs_from_the_3_prime_end():
    reads = simulate.simulate_reads(cap_class=0, run=1, chunk=0, effect=0.0, seed=3)
    parts = [np.array_split(signal, 11) for signal in reads.signals if signal.size > 80]
    shape = np.mean([[part.mean() for part in some] for some in parts], axis=0)
    numbers = np.array([["ACGT".index(letter) for letter in s[4:19]] for s in reads.sequences])
    kmers = np.stack([numbers[:, i : i + 5] @ 4 ** np.arange(5)[::-1] for i in range(11)], axis=1)
    five_to_three = simulate._kmer_levels()[kmers].mean(axis=0)
    three_to_five = five_to_three[::-1]
    assert np.corrcoef(shape, three_to_five)[0, 1] > 0.7
    slant, expected = shape - shape[::-1], three_to_five - five_to_three
    assert np.corrcoef(slant, expected)[0, 1] > 0.5  # about -0.5 were time to run the other way


def test_k_mer_levels_are_standardised_and_complete():
    levels = simulate._kmer_levels()
    assert levels.shape == (1024,)
    assert levels.mean() == pytest.approx(0, abs=0.01)
    assert levels.std() == pytest.approx(1, abs=0.02)
