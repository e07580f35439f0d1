"""A few hundred cases of the fuzz run, and proof that it would notice."""

import csv
import io
import sys

import etl_fuzz
import etl_reference
import numpy as np
import pytest
from etl_cases import ReaderCase, make_reader_case
from etl_compare import Mismatch, Tally
from etl_mutations import corpus
from etl_strategies import reader_cases, usual_rows
from etl_whole import StageCase, look_ahead, make_stage_case
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from capfinder.etl import csv_reader
from capfinder.etl.csv_reader import parse_signals, scan_block

SEED = 3
CASE = ReaderCase(b'a,0,"1.5,2"\nb,0,"0.1,-3"\nc,x,"1"\n', "", (0, 2), None, 3, "float32")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"))


def test_spoiled_text_is_read_as_the_slow_reader_reads_it(rows, tmp_path):
    tally = Tally()
    for number in range(400):
        try:
            tally.add(make_reader_case(SEED, number, rows).check(tmp_path))
        except Exception as error:
            error.add_note(f"make_reader_case({SEED}, {number}, rows)")
            raise
    assert tally.good > 300
    assert len(tally.rejects) >= 7
    assert tally.errors.total() > 3


@given(case=reader_cases)
def test_text_that_hypothesis_makes_up_is_too(case, tmp_path_factory):
    case.check(tmp_path_factory.getbasetemp())


def test_the_whole_stage_stores_just_the_good_reads_or_says_why_not(rows, tmp_path):
    tally = Tally()
    for number in range(30):
        try:
            tally.add(make_stage_case(SEED, number, rows).check(tmp_path))
        except Exception as error:
            error.add_note(f"make_stage_case({SEED}, {number}, rows)")
            raise
    assert tally.good > 100
    assert tally.rejects.total() > 10
    assert 3 < tally.errors.total() < 25


@given(st.lists(usual_rows, max_size=8), st.sampled_from(["\n", "\r\n"]))
@hypothesis_settings(max_examples=50)
def test_the_slow_reader_reads_usual_rows_as_pythons_csv_does(lines, end):
    text = "".join(line + end for line in lines)
    read = etl_reference.read_rows(text.encode(), first_line=2, dtype="float64")
    assert [(row.read_id, str(row.cap_class), list(row.numbers)) for row in read] == [
        (name, label, [float(number) for number in numbers.split(",")])
        for name, label, numbers in csv.reader(io.StringIO(text, newline=""))
    ]


def _one_bit_off(*arguments, **named):
    signals = parse_signals(*arguments, **named)
    signals.fitted[0, 1] = np.nextafter(signals.fitted[0, 1], np.float32(9), dtype=np.float32)
    return signals


def _row_lost(block, **named):
    rows, rejects, count = scan_block(block, **named)
    return rows, rejects[1:], count - 1


def _wrong_line(block, **named):
    rows, rejects, count = scan_block(block, **named)
    rows.line[:] += 1
    return rows, rejects, count


def _wrong_reason(block, **named):
    rows, rejects, count = scan_block(block, **named)
    return rows, [r._replace(reason=csv_reader.BAD_UTF8) for r in rejects], count


@pytest.mark.parametrize(
    ("name", "broken", "told"),
    [
        ("parse_signals", _one_bit_off, "values"),
        ("scan_block", _row_lost, "rows counted"),
        ("scan_block", _wrong_line, "no such row|identity"),
        ("scan_block", _wrong_reason, "a reason that isn't so"),
    ],
)
def test_a_reader_that_is_wrong_is_noticed(name, broken, told, tmp_path, monkeypatch):
    assert CASE.check(tmp_path).good == 2
    monkeypatch.setattr(f"etl_compare.{name}", broken)
    with pytest.raises(Mismatch, match=told):
        CASE.check(tmp_path)


def test_a_failed_case_is_saved_and_can_be_repeated(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(etl_fuzz, "prepare", lambda: None)  # pytest's own warnings and logs stay
    for kind, make in (("block or file", make_reader_case), ("whole stage", make_stage_case)):
        case = make(SEED, 1, rows)
        assert type(case).from_json(case.as_json()) == case
        with monkeypatch.context() as patch:
            patch.setattr(type(case), "check", lambda *_: 1 / 0)
            etl_fuzz.work(kind, SEED, 1, 1, tmp_path)
            assert "ZeroDivisionError" in capsys.readouterr().out
        (path,) = tmp_path.glob(f"{kind.replace(' ', '-')}-*.json")
        etl_fuzz.repeat(path)
        assert "it passes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fate", "died"),
    [
        ("import os; os.abort()", "exit code -6"),
        ("import time; time.sleep(60)", "no end within 1 s"),
        ("pass", None),
    ],
)
def test_a_case_that_crashes_or_hangs_is_told_by_its_number(fate, died):
    program = f"print('{{\"case\": 7}}', flush=True); {fate}"
    said = list(etl_fuzz.follow([sys.executable, "-c", program], first_limit=30, limit=1))
    assert said == [{"case": 7}, *([{"died": died}] if died else [])]


def test_the_outlook_of_a_run_tells_good_input_from_bad():
    """Without it a run that refused everything would pass."""
    header = b"read_id,cap_class,timeseries\n"
    files = {
        f"data__{label}.csv": header
        + b"".join(f'{label}-{i},{label},"1,2"\n'.encode() for i in range(9))
        for label in range(2)
    }

    def outlook(changed, limit=0.3):
        return look_ahead(StageCase({**files, **changed}, "float16", 16, limit, True, False))

    good = outlook({})
    assert (good.error, good.may_fail, len(good.sure), good.bad) == ("", False, 18, set())
    both = files["data__1.csv"]
    assert outlook({"data__1.csv": header}).error == "a file without a good row"
    assert outlook({"data__1.csv": b"x\n"}).error == "a file that can't be read"
    assert outlook({"data__1.csv": files["data__0.csv"]}).error == "other classes"
    assert outlook({"data__1.csv": both + b"x\n" * 4}).error == "too many rejects"
    assert outlook({"data__1.csv": both[:-3].replace(b"1,2", b"1,a", 7)}, 1.0).error == (
        "too few reads"
    )
    late = outlook({"data__1.csv": both + b'late,1,"1.2.3"\n'}, 0.05)
    assert (late.error, late.may_fail, late.bad) == ("", True, set())
