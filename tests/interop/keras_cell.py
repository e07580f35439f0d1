"""Run by a Python that has Keras and none of Capfinder: opens each model of a directory as anyone
would, and compares its probabilities with those that lie beside it.

python -P keras_cell.py --models D --report F --names N ...
The report is JSON: versions, and of each model its largest differences or, in a line, its fault."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BATCH = 128


def main() -> int:
    given = _parsed()
    if importlib.util.find_spec("capfinder") is not None:
        print("error: capfinder can be imported here, so nothing would be shown", file=sys.stderr)
        return 1
    found = report(given.models, given.names, say=lambda text: print(text, flush=True))
    given.report.write_text(json.dumps(found))
    return 0


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Opens models in this Keras")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--names", nargs="+", required=True)
    return parser.parse_args()


def report(directory: Path, names: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """{"versions": ..., "models": {name: what `opened` returns, or {"fault": a line}}}"""
    models: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            models[name] = opened(directory, name)
        except Exception as error:  # a reader's refusal, of whatever class, is a finding
            models[name] = {"fault": _line(error)}
        say(f"    {name}: {_shown(models[name])}")
    return {"versions": _versions(), "models": models}


def _versions() -> dict[str, str]:
    import keras

    backend = keras.config.backend()
    library = {"tensorflow": "tensorflow_cpu"}.get(backend, backend)
    try:
        of_backend = importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        of_backend = importlib.metadata.version(backend)
    return {
        "python": platform.python_version(),
        "keras": keras.__version__,
        "backend": backend,
        backend: of_backend,
        "numpy": importlib.metadata.version("numpy"),
    }


def opened(directory: Path, name: str) -> dict[str, Any]:
    """The largest differences, {"keras": of the archive, "h5": of the weights file}.

    Raises: ValueError for a model that says something else of itself than it should."""
    import keras
    import numpy as np

    with np.load(directory / f"{name}.npz", allow_pickle=False) as arrays:
        signals, expected = arrays["signals"], arrays["expected"]
        class_names = arrays["class_names"].tolist()
    archive = directory / f"{name}.keras"
    model = keras.saving.load_model(archive, safe_mode=True, compile=False)
    _same("input shape", tuple(model.input_shape), (None, *signals.shape[1:]))
    _same("output shape", tuple(model.output_shape), (None, expected.shape[1]))
    _same("class names", _class_names(archive), class_names)
    differences = {"keras": _difference(model, signals, expected)}
    model.set_weights([np.zeros_like(weight) for weight in model.get_weights()])
    if not _difference(model, signals[:BATCH], expected[:BATCH]) > 0.01:
        raise ValueError("a model without weights would pass for the trained one")
    model.load_weights(directory / f"{name}.weights.h5")
    differences["h5"] = _difference(model, signals, expected)
    return differences


def _same(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ValueError(f"{what} {found}, not {expected}")


def _class_names(archive: Path) -> Any:
    with zipfile.ZipFile(archive) as opened:
        return json.loads(opened.read("metadata.json"))["capfinder"]["class_names"]


def _difference(model: Any, signals: Any, expected: Any) -> float:
    """Raises: ValueError for probabilities of another shape, or that are no numbers."""
    import numpy as np

    found = np.asarray(model.predict(signals, batch_size=BATCH, verbose=0))
    _same("shape of the probabilities", found.shape, expected.shape)
    if not np.isfinite(found).all():
        raise ValueError("some probabilities are no numbers")
    return float(np.abs(found - expected).max())


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _shown(found: dict[str, Any]) -> str:
    return found.get("fault") or ", ".join(f"{kind} {value:.1e}" for kind, value in found.items())


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.exit(main())
