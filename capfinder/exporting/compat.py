"""Model configurations that Keras 3.4 reads: no class it lacks, no key it hasn't heard of.

Keras refuses a configuration with an unknown key, and each release adds some. Seen: a file from
3.15 fails in 3.4 and 3.5 for `input_axes`, which 3.15 gives every initialiser, although nobody
set it. Newer releases fill in whatever is left out, so the oldest vocabulary is read by all.
"""

from collections.abc import Callable
from typing import Any

# What get_config of Keras 3.4.1 returns, class by class; layers also have _ON_EVERY_LAYER. A class
# that an architecture comes to need is added here, from a look at that release.
_CONVOLUTION = (
    "filters kernel_size strides padding data_format dilation_rate groups activation use_bias "
    "kernel_initializer bias_initializer kernel_regularizer bias_regularizer "
    "activity_regularizer kernel_constraint bias_constraint"
)
_DENSE = (
    "activation use_bias kernel_initializer bias_initializer kernel_regularizer bias_regularizer "
    "kernel_constraint bias_constraint"
)
_LSTM = (
    "return_sequences return_state go_backwards stateful unroll zero_output_for_mask units "
    "activation recurrent_activation use_bias kernel_initializer recurrent_initializer "
    "bias_initializer unit_forget_bias kernel_regularizer recurrent_regularizer bias_regularizer "
    "activity_regularizer kernel_constraint recurrent_constraint bias_constraint dropout "
    "recurrent_dropout seed"
)
_NORM = (
    "axis epsilon center scale beta_initializer gamma_initializer beta_regularizer "
    "gamma_regularizer beta_constraint gamma_constraint"
)
_POOLING = "pool_size padding strides data_format"
_ON_EVERY_LAYER = {"name", "trainable", "dtype"}
LAYERS_3_4 = {
    "Activation": "activation",
    "Add": "",
    "AveragePooling1D": _POOLING,
    "BatchNormalization": f"{_NORM} momentum moving_mean_initializer moving_variance_initializer "
    "synchronized",
    "Concatenate": "axis",
    "Conv1D": _CONVOLUTION,
    "Cropping1D": "cropping",
    "Dense": f"units {_DENSE}",
    "Dot": "axes normalize",
    "Dropout": "rate seed noise_shape",
    "EinsumDense": "output_shape equation bias_axes activation kernel_initializer "
    "bias_initializer kernel_regularizer bias_regularizer activity_regularizer kernel_constraint "
    "bias_constraint",
    "Embedding": "input_dim output_dim embeddings_initializer embeddings_regularizer "
    "activity_regularizer embeddings_constraint mask_zero",
    "Flatten": "data_format",
    "GlobalAveragePooling1D": "data_format keepdims",
    "GlobalMaxPooling1D": "data_format keepdims",
    "InputLayer": "batch_shape sparse",
    "LSTM": _LSTM,
    "LayerNormalization": f"{_NORM} rms_scaling",
    "MaxPooling1D": _POOLING,
    "MultiHeadAttention": "num_heads key_dim value_dim dropout use_bias output_shape "
    "attention_axes kernel_initializer bias_initializer kernel_regularizer bias_regularizer "
    "activity_regularizer kernel_constraint bias_constraint seed",
    "Multiply": "",
    "Permute": "dims",
    "ReLU": "max_value negative_slope threshold",
    "RepeatVector": "n",
    "Rescaling": "scale offset",
    "Reshape": "target_shape",
    "Softmax": "axis",
    "Subtract": "",
    "ZeroPadding1D": "padding",
}
OTHERS_3_4 = {
    "DTypePolicy": "name",
    "GlorotNormal": "seed",
    "GlorotUniform": "seed",
    "HeNormal": "seed",
    "HeUniform": "seed",
    "LecunNormal": "seed",
    "Ones": "",
    "Orthogonal": "gain seed",
    "OrthogonalInitializer": "gain seed",
    "RandomNormal": "mean stddev seed",
    "RandomUniform": "minval maxval seed",
    "TruncatedNormal": "mean stddev seed",
    "VarianceScaling": "scale mode distribution seed",
    "Zeros": "",
}
# Not objects of their own: the model, whose keys are its layers, and references between layers.
_STRUCTURE = {"Functional", "__keras_tensor__"}


def keys_known_to_3_4(class_name: str) -> set[str]:
    """Raises: ValueError for a class that isn't in the tables above."""
    if class_name in LAYERS_3_4:
        return _ON_EVERY_LAYER | set(LAYERS_3_4[class_name].split())
    if class_name in OTHERS_3_4:
        return set(OTHERS_3_4[class_name].split())
    raise ValueError(
        f"Keras class {class_name!r} is not known to be in Keras 3.4; build the twin without it, "
        "or add it to capfinder/exporting/compat.py after a look at that release"
    )


def unknown_keys(node: Any) -> list[str]:
    """'Class.key' for each key in a serialised model that Keras 3.4 doesn't know; best: none."""
    found = []
    for child in _children(node):
        found += unknown_keys(child)
    if _is_object(node):
        extra = set(node["config"]) - keys_known_to_3_4(node["class_name"])
        found += [f"{node['class_name']}.{key}" for key in sorted(extra)]
    return found


def for_3_4(node: Any, defaults: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """The serialised model without the keys that Keras 3.4 doesn't know.

    `defaults(object without those keys)` gives the configuration that today's Keras makes of it;
    a key is dropped only when its value comes back so, which means that dropping it says the same.
    Raises: ValueError when one has another value: the model needs something Keras 3.4 lacks."""
    if isinstance(node, list):
        return [for_3_4(child, defaults) for child in node]
    if not isinstance(node, dict):
        return node
    if _is_object(node):
        known = keys_known_to_3_4(node["class_name"])
        kept = {key: value for key, value in node["config"].items() if key in known}
        dropped = {key: value for key, value in node["config"].items() if key not in known}
        if dropped:
            filled_in = defaults({**node, "config": kept})
            for key, value in dropped.items():
                if filled_in.get(key) != value:
                    raise ValueError(
                        f"{node['class_name']}.{key}={value!r} can't be said to Keras 3.4"
                    )
        node = {**node, "config": kept}
    return {key: for_3_4(value, defaults) for key, value in node.items()}


def number_shared_objects(node: Any, numbers: dict[int, int] | None = None) -> Any:
    """The same, with `shared_object_id`, a memory address, replaced by 0, 1, ... in file order."""
    numbers = {} if numbers is None else numbers
    if isinstance(node, list):
        return [number_shared_objects(child, numbers) for child in node]
    if not isinstance(node, dict):
        return node
    return {
        key: numbers.setdefault(value, len(numbers))
        if key == "shared_object_id"
        else number_shared_objects(value, numbers)
        for key, value in node.items()
    }


def _is_object(node: Any) -> bool:
    return (
        isinstance(node, dict)
        and isinstance(node.get("config"), dict)
        and node.get("class_name") not in _STRUCTURE
        and "class_name" in node
    )


def _children(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []
