"""The Python of model_card.md, to be copied: how a signal is prepared, how each file is used.

Values are put in as ASCII literals, whatever they are."""

from collections.abc import Callable, Sequence

from capfinder.exporting.keras import PROBABILITIES, SIGNAL
from capfinder.exporting.saved_model import SIGNATURE

_PREPARE = """
import numpy as np

LENGTH = {length}  # samples
CAPS = {caps}


def scale(read):
    \"\"\"The current of a whole read in picoamperes -> z-scores, clipped to -4 ... 4.\"\"\"
    read = np.asarray(read, "float64")
    return np.clip((read - read.mean()) / read.std(), -4, 4)


def fit(signal):
    \"\"\"A scaled cap region of any length -> (LENGTH, 1), its middle in the middle.\"\"\"
    signal = np.asarray(signal, {dtype})
    cut = max(len(signal) - LENGTH, 0) // 2
    pad = max(LENGTH - len(signal), 0) // 2
    kept = signal[cut : cut + LENGTH]
    fitted = np.zeros((LENGTH, 1), {dtype})
    fitted[pad : pad + len(kept), 0] = kept
    return fitted


# Put your reads here: the current of each, and where in it the cap region begins and ends.
reads = [(np.random.default_rng(0).normal(80, 15, 9000), 8200, 8640)]
signals = np.stack([fit(scale(read)[start:end]) for read, start, end in reads])
"""
_NAME = "print([CAPS[number] for number in probabilities.argmax(axis=1)])"
_KERAS = """
import keras

model = keras.models.load_model({file}, compile=False)
probabilities = model.predict(signals, verbose=0)
{name}
"""
_SAVED_MODEL = """
import tensorflow as tf

loaded = tf.saved_model.load({file})
classify = loaded.signatures[{signature}]
probabilities = classify({signal}=tf.constant(signals))[{probabilities}].numpy()
{name}
"""
_ONNX = """
import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # else onnxruntime tells its makers which models it runs
import onnxruntime

session = onnxruntime.InferenceSession({file}, providers=["CPUExecutionProvider"])
(probabilities,) = session.run([{probabilities}], {{{signal_name}: signals.astype("float32")}})
{name}
"""
_WEIGHTS = """
import keras

model = keras.models.load_model({keras_file}, compile=False)
model.load_weights({weights_file})
"""


def prepare(*, length: int, dtype: str, names: Sequence[str]) -> str:
    """Reads to `signals` (n, length, 1) and CAPS, which the blocks below go on from."""
    lines = "".join(f"    {_literal(name)},\n" for name in names)
    return _PREPARE.format(length=length, dtype=_literal(dtype), caps=f"[\n{lines}]")


def use_keras(file: str) -> str:
    return _filled(_KERAS, file)


def use_saved_model(file: str) -> str:
    return _filled(_SAVED_MODEL, file)


def use_onnx(file: str) -> str:
    return _filled(_ONNX, file)


def load_weights(keras_file: str, weights_file: str) -> str:
    return _WEIGHTS.format(keras_file=_literal(keras_file), weights_file=_literal(weights_file))


# Format -> its heading, and the code that uses a file of it.
USE: dict[str, tuple[str, Callable[[str], str]]] = {
    "keras": ("Keras", use_keras),
    "saved_model": ("TensorFlow", use_saved_model),
    "onnx": ("ONNX Runtime", use_onnx),
}


def _filled(template: str, file: str) -> str:
    return template.format(
        file=_literal(file),
        name=_NAME,
        signal=SIGNAL,
        signal_name=_literal(SIGNAL),
        probabilities=_literal(PROBABILITIES),
        signature=_literal(SIGNATURE),
    )


def _literal(text: str) -> str:
    """In double quotes where Python's own repr has single ones and it is safe."""
    quoted = ascii(text)
    return f'"{quoted[1:-1]}"' if quoted[0] == "'" and '"' not in quoted else quoted
