"""Where the files of `capfinder predict` and `evaluate` may go: of what lies there, only what an
earlier result is known to hold is replaced or removed."""

import os
from collections.abc import Sequence
from pathlib import Path

from capfinder import files
from capfinder.errors import InputError
from capfinder.prediction.scoring import LABELS, LOGITS, OUTPUTS, PREDICTIONS, REJECTS
from capfinder.prediction.unfinished import DIRECTORY, METADATA, STATE

COMPOSITION, METRICS, CONFUSION = "composition.json", "metrics.json", "confusion_matrix.csv"
LOGS = "logs"
_UNFINISHED = {*OUTPUTS, LOGITS, LABELS, METRICS, CONFUSION, METADATA, STATE}


def own(output_dir: Path) -> list[str]:
    """The files of an earlier result there, by its composition.json; that one is the last."""
    try:
        outputs = dict(files.read_json(output_dir / COMPOSITION)["outputs"])
    except (InputError, KeyError, TypeError, ValueError):
        return []
    known = (PREDICTIONS, REJECTS, METRICS, CONFUSION)  # whatever else such a file may name
    return [*(name for name in known if name in outputs), COMPOSITION]


def check(output_dir: Path, names: Sequence[str]) -> None:
    """names: of the files that are to be made there, beside COMPOSITION.

    os.path says no where pathlib raises, as for a name that is too long: whoever makes the
    directory says what is wrong with it.
    Raises: InputError when one would replace somebody else's, or can't be made."""
    real = output_dir.resolve()
    if real.name == "evaluation" and os.path.exists(real.parent / "run.json"):
        raise InputError(
            f"--output_dir={output_dir}: is where the run {output_dir.parent} keeps its own "
            "evaluation; choose another"
        )
    found = own(output_dir)
    for name in (*names, COMPOSITION):
        path = output_dir / name
        if os.path.isdir(path):
            raise InputError(f"{path}: is a directory. Move it, or choose another --output_dir.")
        if os.path.lexists(path) and name not in found:
            raise InputError(
                f"{path}: would be replaced, but isn't known to be of `capfinder predict` or "
                f"`evaluate` (no {COMPOSITION} there lists it). Move it, or choose another "
                "--output_dir."
            )
    for name in (DIRECTORY, LOGS):
        path = output_dir / name
        if os.path.lexists(path) and not os.path.isdir(path):
            raise InputError(
                f"{path}: is a file where a directory is needed. Move it, or choose another "
                "--output_dir."
            )
    if os.path.isdir(output_dir / DIRECTORY):
        _check_unfinished(output_dir / DIRECTORY)


def _check_unfinished(directory: Path) -> None:
    """Raises: InputError for a file in it that isn't one of a stopped run."""
    for path in directory.glob("*"):
        if path.name not in _UNFINISHED and not path.name.startswith(files.PARTIAL):
            raise InputError(
                f"{path}: would be removed, but isn't of `capfinder predict` or `evaluate`. Move "
                "it, or choose another --output_dir."
            )


def remove_others(output_dir: Path, names: Sequence[str]) -> None:
    """The figures of an earlier evaluation would lie beside other predictions. names: as above."""
    for name in own(output_dir):
        if name not in (*names, COMPOSITION):
            (output_dir / name).unlink(missing_ok=True)
