"""The trained model as files: written, reloaded, compared with the Flax model, then named."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from capfinder import files, log
from capfinder.errors import StageFailedError
from capfinder.exporting import keras, saved_model
from capfinder.log import logger
from capfinder.stages.assembly import TrainedModel

LARGEST_DIFFERENCE = 1e-4  # of a probability, between a reloaded file and the Flax model
_BATCH = 256

Run = Callable[[Path, np.ndarray], np.ndarray]  # (file, signals (n, T, 1)) -> probabilities (n, C)


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What was written, by format."""

    paths: dict[str, Path]
    differences: dict[str, float]  # of a probability from the Flax model's, the largest
    classifier: Path | None  # the `.keras` file, if it was asked for
    classifier_reused: bool  # it lay there already

    def summary(self) -> str:
        if not self.paths:
            return "no format asked for"
        worst = max(self.differences.values())
        return f"{', '.join(self.paths)}; within {worst:.0e} of the trained model"

    def as_record(self, output_dir: Path) -> list[dict[str, Any]]:
        """For run.json and the report: name, path below `output_dir` and difference of each."""
        return [
            {
                "name": name,
                "path": str(path.relative_to(output_dir)),
                "max_abs_difference": self.differences[name],
            }
            for name, path in self.paths.items()
        ]


@dataclasses.dataclass(frozen=True)
class _Export:
    """What every format is written from and compared with."""

    best_model: Path
    model: TrainedModel
    about: dict[str, Any]
    signals: np.ndarray  # (n, T, 1), the parameters' dtype
    expected: np.ndarray  # (n, C) probabilities of the Flax model for them

    def twin(self) -> Any:
        """A Keras twin without the trained weights."""
        return keras.build_twin(
            self.model.model_type,
            self.model.hyperparameters,
            num_classes=self.model.num_classes,
            target_length=self.model.target_length,
            dtype=_dtype(self.model).name,
        )

    def trained_twin(self) -> Any:
        twin = self.twin()
        keras.copy_weights(twin, self.model.variables)
        return twin

    def difference(self, path: Path, name: Path, run: Run) -> float:
        """Reloads `path`, to be called `name`, and compares it with the Flax model.

        Raises: StageFailedError when it can't be loaded or differs too much."""
        try:
            probabilities = run(path, self.signals)
        except Exception as error:  # whatever a loader raises, the file is unusable
            raise StageFailedError(
                f"{name}: the exported model can't be reloaded and was removed "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
            ) from error
        if probabilities.shape != self.expected.shape:
            raise StageFailedError(
                f"{name}: the exported model gives probabilities of shape {probabilities.shape}, "
                f"the trained one {self.expected.shape}; the file was removed"
            )
        difference = float(np.max(np.abs(probabilities - self.expected)))
        if not difference <= LARGEST_DIFFERENCE:  # so that NaN fails too
            raise StageFailedError(
                f"{name}: the exported model's probabilities differ from the trained one's by up "
                f"to {difference:.2g} ({LARGEST_DIFFERENCE:g} allowed); the file was removed"
            )
        return difference

    def publish(
        self,
        opened: AbstractContextManager[Path],
        name: Path,
        write: Callable[[Path], None],
        run: Run,
    ) -> float:
        """Writes under the temporary name that `opened` gives; `name` appears once it is right."""
        with opened as partial:
            write(partial)
            return self.difference(partial, name, run)


def run(
    config: ConfigDict, *, model: TrainedModel, signals: np.ndarray, class_names: list[str]
) -> ExportResult:
    """Writes `export_params.formats` to output_dir/best_model, each checked on `signals`.

    signals: (n, T, 1) real test signals, n >= 1. A `.keras` file of the same model is kept as it
    is; one of an earlier model is removed once the new one is in place.
    Raises: StageFailedError naming the file that isn't the trained model."""
    with jax.default_matmul_precision("highest"):  # else a GPU rounds products to 10 bits
        return _run(config, model, signals, class_names)


def _run(
    config: ConfigDict, model: TrainedModel, signals: np.ndarray, class_names: list[str]
) -> ExportResult:
    signals = signals.astype(_dtype(model))
    export = _Export(
        best_model=Path(config.shared_params.output_dir) / "best_model",
        model=model,
        about=_about(model, class_names),
        signals=signals,
        expected=_flax_probabilities(model, signals),
    )
    formats = config.export_params.formats
    paths: dict[str, Path] = {}
    differences: dict[str, float] = {}
    reused = False
    with log.progress("Exporting", total=len(formats), unit="files") as bar:
        for name in formats:
            bar.note(name)
            if name == "keras":
                paths[name], differences[name], reused = _export_keras(export)
            else:
                paths[name], differences[name] = _EXPORTERS[name](export)
            bar.advance()
    files.write_json(
        export.best_model / "classifier" / "labels.json",
        {str(index): cap_name for index, cap_name in enumerate(class_names)},
    )
    log.table(
        f"Exported model (checked on {len(signals)} signals)",
        ("file", "MB", "largest |Δp|"),
        [
            (
                path.relative_to(export.best_model),
                f"{_size(path) / 1e6:.2f}",
                f"{differences[name]:.1e}",
            )
            for name, path in paths.items()
        ],
    )
    return ExportResult(paths, differences, paths.get("keras"), reused)


def _export_keras(export: _Export) -> tuple[Path, float, bool]:
    directory = export.best_model / "classifier"
    earlier = sorted(directory.glob("classifier_*.keras"))
    for path in earlier:
        if keras.read_about(path) == export.about:
            try:
                difference = export.difference(path, path, keras.run_keras)
            except StageFailedError:
                continue  # damaged since: written anew below
            logger.info("The model hasn't changed; %s is kept", path)
            return path, difference, True
    path = directory / f"classifier_{datetime.now():%Y%m%d_%H%M%S}.keras"
    difference = export.publish(
        files.atomic_path(path),
        path,
        lambda partial: keras.write_keras(export.trained_twin(), partial, export.about),
        keras.run_keras,
    )
    for old in earlier:
        if old != path:
            old.unlink()
            logger.info("Removed %s, the classifier of an earlier model", old)
    return path, difference, False


def _export_h5(export: _Export) -> tuple[Path, float]:
    path = export.best_model / "best_model_weights.weights.h5"
    difference = export.publish(
        files.atomic_path(path),
        path,
        lambda partial: keras.write_weights(export.trained_twin(), partial),
        lambda partial, signals: keras.run_weights(export.twin(), partial, signals),
    )
    return path, difference


def _export_saved_model(export: _Export) -> tuple[Path, float]:
    path, model = export.best_model / "saved_model", export.model
    difference = export.publish(
        files.atomic_directory(path),
        path,
        lambda partial: saved_model.write_saved_model(
            _probabilities(model), model.variables, partial, target_length=model.target_length
        ),
        saved_model.run_saved_model,
    )
    return path, difference


_EXPORTERS = {"h5": _export_h5, "saved_model": _export_saved_model}


def _probabilities(model: TrainedModel) -> Callable[[Any, Any], jax.Array]:
    """(variables, signal (B, T, 1)) -> probabilities (B, C) of the Flax model."""

    def probabilities(variables: Any, signal: Any) -> jax.Array:
        logits: Any = model.module.apply(variables, signal, train=False)
        return jax.nn.softmax(logits)

    return probabilities


def _flax_probabilities(model: TrainedModel, signals: np.ndarray) -> np.ndarray:
    predict = jax.jit(_probabilities(model))
    starts = range(0, len(signals), _BATCH)
    return np.concatenate(
        [np.asarray(predict(model.variables, signals[at : at + _BATCH])) for at in starts]
    )


def _dtype(model: TrainedModel) -> np.dtype[Any]:
    """The parameters' dtype: float32, or float64 for a float64 training."""
    return np.dtype(jax.tree.leaves(model.variables["params"])[0].dtype)


def _about(model: TrainedModel, class_names: list[str]) -> dict[str, Any]:
    """What a reader of the `.keras` file must know, and what tells one model from another."""
    about: dict[str, Any] = {
        "capfinder_version": version("capfinder"),
        "model_type": model.model_type,
        "hyperparameters": dataclasses.asdict(model.hyperparameters),
        "class_names": class_names,  # index in the output -> cap
        "preprocessing": {
            "signal": "current of the cap region, z-scored over the whole read, clipped to ±4",
            "target_length": model.target_length,
            "fitting": "centred zero padding or truncation; an odd sample goes to, or comes off, "
            "the right",
        },
        "weights_sha256": _weights_sha256(model.variables),
    }
    as_read_back: dict[str, Any] = json.loads(json.dumps(about))
    return as_read_back


def _weights_sha256(variables: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for path, value in sorted(flatten_dict(dict(variables)).items()):
        array = np.asarray(value)
        digest.update(f"{'/'.join(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _size(path: Path) -> int:
    members = path.rglob("*") if path.is_dir() else [path]
    return sum(member.stat().st_size for member in members if member.is_file())
