"""How large the architectures are in tests. One that isn't named here is tested at its defaults,
which takes longer."""

from typing import Any


class Sizes(dict[str, dict[str, Any]]):
    """model_type -> hyperparameters that aren't the defaults."""

    def __missing__(self, model_type: str) -> dict[str, Any]:
        return {}


# Widths repeat, since Keras on JAX compiles an initialiser for each new shape.
_TINY_TRUNK = {
    "conv_filters": (4, 4),
    "conv_kernels": (5, 5),
    "conv_dropouts": (0.1, 0.1),
    "lstm_units": (4, 4),
    "lstm_dropouts": (0.1, 0.1),
    "dense_units": 4,
}
TINY = Sizes(
    {
        "cnn_lstm": _TINY_TRUNK,
        "attention_cnn_lstm": _TINY_TRUNK,
        "encoder": {
            "d_model": 4,
            "num_heads": 2,
            "head_size": 2,
            "num_blocks": 1,
            "feed_forward_units": 8,
            "mlp_units": (4,),
        },
        "resnet": {
            "stem_filters": 4,
            "stage_filters": (4, 8),
            "stage_kernels": (3, 3),
            "stage_blocks": (1, 2),
            "dense_units": 4,
        },
    }
)
# Large enough to learn something in a few steps.
_SMALL_TRUNK = {
    "conv_filters": (8, 8),
    "conv_kernels": (5, 3),
    "conv_dropouts": (0.1, 0.1),
    "lstm_units": (8,),
    "lstm_dropouts": (0.1,),
    "dense_units": 8,
}
SMALL = Sizes(
    {
        "cnn_lstm": _SMALL_TRUNK,
        "attention_cnn_lstm": _SMALL_TRUNK,
        "encoder": {
            "d_model": 16,
            "num_heads": 2,
            "head_size": 8,
            "num_blocks": 1,
            "feed_forward_units": 16,
            "mlp_units": (16,),
        },
        "resnet": {
            "stem_filters": 8,
            "stem_kernel": 5,
            "stage_filters": (8, 8),
            "stage_kernels": (3, 3),
            "stage_blocks": (1, 1),
            "dense_units": 8,
        },
    }
)
# What those leave out: other depths, even kernels, a length that leaves rests, one of everything.
ODD_LENGTH = 77
ODD = Sizes(
    {
        "cnn_lstm": {
            "conv_filters": [3],
            "conv_kernels": [4],
            "conv_dropouts": [0.5],
            "lstm_units": [5, 3, 4],
            "lstm_dropouts": [0, 0, 0.3],
        },
        "attention_cnn_lstm": {
            "conv_filters": [6, 4, 3],
            "conv_kernels": [1, 2, 7],
            "conv_dropouts": [0, 0, 0],
            "lstm_units": [4, 7],
            "lstm_dropouts": [0.2, 0.2],
        },
        "encoder": {
            "d_model": 5,
            "num_heads": 3,
            "head_size": 4,
            "num_blocks": 2,
            "mlp_units": [9, 7],
        },
        "resnet": {
            "stem_filters": 8,
            "stem_kernel": 4,
            "stage_filters": [8, 12, 12],
            "stage_kernels": [2, 5, 3],
            "stage_blocks": [2, 1, 2],
        },
    }
)
