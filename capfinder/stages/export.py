"""The trained model as files: written, reloaded in a fresh process, compared, then named.

No file gets its name before all of them have given the Flax model's probabilities."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from capfinder import files, log
from capfinder.errors import StageFailedError
from capfinder.etl import preprocess
from capfinder.evaluation.facts import Facts
from capfinder.exporting import describing, fresh_process, keras, onnx, saved_model
from capfinder.exporting.record import ExportedFile
from capfinder.exporting.reload import Answer, Job
from capfinder.log import logger
from capfinder.stages import assembly, export_result
from capfinder.stages.assembly import TrainedModel
from capfinder.stages.export_failure import Asked
from capfinder.stages.export_result import ExportResult

LARGEST_DIFFERENCE = 1e-4  # of a probability, between a reloaded file and the Flax model
_BATCH = 256


def run(
    config: ConfigDict,
    *,
    model: TrainedModel,
    signals: np.ndarray,
    class_names: list[str],
    facts: Facts | None = None,
    class_map: Mapping[str, int] | None = None,
    earlier: Iterable[Mapping[str, Any]] = (),
) -> ExportResult:
    """Writes `export_params.formats` to output_dir/best_model, as `write` does."""
    output_dir = Path(config.shared_params.output_dir)
    return write(
        output_dir / "best_model",
        output_dir=output_dir,
        earlier=earlier,
        model=model,
        signals=signals,
        class_names=class_names,
        facts=Facts() if facts is None else facts,
        class_map={} if class_map is None else class_map,
        formats=config.export_params.formats,
        input_length=config.export_params.input_length,
        option="--stage=export --config.export_params.formats=",
    )


def write(
    directory: Path,
    *,
    output_dir: Path,
    earlier: Iterable[Mapping[str, Any]],
    model: TrainedModel,
    signals: np.ndarray,
    class_names: list[str],
    facts: Facts,
    class_map: Mapping[str, int],
    formats: Sequence[str],
    input_length: int | None,
    option: str,
    source: Path | None = None,
) -> ExportResult:
    """Writes `formats` to `directory`, each checked on `signals`; names and model card beside them.

    earlier: run.json's `exports` of output_dir, which `directory` lies in; of another model's files
    none stays. signals: (n, T, 1) of the model's length, n >= 1. class_map: class number in files
    -> the model's. input_length: samples of the signals that the files take; None: the model's.
    option: what asks for formats, for an error to say. source: the file that `model` came from, if
    it came from one; it is never removed.
    A `.keras` file that tells the same of the same model is kept as it is; others that were
    exported are removed once the new one is in place.
    Raises: StageFailedError naming the file that isn't the trained model, and the format."""
    asked = Asked(formats, option)
    with jax.default_matmul_precision("highest"):  # else a GPU rounds products to 10 bits
        export = _export(directory, model, signals, class_names, facts, class_map, input_length)
        kept = export.kept_classifier() if "keras" in formats else None
        try:
            written = _written(export, asked, kept)
        except _DamagedError:
            logger.info("%s is damaged; it is written anew", kept)
            kept, written = None, _written(export, asked, None)
    weights = _weights_sha256(model.variables)
    result = ExportResult(tuple(written), export.about, kept is not None, weights, source)
    if kept is not None:
        logger.info("The model hasn't changed; %s is kept", kept)
    export_result.remove_earlier(result)
    rows = export_result.merged(earlier, result, output_dir)
    export_result.describe(directory, result, rows, output_dir)
    export_result.show(directory, result, num_signals=len(signals))
    return result


class _DamagedError(Exception):
    """The `.keras` file that was to be kept isn't the model that it says it is."""


@dataclasses.dataclass(frozen=True)
class _Export:
    """What every format is written from and compared with."""

    directory: Path
    model: TrainedModel
    about: dict[str, Any]
    twin_as: dict[str, Any]  # arguments of keras.build_twin, as JSON
    signals: np.ndarray  # (n, input_length, 1), the parameters' dtype
    expected: np.ndarray  # (n, C) probabilities of the Flax model for them

    @functools.cached_property
    def twin(self) -> Any:
        """With the trained weights. Raises: keras.TwinError."""
        given = {**self.twin_as, "hyperparameters": self.model.hyperparameters}
        return keras.trained_twin(self.model.variables, **given)

    def kept_classifier(self) -> Path | None:
        """A `.keras` file that says the same of the same weights."""
        same = files.fingerprint(self.about)
        for path in export_result.classifiers(self.directory / "classifier"):
            if files.fingerprint(keras.read_about(path)) == same:
                return path
        return None

    def difference(self, path: Path, answer: Answer) -> float:
        """The largest from the Flax model's probabilities.

        Raises: StageFailedError when `path` couldn't be loaded or differs too much."""
        if answer.probabilities is None:
            raise StageFailedError(
                f"{path}: the exported model can't be reloaded and was removed ({answer.error})"
            )
        if answer.probabilities.shape != self.expected.shape:
            raise StageFailedError(
                f"{path}: the exported model gives probabilities of shape "
                f"{answer.probabilities.shape}, the trained one {self.expected.shape}; the file "
                "was removed"
            )
        difference = float(np.max(np.abs(answer.probabilities - self.expected)))
        if not difference <= LARGEST_DIFFERENCE:  # so that NaN fails too
            raise StageFailedError(
                f"{path}: the exported model's probabilities differ from the trained one's by up "
                f"to {difference:.2g} ({LARGEST_DIFFERENCE:g} allowed); the file was removed"
            )
        return difference


def _export(
    directory: Path,
    model: TrainedModel,
    signals: np.ndarray,
    class_names: list[str],
    facts: Facts,
    class_map: Mapping[str, int],
    input_length: int | None,
) -> _Export:
    length = input_length or model.target_length
    dtype = np.dtype(jax.tree.leaves(model.variables["params"])[0].dtype)
    given = _fitted(signals.astype(dtype), length)
    twin_as = {
        "model_type": model.model_type,
        "hyperparameters": dataclasses.asdict(model.hyperparameters),
        "num_classes": model.num_classes,
        "target_length": model.target_length,
        "input_length": length,
        "dtype": dtype.name,
    }
    about = describing.about(
        twin_as,
        num_parameters=model.num_parameters,
        class_names=class_names,
        class_map=class_map,
        weights_sha256=assembly.weights_sha256(model.variables),
        facts=facts.as_json(),
    )
    expected = _flax_probabilities(model, _fitted(given, model.target_length))
    return _Export(directory, model, about, twin_as, given, expected)


def _weights_sha256(variables: Mapping[str, Any]) -> str:
    """The same for a model and for one that was made of its `.keras` file."""
    flat = flatten_dict(dict(variables))
    kept = {path: leaf for path, leaf in flat.items() if path[-1] not in keras.TRAINING_ONLY}
    return assembly.weights_sha256(unflatten_dict(kept))


def _fitted(signals: np.ndarray, length: int) -> np.ndarray:
    """(n, T, 1) -> (n, length, 1)"""
    fitted = [preprocess.fit_length(signal[:, 0], length) for signal in signals]
    return np.stack(fitted)[..., np.newaxis]


def _written(export: _Export, asked: Asked, kept: Path | None) -> list[ExportedFile]:
    """Writes the files, has them all reloaded at once, and gives them their names."""
    formats = asked.formats
    if not formats:
        return []
    now = datetime.now()
    paths = {name: export.directory / f"{now:{_FORMATS[name][0]}}" for name in formats}
    if kept is not None:
        paths["keras"] = kept
    with (
        contextlib.ExitStack() as opened,
        log.progress("Exporting", total=2 * len(formats), unit="steps") as bar,
    ):
        jobs, fresh = [], opened.enter_context(fresh_process.started(formats))
        for name, path in paths.items():
            bar.note(f"writing {name}")
            with asked.written(name, path):
                job = Job(name, path, export.twin.to_json() if name == "h5" else "")
                if path != kept:
                    job = dataclasses.replace(job, path=opened.enter_context(_opened(path)))
                    _FORMATS[name][1](export, job.path)
            jobs.append(job)
            bar.advance()
        bar.note("reloading in a fresh process")
        answers = fresh.reloaded(jobs, export.signals, done=bar.advance)
        written, failed = [], dict[str, StageFailedError]()
        for job, path, answer in zip(jobs, paths.values(), answers, strict=False):
            try:
                written.append(_checked(export, job, path, answer, kept))
            except StageFailedError as error:
                failed[job.kind] = error
        if failed:
            first = next(iter(failed.values()))
            raise asked.failure(str(first), failed) from first
        return written


def _checked(
    export: _Export, job: Job, path: Path, answer: Answer, kept: Path | None
) -> ExportedFile:
    error = answer.error.replace(str(job.path), str(path)).replace(job.path.name, path.name)
    try:
        difference = export.difference(path, dataclasses.replace(answer, error=error))
    except StageFailedError as failed:
        if path == kept:
            raise _DamagedError from failed
        raise
    opset = onnx.OPSET if job.kind == "onnx" else None
    return ExportedFile(job.kind, path, difference, answer.reader, opset)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Path]:
    """A temporary name, `path` after the block."""
    opener = files.atomic_path if path.suffix else files.atomic_directory
    with opener(path) as partial:
        yield partial


def _write_keras(export: _Export, path: Path) -> None:
    keras.write_keras(export.twin, path, export.about)


def _write_h5(export: _Export, path: Path) -> None:
    keras.write_weights(export.twin, path)


def _write_saved_model(export: _Export, path: Path) -> None:
    saved_model.write_saved_model(
        functools.partial(assembly.probabilities, export.model.module),
        export.model.variables,
        path,
        target_length=export.model.target_length,
        input_length=export.twin_as["input_length"],
    )


def _write_onnx(export: _Export, path: Path) -> None:
    onnx.write_onnx(export.twin, path, export.about)


# Format -> the path of its file, below best_model, and what writes it.
_FORMATS: dict[str, tuple[str, Callable[[_Export, Path], None]]] = {
    "keras": ("classifier/classifier_%Y%m%d_%H%M%S.keras", _write_keras),
    "h5": ("best_model_weights.weights.h5", _write_h5),
    "saved_model": ("saved_model", _write_saved_model),
    "onnx": ("classifier/classifier.onnx", _write_onnx),
}


def _flax_probabilities(model: TrainedModel, signals: np.ndarray) -> np.ndarray:
    predict = jax.jit(functools.partial(assembly.probabilities, model.module))
    starts = range(0, len(signals), _BATCH)
    return np.concatenate(
        [np.asarray(predict(model.variables, signals[at : at + _BATCH])) for at in starts]
    )
