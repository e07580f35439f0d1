"""Names of the caps: what is added, renamed and removed is in the file, as Capfinder has it."""

import csv
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfinder import capmap, cli, files
from capfinder.errors import InputError, SettingsError
from capfinder.evaluation import metrics, predictions

# What Capfinder 0.4.3 writes when it first starts.
AS_CAPFINDER_WRITES = (
    b'{\n  "-99": "cap_unknown",\n  "0": "cap_0",\n  "1": "cap_1",\n  "2": "cap_2",\n'
    b'  "3": "cap_2-1"\n}'
)
DEFAULTS = capmap.DEFAULT_NAMES


@pytest.fixture(autouse=True)
def mapping(tmp_path, monkeypatch) -> Path:
    """Where the names are kept; not there yet."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".capfinder" / "custom_mapping.json"


@pytest.fixture
def run(capsys):
    """`capfinder capmap ...`: exit code, what it printed, its error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["capmap", *arguments])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def store(path: Path, entries: object) -> bytes:
    files.write_json(path, entries)
    return path.read_bytes()


def stored(path: Path) -> dict[str, str]:
    return dict(json.loads(path.read_text(encoding="ascii")))


def cells(printed: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in printed.splitlines()
        if line.startswith("│")
    ]


def test_looking_writes_nothing(run, mapping, tmp_path):
    for action in ("list", "config"):
        code, shown, _ = run(action)
        assert code == 0 and str(mapping) in shown
    assert capmap.class_names({}, 2) == ["cap_0", "cap_1"]
    assert list(tmp_path.iterdir()) == []


def test_list_shows_numbers_names_and_the_file(run, mapping):
    code, shown, _ = run("list")
    assert code == 0
    assert cells(shown) == [[str(number), name] for number, name in DEFAULTS.items()]
    assert f"{mapping} (isn't there" in shown and "Next number: 4" in shown
    store(mapping, {"12": "late", "3": "early"})
    _, shown, _ = run("list")
    assert cells(shown) == [["3", "early"], ["12", "late"]]
    assert f"File: {mapping}\n" in shown and "Next number: 13" in shown


def test_config_prints_the_path_alone(run, mapping):
    assert run("config") == (0, f"{mapping}\n", "")


def test_add_takes_the_next_number_or_renames_a_listed_one(run, mapping):
    code, shown, _ = run("add", "4", "m2,7G cap")
    assert code == 0 and "Added 4: m2,7G cap" in shown and f"Wrote {mapping}" in shown
    code, shown, _ = run("add", "3", "CAP_2-1")  # its own name in other letters
    assert code == 0 and "Renamed 3: CAP_2-1 (was cap_2-1)" in shown
    expected = {**DEFAULTS, 3: "CAP_2-1", 4: "m2,7G cap"}
    assert capmap.names() == expected
    assert list(stored(mapping).items()) == [(str(n), name) for n, name in expected.items()]
    assert capmap.class_names({"4": 0, "3": 1}, 2) == ["m2,7G cap", "CAP_2-1"]


@pytest.mark.parametrize(
    ("number", "name", "says"),
    [
        ("6", "new", "the next number, 4"),
        ("-1", "new", "the next number, 4"),
        ("4", "Cap_1", "1 is called 'cap_1' already"),
        ("0", "CAP_UNKNOWN", "-99 is called 'cap_unknown' already"),
        ("4", "", "is empty"),
        ("4", "  ", "is empty"),
        ("4", " cap_4", "begins or ends with a space"),
        ("4", "cap\x1b[31m4", "can't be printed"),
        ("4", "cap\n4", "can't be printed"),
        ("4", "cap\ud800", "can't be printed"),
        ("4", "cap_4" * 21, "longer than 100 characters"),
        ("4", "../cap_4", "can't be in the name of a file"),
        ("4", "=1+1", "formula"),
    ],
)
def test_what_cant_be_added_is_said_in_one_line_and_changes_nothing(
    run, mapping, number, name, says
):
    code, shown, error = run("add", number, name)
    assert code == 2 and shown == ""
    assert error.startswith(f"error: capmap add {number}: ") and says in error
    assert error.count("\n") == 1 and error.rstrip("\n").isprintable()
    assert not mapping.exists()


def test_remove_leaves_a_hole_which_isnt_filled(run, mapping):
    code, shown, _ = run("remove", "1")
    assert code == 0 and "Removed 1: cap_1 (it shows as 'Unknown cap: 1' now)" in shown
    assert capmap.class_names({}, 4) == ["cap_0", "Unknown cap: 1", "cap_2", "cap_2-1"]
    assert run("add", "1", "other")[0] == 2
    assert run("remove", "-99")[0] == 0
    assert stored(mapping) == {"0": "cap_0", "2": "cap_2", "3": "cap_2-1"}
    code, _, error = run("remove", "1")
    assert code == 2 and "capmap remove 1: it has no name" in error


def test_the_last_name_stays_as_no_names_would_mean_the_defaults(run, mapping):
    before = store(mapping, {"7": "only"})
    code, _, error = run("remove", "7")
    assert code == 2 and "capmap reset" in error
    assert mapping.read_bytes() == before


def test_reset_goes_back_to_the_defaults_and_says_what_that_changed(run, mapping):
    store(mapping, {"-99": "cap_unknown", "0": "cap_0", "1": "one", "2": "cap_2", "4": "four"})
    code, shown, _ = run("reset")
    assert code == 0
    lines = shown.splitlines()
    assert lines[:3] == [
        "Renamed 1: cap_1 (was one)",
        "Added 3: cap_2-1",
        "Removed 4: four (it shows as 'Unknown cap: 4' now)",
    ]
    assert mapping.read_bytes() == AS_CAPFINDER_WRITES


def test_what_is_so_already_is_not_written_again(run, mapping):
    mapping.parent.mkdir()
    mapping.write_bytes(AS_CAPFINDER_WRITES)
    before = mapping.stat().st_mtime_ns
    for arguments in (("add", "3", "cap_2-1"), ("reset",)):
        code, shown, _ = run(*arguments)
        assert code == 0 and "Nothing changed" in shown
    assert mapping.stat().st_mtime_ns == before


def can_be_added(name: str) -> bool:
    try:
        return bool(capmap.with_name({0: "cap_0"}, 1, name))
    except InputError:
        return False


@given(
    names=st.lists(
        st.text(min_size=1, max_size=20).filter(can_be_added),
        min_size=1,
        max_size=5,
        unique_by=str.casefold,
    )
)
def test_names_that_can_be_added_come_back_from_every_file_that_they_go_to(names):
    known = {0: "a name that is longer than twenty characters"}
    for number, name in enumerate(names, start=1):
        known = capmap.with_name(known, number, name)
    assert list(known.values())[1:] == names
    count = len(names)
    matrix = metrics.confusion_csv([[0] * count] * count, names)
    (header, *_) = csv.reader(matrix.splitlines())
    assert header[1:] == names
    lines = predictions.lines(
        np.array([b"read"] * count), np.arange(count), np.eye(count, dtype=float), names
    ).decode()
    assert [row[3] for row in csv.reader(lines.splitlines())] == names


@pytest.mark.parametrize("content", [b"", b"\n", b"{}", b"\xef\xbb\xbf{}"])
def test_a_file_without_names_means_the_defaults(mapping, content):
    mapping.parent.mkdir()
    mapping.write_bytes(content)
    assert capmap.names() == DEFAULTS


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"0": "cap_0",}', "line 1, column 15: not valid JSON"),
        (b'["cap_0"]', "must hold one JSON object"),
        (b'{"zero": "cap_0"}', "'zero' isn't a whole number"),
        (b'{"' + b"9" * 5000 + b'": "cap_0"}', "isn't a whole number"),
        (b'{"0": null}', "the name of 0, None, isn't a text"),
        (b'{"0": ""}', "the name of 0, '', isn't a text"),
        (b'{"0": "\\ud800"}', r"the name of 0, '\ud800', isn't a text"),
        (b"\xff\xfe", "isn't text in UTF-8"),
        (b"[" * 100_000, "too deep"),
    ],
)
def test_a_damaged_file_is_an_error_that_reset_mends(run, mapping, content, says):
    mapping.parent.mkdir()
    mapping.write_bytes(content)
    for arguments in (("list",), ("add", "4", "new"), ("remove", "0")):
        code, _, error = run(*arguments)
        assert code == 2 and error.startswith(f"error: {mapping}") and error.count("\n") == 1
        assert says in error and "capfinder capmap reset" in error
    assert mapping.read_bytes() == content
    code, shown, _ = run("reset")
    assert code == 0 and "it is replaced" in shown
    assert mapping.read_bytes() == AS_CAPFINDER_WRITES


def test_a_file_that_cant_be_written_is_an_error(run, mapping):
    mapping.mkdir(parents=True)
    code, _, error = run("reset")
    assert code == 2 and f"{mapping}: can't be written" in error and error.count("\n") == 1
    assert not list(mapping.parent.glob(".partial*"))
    mapping.rmdir()
    mapping.parent.joinpath(".custom_mapping.lock").unlink()
    mapping.parent.rmdir()
    mapping.parent.write_text("not a directory")
    code, _, error = run("add", "4", "new")
    assert code == 2 and str(mapping.parent) in error and error.count("\n") == 1


def test_a_link_to_the_file_stays_one(run, mapping, tmp_path):
    mapping.parent.mkdir()
    mapping.symlink_to(tmp_path / "dotfiles" / "names.json")
    assert run("add", "4", "new")[0] == 0
    assert mapping.is_symlink()
    assert stored(tmp_path / "dotfiles" / "names.json")["4"] == "new"


def test_of_two_changes_at_once_none_is_lost(run, mapping):
    """The second waits for the first, and only then reads what there is."""
    store(mapping, {"0": "zero", "1": "one"})
    lock = mapping.with_name(".custom_mapping.lock")
    second = threading.Thread(target=capmap.command, args=("add", 0, "null"))
    with files.exclusive_lock(lock, holder="the first"):
        second.start()
        second.join(timeout=0.3)
        assert second.is_alive()
        store(mapping, {"0": "zero", "1": "eins"})
    second.join(timeout=10)
    assert stored(mapping) == {"0": "null", "1": "eins"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("add", 4, None), "capmap add: takes NUMBER NAME"),
        (("add", None, None), "capmap add: takes NUMBER NAME"),
        (("remove", None, None), "capmap remove: takes NUMBER"),
        (("remove", 1, "cap_1"), "capmap remove: takes NUMBER"),
        (("list", 1, None), "capmap list: takes nothing more"),
        (("reset", 1, None), "capmap reset: takes nothing more"),
        (("rename", 1, "x"), "no such action"),
    ],
)
def test_an_action_that_gets_too_little_or_too_much_says_what_it_takes(arguments, says, mapping):
    with pytest.raises(SettingsError, match=says):
        capmap.command(*arguments)
    assert not mapping.parent.exists()


def test_numbers_that_a_hand_edited_file_may_hold():
    assert capmap.next_number({-99: "unknown"}) == 0
    assert capmap.next_number({-99: "unknown", -5: "odd", 2: "two"}) == 3
    with pytest.raises(InputError, match="the next number, 0"):
        capmap.with_name({-5: "odd"}, -4, "new")
