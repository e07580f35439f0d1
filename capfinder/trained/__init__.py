"""A trained model from a path, with all that its input and output need.

`load` takes what a user may have: a run's output directory (`run_directory`), an import (`stored`)
or a `.keras` file (`imported`). Another kind of model gets its module here and its line in `load`.
"""

from pathlib import Path

from capfinder.errors import InputError
from capfinder.trained import imported, run_directory, stored
from capfinder.trained.classifier import Classifier

__all__ = ["Classifier", "load"]

EXPECTED = "expected a run's output directory, an import, or a .keras file"


def load(path: Path) -> Classifier:
    """The model at `path`; JAX is set up for it.

    Raises: InputError for anything else, or a model that can't be used."""
    if path.is_dir():
        if stored.is_one(path):
            return stored.load(path)
        return run_directory.load(path)
    if path.is_file() and path.suffix.lower() == ".keras":
        return imported.from_keras_file(path)
    found = "is no .keras file" if path.exists() else "no such file or directory"
    raise InputError(f"{path}: {found}; {EXPECTED}")
