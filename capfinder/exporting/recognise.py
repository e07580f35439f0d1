"""Which of the architectures a Keras model is, with which hyperparameters and weights.

Each architecture reads its hyperparameters from the model's layers; its Keras twin of them is then
compared with the model, node by node. Nothing is guessed: what differs is an error that names the
layer. The pairs of nodes say which weight goes where."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from capfinder import models
from capfinder.allowed import shown
from capfinder.errors import SettingsError
from capfinder.exporting import keras, keras_graph
from capfinder.exporting.keras_graph import (
    ACTIVATION,
    EITHER_ORDER,
    SIGNAL,
    Graph,
    Node,
    UnlikeError,
)

_NEW_STEPS = "steps"  # BatchNorm's: at 0, fine-tuning averages over the new data alone


@dataclass(frozen=True)
class Recognised:
    """variables: {"params", "batch_stats"} in `dtype`, "float32" or "float64". remarks: what of
    the model has no place in the architecture, though it gives the same probabilities."""

    model_type: str
    hyperparameters: Any
    num_classes: int
    input_length: int  # samples that the Keras model takes
    target_length: int  # samples that the network sees
    dtype: str
    variables: dict[str, Any]
    remarks: list[str]


def recognise(model: Any, *, learning_rate: float | None) -> Recognised:
    """A Keras model, signal (B, T, 1) -> probabilities (B, C), as one of the architectures.

    learning_rate: the hyperparameter that no layer tells; None: not known.
    Raises: UnlikeError that names a layer, what was found and what is expected."""
    graph = keras_graph.of(model)
    num_classes = _num_classes(graph)
    failures = []
    for model_type in models.ARCHITECTURES:
        read = models.architecture(model_type).from_keras(graph.nodes)
        if read is None:
            continue
        try:
            hyperparameters, remarks = _hyperparameters(model_type, read, learning_rate)
            return _as_architecture(
                model_type,
                hyperparameters,
                graph,
                num_classes=num_classes,
                dtype=_dtype(model),
                remarks=remarks,
            )
        except UnlikeError as error:
            failures.append(str(error))
    if failures:
        raise UnlikeError("; ".join(failures))
    kinds = sorted({node.kind for node in graph.nodes} - {ACTIVATION, SIGNAL})
    raise UnlikeError(
        f"its layers ({', '.join(kinds)}) are those of none of the architectures, which are "
        f"{', '.join(models.ARCHITECTURES)}"
    )


def _dtype(model: Any) -> str:
    kinds = {str(np.dtype(weight.dtype)) for weight in model.weights if weight.dtype != "bfloat16"}
    return "float64" if "float64" in kinds else "float32"


def _as_architecture(
    model_type: str,
    hyperparameters: Any,
    graph: Graph,
    *,
    num_classes: int,
    dtype: str,
    remarks: list[str],
) -> Recognised:
    twin = keras.build_twin(
        model_type,
        hyperparameters,
        num_classes=num_classes,
        target_length=graph.target_length,
        dtype=dtype,
    )
    pairs = pair(keras_graph.of(twin).output, graph.output, model_type=model_type)
    module = models.architecture(model_type).build(
        hyperparameters, num_classes=num_classes, dtype=dtype
    )
    weights = _weights(twin, graph, pairs)
    return Recognised(
        model_type=model_type,
        hyperparameters=hyperparameters,
        num_classes=num_classes,
        input_length=graph.input_length,
        target_length=graph.target_length,
        dtype=dtype,
        variables=_variables(module, weights, target_length=graph.target_length, dtype=dtype),
        remarks=remarks + _precision_remarks(graph, dtype) + _training_remarks(pairs),
    )


def _hyperparameters(
    model_type: str, read: dict[str, Any], learning_rate: float | None
) -> tuple[Any, list[str]]:
    try:
        hyperparameters = models.parse_hyperparameters(model_type, read)
    except SettingsError as error:
        raise UnlikeError(f"as {model_type}: {error}") from None
    default = hyperparameters.learning_rate
    if learning_rate is None:
        return hyperparameters, [f"learning_rate isn't in the file: {default:g}, the default"]
    whole = read | {"learning_rate": learning_rate}
    try:
        return models.parse_hyperparameters(model_type, whole), []
    except SettingsError:
        return hyperparameters, [
            f"learning_rate={learning_rate:g} becomes {default:g}, the default"
        ]


def _num_classes(graph: Graph) -> int:
    """Of the last dense layer."""
    dense = [node for node in graph.nodes if node.kind == "Dense"]
    if not dense:
        raise UnlikeError("it has no Dense layer, whose units would be the classes")
    return int(dense[-1].settings["units"])


def pair(ours: Node, theirs: Node, *, model_type: str) -> dict[Node, Node]:
    """Each node that `ours` depends on, itself included, with its counterpart.

    Raises: UnlikeError for the first difference on the way from the output to the signal."""
    if ours.signature != theirs.signature:
        raise UnlikeError(_difference(ours, theirs, model_type))
    pairs: dict[Node, Node] = {}
    waiting = [(ours, theirs)]
    while waiting:
        one, other = waiting.pop()
        if one in pairs:
            if pairs[one] is not other:
                raise UnlikeError(
                    f"layers {pairs[one].layer} and {other.layer} are two; {model_type} has one "
                    "there, used twice"
                )
            continue
        pairs[one] = other
        waiting += zip(_ordered(one), _ordered(other), strict=True)
    if len(set(pairs.values())) < len(pairs):
        raise UnlikeError(f"it uses a layer twice where {model_type} has two")
    return pairs


def _ordered(node: Node) -> Sequence[Node]:
    if node.kind in EITHER_ORDER:
        return sorted(node.inputs, key=lambda before: before.signature)
    return node.inputs


def _difference(ours: Node, theirs: Node, model_type: str) -> str:
    while ours.kind == theirs.kind and ours.settings == theirs.settings:
        wanted, given = len(ours.inputs), len(theirs.inputs)
        if wanted != given:
            return f"layer {theirs.layer}: takes {given} inputs; {model_type} has {wanted} there"
        ours, theirs = _unequal_inputs(ours, theirs)
    if ours.kind != theirs.kind:
        return (
            f"layer {theirs.layer}: {_described(theirs)} where {model_type} has {_described(ours)}"
        )
    names = sorted(ours.settings.keys() | theirs.settings.keys())
    name = next(one for one in names if ours.settings.get(one) != theirs.settings.get(one))
    found, expected = (shown(node.settings.get(name)) for node in (theirs, ours))
    return f"layer {theirs.layer}: {name}={found}; {model_type} has {expected}"


def _unequal_inputs(ours: Node, theirs: Node) -> tuple[Node, Node]:
    """The first that differ; with inputs in either order, of those that have no equal, two of one
    kind if there are any."""
    if ours.kind not in EITHER_ORDER:
        both = zip(ours.inputs, theirs.inputs, strict=True)
        return next(two for two in both if two[0].signature != two[1].signature)
    there, here = ({node.signature for node in side.inputs} for side in (theirs, ours))
    lone = [node for node in ours.inputs if node.signature not in there] or list(ours.inputs)
    others = [node for node in theirs.inputs if node.signature not in here] or list(theirs.inputs)
    alike = [(one, other) for one in lone for other in others if one.kind == other.kind]
    return alike[0] if alike else (lone[0], others[0])


def _described(node: Node) -> str:
    if node.kind == SIGNAL:
        return "the signal"
    if node.kind == ACTIVATION:
        return f"the activation {node.settings['activation']}"
    return node.kind


def _precision_remarks(graph: Graph, dtype: str) -> list[str]:
    types = {getattr(one, "compute_dtype", dtype) for one in graph.operations.values()}
    return [f"it computes in {other}, the import in {dtype}" for other in sorted(types - {dtype})]


def _training_remarks(pairs: Mapping[Node, Node]) -> list[str]:
    """What only training would notice: dropout elsewhere than in the architecture."""
    remarks = []
    for ours, theirs in reversed(list(pairs.items())):
        if ours.dropout != theirs.dropout:
            remarks.append(
                f"dropout after layer {theirs.layer} becomes {ours.dropout:g} (was "
                f"{theirs.dropout:g})"
            )
        remarks += [
            f"layer {theirs.layer}: {name}={rate:g} is left out"
            for name, rate in theirs.inner_dropouts.items()
        ]
    return remarks


def _weights(twin: Any, graph: Graph, pairs: Mapping[Node, Node]) -> dict[str, np.ndarray]:
    """The model's weights under the names that ours have in Flax, levels joined by "_"."""
    found = {}
    for ours, theirs in pairs.items():
        if ours.kind in (SIGNAL, ACTIVATION):
            continue
        taken = getattr(graph.operations[theirs.layer], "weights", [])
        for weight, value in zip(twin.get_layer(ours.layer).weights, taken, strict=True):
            if tuple(weight.shape) != tuple(value.shape):
                raise UnlikeError(
                    f"layer {theirs.layer}: {value.path} has the shape {tuple(value.shape)}; "
                    f"expected {tuple(weight.shape)}"
                )
            found[keras.flax_name(weight.path)] = np.asarray(value).astype(str(weight.dtype))
    return found


def _variables(
    module: Any, weights: dict[str, np.ndarray], *, target_length: int, dtype: str
) -> dict[str, Any]:
    """The weights as the module's {"params", "batch_stats"}, each used exactly once."""
    signal = jax.ShapeDtypeStruct((1, target_length, 1), dtype)
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros_like(signal), train=False)
    )
    tree = {}
    for path, shape in flatten_dict(dict(shapes)).items():
        if path[-1] == _NEW_STEPS:
            tree[path] = jnp.zeros(shape.shape, shape.dtype)
        else:
            tree[path] = jnp.asarray(weights.pop("_".join(path[1:])))
            assert tree[path].shape == shape.shape, path
    assert not weights, f"no parameter takes {', '.join(weights)}"
    return {"params": {}, "batch_stats": {}} | unflatten_dict(tree)
