"""`capfinder inspect DATASET`: prints what a dataset holds, checks it, draws its signals."""

import errno
import os
from pathlib import Path

from capfinder import capmap, files, log, run_record
from capfinder.data import versions
from capfinder.data.records import DATASET_NAME
from capfinder.errors import InputError, SettingsError
from capfinder.inspection import contents, integrity
from capfinder.inspection.contents import Inspected
from capfinder.log import logger

FORMS = (".html", ".png")


def run(dataset: Path, *, output: Path | None, verify: bool) -> None:
    """Prints tables; writes `output`, an .html page with tables and example signals or a .png of
    the signals alone; `verify` reads every byte first.

    dataset: a version's directory, a run's output_dir, or a directory of versions.
    Raises: SettingsError for another kind of output; InputError when there is no dataset, and, at
    the end, when something is wrong with its files."""
    if output is not None and output.suffix not in FORMS:
        raise SettingsError(f"--output={output}: give a name that ends in {' or '.join(FORMS)}")
    directory, why = find(dataset.absolute())
    if output is not None:
        _check_output(output)  # now, as reading may take long
    found = _inspect(directory, why, verify=verify)
    _show(found)
    if output is not None:
        _write(output, found)
    else:
        logger.info("Example signals of each class: add --output inspect.html (or .png)")
    if found.problems:
        others = f" (and {len(found.problems) - 1} more, above)" if len(found.problems) > 1 else ""
        raise InputError(f"{directory}: {found.problems[0]}{others}")


def find(path: Path) -> tuple[Path, str]:
    """The version meant by `path`, and in words how it was found."""
    if not path.is_dir():
        raise InputError(f"{path}: {'not a directory' if path.exists() else 'no such directory'}")
    if (path / versions.MANIFEST).is_file():
        return path, "the version given"
    if (path / "run.json").is_file():
        record = files.read_json(path / "run.json")
        used = record.get("dataset") if isinstance(record, dict) else None
        name = used.get("directory") if isinstance(used, dict) else None
        if isinstance(name, str):
            used_directory = run_record.inside(path, name)
            if (used_directory / versions.MANIFEST).is_file():
                return used_directory, "the version that the last run used (run.json)"
    for root in (path / "dataset" / DATASET_NAME, path / DATASET_NAME, path):
        found = versions.list_versions(root)
        if found:
            others = f"; older: {', '.join(reversed(found[:-1]))}" if found[:-1] else ""
            return root / found[-1], f"the newest version in {root}{others}"
    raise InputError(
        f"{path}: no dataset there. Give a run's output directory, its dataset/{DATASET_NAME}, or "
        f"one version in that, which holds a {versions.MANIFEST}."
    )


def _inspect(directory: Path, why: str, *, verify: bool) -> Inspected:
    path = directory / versions.MANIFEST
    manifest = files.read_json(path)
    try:
        names = capmap.class_names(manifest["settings"]["class_map"], manifest["num_classes"])
        facts = [("dataset", f"{directory} ({why})"), *contents.facts(manifest)]
        tables = contents.tables(manifest, names, directory)
        warnings = [str(warning) for warning in manifest.get("warnings") or ()]
        problems = integrity.missing_files(directory, manifest)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: isn't a dataset's manifest ({type(error).__name__}: {error}). Copy the "
            "version again, or remove it to have it rebuilt."
        ) from None
    checked = "Files: none missing, none too many. --verify reads them too."
    if verify:
        problems += integrity.verify(directory, manifest)
        checked = (
            "Verified: every shard has its SHA-256, every record its checksums; the counts are the "
            "manifest's, and no read_id is there twice, in one split or in two."
        )
    return Inspected(
        directory=directory,
        manifest=manifest,
        names=names,
        facts=facts,
        tables=tables,
        warnings=warnings,
        problems=problems,
        checked="" if problems else checked,
    )


def _check_output(output: Path) -> None:
    """Raises: InputError when a file can't be written there."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a directory")
        if not os.access(output.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "no permission")
    except OSError as error:
        raise _unwritable(output, error) from None


def _unwritable(output: Path, error: OSError) -> InputError:
    return InputError(f"--output={output}: can't be written ({error.strerror})")


def _show(found: Inspected) -> None:
    for name, value in found.facts:
        logger.info("%-12s %s", name, value)
    for table in found.tables:
        if table.rows:
            log.table(table.title, table.columns, table.rows, left=table.left)
        if table.note:
            logger.info("%s", table.note if table.rows else f"{table.title}: {table.note}")
    for warning in found.warnings:
        logger.warning("Warning: %s", warning)
    for problem in found.problems:
        logger.warning("Wrong: %s", problem)
    if found.checked:
        logger.info("%s", found.checked)


def _write(output: Path, found: Inspected) -> None:
    """Raises: InputError when `output` can't be written or, for a picture, no signal read."""
    from capfinder.inspection import page, plot  # the drawing library takes a while to load

    try:
        if output.suffix == ".png":
            examples = plot.read_examples(found.directory, found.counts(plot.SPLIT))
            with files.atomic_path(output) as partial:
                plot.write_png(partial, examples, found.names)
        else:
            files.write_text(output, page.render(found))
    except OSError as error:
        raise _unwritable(output, error) from None
    logger.info("Wrote %s", output)
