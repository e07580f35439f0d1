"""Names of the caps: which class number means which cap."""

import json
from pathlib import Path

from capfinder.errors import InputError

DEFAULT_NAMES = {-99: "cap_unknown", 0: "cap_0", 1: "cap_1", 2: "cap_2", 3: "cap_2-1"}


def mapping_path() -> Path:
    return Path.home() / ".capfinder" / "custom_mapping.json"


def names() -> dict[int, str]:
    """Class number -> name, from the user's mapping file when there is one.

    Raises: InputError naming the file when it can't be read."""
    path = mapping_path()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {int(number): str(name) for number, name in entries.items()}
    except FileNotFoundError:
        return dict(DEFAULT_NAMES)
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a cap mapping ({error}). Correct or remove it.") from None


def class_names(class_map: dict[str, int], num_classes: int) -> list[str]:
    """Names of the classes to train, by their number after `class_map`."""
    known = names()
    in_files = {new: int(old) for old, new in class_map.items()} or {
        number: number for number in range(num_classes)
    }
    return [
        known.get(in_files[number], f"Unknown cap: {in_files[number]}")
        for number in range(num_classes)
    ]
