"""The models that are compared: their hyperparameters in both vocabularies, and what they cost.

Plain Python, as the environments of both projects read it. FLOPs are counted from the shapes of
matrix products, convolutions and LSTMs, two for a multiplication with its addition; pooling, norms
and activations aren't counted, and a backward pass counts as two forward passes."""

import itertools
from dataclasses import dataclass
from typing import Any

LENGTH, CLASSES = 500, 4  # samples of a signal; caps
TRAINING = 3  # times a forward pass
OUR_ENCODER_STEM = ((7, 2), (5, 2), (5, 2))  # kernel, stride

Parameters = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """One architecture as either project builds it.

    ours: model_params; theirs: the values of keras_tuner's HyperParameters; train_at_least and
    predict_at_least: what our speed has to be, in theirs; is_same: whether both names stand for
    about the same computation."""

    model_type: str
    batch_size: int
    ours: Parameters
    theirs: Parameters
    remark: str
    train_at_least: float = 1.2
    predict_at_least: float = 1.3
    is_same: bool = True

    def flops(self, who: str) -> float:
        """Of the forward pass of one signal; who: "ours" or "theirs"."""
        if self.model_type == "resnet":
            return _resnet(self.ours, always_projects=who == "theirs")
        if self.model_type == "encoder":
            return _our_encoder(self.ours) if who == "ours" else _their_encoder(self.theirs)
        return _cnn_lstm(self.ours, attention=self.model_type == "attention_cnn_lstm")


def trunk_values(ours: Parameters) -> Parameters:
    """model_params of cnn_lstm or attention_cnn_lstm in the names of Capfinder 0.4.3."""
    values = {
        "conv_layers": len(ours["conv_filters"]),
        "lstm_layers": len(ours["lstm_units"]),
        "dense_units": ours["dense_units"],
        "dense_dropout": ours["dense_dropout"],
        "learning_rate": ours["learning_rate"],
    }
    for theirs, name in (
        ("filters", "conv_filters"),
        ("kernel_size", "conv_kernels"),
        ("dropout", "conv_dropouts"),
        ("lstm_units", "lstm_units"),
        ("lstm_dropout", "lstm_dropouts"),
    ):
        values |= {f"{theirs}_{layer}": value for layer, value in enumerate(ours[name])}
    return values


def resnet_values(ours: Parameters) -> Parameters:
    """The same of resnet, whose stages all have the same number of blocks there."""
    (blocks,) = set(ours["stage_blocks"])
    values = {
        "initial_filters": ours["stem_filters"],
        "initial_kernel": ours["stem_kernel"],
        "num_stages": len(ours["stage_filters"]),
        "num_blocks_per_stage": blocks,
        "dense_units": ours["dense_units"],
        "dropout": ours["dense_dropout"],
        "learning_rate": ours["learning_rate"],
    }
    stages = enumerate(zip(ours["stage_filters"], ours["stage_kernels"], strict=True))
    for stage, (filters, kernel) in stages:
        values[f"filters_stage_{stage}"] = filters
        values |= {f"kernel_stage_{stage}_block_{block}": kernel for block in range(blocks)}
    return values


RELEASED = {  # the classifier that Capfinder 0.4.3 comes with
    "conv_filters": [64, 128, 32],
    "conv_kernels": [3, 7, 3],
    "conv_dropouts": [0.1, 0.5, 0.1],
    "lstm_units": [64, 128, 128, 32],
    "lstm_dropouts": [0.3, 0.4, 0.4, 0.1],
    "dense_units": 32,
    "dense_dropout": 0.5,
    "learning_rate": 6.25e-5,
}
RESNET = {
    "stem_filters": 64,
    "stem_kernel": 7,
    "stage_filters": [64, 128, 128],
    "stage_kernels": [5, 5, 5],
    "stage_blocks": [2, 2, 2],
    "dense_units": 64,
    "dense_dropout": 0.2,
    "learning_rate": 2e-4,
}
OUR_ENCODER = {
    "d_model": 64,
    "num_heads": 4,
    "head_size": 16,
    "num_blocks": 3,
    "feed_forward_units": 128,
    "dropout": 0.1,
    "mlp_units": [64],
    "mlp_dropout": 0.2,
    "learning_rate": 1e-3,
}
THEIR_ENCODER = {
    "num_transformer_blocks": 3,
    "num_heads": 4,
    "head_size": 256,
    "ff_dim": 320,
    "dropout": 0.1,
    "num_mlp_layers": 3,
    "mlp_units_0": 256,
    "mlp_units_1": 256,
    "mlp_units_2": 256,
    "mlp_dropout": 0.2,
    "learning_rate": 1e-3,
}
PAIRS = (
    Pair(
        "cnn_lstm",
        256,
        RELEASED,
        trunk_values(RELEASED),
        "Hyperparameters of the classifier that Capfinder 0.4.3 comes with.",
    ),
    Pair(
        "attention_cnn_lstm",
        256,
        RELEASED,
        trunk_values(RELEASED),
        "The hyperparameters of cnn_lstm above.",
    ),
    Pair(
        "resnet",
        64,
        RESNET,
        resnet_values(RESNET),
        "Stem of 64 filters, 3 stages of 2 blocks (64, 128, 128 filters, kernel 5). Theirs "
        "projects every block's shortcut, ours only where shapes change, and theirs has biases "
        "before its norms: hence the different parameters and FLOPs.",
    ),
    Pair(
        "encoder",
        32,
        OUR_ENCODER,
        THEIR_ENCODER,
        "Not the same architecture, and the ratio of examples/s is mostly that, not a faster way "
        "to the same: theirs attends among all 500 samples, with one input channel, and only among "
        "the padding, so it cannot learn; ours among 63 tokens of 64 channels. Theirs has as many "
        "blocks and heads, the rest is chosen for as many parameters, which from one channel takes "
        "wide heads at each of the 500 positions. How well either uses the machine is in the "
        "GFLOP/s.",
        train_at_least=20.0,
        is_same=False,
    ),
)


def _conv(length: float, kernel: int, channels: int, filters: int) -> float:
    return 2.0 * length * kernel * channels * filters


def _dense(*widths: int) -> float:
    return sum(2.0 * a * b for a, b in itertools.pairwise(widths))


def _cnn_lstm(h: Parameters, *, attention: bool) -> float:
    total, length, channels = 0.0, LENGTH, 1
    for filters, kernel in zip(h["conv_filters"], h["conv_kernels"], strict=True):
        total += _conv(length, kernel, channels, filters)
        length, channels = length // 2, filters
    for units in h["lstm_units"]:
        total += length * _dense(channels + units, 4 * units)
        channels = units
    total += 2 * length * _dense(channels, 1) if attention else 0.0  # scores, weighted average
    return total + _dense(channels, h["dense_units"], CLASSES)


def _resnet(h: Parameters, *, always_projects: bool) -> float:
    total, channels = _conv(LENGTH, h["stem_kernel"], 1, h["stem_filters"]), h["stem_filters"]
    length = -(-LENGTH // 2)
    shapes = zip(h["stage_filters"], h["stage_kernels"], h["stage_blocks"], strict=True)
    for stage, (filters, kernel, blocks) in enumerate(shapes):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            length = -(-length // stride)
            if always_projects or stride > 1 or channels != filters:
                total += _conv(length, 1, channels, filters)
            total += _conv(length, kernel, channels, filters)
            total += _conv(length, kernel, filters, filters)
            channels = filters
    return total + _dense(channels, h["dense_units"], CLASSES)


def _attention(length: int, channels: int, width: int) -> float:
    """Projections to queries, keys, values and back; scores; weighted sums."""
    return 4 * length * _dense(channels, width) + 2 * length * _dense(width, length)


def _our_encoder(h: Parameters) -> float:
    total, length, channels, width = 0.0, LENGTH, 1, h["d_model"]
    for kernel, stride in OUR_ENCODER_STEM:
        length = -(-length // stride)
        total += _conv(length, kernel, channels, width)
        channels = width
    total += length * _dense(width, width)  # positions
    block = _attention(length, width, h["num_heads"] * h["head_size"])
    block += length * _dense(width, h["feed_forward_units"], width)
    return total + h["num_blocks"] * block + _dense(width, *h["mlp_units"], CLASSES)


def _their_encoder(h: Parameters) -> float:
    block = _attention(LENGTH, 1, h["num_heads"] * h["head_size"])
    block += LENGTH * _dense(1, h["ff_dim"], 1)
    mlp = [h[f"mlp_units_{layer}"] for layer in range(h["num_mlp_layers"])]
    return h["num_transformer_blocks"] * block + _dense(1, *mlp, CLASSES)
