"""`capfinder import-model`: a `.keras` classifier becomes a model to go on with."""

import errno
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capfinder import files, log
from capfinder.errors import InputError
from capfinder.log import logger
from capfinder.trained import imported, stored


def run(keras_file: Path, *, output_dir: Path) -> None:
    """Writes the import of `keras_file` to `output_dir`, whole or not at all; one that is there
    already is kept.

    Raises: InputError for a file that can't be imported, or a directory that holds something else;
    StageFailedError when the imported model gives other probabilities, or can't be written."""
    earlier = _earlier(output_dir)
    if earlier is not None:
        _check_same(earlier, keras_file, output_dir)
        stored.load(output_dir)  # raises for one that was damaged since
        logger.info("%s is imported already: %s is kept", keras_file, output_dir)
        _show(earlier, output_dir)
        return
    logger.info("Reading %s with Keras", keras_file)
    found = imported.read_keras_file(keras_file)
    try:
        stored.write(found.classifier, found.record, output_dir)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"--output_dir={output_dir}: can't be written to ({error.strerror})"
        ) from None
    for remark in found.remarks:
        logger.warning("%s: %s", keras_file, remark)
    _show(found.record, output_dir)


def _earlier(output_dir: Path) -> dict[str, Any] | None:
    """The record of the import that is there. Raises: InputError for anything else."""
    if stored.is_one(output_dir):
        return stored.read_record(output_dir)
    is_free = not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir()))
    if not is_free:
        raise InputError(
            f"--output_dir={output_dir}: is there and holds no import; choose a directory that is "
            "new or empty"
        )
    return None


def _check_same(earlier: Mapping[str, Any], keras_file: Path, output_dir: Path) -> None:
    if not keras_file.is_file():
        raise InputError(f"{keras_file}: no such file")
    if files.sha256_file(keras_file) != earlier.get("source_sha256"):
        raise InputError(
            f"--output_dir={output_dir}: holds the import of another file, "
            f"{earlier.get('source')}; choose another directory"
        )


def _show(record: Mapping[str, Any], output_dir: Path) -> None:
    rows = [
        ("architecture", record["model_type"]),
        *((f"  {name}", _listed(value)) for name, value in record["hyperparameters"].items()),
        ("classes", f"{record['num_classes']} ({', '.join(record['class_names'])})"),
        ("samples that it takes", record["target_length"]),
        ("samples that the file took", record["input_length"]),
        ("parameters", f"{record['num_parameters']:,} in {record['dtype']}"),
        ("largest |Δp| from Keras", f"{record['max_abs_difference']:.1e}"),
    ]
    log.table(f"Imported {record['source']}", ("", ""), rows, left=(0, 1))
    place = shlex.quote(str(output_dir))
    tune = (
        f"python launch.py --config=configs/{record['model_type']}.py",
        f"--config.train_params.init_from={place}",
        f"--config.shared_params.target_length={record['target_length']}",
        "--config.etl_params.caps_data_dir=CSVS --output_dir=RUN",
    )
    for use, command in (
        ("Predict", f"capfinder predict --model {place} --caps_data_dir CSVS --output_dir RESULTS"),
        ("Fine-tune", " ".join(tune)),
        ("Export", f"capfinder export --run {place}"),
    ):
        logger.info("%-10s %s", use, command)


def _listed(value: Any) -> str:
    values = value if isinstance(value, list | tuple) else [value]
    return ", ".join(f"{one:.6g}" for one in values)
