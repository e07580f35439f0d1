"""The trained model as an ONNX file, written layer by layer from its Keras twin.

Each kind of Keras layer has a function that says it in ONNX's operators; one that an architecture
comes to need is one more function and its line in _LAYERS. LSTMs stay whole, so that a runtime has
its own, and no size is looked up at run time. What isn't written is refused by name, never left
out: a layer, an option of one, or an argument that it is called with.

Why not a converter: jax2onnx can't be installed beside the Orbax that training needs. tf2onnx
takes TensorFlow as Keras's backend, in a process of its own; its encoder, which looks up sizes at
every step, takes 1.5 times as long; and it installs top-level packages called `tests` and `tools`.
"""

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from capfinder import libraries
from capfinder.errors import StageFailedError
from capfinder.exporting import batches, compat
from capfinder.exporting.keras import PROBABILITIES, SIGNAL

OPSET = 17  # of ONNX 1.12 (2022), the first with layer normalisation
IR_VERSION = 8  # of the file, of the same release
_MASKED = -1e9  # a score that softmax makes 0, as in Keras
_ONLY = {  # option -> the one value that is written, whichever layer has it
    "attention_axes": (1,),
    "data_format": "channels_last",
    "lora_rank": None,
    "mask_zero": False,
    "normalize": False,
    "return_state": False,
    "rms_scaling": False,
    "stateful": False,
}
_ARGUMENTS = {"MultiHeadAttention": ("query", "value", "key", "attention_mask")}  # else the first
_T = TypeVar("_T")


def write_onnx(twin: Any, path: Path, about: Mapping[str, Any]) -> None:
    """`twin` with its weights as ONNX: signal (B, T, 1) -> probabilities (B, C), B free.

    It is float32 whatever the twin is: ONNX Runtime has neither convolutions nor LSTMs in float64.
    `about` becomes the file's metadata, all but text as JSON. Equal models give equal bytes.
    Raises: StageFailedError for what has no counterpart here."""
    import onnx

    graph = _Graph()
    graph.gives(twin.inputs[0], SIGNAL)
    for layer in twin.operations:  # its layers, and what isn't one, each after its inputs
        kind = _kind(layer)
        if kind != "InputLayer":
            _check_options(layer, kind)
            graph.gives(layer.output, _LAYERS[kind](graph, layer, graph.inputs(layer, kind)))
    output = graph.add("Identity", graph.names[id(twin.outputs[0])], name=PROBABILITIES)
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
        self.names: dict[int, str] = {}  # by the id of Keras's tensor
        self.shapes: dict[str, tuple[int, ...]] = {}  # of those by name, the batch being None
        self._count = 0

    def gives(self, tensor: Any, name: str) -> None:
        """Keras's tensor has that name here."""
        self.names[id(tensor)], self.shapes[name] = name, tensor.shape

    def inputs(self, layer: Any, kind: str) -> list[str]:
        """Names of what the layer is called with; "" for an argument that is left out."""
        for tensor in (given := _arguments(layer, kind)):
            if tensor is not None and id(tensor) not in self.names:
                _refuse(layer, "takes something other than the signal or what a layer gives")
        return ["" if tensor is None else self.names[id(tensor)] for tensor in given]

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


def _refuse(layer: Any, what: str) -> NoReturn:
    raise StageFailedError(
        f"ONNX: the layer {layer.name} {what}, which isn't written (capfinder/exporting/onnx.py is "
        "where it would be added)"
    )


def _kind(layer: Any) -> str:
    """The name of its class; only Keras's own are known, not another of the same name."""
    kind = type(layer)
    if getattr(libraries.keras().layers, kind.__name__, None) is not kind:
        _refuse(layer, f"is a {kind.__module__}.{kind.__name__}")
    if kind.__name__ not in (*_LAYERS, "InputLayer"):
        _refuse(layer, f"is a {kind.__name__}")
    return str(kind.__name__)


def _check_options(layer: Any, kind: str) -> None:
    """What Keras 3.4 lacks isn't known here either, so that it has to be as if it weren't there."""
    old = compat.keys_known_to_3_4(kind)
    parameters = inspect.signature(type(layer).__init__).parameters
    defaults = {name: one.default for name, one in parameters.items() if name not in old} | _ONLY
    for name, value in layer.get_config().items():
        if name in defaults and value != defaults[name]:
            _refuse(layer, f"has {name}={value!r}")


def _arguments(layer: Any, kind: str) -> list[Any]:
    """The tensors that it is called with, in the order of _ARGUMENTS."""
    first, *more_calls = layer._inbound_nodes
    if more_calls:
        _refuse(layer, "is called more than once")
    call = inspect.signature(layer.call).bind(*first.arguments.args, **first.arguments.kwargs)
    given = call.arguments
    known = _ARGUMENTS.get(kind, tuple(given)[:1])
    for name, value in given.items():
        if name not in known and value is not None and value is not False:
            _refuse(layer, f"is called with {name}")
    tensors = given[known[0]]
    return [given.get(one) for one in known] if hasattr(tensors, "shape") else list(tensors)


def _weights(layer: Any) -> dict[str, np.ndarray]:
    """By Keras's names inside the layer, as "kernel" or "query/bias", in float64."""
    return {
        weight.path.split("/", 1)[1].removeprefix("lstm_cell/"): weight.numpy().astype(np.float64)
        for weight in layer.weights
    }


def _chosen(layer: Any, option: str, known: Mapping[str, _T]) -> _T:
    """What `known` has for one of Keras's activations."""
    function = getattr(layer, option)
    name = getattr(function, "__name__", type(function).__name__)
    if name not in known or getattr(libraries.keras().activations, name, None) is not function:
        _refuse(layer, f"has {option}={name!r}")
    return known[name]


def _activated(graph: _Graph, x: str, layer: Any, *, channels: int = -1) -> str:
    return _chosen(layer, "activation", _ACTIVATIONS)(graph, x, channels)


def _elementwise(kind: str, **attributes: Any) -> "_Activation":
    return lambda graph, x, channels: graph.add(kind, x, **attributes)


def _gelu(graph: _Graph, x: str, channels: int) -> str:
    erf = graph.add("Erf", graph.add("Mul", x, np.array(0.5**0.5)))
    half = graph.add("Mul", x, np.array(0.5))
    return graph.add("Mul", half, graph.add("Add", erf, np.array(1.0)))


_Activation = Callable[[_Graph, str, int], str]  # (graph, x, its axis of channels) -> output's name
_ACTIVATIONS: dict[str, _Activation] = {
    "elu": _elementwise("Elu"),
    "exponential": _elementwise("Exp"),
    "gelu": _gelu,
    "hard_sigmoid": _elementwise("HardSigmoid", alpha=1 / 6, beta=0.5),
    "leaky_relu": _elementwise("LeakyRelu", alpha=0.2),
    "linear": lambda graph, x, channels: x,
    "relu": _elementwise("Relu"),
    "selu": _elementwise("Selu"),
    "sigmoid": _elementwise("Sigmoid"),
    "silu": lambda graph, x, channels: graph.add("Mul", x, graph.add("Sigmoid", x)),
    "softmax": lambda graph, x, channels: graph.add("Softmax", x, axis=channels),
    "softplus": _elementwise("Softplus"),
    "softsign": _elementwise("Softsign"),
    "tanh": _elementwise("Tanh"),
}
_IN_LSTM = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}


def _swapped(graph: _Graph, x: str) -> str:
    """(B, T, C) <-> (B, C, T), where Keras and ONNX look for channels; runtimes join such pairs."""
    return graph.add("Transpose", x, perm=(0, 2, 1))


def _along(vector: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """(C,) in a shape that is broadcast along the other axes."""
    return vector.reshape(-1, *[1] * (rank - 1 - axis % rank))


def _biased(graph: _Graph, y: str, bias: np.ndarray | None) -> str:
    return y if bias is None else graph.add("Add", y, bias)


def _pads(layer: Any, length: int, window: int, stride: int) -> list[int]:
    """Before and after; of TensorFlow's "same" the odd one comes after."""
    padding = layer.padding.lower()
    if padding == "valid":
        return [0, 0]
    if padding == "causal":
        return [window - 1, 0]
    total = max((-(-length // stride) - 1) * stride + window - length, 0)
    return [total // 2, total - total // 2]


def _conv(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    w, (stride,), (dilation,) = _weights(layer), layer.strides, layer.dilation_rate
    given = [w["kernel"].transpose(2, 1, 0), *([w["bias"]] if layer.use_bias else [])]
    window = (layer.kernel_size[0] - 1) * dilation + 1
    how: dict[str, Any] = {
        "pads": _pads(layer, graph.shapes[inputs[0]][1], window, stride),
        "strides": [stride],
        "dilations": [dilation],
        "group": layer.groups,
    }
    y = graph.add("Conv", _swapped(graph, inputs[0]), *given, **how)
    return _swapped(graph, _activated(graph, y, layer, channels=1))


def _pool(kind: str) -> "_Writer":
    def write(graph: _Graph, layer: Any, inputs: list[str]) -> str:
        (window,), (stride,) = layer.pool_size, layer.strides
        pads = _pads(layer, graph.shapes[inputs[0]][1], window, stride)
        how: dict[str, Any] = {"kernel_shape": [window], "strides": [stride], "pads": pads}
        return _swapped(graph, graph.add(kind, _swapped(graph, inputs[0]), **how))

    return write


def _batch_norm(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    w, rank = _weights(layer), len(graph.shapes[inputs[0]])
    scale = w.get("gamma", 1.0) / np.sqrt(w["moving_variance"] + layer.epsilon)
    shift = w.get("beta", 0.0) - w["moving_mean"] * scale
    y = graph.add("Mul", inputs[0], _along(scale, layer.axis, rank))
    return graph.add("Add", y, _along(shift, layer.axis, rank))


def _layer_norm(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    w, shape = _weights(layer), graph.shapes[inputs[0]]
    axes = sorted(axis % len(shape) for axis in layer.axis)
    sizes = [shape[axis] for axis in axes]
    order = [*(axis for axis in range(len(shape)) if axis not in axes), *axes]
    moved = order != sorted(order)  # to the end, where ONNX wants them
    x = graph.add("Transpose", inputs[0], perm=order) if moved else inputs[0]
    norm = [x, w.get("gamma", np.ones(sizes)).reshape(sizes)]
    if layer.center:
        norm.append(w["beta"].reshape(sizes))
    y = graph.add("LayerNormalization", *norm, axis=-len(axes), epsilon=layer.epsilon)
    return graph.add("Transpose", y, perm=np.argsort(order)) if moved else y


def _lstm(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    w, units = _weights(layer), layer.units
    inner = _chosen(layer, "activation", _IN_LSTM)
    how: dict[str, Any] = {
        "hidden_size": units,
        "activations": [_chosen(layer, "recurrent_activation", _IN_LSTM), inner, inner],
    }

    def gates(weight: np.ndarray) -> np.ndarray:
        """(..., 4 H), Keras's input, forget, cell, output -> (4 H, ...), input, output, forget,
        cell."""
        i, f, c, o = np.split(weight, 4, axis=-1)
        return np.concatenate([i, o, f, c], axis=-1).T

    given = [gates(w["kernel"])[None], gates(w["recurrent_kernel"])[None]]
    bias = gates(w.get("bias", np.zeros(4 * units)))
    given.append(np.concatenate([bias, np.zeros(4 * units)])[None])
    x = graph.add("Transpose", inputs[0], perm=(1, 0, 2))  # (T, B, C)
    if layer.go_backwards:  # Keras leaves what comes out in that order
        x = graph.add("Slice", x, [-1], [-1 - graph.shapes[inputs[0]][1]], [0], [-1])
    if not layer.return_sequences:  # (1, B, H)
        return graph.add("Squeeze", graph.add("LSTM", x, *given, skip=1, **how), [0])
    y = graph.add("LSTM", x, *given, **how)  # (T, 1, B, H)
    return graph.add("Transpose", graph.add("Squeeze", y, [1]), perm=(1, 0, 2))


def _dense(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    w = _weights(layer)
    y = _biased(graph, graph.add("MatMul", inputs[0], w["kernel"]), w.get("bias"))
    return _activated(graph, y, layer)


def _einsum_dense(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    if layer.equation == "btc,co->bto":  # a product of matrices runs faster
        return _dense(graph, layer, inputs)  # a bias for each position, or for all
    w = _weights(layer)
    y = graph.add("Einsum", inputs[0], w["kernel"], equation=layer.equation)
    return _activated(graph, _biased(graph, y, w.get("bias")), layer)


def _embedding(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    from onnx import TensorProto

    whole = graph.add("Cast", inputs[0], to=TensorProto.INT64)
    return graph.add("Gather", _weights(layer)["embeddings"], whole, axis=0)


def _attention(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    """query, value, key and a mask (B, 1 or T, T): those that aren't 0 are attended to."""
    from onnx import TensorProto

    query, value, key, mask = inputs
    w, heads, size = _weights(layer), layer.num_heads, layer.key_dim
    if (rank := len(layer.output.shape)) != 3:
        _refuse(layer, f"gives {rank} axes")
    if mask and (rank := len(graph.shapes[mask])) != 3:
        _refuse(layer, f"has an attention_mask of {rank} axes")

    def projected(x: str, name: str, perm: tuple[int, ...], scale: float = 1.0) -> str:
        """(B, T, C) -> (B, T, heads, size), its axes in the order of `perm`."""
        kernel, bias = w[f"{name}/kernel"] * scale, w.get(f"{name}/bias")
        y = graph.add("MatMul", x, kernel.reshape(len(kernel), -1))
        y = _biased(graph, y, None if bias is None else bias.reshape(-1) * scale)
        return graph.add("Transpose", graph.add("Reshape", y, [0, 0, heads, -1]), perm=perm)

    scores = graph.add(
        "MatMul",
        projected(query, "query", (0, 2, 1, 3), scale=size**-0.5),
        projected(key or value, "key", (0, 2, 3, 1)),
    )
    if mask:  # (B, 1, 1 or T, T)
        attended = graph.add("Cast", graph.add("Unsqueeze", mask, [1]), to=TensorProto.BOOL)
        scores = graph.add("Where", attended, scores, np.array(_MASKED))
    weights = graph.add("Softmax", scores, axis=-1)
    y = graph.add("MatMul", weights, projected(value, "value", (0, 2, 1, 3)))
    y = graph.add("Reshape", graph.add("Transpose", y, perm=(0, 2, 1, 3)), [0, 0, -1])
    kernel = w["attention_output/kernel"]
    y = graph.add("MatMul", y, kernel.reshape(-1, kernel.shape[-1]))
    return _biased(graph, y, w.get("attention_output/bias"))


def _softmax(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    if isinstance(layer.axis, int):
        return graph.add("Softmax", inputs[0], axis=layer.axis)
    total = graph.add("ReduceLogSumExp", inputs[0], axes=list(layer.axis), keepdims=1)
    return graph.add("Exp", graph.add("Sub", inputs[0], total))


def _relu(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    (x,), threshold, most = inputs, float(layer.threshold), layer.max_value
    y = graph.add("ThresholdedRelu", x, alpha=threshold) if threshold else x
    if most is not None:
        y = graph.add("Clip", y, np.array(0.0), np.array(float(most)))
    elif not threshold:
        y = graph.add("Relu", y)
    if not layer.negative_slope:
        return y
    below = graph.add("Relu", graph.add("Sub", np.array(threshold), x))
    return graph.add("Sub", y, graph.add("Mul", below, np.array(float(layer.negative_slope))))


def _rescaling(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    y = graph.add("Mul", inputs[0], np.asarray(layer.scale, float))
    return graph.add("Add", y, np.asarray(layer.offset, float))


def _merge(kind: str) -> "_Writer":
    def write(graph: _Graph, layer: Any, inputs: list[str]) -> str:
        """Those of fewer axes get the missing ones after the batch's."""
        missing = [len(layer.output.shape) - len(graph.shapes[name]) for name in inputs]
        alike = [
            graph.add("Unsqueeze", name, list(range(1, 1 + count))) if count else name
            for name, count in zip(inputs, missing, strict=True)
        ]
        return functools.reduce(functools.partial(graph.add, kind), alike)

    return write


def _concatenate(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    return graph.add("Concat", *inputs, axis=layer.axis)


def _dot(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    """(B, T, C), (B, T, D) -> (B, C, D), or along other axes; one of them may be (B, T)."""
    ranks = [len(graph.shapes[name]) for name in inputs]
    if max(ranks) > 3:
        _refuse(layer, f"takes {ranks[0]} and {ranks[1]} axes")
    axes = [layer.axes] * 2 if isinstance(layer.axes, int) else layer.axes

    def matrix(index: int, place: int) -> str:
        """(B, ., .), with what is summed over at `place`."""
        if ranks[index] == 2:
            return graph.add("Unsqueeze", inputs[index], [3 - place])
        return inputs[index] if axes[index] % 3 == place else _swapped(graph, inputs[index])

    y = graph.add("MatMul", matrix(0, 2), matrix(1, 1))
    return graph.add("Reshape", y, [0, *layer.output.shape[1:]]) if 2 in ranks else y


def _flatten(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    return graph.add("Flatten", inputs[0], axis=1)


def _reshape(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    return graph.add("Reshape", inputs[0], [0, *layer.output.shape[1:]])


def _repeat(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    return graph.add("Tile", graph.add("Unsqueeze", inputs[0], [1]), [1, layer.n, 1])


def _permute(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    return graph.add("Transpose", inputs[0], perm=(0, *layer.dims))


def _global_pool(kind: str) -> "_Writer":
    def write(graph: _Graph, layer: Any, inputs: list[str]) -> str:
        return graph.add(kind, inputs[0], axes=[1], keepdims=int(layer.keepdims))

    return write


def _cropping(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    left, right = layer.cropping
    stop = graph.shapes[inputs[0]][1] - right
    return graph.add("Slice", inputs[0], [left], [stop], [1])


def _padding(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    left, right = layer.padding
    return graph.add("Pad", inputs[0], [0, left, 0, 0, right, 0])


def _nothing(graph: _Graph, layer: Any, inputs: list[str]) -> str:
    return inputs[0]


_Writer = Callable[[_Graph, Any, list[str]], str]  # (graph, layer, inputs' names) -> output's name
_LAYERS: dict[str, _Writer] = {
    "Activation": lambda graph, layer, inputs: _activated(graph, inputs[0], layer),
    "Add": _merge("Add"),
    "AveragePooling1D": _pool("AveragePool"),  # which doesn't count padded samples, as Keras
    "BatchNormalization": _batch_norm,
    "Concatenate": _concatenate,
    "Conv1D": _conv,
    "Cropping1D": _cropping,
    "Dense": _dense,
    "Dot": _dot,
    "Dropout": _nothing,
    "EinsumDense": _einsum_dense,
    "Embedding": _embedding,
    "Flatten": _flatten,
    "GlobalAveragePooling1D": _global_pool("ReduceMean"),
    "GlobalMaxPooling1D": _global_pool("ReduceMax"),
    "LSTM": _lstm,
    "LayerNormalization": _layer_norm,
    "MaxPooling1D": _pool("MaxPool"),
    "MultiHeadAttention": _attention,
    "Multiply": _merge("Mul"),
    "Permute": _permute,
    "ReLU": _relu,
    "RepeatVector": _repeat,
    "Rescaling": _rescaling,
    "Reshape": _reshape,
    "Softmax": _softmax,
    "Subtract": _merge("Sub"),
    "ZeroPadding1D": _padding,
}
