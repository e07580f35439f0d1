"""Whether what a record says of a model can be: the record, and the weights, may be anybody's."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from capfinder import models
from capfinder.allowed import is_text
from capfinder.stages.assembly import TrainedModel


def class_names(value: Any, num_classes: int) -> list[str]:
    """The names of so many classes; any text will do for one, as in the user's own mapping.

    Raises: ValueError when `value` holds something else."""
    is_list = isinstance(value, list) and len(value) == num_classes
    if not is_list or not all(isinstance(n, str) and n.strip() and is_text(n) for n in value):
        raise ValueError(f"class_names isn't a list of {num_classes} names, one for each class")
    return list(value)


def hyperparameters(config: ConfigDict, values: Any) -> Any:
    """Those of the model that `config` tells of.

    Raises: ValueError when `values` are none; SettingsError when they can't be."""
    if not isinstance(values, Mapping):
        raise ValueError("hyperparameters aren't a JSON object")
    shared = config.shared_params
    return models.parse_hyperparameters(
        shared.model_type, values, target_length=shared.target_length
    )


def check_weights(model: TrainedModel) -> None:
    """Raises: ValueError when the weights aren't those of such a model."""
    expected, found = _expected(model.module, model.target_length), _kinds(model.variables)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"its weights are of another model ({name} is {found.get(name, 'missing')}, "
                f"expected {expected.get(name, 'nothing of that name')})"
            )


@functools.cache
def _expected(module: nn.Module, target_length: int) -> dict[str, str]:
    """Kept, as it takes a tenth of a second or two."""
    signal = jax.ShapeDtypeStruct((1, target_length, 1), np.float32)
    return _kinds(jax.eval_shape(lambda s: module.init(jax.random.key(0), s, train=False), signal))


def _kinds(variables: Any) -> dict[str, str]:
    """The shape of each weight, and whether it is of real numbers."""
    return {
        "/".join(path): f"{leaf.shape}{_kind(leaf.dtype)}"
        for path, leaf in flatten_dict(dict(variables)).items()
    }


def _kind(dtype: Any) -> str:
    return "" if jnp.issubdtype(dtype, jnp.floating) else f" of {dtype}"
