"""Transformer encoder: strided convolutions make the signal into tokens that attend to each other.

Padding is left out: a token is padding when every sample in its window is exactly 0, in the Flax
module and in its Keras twin alike. Source: Vaswani et al. 2017, pre-norm: Xiong et al. 2020."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from capfinder.models import initial, search
from capfinder.models.hyperparameters import hyperparameter, learning_rate
from capfinder.models.layers import (
    Conv,
    Dense,
    Dropout,
    PositionDense,
    classifier_head,
    freeze,
    keras_classifier_head,
    param_dtype,
    precision,
    weighted_average,
)

STEM = ((7, 2), (5, 2), (5, 2))  # kernel and stride of each convolution: a token every 8 samples
NORM_EPSILON = 1e-5
PADDING_SCORE = -1e9  # its softmax is exactly 0 beside a score of 0


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """Small enough to train on a CPU."""

    d_model: int = hyperparameter(64, low=2, high=4096, meaning="channels of a token")
    num_heads: int = hyperparameter(4, low=1, high=64, meaning="attention heads in a block")
    head_size: int = hyperparameter(16, low=1, high=1024, meaning="channels of an attention head")
    num_blocks: int = hyperparameter(3, low=1, high=64, meaning="attention and feed-forward pairs")
    feed_forward_units: int = hyperparameter(
        128, low=1, high=16384, meaning="units between the two layers of a feed-forward"
    )
    dropout: float = hyperparameter(0.1, low=0, high=0.95, meaning="share dropped in each block")
    mlp_units: tuple[int, ...] = hyperparameter(
        (64,), low=1, high=4096, meaning="units of the dense layers before the scores"
    )
    mlp_dropout: float = hyperparameter(0.2, low=0, high=0.95, meaning="share dropped after each")
    learning_rate: float = learning_rate(1e-3)


def sinusoids(key: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Initial position codes (T, C): sines in the first half of the channels, cosines in the rest.

    Source: Vaswani et al. 2017, section 3.5; here only where training starts from."""
    length, channels = shape
    rates = 10000.0 ** -np.linspace(0, 1, (channels + 1) // 2, endpoint=False)
    angles = np.arange(length)[:, None] * rates
    codes = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :channels]
    return codes.astype(dtype)


def real_tokens(signal: jax.Array) -> jax.Array:
    """1.0 for tokens with a sample other than 0 in their window: (B, T, 1) -> (B, T', 1).

    In a signal of nothing but zeros every token counts as real, so that no average is over none."""
    real = (signal != 0).astype(param_dtype(signal.dtype))
    for kernel, stride in STEM:
        real = nn.max_pool(real, (kernel,), strides=(stride,), padding="SAME")
    return real + 1 - real.max(axis=1, keepdims=True)


class Encoder(nn.Module):
    """signal: (B, T, 1) z-scored current -> logits: (B, num_classes), no softmax."""

    hyperparameters: Hyperparameters
    num_classes: int
    dtype: Any
    frozen_trunk: bool = False

    @nn.compact
    def __call__(self, signal: jax.Array, *, train: bool) -> jax.Array:
        h, types = self.hyperparameters, precision(self.dtype)
        trains = train and not self.frozen_trunk
        real = real_tokens(signal)  # (B, T', 1)
        x = signal.astype(self.dtype)
        for layer, (kernel, stride) in enumerate(STEM):
            x = nn.relu(Conv(h.d_model, kernel, stride, name=f"stem_{layer}", **types)(x))
        x = PositionDense(h.d_model, sinusoids, name="positions", **types)(x)  # (B, T', d_model)
        for block in range(h.num_blocks):
            x = x + self._attention(x, real, f"block_{block}", trains)
            x = x + self._feed_forward(x, f"block_{block}", trains)
        x = self._norm("norm")(x)
        x = weighted_average(x, (1 - real) * PADDING_SCORE)  # (B, d_model)
        return classifier_head(
            freeze(x, self.frozen_trunk),
            h.mlp_units,
            h.mlp_dropout,
            num_classes=self.num_classes,
            train=train,
            dtype=self.dtype,
        )

    def _norm(self, name: str) -> nn.Module:
        return nn.LayerNorm(
            NORM_EPSILON,
            name=name,
            use_fast_variance=False,
            scale_init=initial.ones,
            bias_init=initial.zeros,
            **precision(self.dtype),
        )

    def _attention(self, x: jax.Array, real: jax.Array, name: str, train: bool) -> jax.Array:
        h = self.hyperparameters
        x = self._norm(f"{name}_attention_norm")(x)
        x = nn.MultiHeadDotProductAttention(
            h.num_heads,
            qkv_features=h.num_heads * h.head_size,
            kernel_init=initial.glorot_uniform,
            bias_init=initial.zeros,
            force_fp32_for_softmax=self.dtype != jnp.float64,
            name=f"{name}_attention",
            **precision(self.dtype),
        )(x, mask=real[:, None, None, :, 0] > 0)
        return Dropout(h.dropout, deterministic=not train)(x)

    def _feed_forward(self, x: jax.Array, name: str, train: bool) -> jax.Array:
        h, types = self.hyperparameters, precision(self.dtype)
        x = self._norm(f"{name}_feed_forward_norm")(x)
        x = nn.relu(Dense(h.feed_forward_units, name=f"{name}_feed_forward_0", **types)(x))
        x = Dense(h.d_model, name=f"{name}_feed_forward_1", **types)(x)
        return Dropout(h.dropout, deterministic=not train)(x)


def build(
    hyperparameters: Hyperparameters, *, num_classes: int, dtype: Any, frozen_trunk: bool = False
) -> nn.Module:
    """The module that computes in `dtype`, with float32 parameters (float64 for float64)."""
    return Encoder(hyperparameters, num_classes, jnp.dtype(dtype), frozen_trunk)


def minimum_length(hyperparameters: Hyperparameters) -> int:
    """The shortest signal, in samples, that the model takes: padding makes up for any."""
    return 1


def search_space(trial: Any, *, target_length: int) -> Hyperparameters:
    """Draws every hyperparameter; tokens of at most 128 channels, heads of at most 64, so that
    an epoch of the largest trial still takes minutes on a CPU, not a day."""
    return Hyperparameters(
        d_model=trial.suggest_int("d_model", 32, 128, step=32),
        num_heads=trial.suggest_int("num_heads", 1, 8),
        head_size=trial.suggest_int("head_size", 16, 64, step=16),
        num_blocks=trial.suggest_int("num_blocks", 1, 8),
        feed_forward_units=trial.suggest_int("feed_forward_units", 32, 512, step=32),
        dropout=search.suggest_dropout(trial, "dropout", 0.0),
        mlp_units=tuple(
            trial.suggest_int(f"mlp_units_{i}", 32, 256, step=32)
            for i in range(trial.suggest_int("mlp_layers", 1, 3))
        ),
        mlp_dropout=search.suggest_dropout(trial, "mlp_dropout", 0.0),
        learning_rate=trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
    )


def trial_parameters(hyperparameters: Hyperparameters) -> dict[str, Any]:
    """The trial's parameters that give these hyperparameters in `search_space`."""
    return search.flatten(dataclasses.asdict(hyperparameters), {"mlp_layers": "mlp_units"})


def keras_twin(
    hyperparameters: Hyperparameters, *, num_classes: int, layers: Any
) -> Callable[[Any], Any]:
    """The same network in Keras's own layers: signal (B, T, 1) -> logits (B, num_classes)."""
    h = hyperparameters

    def norm(x: Any, name: str) -> Any:
        return layers.LayerNormalization(epsilon=NORM_EPSILON, name=name)(x)

    def twin(signal: Any) -> Any:
        real = _keras_real_tokens(signal, layers)
        mask = layers.Permute((2, 1))(real)  # (B, 1, T'): every token sees the same ones
        x = signal
        for layer, (kernel, stride) in enumerate(STEM):
            x = layers.Conv1D(
                h.d_model,
                kernel,
                strides=stride,
                padding="same",
                activation="relu",
                name=f"stem_{layer}",
            )(x)
        x = layers.EinsumDense(
            "btc,co->bto", (x.shape[1], h.d_model), bias_axes="to", name="positions"
        )(x)
        for block in (f"block_{i}" for i in range(h.num_blocks)):
            y = norm(x, f"{block}_attention_norm")
            y = layers.MultiHeadAttention(
                h.num_heads, key_dim=h.head_size, name=f"{block}_attention"
            )(y, y, attention_mask=mask)
            x = layers.Add()([x, layers.Dropout(h.dropout)(y)])
            y = norm(x, f"{block}_feed_forward_norm")
            y = layers.Dense(
                h.feed_forward_units, activation="relu", name=f"{block}_feed_forward_0"
            )(y)
            y = layers.Dense(h.d_model, name=f"{block}_feed_forward_1")(y)
            x = layers.Add()([x, layers.Dropout(h.dropout)(y)])
        x = norm(x, "norm")
        weights = layers.Softmax(axis=1)(layers.Rescaling(-PADDING_SCORE, PADDING_SCORE)(real))
        x = layers.Flatten()(layers.Dot(axes=1)([weights, x]))
        return keras_classifier_head(
            x, h.mlp_units, h.mlp_dropout, num_classes=num_classes, layers=layers
        )

    return twin


def from_keras(layers: Sequence[Any]) -> dict[str, Any] | None:
    """The inverse, as far as layers tell: hyperparameters of a model that is made of these."""
    kinds = ("Conv1D", "MultiHeadAttention", "Dense")
    convs, attentions, dense = ([one for one in layers if one.kind == kind] for kind in kinds)
    in_blocks, mlp = dense[: 2 * len(attentions)], dense[2 * len(attentions) : -1]
    if not (convs and attentions and in_blocks and mlp):
        return None
    return {
        "d_model": convs[0].settings["filters"],
        "num_heads": attentions[0].settings["num_heads"],
        "head_size": attentions[0].settings["key_dim"],
        "num_blocks": len(attentions),
        "feed_forward_units": in_blocks[0].settings["units"],
        "dropout": attentions[0].dropout,
        "mlp_units": [one.settings["units"] for one in mlp],
        "mlp_dropout": mlp[0].dropout,
    }


def _keras_real_tokens(signal: Any, layers: Any) -> Any:
    """`real_tokens` from layers alone: a node made by keras.ops would not load from .h5.

    min(1e30 |x|, 1) is 1 for every sample that isn't exactly 0 (float32 and float64)."""
    up = layers.ReLU(max_value=1.0)(layers.Rescaling(1e30)(signal))
    down = layers.ReLU(max_value=1.0)(layers.Rescaling(-1e30)(signal))
    real = layers.Add()([up, down])
    for kernel, stride in STEM:
        real = layers.MaxPooling1D(kernel, strides=stride, padding="same")(real)
    empty = layers.Rescaling(-1.0, 1.0)(layers.GlobalMaxPooling1D(keepdims=True)(real))
    return layers.Add()([real, empty])
