"""What tuning, training, evaluation and export all build: batches, module, state."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from capfinder import models
from capfinder.data import loader
from capfinder.data.versions import Dataset
from capfinder.training import precision
from capfinder.training.step import TrainState, new_state

Split = loader.Split | loader.ShardedSplit
DEVICE_SHARE = 0.3  # of the device's memory that training data may take
HOST_BYTES_ON_CPU = 2 * 2**30  # the "device" of a CPU is the host's memory; more is streamed
EXAMPLE_SIGNALS = 256


@dataclass(frozen=True)
class TrainedModel:
    """The best epoch of a training, in the arithmetic of its parameters, float32 or float64."""

    model_type: str
    hyperparameters: Any
    module: nn.Module
    variables: dict[str, Any]  # "params", "batch_stats"
    num_classes: int
    target_length: int  # samples
    best_epoch: int  # 1-based
    num_parameters: int


def configure_jax(config: ConfigDict) -> None:
    """float64 and the persistent compilation cache; before the first array is made."""
    dtypes = (config.shared_params.dtype, config.runtime_params.compute_dtype)
    jax.config.update("jax_enable_x64", "float64" in dtypes)
    chosen = config.runtime_params.compilation_cache_dir
    if chosen is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        chosen = str(Path(base) / "capfinder" / "xla")
    jax.config.update("jax_compilation_cache_dir", chosen or None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def policy(config: ConfigDict) -> precision.Policy:
    return precision.policy(
        config.shared_params.dtype, config.runtime_params.compute_dtype, jax.default_backend()
    )


@functools.cache
def _opened(directory: Path, split: str, *, streamed: bool) -> Split:
    """Kept, as tuning opens the same ones for every trial."""
    if streamed:
        return loader.open_shards(directory, split)
    return loader.open_split(directory, split)


def open_split(config: ConfigDict, dataset: Dataset, split: str) -> Split:
    """From the shards themselves when training streams, else from their cache."""
    streamed = config.runtime_params.data_residency == "stream"
    return _opened(dataset.directory, split, streamed=streamed)


def _residency(config: ConfigDict, split: Split) -> Literal["device", "host", "stream"]:
    asked: Literal["auto", "device", "host", "stream"] = config.runtime_params.data_residency
    if isinstance(split, loader.ShardedSplit):
        return "stream"
    if asked != "auto":
        return asked
    stats = jax.devices()[0].memory_stats()
    limit = DEVICE_SHARE * stats["bytes_limit"] if stats else HOST_BYTES_ON_CPU
    return "device" if split.signal.nbytes <= limit else "host"


def train_batches(config: ConfigDict, dataset: Dataset) -> loader.TrainBatches:
    split = open_split(config, dataset, "train")
    return loader.TrainBatches(
        split,
        batch_size=config.shared_params.batch_size,
        seed=config.tune_params.seed,
        augment=config.shared_params.use_augmentation,
        residency=_residency(config, split),
    )


def evaluation_batches(
    config: ConfigDict, dataset: Dataset, split: str, *, batch_size: int | None = None
) -> loader.EvaluationBatches:
    return loader.EvaluationBatches(
        open_split(config, dataset, split),
        batch_size=batch_size or config.shared_params.batch_size,
    )


def example_signals(config: ConfigDict, dataset: Dataset, split: str) -> np.ndarray:
    """(n, T, 1) float32: the first reads of a split."""
    first = next(open_split(config, dataset, split).blocks()).signals[:EXAMPLE_SIGNALS]
    return np.asarray(first, np.float32)[..., np.newaxis]


def out_of_memory(error: BaseException, config: ConfigDict) -> str | None:
    """What to say when memory ran out, on the host or the device; None for any other error."""
    text = str(error)
    is_device = "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
    if not isinstance(error, MemoryError) and not is_device:
        return None
    return f"out of memory; lower shared_params.batch_size ({config.shared_params.batch_size} now)"


def new_module(config: ConfigDict, hyperparameters: Any, *, compute_dtype: Any) -> nn.Module:
    module: nn.Module = models.architecture(config.shared_params.model_type).build(
        hyperparameters, num_classes=config.shared_params.num_classes, dtype=compute_dtype
    )
    return module


def initial_state(config: ConfigDict, hyperparameters: Any, tx: Any, *, seed: int) -> TrainState:
    """Fresh weights and optimiser; one seed gives the same state every time."""
    chosen = policy(config)
    module = new_module(config, hyperparameters, compute_dtype=chosen.compute_dtype)
    key_params, key_dropout = jax.random.split(jax.random.key(seed))
    signal = jax.numpy.zeros((1, config.shared_params.target_length, 1), chosen.param_dtype)
    variables = jax.jit(lambda key: module.init(key, signal, train=False))(key_params)
    return new_state(module.apply, variables, tx, key_dropout, chosen)


def trained_model(
    config: ConfigDict, hyperparameters: Any, variables: dict[str, Any], *, best_epoch: int
) -> TrainedModel:
    return TrainedModel(
        model_type=config.shared_params.model_type,
        hyperparameters=hyperparameters,
        module=new_module(config, hyperparameters, compute_dtype=policy(config).param_dtype),
        variables=variables,
        num_classes=config.shared_params.num_classes,
        target_length=config.shared_params.target_length,
        best_epoch=best_epoch,
        num_parameters=sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
    )
