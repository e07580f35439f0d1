"""The network that a Keras model computes, in one form for all the ways of writing it down.

Models within models are dissolved. Whatever does nothing when a signal is scored, such as dropout,
is taken out (its rate is remembered); an activation is a node of its own, whether it was an
argument or a layer. Equal networks then have nodes of equal signature."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from capfinder import files
from capfinder.exporting import fitting
from capfinder.exporting.keras_archive import MODELS

SIGNAL, ACTIVATION = "Signal", "Activation"
EITHER_ORDER = {"Add"}  # of their inputs
# What changes nothing in what a trained layer computes.
_NO_MATTER = {
    "name",
    "trainable",
    "dtype",
    "seed",
    "momentum",
    "synchronized",
    "renorm_clipping",
    "renorm_momentum",
    "unit_forget_bias",
    "unroll",
}
_NO_MATTER_ENDS = ("_initializer", "_regularizer", "_constraint")
_DROPOUTS = ("dropout", "recurrent_dropout")  # of layers that have their own
_PLAIN_RELU = {"max_value": None, "negative_slope": 0.0, "threshold": 0.0}
_FITS = {"Cropping1D": ("cropping", -1), "ZeroPadding1D": ("padding", 1)}
_CALL_ARGUMENTS = {"MultiHeadAttention": ("query", "value", "key")}


class UnlikeError(ValueError):
    """Says of a layer what keeps the model from being one of ours."""


@dataclass(eq=False)
class Node:
    """A layer, or a part of one, that takes the `inputs`.

    kind: Keras's class, ACTIVATION or SIGNAL. layer: its name, after those of the models that it
    is in ("trunk/lstm"). dropout: the share dropped after it, or after the activation that follows;
    inner_dropouts: shares dropped within it."""

    kind: str
    layer: str
    settings: dict[str, Any]
    inputs: tuple["Node", ...]
    dropout: float = 0.0
    inner_dropouts: dict[str, float] = field(default_factory=dict)
    signature: str = ""

    def __post_init__(self) -> None:
        before = [node.signature for node in self.inputs]
        if self.kind in EITHER_ORDER:
            before.sort()
        self.signature = files.fingerprint([self.kind, self.settings, before])


@dataclass(frozen=True)
class Graph:
    """nodes: each after its inputs. operations: Keras's layers by their `Node.layer`."""

    nodes: list[Node]
    output: Node
    input_length: int  # samples
    target_length: int  # samples, after what cuts or pads the signal
    operations: dict[str, Any]


def of(model: Any) -> Graph:
    """The graph of a Keras model: signal (B, T, 1) -> anything.

    Raises: UnlikeError for a model that takes something else, or uses layers more than once."""
    length = _input_length(model)
    signal = Node(SIGNAL, "input", {"length": length}, ())
    builder = _Builder(dict(_operations(model, "")), signal)
    output = builder.model(json.loads(model.to_json()), [signal], "")
    nodes = _reachable(output)
    roots = [node for node in nodes if node.kind == SIGNAL]
    if len(roots) != 1:
        raise UnlikeError("its layers don't all take the same signal")
    return Graph(nodes, output, length, roots[0].settings["length"], builder.operations)


def _input_length(model: Any) -> int:
    try:
        shapes = [tuple(tensor.shape) for tensor in model.inputs]
    except (AttributeError, TypeError, ValueError):  # never built
        raise UnlikeError("it doesn't say what shape its input has") from None
    if len(shapes) != 1:
        raise UnlikeError(f"it takes {len(shapes)} inputs; expected one, (reads, samples, 1)")
    match shapes[0]:
        case (_, int(length), 1):
            return length
    shape = ", ".join("any" if size is None else str(size) for size in shapes[0][1:])
    raise UnlikeError(
        f"its input has the shape (reads, {shape}); expected (reads, samples, 1) with a fixed "
        "number of samples"
    )


def _operations(model: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Layers, and what isn't a layer, by their path."""
    is_functional = type(model).__name__ != "Sequential"
    for operation in model.operations if is_functional else model.layers:
        yield prefix + operation.name, operation
        if type(operation).__name__ in MODELS:
            yield from _operations(operation, f"{prefix}{operation.name}/")


def _reachable(output: Node) -> list[Node]:
    """What the output depends on, each after its inputs."""
    found: dict[Node, None] = {}
    waiting = [output]
    while waiting:
        node = waiting[-1]
        missing = [before for before in node.inputs if before not in found]
        if missing:
            waiting += missing
        else:
            found.setdefault(waiting.pop())
    return list(found)


class _Builder:
    """Goes through a model's configuration as Keras wrote it."""

    def __init__(self, operations: dict[str, Any], signal: Node) -> None:
        self.operations = operations
        self._signal = signal
        self._used: set[str] = set()  # layers with weights, and models

    def model(self, description: dict[str, Any], inputs: list[Node], prefix: str) -> Node:
        config = description["config"]
        if description["class_name"] == "Sequential":
            found = inputs[0]
            for layer in config["layers"]:
                if layer["class_name"] != "InputLayer":
                    found = self._call(layer, {"inputs": [found]}, {}, prefix)
            return found
        return self._functional(config, inputs, prefix)

    def _functional(self, config: dict[str, Any], inputs: list[Node], prefix: str) -> Node:
        values: dict[tuple[str, int], Node] = {}
        for (name, index, _), node in zip(_ends(config["input_layers"]), inputs, strict=True):
            values[name, index] = node
        models = {one["name"] for one in config["layers"] if one["class_name"] in MODELS}

        def key(tensor: dict[str, Any]) -> tuple[str, int]:
            name, index, _ = tensor["config"]["keras_history"]
            return name, 0 if name in models else index  # a model is called once

        calls = [
            (layer, index, *_arguments(layer["class_name"], call))
            for layer in config["layers"]
            for index, call in enumerate(layer["inbound_nodes"])
        ]
        while calls:
            later = []
            for layer, index, tensors, others in calls:
                wanted = {name: list(map(key, given)) for name, given in tensors.items()}
                if any(one not in values for given in wanted.values() for one in given):
                    later.append((layer, index, tensors, others))
                    continue
                taken = {name: [values[one] for one in given] for name, given in wanted.items()}
                values[layer["name"], index] = self._call(layer, taken, others, prefix)
            assert len(later) < len(calls), "Keras has loaded a network that goes in a circle"
            calls = later
        outputs = _ends(config["output_layers"])
        if len(outputs) != 1:
            raise UnlikeError(f"it gives {len(outputs)} outputs; expected one, the probabilities")
        name, index, _ = outputs[0]
        return values[name, 0 if name in models else index]

    def _call(
        self,
        layer: dict[str, Any],
        tensors: dict[str, list[Node]],
        others: dict[str, Any],
        prefix: str,
    ) -> Node:
        kind, config = layer["class_name"], layer["config"]
        path = prefix + config["name"]
        inputs = [node for given in tensors.values() for node in given]
        self._mark_used(path, kind)
        if kind in MODELS:
            if others or len(tensors) != 1:
                extra = ", ".join([*others, *list(tensors)[1:]])
                raise UnlikeError(f"layer {path}: is called with {extra}, besides the signal")
            return self.model(layer, inputs, f"{path}/")
        if kind == "Dropout" and not others:
            _drop(inputs[0], config["rate"])
            return inputs[0]
        if kind == "Identity":
            return inputs[0]
        if kind in _FITS and inputs[0] is self._signal:  # after another it is more than a crop
            return self._fitted(path, kind, config)
        if kind == ACTIVATION:
            return self._activated(config["activation"], path, inputs[0])
        settings = self._settings(path, config) | others
        if kind == "ReLU" and settings == _PLAIN_RELU:
            return self._activated("relu", path, inputs[0])
        if kind == "Softmax":
            return Node(ACTIVATION, path, {"activation": "softmax", **settings}, tuple(inputs))
        if kind == "MultiHeadAttention":
            settings["takes"] = sorted(tensors)
        activation = None if kind == "LSTM" else settings.pop("activation", None)
        found = Node(kind, path, settings, tuple(inputs))
        found.inner_dropouts = {name: config[name] for name in _DROPOUTS if config.get(name)}
        return self._activated(activation, path, found)

    def _mark_used(self, path: str, kind: str) -> None:
        has_weights = bool(getattr(self.operations.get(path), "weights", None))
        if has_weights or kind in MODELS:
            if path in self._used:
                raise UnlikeError(
                    f"layer {path}: is used more than once; no architecture shares weights"
                )
            self._used.add(path)

    def _activated(self, activation: Any, path: str, before: Node) -> Node:
        if activation in (None, "linear"):
            return before
        settings = {"activation": activation}
        if activation == "softmax":
            settings["axis"] = self._rank(path) - 1
        return Node(ACTIVATION, path, settings, (before,))

    def _settings(self, path: str, config: dict[str, Any]) -> dict[str, Any]:
        """Those that change what the layer computes; axes counted from the front."""
        kept = {
            name: value
            for name, value in config.items()
            if name not in _NO_MATTER
            and name not in _DROPOUTS
            and not name.endswith(_NO_MATTER_ENDS)
        }
        axis = kept.get("axis")
        if isinstance(axis, int):
            kept["axis"] = axis % self._rank(path)
        elif isinstance(axis, list):
            kept["axis"] = [one % self._rank(path) for one in axis]
        return kept

    def _rank(self, path: str) -> int:
        return len(self.operations[path].output.shape)

    def _fitted(self, path: str, kind: str, config: dict[str, Any]) -> Node:
        """The signal after a crop or zeros at its ends."""
        name, sign = _FITS[kind]
        ends = config[name]
        before = self._signal.settings["length"]
        length = before + sign * sum(ends)
        centred = [abs(samples) for samples in fitting.margins(before, length)]
        if ends != centred:
            raise UnlikeError(f"layer {path}: {name}={ends}; expected {centred}, centred")
        return Node(SIGNAL, path, {"length": length}, ())


def _arguments(
    kind: str, call: dict[str, Any]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """Tensors by the name of their argument, and what else was given, but for None and False."""
    names = _CALL_ARGUMENTS.get(kind, ())
    given = dict(call["kwargs"])
    for index, value in enumerate(call["args"]):
        given[names[index] if index < len(names) else f"argument {index}"] = value
    tensors = {name: found for name, value in given.items() if (found := list(_tensors(value)))}
    others = {
        name: value
        for name, value in given.items()
        if name not in tensors and value is not None and value is not False
    }
    if kind == "MultiHeadAttention":
        tensors.setdefault("key", tensors.get("value", []))
        first = {name: tensors.pop(name) for name in names}
        tensors = {**first, **dict(sorted(tensors.items()))}
    return tensors, others


def _tensors(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, list):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict) and value.get("class_name") == "__keras_tensor__":
        yield value


def _ends(value: list[Any]) -> list[list[Any]]:
    """[name, index, index], or a list of such -> a list of such."""
    return [value] if value and isinstance(value[0], str) else value


def _drop(after: Node, rate: float) -> None:
    """Dropout before an activation drops the same as one after it."""
    while after.kind == ACTIVATION:
        after = after.inputs[0]
    after.dropout = 1 - (1 - after.dropout) * (1 - rate) if after.dropout else rate
