"""The model that a fine-tuning starts from: its run keeps a copy, and can go on once it is gone."""

import os
from pathlib import Path

from capfinder import trained
from capfinder.errors import InputError
from capfinder.log import logger
from capfinder.trained import stored
from capfinder.trained.classifier import Classifier


def source(path: Path, copy: Path, *, keep: bool) -> Classifier:
    """The model at `path`; where that is gone, the one in `copy`, which is of it.

    keep: `copy` is made, in place of one of another model or one that is damaged.
    Raises: InputError as `trained.load`; StageFailedError when the copy can't be written."""
    try:
        classifier = trained.load(path)
    except InputError:
        if os.path.exists(path) or not stored.is_one(copy):  # False for a name that is too long
            raise
        return _in_its_place(path, copy)
    if keep and path != copy:
        record = {"source": str(path), **stored.record_of(classifier)}
        if not stored.holds(copy, record):
            stored.write(classifier, record, copy)
    return classifier


def _in_its_place(path: Path, copy: Path) -> Classifier:
    try:
        known = stored.read_record(copy).get("source")
        classifier = stored.load(copy)
    except InputError as error:
        raise InputError(f"{path}: is gone, and its copy can't be used ({error})") from None
    if known != str(path):
        raise InputError(f"{path}: no such file or directory; the copy in {copy} is of {known}")
    logger.warning("%s is gone; its copy in %s is used", path, copy)
    return classifier
