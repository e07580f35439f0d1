"""Names of the caps: which class number means which cap, and `capfinder capmap`, which changes it.

The file of names is Capfinder's own, in its form, so that both programs read what either wrote."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from capfinder import files, log
from capfinder.allowed import MOST_NAME_LENGTH, shown
from capfinder.errors import InputError, SettingsError
from capfinder.log import logger

DEFAULT_NAMES = {-99: "cap_unknown", 0: "cap_0", 1: "cap_1", 2: "cap_2", 3: "cap_2-1"}
# Each action with what it takes.
ACTIONS = {"list": "", "add": "NUMBER NAME", "remove": "NUMBER", "reset": "", "config": ""}


def mapping_path() -> Path:
    return Path.home() / ".capfinder" / "custom_mapping.json"


def names() -> dict[int, str]:
    """Class number -> name, from the user's mapping file when there is one that holds any.

    Raises: InputError naming the file when it can't be read."""
    try:
        return _stored(mapping_path())
    except InputError as error:
        raise InputError(
            f"{error}. Correct the file, or go back to the default names: capfinder capmap reset"
        ) from None


def _stored(path: Path) -> dict[int, str]:
    """Any text will do for a name here: what couldn't be added may still be read."""
    if not os.path.exists(path):
        return dict(DEFAULT_NAMES)
    entries = files.read_json(path, parse=_loads, encoding="utf-8-sig")
    if not isinstance(entries, dict):
        raise InputError(f"{path}: must hold one JSON object of numbers and names")
    known = {}
    for key, name in entries.items():
        try:
            number = int(key)
        except ValueError:
            raise InputError(f"{path}: {shown(key)} isn't a whole number") from None
        if not isinstance(name, str) or not name.strip() or not _is_utf8(name):
            raise InputError(f"{path}: the name of {number}, {shown(name)}, isn't a text")
        known[number] = name
    return known or dict(DEFAULT_NAMES)


def _is_utf8(name: str) -> bool:
    """JSON can hold halves of characters, which no file can."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _loads(text: str) -> object:
    return json.loads(text) if text.strip() else {}


def class_names(class_map: Mapping[str, int], num_classes: int) -> list[str]:
    """Names of the classes to train, by their number after `class_map`."""
    known = names()
    numbers = class_numbers(class_map, num_classes)
    return [known.get(number, unknown_cap(number)) for number in numbers]


def class_numbers(class_map: Mapping[str, int], num_classes: int) -> list[int]:
    """What files call the classes to train, by their number after `class_map`."""
    in_files = {new: int(old) for old, new in class_map.items()}
    return [in_files[number] if in_files else number for number in range(num_classes)]


def unknown_cap(number: int) -> str:
    """What a class is called that has no name."""
    return f"Unknown cap: {number}"


def command(action: str, number: int | None, name: str | None) -> None:
    """`capfinder capmap`: shows the names or changes them, and says what it changed.

    Raises: SettingsError when `action` doesn't take these; InputError for a number or name that
    can't be, or a file that can't be read or written."""
    match action, number, name:
        case "list", None, None:
            _show()
        case "config", None, None:
            logger.info("%s", mapping_path())
        case "add", int(of), str(new):
            _change(names, lambda known: with_name(known, of, new))
        case "remove", int(of), None:
            _change(names, lambda known: without(known, of))
        case "reset", None, None:
            _change(_readable_names, lambda known: dict(DEFAULT_NAMES))
        case _:
            raise SettingsError(
                f"capmap {action}: takes {ACTIONS[action] or 'nothing more'}"
                if action in ACTIONS
                else f"capmap {shown(action)}: no such action (actions: {', '.join(ACTIONS)})"
            )


def with_name(known: Mapping[int, str], number: int, name: str) -> dict[int, str]:
    """The names with `number`, a listed one or the next, called `name`.

    Raises: InputError when that can't be."""
    problem = _problem(name)
    if problem:
        raise InputError(f"capmap add {number}: the name {shown(name)} {problem}")
    for other, taken in known.items():
        if other != number and taken.casefold() == name.casefold():
            raise InputError(
                f"capmap add {number}: {other} is called {shown(taken)} already; "
                "each cap needs a name of its own"
            )
    following = next_number(known)
    if number not in known and number != following:
        raise InputError(
            f"capmap add {number}: a new cap gets the next number, {following}; "
            "only a listed number can be renamed (capfinder capmap list)"
        )
    return dict(sorted({**known, number: name}.items()))


def without(known: Mapping[int, str], number: int) -> dict[int, str]:
    """The names without that of `number`; the other numbers stay.

    Raises: InputError when it has none, or is the last one."""
    if number not in known:
        raise InputError(f"capmap remove {number}: it has no name (capfinder capmap list)")
    if len(known) == 1:
        raise InputError(
            f"capmap remove {number}: it is the last name; `capfinder capmap reset` goes back to "
            "the defaults"
        )
    return {other: name for other, name in known.items() if other != number}


def next_number(known: Mapping[int, str]) -> int:
    """The number of a cap to be added."""
    return max((number for number in known if number >= 0), default=-1) + 1


def _problem(name: str) -> str:
    """What keeps it from being a name. Commas are in real ones, and every CSV has them in quotes.

    Capfinder names its signal files after the cap, so that / and \\ would lead elsewhere."""
    if not name.strip():
        return "is empty"
    if name != name.strip():
        return "begins or ends with a space"
    if len(name) > MOST_NAME_LENGTH:
        return f"is longer than {MOST_NAME_LENGTH} characters"
    if not name.isprintable():
        return "holds a character that can't be printed, such as a line break"
    if "/" in name or "\\" in name:
        return "holds / or \\, which can't be in the name of a file"
    if name[0] in "=+-@":
        return f"begins with {name[0]}: a spreadsheet would take it for a formula"
    return ""


def _show() -> None:
    known, path = names(), mapping_path()
    log.table("Names of the caps", ("number", "name"), sorted(known.items()), left=(1,))
    where = "" if os.path.exists(path) else " (isn't there: these are the defaults)"
    logger.info("File: %s%s", path, where)
    logger.info("Next number: %d", next_number(known))


def _readable_names() -> dict[int, str]:
    """Those that there are; {} for a file that can't be read, which is to be replaced."""
    try:
        return _stored(mapping_path())
    except InputError as error:
        logger.warning("%s; it is replaced", error)
        return {}


def _change(
    read: Callable[[], dict[int, str]], edit: Callable[[dict[int, str]], dict[int, str]]
) -> None:
    """Writes what `edit` makes of the names that `read` gives; others wait meanwhile."""
    path = Path(os.path.realpath(mapping_path()))  # else a link would become a file
    lock = path.with_name(f".{path.stem}.lock")
    with files.exclusive_lock(
        lock,
        holder="another capfinder capmap",
        waiting=lambda owner: logger.info("Waiting for %s", owner),
    ):
        before = read()
        after = edit(before)
        if before == after:
            logger.info("Nothing changed: that is how it was")
            return
        try:
            files.remove_partial(path.parent, path.name)
            # ASCII, without a line end: byte for byte as Capfinder has it.
            files.write_text(path, json.dumps(after, indent=2))
        except OSError as error:
            raise InputError(f"{path}: can't be written ({error.strerror})") from None
    for line in _differences(before, after):
        logger.info("%s", line)
    logger.info("Wrote %s", path)


def _differences(before: Mapping[int, str], after: Mapping[int, str]) -> list[str]:
    lines = []
    for number in sorted(before.keys() | after.keys()):
        old, new = before.get(number), after.get(number)
        if old is None:
            lines.append(f"Added {number}: {new}")
        elif new is None:
            lines.append(f"Removed {number}: {old} (it shows as {unknown_cap(number)!r} now)")
        elif old != new:
            lines.append(f"Renamed {number}: {new} (was {old})")
    return lines
