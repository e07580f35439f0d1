"""A trained model from a path, with all that its input and output need.

`load` takes what a user may have: a run's output directory (`run_directory`), an import (`stored`)
or a `.keras` file (`imported`). Another kind of model gets its module here and its line in `load`.
"""

from pathlib import Path

from capfinder.allowed import shortened
from capfinder.errors import InputError
from capfinder.trained import imported, run_directory, stored
from capfinder.trained.classifier import Classifier

__all__ = ["Classifier", "load"]

EXPECTED = "expected a run's output directory, an import, or a .keras file"


def load(path: Path) -> Classifier:
    """The model at `path`; JAX is set up for it.

    Raises: InputError for anything else, or a model that can't be used."""
    try:
        is_directory = path.is_dir()
        found = "isn't called .keras" if path.exists() else "no such file or directory"
    except OSError as error:  # a name that is too long, say
        raise InputError(f"{shortened(str(path))}: {error.strerror}; {EXPECTED}") from None
    if is_directory:
        return stored.load(path) if stored.is_one(path) else run_directory.load(path)
    if path.is_file() and path.suffix == ".keras":  # as Keras has it, which takes no .KERAS
        return imported.from_keras_file(path)
    raise InputError(f"{path}: {found}; {EXPECTED}")
