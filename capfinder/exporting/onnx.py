"""The trained model as an ONNX file, written layer by layer from its Keras twin.

Each kind of Keras layer has a function that says it in ONNX's operators; one that an architecture
comes to need is one more function and its line in _LAYERS. LSTMs stay whole, so that a runtime has
its own, and no size is looked up at run time.

Why not a converter: jax2onnx can't be installed beside the Orbax that training needs. tf2onnx
takes TensorFlow as Keras's backend, in a process of its own; its encoder, which looks up sizes at
every step, takes 1.5 times as long; and it installs top-level packages called `tests` and `tools`.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from capfinder import libraries
from capfinder.exporting import batches
from capfinder.exporting.keras import PROBABILITIES, SIGNAL

OPSET = 17  # of ONNX 1.12 (2022), the first with layer normalisation
IR_VERSION = 8  # of the file, of the same release
_MASKED = -1e9  # a score that softmax makes 0, as in Keras
_ACTIVATIONS = {"linear": None, "relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid"}


def write_onnx(twin: Any, path: Path, about: Mapping[str, Any]) -> None:
    """`twin` with its weights as ONNX: signal (B, T, 1) -> probabilities (B, C), B free.

    It is float32 whatever the twin is: ONNX Runtime has neither convolutions nor LSTMs in float64.
    `about` becomes the file's metadata, all but text as JSON. Equal models give equal bytes.
    Raises: ValueError for a layer that has no counterpart here."""
    import onnx

    graph = _Graph()
    names = {id(twin.inputs[0]): SIGNAL}
    for layer in twin.layers:
        kind = type(layer).__name__
        if kind == "InputLayer":
            continue
        if kind not in _LAYERS:
            raise ValueError(f"{layer.name}: the Keras layer {kind} isn't known in ONNX")
        inputs = layer.input if isinstance(layer.input, list) else [layer.input]
        names[id(layer.output)] = _LAYERS[kind](graph, layer, [names[id(one)] for one in inputs])
    output = graph.add("Identity", names[id(twin.outputs[0])], name=PROBABILITIES)
    described = [
        onnx.helper.make_tensor_value_info(
            name, onnx.TensorProto.FLOAT, ["batch", *tensor.shape[1:]]
        )
        for name, tensor in ((SIGNAL, twin.inputs[0]), (output, twin.outputs[0]))
    ]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.nodes, twin.name, described[:1], described[1:], graph.constants
        ),
        producer_name="capfinder",
        producer_version=str(about.get("capfinder_version", "")),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    onnx.helper.set_model_props(model, metadata(about))
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def metadata(about: Mapping[str, Any]) -> dict[str, str]:
    """What the file says of the model, and its opset."""
    values = {**about, "opset": OPSET}
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in sorted(values.items())
    }


def run_onnx(path: Path, signals: np.ndarray) -> np.ndarray:
    """Probabilities (n, C) that ONNX Runtime gives `signals` (n, T, 1): the first of them alone,
    the rest in batches."""
    session = libraries.onnxruntime().InferenceSession(
        str(path), providers=["CPUExecutionProvider"]
    )
    together = batches.alone_then_together(signals.astype(np.float32))
    return np.concatenate([session.run([PROBABILITIES], {SIGNAL: batch})[0] for batch in together])


class _Graph:
    """Nodes and constants so far; each node is named like its output, after its Keras layer."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._count = 0

    def add(self, kind: str, *inputs: Any, name: str = "", skip: int = 0, **attributes: Any) -> str:
        """One operator; an input is a name or an array. Returns its output's name; with `skip`
        that of a later output, the earlier ones being left out."""
        from onnx import helper

        self._count += 1
        output = name or f"{kind.lower()}_{self._count}"
        given = [one if isinstance(one, str) else self._constant(one) for one in inputs]
        outputs = [""] * skip + [output]
        self.nodes.append(helper.make_node(kind, given, outputs, output, **attributes))
        return output

    def _constant(self, value: Any) -> str:
        from onnx import numpy_helper

        array = np.asarray(value)
        kept = array.astype(np.float32) if array.dtype.kind == "f" else array.astype(np.int64)
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(kept, order="C"), name))
        return name


def _weights(layer: Any) -> dict[str, np.ndarray]:
    """By Keras's names inside the layer, as "kernel" or "query/bias", in float64."""
    return {
        weight.path.split("/", 1)[1].removeprefix("lstm_cell/"): weight.numpy().astype(np.float64)
        for weight in layer.weights
    }


def _activated(graph: _Graph, x: str, layer: Any) -> str:
    name = layer.activation.__name__
    if name not in _ACTIVATIONS:
        raise ValueError(f"{layer.name}: the activation {name} isn't known in ONNX")
    kind = _ACTIVATIONS[name]
    return x if kind is None else graph.add(kind, x)


def _swapped(graph: _Graph, x: str) -> str:
    """(B, T, C) <-> (B, C, T), where Keras and ONNX look for channels; runtimes join such pairs."""
    return graph.add("Transpose", x, perm=(0, 2, 1))


def _pads(layer: Any, window: int, stride: int) -> list[int]:
    """Before and after, as TensorFlow's "same": the odd one comes after."""
    if layer.padding == "valid":
        return [0, 0]
    length = layer.input.shape[1]
    total = max((-(-length // stride) - 1) * stride + window - length, 0)
    return [total // 2, total - total // 2]


def _conv(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    weights, (window,), (stride,) = _weights(layer), layer.kernel_size, layer.strides
    given = [weights["kernel"].transpose(2, 1, 0), *([weights["bias"]] if layer.use_bias else [])]
    pads = _pads(layer, window, stride)
    y = graph.add("Conv", _swapped(graph, inputs[0]), *given, pads=pads, strides=[stride])
    return _swapped(graph, _activated(graph, y, layer))


def _max_pool(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    (window,), (stride,) = layer.pool_size, layer.strides
    pads = _pads(layer, window, stride)
    how: dict[str, Any] = {"kernel_shape": [window], "strides": [stride], "pads": pads}
    return _swapped(graph, graph.add("MaxPool", _swapped(graph, inputs[0]), **how))


def _batch_norm(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    w = _weights(layer)
    scale = w["gamma"] / np.sqrt(w["moving_variance"] + layer.epsilon)
    y = graph.add("Mul", inputs[0], scale)
    return graph.add("Add", y, w["beta"] - w["moving_mean"] * scale)


def _layer_norm(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    w = _weights(layer)
    norm = (inputs[0], w["gamma"], w["beta"])
    return graph.add("LayerNormalization", *norm, axis=-1, epsilon=layer.epsilon)


def _lstm(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    w, units = _weights(layer), layer.units

    def gates(weight: np.ndarray) -> np.ndarray:
        """(..., 4 H), Keras's input, forget, cell, output -> (4 H, ...), input, output, forget,
        cell."""
        i, f, c, o = np.split(weight, 4, axis=-1)
        return np.concatenate([i, o, f, c], axis=-1).T

    given = [gates(w["kernel"])[None], gates(w["recurrent_kernel"])[None]]
    bias = np.concatenate([gates(w["bias"]), np.zeros(4 * units)])[None]
    x = graph.add("Transpose", inputs[0], perm=(1, 0, 2))  # (T, B, C)
    if not layer.return_sequences:  # (1, B, H)
        return graph.add(
            "Squeeze", graph.add("LSTM", x, *given, bias, skip=1, hidden_size=units), [0]
        )
    y = graph.add("LSTM", x, *given, bias, hidden_size=units)  # (T, 1, B, H)
    return graph.add("Transpose", graph.add("Squeeze", y, [1]), perm=(1, 0, 2))


def _dense(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    w = _weights(layer)
    y = graph.add("Add", graph.add("MatMul", inputs[0], w["kernel"]), w["bias"])
    return _activated(graph, y, layer)


def _einsum_dense(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    if layer.equation != "btc,co->bto":
        raise ValueError(f"{layer.name}: the equation {layer.equation} isn't known in ONNX")
    return _dense(graph, layer, inputs)  # a bias for each position, or for all


def _attention(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    """query, value and, by position, a mask (B, 1, T): those above 0.5 are attended to."""
    query, value, *mask = inputs
    w, heads, size = _weights(layer), layer.num_heads, layer.key_dim

    def projected(x: str, name: str, perm: tuple[int, ...], scale: float = 1.0) -> str:
        """(B, T, C) -> (B, T, heads, size), its axes in the order of `perm`."""
        kernel, bias = w[f"{name}/kernel"] * scale, w[f"{name}/bias"] * scale
        y = graph.add("MatMul", x, kernel.reshape(len(kernel), -1))
        y = graph.add("Add", y, bias.reshape(-1))
        return graph.add("Transpose", graph.add("Reshape", y, [0, 0, heads, -1]), perm=perm)

    scores = graph.add(
        "MatMul",
        projected(query, "query", (0, 2, 1, 3), scale=size**-0.5),
        projected(value, "key", (0, 2, 3, 1)),
    )
    if mask:  # (B, 1, 1, T)
        attended = graph.add("Greater", graph.add("Unsqueeze", mask[0], [1]), np.array(0.5))
        scores = graph.add("Where", attended, scores, np.array(_MASKED))
    weights = graph.add("Softmax", scores, axis=-1)
    y = graph.add("MatMul", weights, projected(value, "value", (0, 2, 1, 3)))
    y = graph.add("Reshape", graph.add("Transpose", y, perm=(0, 2, 1, 3)), [0, 0, -1])
    kernel = w["attention_output/kernel"]
    y = graph.add("MatMul", y, kernel.reshape(-1, kernel.shape[-1]))
    return graph.add("Add", y, w["attention_output/bias"])


def _softmax(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    return graph.add("Softmax", inputs[0], axis=layer.axis)


def _relu(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    if layer.max_value is None:
        return graph.add("Relu", inputs[0])
    return graph.add("Clip", inputs[0], np.array(0.0), np.array(float(layer.max_value)))


def _rescaling(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    y = graph.add("Mul", inputs[0], np.array(float(layer.scale)))
    return graph.add("Add", y, np.array(float(layer.offset)))


def _add(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    return graph.add("Sum", *inputs)


def _dot(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    """(B, T, C), (B, T, D) -> (B, C, D)"""
    return graph.add("MatMul", _swapped(graph, inputs[0]), inputs[1])


def _flatten(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    return graph.add("Flatten", inputs[0], axis=1)


def _permute(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    return graph.add("Transpose", inputs[0], perm=(0, *layer.dims))


def _global_pool(kind: str) -> "_Writer":
    def write(graph: _Graph, layer: Any, inputs: list[str]) -> str:
        return graph.add(kind, inputs[0], axes=[1], keepdims=int(layer.keepdims))

    return write


def _cropping(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    left, right = layer.cropping
    stop = layer.input.shape[1] - right
    return graph.add("Slice", inputs[0], [left], [stop], [1])


def _padding(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    left, right = layer.padding
    return graph.add("Pad", inputs[0], [0, left, 0, 0, right, 0])


def _nothing(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    return inputs[0]


_Writer = Callable[[_Graph, Any, list[str]], str]  # (graph, layer, inputs' names) -> output's name
_LAYERS: dict[str, _Writer] = {
    "Add": _add,
    "BatchNormalization": _batch_norm,
    "Conv1D": _conv,
    "Cropping1D": _cropping,
    "Dense": _dense,
    "Dot": _dot,
    "Dropout": _nothing,
    "EinsumDense": _einsum_dense,
    "Flatten": _flatten,
    "GlobalAveragePooling1D": _global_pool("ReduceMean"),
    "GlobalMaxPooling1D": _global_pool("ReduceMax"),
    "LSTM": _lstm,
    "LayerNormalization": _layer_norm,
    "MaxPooling1D": _max_pool,
    "MultiHeadAttention": _attention,
    "Permute": _permute,
    "ReLU": _relu,
    "Rescaling": _rescaling,
    "Softmax": _softmax,
    "ZeroPadding1D": _padding,
}
