"""ResNet: stages of residual convolutions, each at half the time resolution of the one before.

Source: He et al. 2015, for time series Wang et al. 2017."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from capfinder.models import search
from capfinder.models.chunks import in_chunks
from capfinder.models.hyperparameters import hyperparameter, learning_rate
from capfinder.models.layers import (
    BatchNorm,
    Conv,
    classifier_head,
    freeze,
    keras_classifier_head,
    max_pool_same,
    precision,
)


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """Tuples have one value per stage."""

    stem_filters: int = hyperparameter(32, low=1, high=4096, meaning="filters of the first layer")
    stem_kernel: int = hyperparameter(7, low=1, high=999, meaning="samples the first layer sees")
    stage_filters: tuple[int, ...] = hyperparameter(
        (64, 128), low=1, high=4096, per="stage", meaning="filters in each stage"
    )
    stage_kernels: tuple[int, ...] = hyperparameter(
        (5, 5), low=1, high=999, per="stage", meaning="positions each convolution sees"
    )
    stage_blocks: tuple[int, ...] = hyperparameter(
        (2, 2), low=1, high=64, per="stage", meaning="residual blocks in each stage"
    )
    dense_units: int = hyperparameter(64, low=1, high=4096, meaning="units of the dense layer")
    dense_dropout: float = hyperparameter(0.2, low=0, high=0.95, meaning="share dropped after it")
    learning_rate: float = learning_rate(2e-4)  # from 3e-4 on the running averages lag


class ResNet(nn.Module):
    """signal: (B, T, 1) z-scored current -> logits: (B, num_classes), no softmax."""

    hyperparameters: Hyperparameters
    num_classes: int
    dtype: Any
    frozen_trunk: bool = False

    @nn.compact
    def __call__(self, signal: jax.Array, *, train: bool) -> jax.Array:
        h, trains = self.hyperparameters, train and not self.frozen_trunk

        def conv_norm(x: jax.Array, filters: int, kernel: int, stride: int, name: str) -> jax.Array:
            # The norm subtracts the mean, so a bias before it would do nothing.
            x = Conv(filters, kernel, stride, use_bias=False, name=name, **precision(self.dtype))(x)
            return BatchNorm(not trains, name=f"{name}_norm", **precision(self.dtype))(x)

        def blocks(x: jax.Array) -> jax.Array:
            x = nn.relu(conv_norm(x, h.stem_filters, h.stem_kernel, 1, "stem"))
            x = max_pool_same(x, window=3, stride=2)  # T halves
            for name, filters, kernel, stride in _blocks(h):
                shortcut = x
                if stride > 1 or x.shape[-1] != filters:
                    shortcut = conv_norm(x, filters, 1, stride, f"{name}_shortcut")
                x = nn.relu(conv_norm(x, filters, kernel, stride, f"{name}_conv_0"))
                x = conv_norm(x, filters, kernel, 1, f"{name}_conv_1")
                x = nn.relu(x + shortcut)
            return x.mean(axis=1)  # (B, filters)

        x = in_chunks(self, blocks, signal.astype(self.dtype), train=trains, times=2)
        return classifier_head(
            freeze(x, self.frozen_trunk),
            (h.dense_units,),
            h.dense_dropout,
            num_classes=self.num_classes,
            train=train,
            dtype=self.dtype,
        )


def _blocks(h: Hyperparameters) -> list[tuple[str, int, int, int]]:
    """Name, filters, kernel and stride of every residual block, in order."""
    blocks = []
    stages = zip(h.stage_filters, h.stage_kernels, h.stage_blocks, strict=True)
    for stage, (filters, kernel, count) in enumerate(stages):
        for block in range(count):
            stride = 2 if stage > 0 and block == 0 else 1
            blocks.append((f"stage_{stage}_block_{block}", filters, kernel, stride))
    return blocks


def build(
    hyperparameters: Hyperparameters, *, num_classes: int, dtype: Any, frozen_trunk: bool = False
) -> nn.Module:
    """The module that computes in `dtype`, with float32 parameters (float64 for float64)."""
    return ResNet(hyperparameters, num_classes, jnp.dtype(dtype), frozen_trunk)


def minimum_length(hyperparameters: Hyperparameters) -> int:
    """The shortest signal, in samples, that the model takes: padding makes up for any."""
    return 1


def search_space(trial: Any, *, target_length: int) -> Hyperparameters:
    """Draws every hyperparameter. The widest of these models take hours an epoch on a CPU:
    search_params narrows the space."""
    stages = range(trial.suggest_int("stages", 2, 4))
    return Hyperparameters(
        stem_filters=trial.suggest_int("stem_filters", 32, 128, step=32),
        stem_kernel=trial.suggest_categorical("stem_kernel", search.KERNELS),
        stage_filters=tuple(
            trial.suggest_int(f"stage_filters_{i}", 64, 256, step=64) for i in stages
        ),
        stage_kernels=tuple(
            trial.suggest_categorical(f"stage_kernels_{i}", search.KERNELS) for i in stages
        ),
        stage_blocks=tuple(trial.suggest_int(f"stage_blocks_{i}", 2, 4) for i in stages),
        dense_units=trial.suggest_int("dense_units", 32, 256, step=32),
        dense_dropout=search.suggest_dropout(trial, "dense_dropout", 0.0),
        learning_rate=trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
    )


def trial_parameters(hyperparameters: Hyperparameters) -> dict[str, Any]:
    """The trial's parameters that give these hyperparameters in `search_space`."""
    return search.flatten(dataclasses.asdict(hyperparameters), {"stages": "stage_filters"})


def keras_twin(
    hyperparameters: Hyperparameters, *, num_classes: int, layers: Any
) -> Callable[[Any], Any]:
    """The same network in Keras's own layers: signal (B, T, 1) -> logits (B, num_classes)."""
    h = hyperparameters

    def conv_norm(x: Any, filters: int, kernel: int, stride: int, name: str) -> Any:
        # Keras 3.4 to 3.8 on PyTorch takes the wrong samples for "same" with a kernel of 1 that
        # strides; it needs no padding.
        padding = "same" if kernel > 1 else "valid"
        x = layers.Conv1D(
            filters, kernel, strides=stride, padding=padding, use_bias=False, name=name
        )(x)
        return layers.BatchNormalization(epsilon=BatchNorm.epsilon, name=f"{name}_norm")(x)

    def twin(signal: Any) -> Any:
        x = layers.ReLU()(conv_norm(signal, h.stem_filters, h.stem_kernel, 1, "stem"))
        x = layers.MaxPooling1D(3, strides=2, padding="same")(x)
        for name, filters, kernel, stride in _blocks(h):
            shortcut = x
            if stride > 1 or x.shape[-1] != filters:
                shortcut = conv_norm(x, filters, 1, stride, f"{name}_shortcut")
            x = layers.ReLU()(conv_norm(x, filters, kernel, stride, f"{name}_conv_0"))
            x = conv_norm(x, filters, kernel, 1, f"{name}_conv_1")
            x = layers.ReLU()(layers.Add()([x, shortcut]))
        x = layers.GlobalAveragePooling1D()(x)
        return keras_classifier_head(
            x, (h.dense_units,), h.dense_dropout, num_classes=num_classes, layers=layers
        )

    return twin


def from_keras(layers: Sequence[Any]) -> dict[str, Any] | None:
    """The inverse, as far as layers tell: hyperparameters of a model that is made of these."""
    kinds = ("Conv1D", "Add", "Dense")
    convs, sums, dense = ([one for one in layers if one.kind == kind] for kind in kinds)
    others = {one.kind for one in layers} & {"LSTM", "EinsumDense", "MultiHeadAttention"}
    if not (convs and sums) or others:
        return None

    def convolutions(layer: Any) -> list[Any]:
        """Back from a sum to where its branch left off, the last one first."""
        found = []
        while layer.inputs and layer.kind not in ("Add", "MaxPooling1D"):
            if layer.kind == "Conv1D":
                found.append(layer)
            layer = layer.inputs[0]
        return found

    stages: list[list[Any]] = []  # of the last convolution of each block
    for one in sums:
        longest = max(map(convolutions, one.inputs), key=len)
        if not longest:
            return None
        if not stages or longest[-1].settings["strides"] != [1]:
            stages.append([])
        stages[-1].append(longest[0])
    return {
        "stem_filters": convs[0].settings["filters"],
        "stem_kernel": convs[0].settings["kernel_size"][0],
        "stage_filters": [blocks[0].settings["filters"] for blocks in stages],
        "stage_kernels": [blocks[0].settings["kernel_size"][0] for blocks in stages],
        "stage_blocks": [len(blocks) for blocks in stages],
        "dense_units": dense[0].settings["units"],
        "dense_dropout": dense[0].dropout,
    }
