"""The models that every reader has to open, written by the export stage, with signals and with the
probabilities that the Flax model gives them.

Weights are drawn, not trained: none is where it started, and all matter. Every architecture comes
with its default hyperparameters at 500 samples, twice more for models that cut or pad their input
themselves, and once with odd ones: even kernels, strides that leave a rest, one of everything."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from capfinder import models, settings, simulate
from capfinder.etl.preprocess import fit_length
from capfinder.models import ARCHITECTURES
from capfinder.stages import export
from capfinder.stages.assembly import TrainedModel

CLASS_NAMES = ("cap_0", "cap_1", "cap_2", "cap_2-1")
SIGNALS, ALL_ZERO, SEED = 256, 8, 11
USUAL_LENGTH, ODD_LENGTH = 500, 77  # samples
_ODD_TRUNK = {
    "conv_filters": (6, 5),
    "conv_kernels": (4, 2),
    "conv_dropouts": (0.1, 0.5),
    "lstm_units": (7,),
    "lstm_dropouts": (0.3,),
    "dense_units": 5,
}
ODD: dict[str, dict[str, Any]] = {
    "cnn_lstm": _ODD_TRUNK,
    "attention_cnn_lstm": _ODD_TRUNK,
    "encoder": {
        "d_model": 6,
        "num_heads": 3,
        "head_size": 5,
        "num_blocks": 1,
        "feed_forward_units": 9,
        "mlp_units": (7, 5),
    },
    "resnet": {
        "stem_filters": 5,
        "stem_kernel": 4,
        "stage_filters": (5, 6, 7),
        "stage_kernels": (2, 4, 3),
        "stage_blocks": (1, 3, 1),
        "dense_units": 6,
    },
}


@dataclass(frozen=True)
class Case:
    """input_length: None for a model that takes signals of target_length."""

    model_type: str
    variant: str
    hyperparameters: dict[str, Any]
    target_length: int
    input_length: int | None = None

    @property
    def name(self) -> str:
        return f"{self.model_type}-{self.variant}"

    @property
    def samples(self) -> int:
        return self.input_length or self.target_length


def cases(model_types: Sequence[str] = tuple(ARCHITECTURES)) -> list[Case]:
    return [
        case
        for model_type in model_types
        for case in (
            Case(model_type, "default", {}, USUAL_LENGTH),
            Case(model_type, "cuts", {}, 401, USUAL_LENGTH),
            Case(model_type, "pads", {}, 611, USUAL_LENGTH),
            Case(model_type, "odd", ODD.get(model_type, {}), ODD_LENGTH),
        )
    ]


def signals(samples: int) -> np.ndarray:
    """(SIGNALS, samples, 1) float32: simulated reads, shorter and longer than that, and zeros."""
    reads = simulate.simulate_reads(cap_class=3, run=1, chunk=0, effect=2.0, seed=SEED)
    lengths = np.random.default_rng(SEED).uniform(0.5, 1.4, SIGNALS)
    fitted = [
        fit_length(_stretched(signal, round(float(factor) * samples)), samples)
        for signal, factor in zip(reads.signals, lengths, strict=False)
    ]
    fitted[-ALL_ZERO:] = [np.zeros(samples)] * ALL_ZERO
    return np.array(fitted, np.float32)[..., np.newaxis]


def _stretched(signal: np.ndarray, samples: int) -> np.ndarray:
    at = np.linspace(0, signal.size - 1, samples)
    return np.interp(at, np.arange(signal.size), signal)


def write(case: Case, directory: Path) -> None:
    """directory/<name>.keras, .weights.h5 and .npz: signals (n, L, 1), expected (n, C), names."""
    model = _model(case)
    given = signals(case.samples)
    seen = np.array([fit_length(signal, case.target_length) for signal in given[..., 0]])
    seen = seen[..., np.newaxis]  # (n, target_length, 1): what the Flax model takes
    with jax.default_matmul_precision("highest"):  # else a GPU rounds products to 10 bits
        expected = jax.jit(_probabilities(model.module))(model.variables, seen)
    work = directory / f"{case.name}.export"
    config = settings.checked(
        settings.default_config(),
        {
            "shared_params.output_dir": str(work),
            "shared_params.dtype": "float32",
            "export_params.formats": ["keras", "h5"],
            "export_params.input_length": case.input_length,
        },
    )
    written = export.run(config, model=model, signals=seen[:8], class_names=list(CLASS_NAMES))
    written.paths["keras"].rename(directory / f"{case.name}.keras")
    written.paths["h5"].rename(directory / f"{case.name}.weights.h5")
    np.savez(
        directory / f"{case.name}.npz",
        signals=given,
        expected=np.asarray(expected),
        class_names=np.array(CLASS_NAMES),
    )
    shutil.rmtree(work)


def _probabilities(module: nn.Module) -> Any:
    def probabilities(variables: Any, signal: jax.Array) -> jax.Array:
        logits: Any = module.apply(variables, signal, train=False)
        return jax.nn.softmax(logits)

    return probabilities


def _model(case: Case) -> TrainedModel:
    hyperparameters = models.parse_hyperparameters(
        case.model_type, case.hyperparameters, target_length=case.target_length
    )
    module = models.architecture(case.model_type).build(
        hyperparameters, num_classes=len(CLASS_NAMES), dtype=np.dtype("float32")
    )
    variables = _drawn_variables(module, case.target_length)
    return TrainedModel(
        model_type=case.model_type,
        hyperparameters=hyperparameters,
        module=module,
        variables=variables,
        num_classes=len(CLASS_NAMES),
        target_length=case.target_length,
        best_epoch=1,
        num_parameters=sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
    )


def _drawn_variables(module: nn.Module, samples: int) -> dict[str, Any]:
    signal = np.zeros((1, samples, 1), np.float32)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), signal, train=False))
    rng = np.random.default_rng(SEED)

    def drawn(path: Any, leaf: Any) -> np.ndarray:
        name = path[-1].key
        if name == "var":
            return rng.uniform(0.5, 2, leaf.shape).astype(leaf.dtype)
        centre = 1.0 if name == "scale" else 0.0
        spread = 1.5 / np.sqrt(np.prod(leaf.shape[:-1])) if "kernel" in name else 0.3
        return rng.normal(centre, spread, leaf.shape).astype(leaf.dtype)

    variables: dict[str, Any] = jax.tree_util.tree_map_with_path(drawn, shapes)
    return variables
