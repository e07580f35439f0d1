"""A fresh process that loads exported files as their users do:
python -m capfinder.exporting.reload KIND ...

It loads what files of these kinds need. Asked on its standard input (`write_request`), it answers
on its standard output, file by file, in the order asked for; `fresh_process` is who asks. It knows
of the model only what lies in the files, and for weights alone which network takes them. Nothing is
pickled, and it writes no file. When its standard input ends, so does it: whoever asked is gone."""

import dataclasses
import io
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Job:
    """kind: as in export_params.formats. network: as Keras's `to_json` tells it, which only weights
    alone need."""

    kind: str
    path: Path
    network: str = ""


@dataclasses.dataclass(frozen=True)
class Answer:
    """probabilities: (n, C), or None and why not. reader: what loaded the file, its version too."""

    probabilities: np.ndarray | None
    error: str
    reader: str


def write_request(stream: IO[bytes], jobs: Sequence[Job], signals: np.ndarray) -> None:
    asked = [{**dataclasses.asdict(job), "path": str(job.path)} for job in jobs]
    _write(stream, {"jobs": asked}, signals)


def read_answer(stream: IO[bytes]) -> Answer | None:
    """None when the other process has ended."""
    found = _read(stream)
    if found is None:
        return None
    values, probabilities = found
    return Answer(probabilities, values["error"], values["reader"])


def _write(stream: IO[bytes], values: dict[str, Any], array: np.ndarray | None) -> None:
    packed = io.BytesIO()
    if array is not None:
        np.save(packed, array, allow_pickle=False)
    stream.write(json.dumps({**values, "bytes": packed.tell()}).encode() + b"\n")
    stream.write(packed.getbuffer())
    stream.flush()


def _read(stream: IO[bytes]) -> tuple[dict[str, Any], np.ndarray | None] | None:
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    values = json.loads(line)
    content = stream.read(values["bytes"])
    if len(content) < values["bytes"]:
        return None
    return values, np.load(io.BytesIO(content), allow_pickle=False) if content else None


# Of Keras: not the one that the files were made on, and quicker, as on JAX it compiles the first
# value of each weight, 5 to 10 s for a file.
BACKEND = "tensorflow"


# What no reader of the files needs; where it is, TensorFlow and Keras load it, which takes a third
# of their time. Without JAX it also shows that the files need none.
UNNEEDED = ("jax", "matplotlib", "sklearn")


def load(kinds: Sequence[str]) -> None:
    """The libraries that read files of these kinds, if they are slow to load."""
    for name in UNNEEDED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # which makes it an ImportError
    if any("tensorflow" in READERS[kind][0] for kind in kinds):
        from capfinder import libraries

        libraries.keras(BACKEND)  # and with it TensorFlow, which alone would load it on another


def _keras(job: Job, signals: np.ndarray) -> np.ndarray:
    from capfinder.exporting import keras

    return keras.run_keras(job.path, signals)


def _h5(job: Job, signals: np.ndarray) -> np.ndarray:
    from capfinder import libraries
    from capfinder.exporting import keras

    network = libraries.keras(BACKEND).models.model_from_json(job.network)
    return keras.run_weights(network, job.path, signals)


def _saved_model(job: Job, signals: np.ndarray) -> np.ndarray:
    from capfinder.exporting import saved_model

    return saved_model.run_saved_model(job.path, signals)


def _onnx(job: Job, signals: np.ndarray) -> np.ndarray:
    from capfinder.exporting import onnx

    return onnx.run_onnx(job.path, signals)


READERS: dict[str, tuple[tuple[str, ...], Callable[[Job, np.ndarray], np.ndarray]]] = {
    "keras": (("keras", "tensorflow"), _keras),
    "h5": (("keras", "tensorflow"), _h5),
    "saved_model": (("tensorflow",), _saved_model),
    "onnx": (("onnxruntime",), _onnx),
}


def _answer(job: Job, signals: np.ndarray) -> tuple[dict[str, str], np.ndarray | None]:
    packages, run = READERS[job.kind]
    try:
        probabilities = run(job, signals)
    except Exception as error:  # whatever a loader raises, the file is unusable
        said = next(iter(str(error).strip().splitlines()), "")
        return {"error": f"{type(error).__name__}: {said}", "reader": ""}, None
    versions = (f"{name} {sys.modules[name].__version__}" for name in packages)
    return {"error": "", "reader": " on ".join(versions)}, probabilities


def _end_with_who_asks(requests: IO[bytes]) -> None:
    requests.read()
    os._exit(1)


def main() -> None:
    """Answers one request."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    requests = sys.stdin.buffer
    load(sys.argv[1:])
    found = _read(requests)
    if found is None or found[1] is None:
        os._exit(1)  # nobody asks any more
    threading.Thread(target=_end_with_who_asks, args=(requests,), daemon=True).start()
    jobs = [Job(job["kind"], Path(job["path"]), job["network"]) for job in found[0]["jobs"]]
    signals = found[1]
    for job in jobs:
        _write(answers, *_answer(job, signals))
    os._exit(0)  # the answers are given: no library is to take its time over ending


if __name__ == "__main__":
    main()
