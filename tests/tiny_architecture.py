"""An architecture that compiles in a moment: dense layers alone. For tests of the trainings."""

import dataclasses
from typing import Any

import jax
from flax import linen as nn

from capfinder.models import search
from capfinder.models.hyperparameters import hyperparameter, learning_rate


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    units: tuple[int, ...] = hyperparameter((8,), low=1, high=64, per="layer", meaning="units")
    dropout: float = hyperparameter(0.1, low=0, high=0.95, meaning="share dropped at the end")
    learning_rate: float = learning_rate(1e-2)


class Tiny(nn.Module):
    hyperparameters: Hyperparameters
    num_classes: int

    @nn.compact
    def __call__(self, signal: jax.Array, *, train: bool) -> jax.Array:
        x = signal[..., 0]
        for width in self.hyperparameters.units:
            x = nn.relu(nn.Dense(width)(x))
        x = nn.Dropout(self.hyperparameters.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes)(x)


def build(hyperparameters: Hyperparameters, *, num_classes: int, dtype: Any) -> nn.Module:
    return Tiny(hyperparameters, num_classes)


def keras_twin(hyperparameters: Hyperparameters, *, num_classes: int, layers: Any) -> Any:
    def twin(signal: Any) -> Any:
        x = layers.Flatten()(signal)
        for layer, width in enumerate(hyperparameters.units):
            x = layers.Dense(width, activation="relu", name=f"Dense_{layer}")(x)
        return layers.Dense(num_classes, name=f"Dense_{len(hyperparameters.units)}")(x)

    return twin


def from_keras(layers: Any) -> None:
    """Any other network might have these layers."""


def minimum_length(hyperparameters: Hyperparameters) -> int:
    return 1


def search_space(trial: Any, *, target_length: int) -> Hyperparameters:
    depth = trial.suggest_int("layers", 1, 2)
    return Hyperparameters(
        units=tuple(trial.suggest_int(f"units_{i}", 4, 16, step=4) for i in range(depth)),
        dropout=search.suggest_dropout(trial, "dropout", 0.1),
        learning_rate=trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True),
    )


def trial_parameters(hyperparameters: Hyperparameters) -> dict[str, Any]:
    return search.flatten(dataclasses.asdict(hyperparameters), {"layers": "units"})
