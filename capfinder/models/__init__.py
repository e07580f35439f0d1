"""The registry of architectures. One line here makes a model known to settings, tuning and export.

An architecture is a module with these names (`cnn_lstm.py` is the one to copy):

- `Hyperparameters`: frozen dataclass of numbers and tuples of numbers, each a `hyperparameter` with
  a good default, its range and its meaning, `learning_rate` among them
- `build(hyperparameters, *, num_classes, dtype, frozen_trunk)`: the Flax module; signal (B, T, 1)
  -> logits; with a frozen trunk all before the head works as when scoring, also in training
- `minimum_length(hyperparameters)`: the shortest signal, in samples, that the module takes
- `search_space(trial, *, target_length)`: draws hyperparameters from a trial
- `trial_parameters(hyperparameters)`: the inverse, so that a study can start from known values
- `keras_twin(hyperparameters, *, num_classes, layers)`: the same network in Keras layers, each
  layer with weights named like its Flax module path joined by "_"
- `from_keras(layers)`: the inverse: hyperparameters, as in JSON and but for learning_rate, of a
  Keras model with these layers (`exporting.keras_graph.Node`, each after its inputs, one `Dense`
  at least), or None for layers of another kind; whether it really is that network is found out by
  comparing it with its twin
"""

import importlib
from collections.abc import Mapping
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from capfinder.errors import SettingsError

# Names as strings, so that settings and --help read this without importing JAX.
ARCHITECTURES = {
    "cnn_lstm": "capfinder.models.cnn_lstm",
    "attention_cnn_lstm": "capfinder.models.attention_cnn_lstm",
    "encoder": "capfinder.models.encoder",
    "resnet": "capfinder.models.resnet",
}

NAMES = (  # of an architecture's module
    "Hyperparameters",
    "build",
    "minimum_length",
    "search_space",
    "trial_parameters",
    "keras_twin",
    "from_keras",
)


def architecture(model_type: str) -> ModuleType:
    """The module behind a name of ARCHITECTURES.

    Raises: SettingsError for an unknown name, and for a module that lacks one of NAMES."""
    if model_type not in ARCHITECTURES:
        near = get_close_matches(model_type, ARCHITECTURES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SettingsError(
            f"shared_params.model_type: {model_type!r} is not one of "
            f"{', '.join(ARCHITECTURES)}{hint}"
        )
    module = importlib.import_module(ARCHITECTURES[model_type])
    if lacking := [name for name in NAMES if not hasattr(module, name)]:
        raise SettingsError(
            f"{module.__name__}: has no {', '.join(lacking)}, which every architecture needs; "
            f"{__name__} says what they are"
        )
    return module


def parse_hyperparameters(
    model_type: str, overrides: Mapping[str, Any], *, target_length: int | None = None
) -> Any:
    """The architecture's defaults with `overrides` (as in JSON: lists for tuples) put over them.

    With `target_length` it is also checked that signals of that length pass through the model.
    Raises: SettingsError that names the key, the value, what is allowed and the nearest key."""
    from capfinder.models import hyperparameters

    module = architecture(model_type)
    parsed = hyperparameters.parse(module.Hyperparameters, overrides, model_type=model_type)
    shortest = module.minimum_length(parsed)
    if target_length is not None and target_length < shortest:
        raise SettingsError(
            f"shared_params.target_length: {target_length} samples are too few for {model_type} "
            f"with these model_params, which need {shortest} or more (each convolution halves "
            f"the length). Use fewer convolutions or a larger target_length."
        )
    return parsed
