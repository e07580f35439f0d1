"""What tuning, training, evaluation and export all build: batches, module, state."""

import functools
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import filelock
import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from capfinder import memory, models
from capfinder.data import loader
from capfinder.data.versions import Dataset
from capfinder.log import logger
from capfinder.models import initial
from capfinder.training import devices, precision, schedules
from capfinder.training.step import TrainState, new_state

Split = loader.Split | loader.ShardedSplit
DEVICE_SHARE = 0.3  # of the device's memory that training data may take
HOST_BYTES_ON_CPU = 2 * 2**30  # the "device" of a CPU is the host's memory; more is streamed
EXAMPLE_SIGNALS = 256
CACHE_BYTES = 2**30  # of compiled programs on the disk; those not used for longest go first


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
    """Memory, float64 and the persistent compilation cache; before the first array is made."""
    memory.keep_freed()
    dtypes = (config.shared_params.dtype, config.runtime_params.compute_dtype)
    jax.config.update("jax_enable_x64", "float64" in dtypes)
    chosen = config.runtime_params.compilation_cache_dir
    if chosen is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        chosen = str(Path(base) / "capfinder" / "programs")
    programs = _writable(chosen) if chosen else None
    if programs is not None:
        _drop_unfinished(Path(programs))
    jax.config.update("jax_compilation_cache_dir", programs)
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # many small ones add up


def _writable(directory: str) -> str | None:
    """None where programs can't be kept: JAX would warn of each of them."""
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        logger.debug("compiled programs aren't kept: %s", error)
        return None
    if os.access(directory, os.W_OK | os.X_OK):
        return directory
    logger.debug("compiled programs aren't kept: %s can't be written to", directory)
    return None


def _drop_unfinished(programs: Path) -> None:
    """Removes those whose writer was killed. JAX writes a program, then the time of its use: where
    that file is missing the program may be cut short, and JAX keeps no new ones, with a warning for
    each."""
    with filelock.FileLock(programs / ".lockfile"):  # JAX's own
        for entry in programs.glob("*-cache"):
            if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
                entry.unlink()


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
    stats = jax.local_devices()[0].memory_stats()
    limit = DEVICE_SHARE * stats["bytes_limit"] if stats else HOST_BYTES_ON_CPU
    return "device" if split.signal.nbytes <= limit else "host"


def train_batches(
    config: ConfigDict, dataset: Dataset, *, every_process: bool = False
) -> loader.TrainBatches:
    """On this process's devices, or on those of `every_process` that trains along."""
    split = open_split(config, dataset, "train")

    def place(batch_size: int) -> loader.Placement:
        limit = config.runtime_params.mesh
        chosen = devices.spread(batch_size, limit=limit, every_process=every_process)
        return loader.ONE_DEVICE if chosen is None else chosen

    return loader.TrainBatches(
        split,
        batch_size=config.shared_params.batch_size,
        seed=config.tune_params.seed,
        augment=config.shared_params.use_augmentation,
        residency=_residency(config, split),
        place=place,
    )


def evaluation_batches(
    config: ConfigDict,
    dataset: Dataset,
    split: str,
    *,
    placement: loader.Placement = loader.ONE_DEVICE,
) -> loader.EvaluationBatches:
    return loader.EvaluationBatches(
        open_split(config, dataset, split),
        batch_size=config.shared_params.batch_size,
        placement=placement,
    )


def example_signals(config: ConfigDict, dataset: Dataset, split: str) -> np.ndarray:
    """(n, T, 1) float32: the first reads of a split."""
    first = next(open_split(config, dataset, split).blocks()).signals[:EXAMPLE_SIGNALS]
    return np.asarray(first, np.float32)[..., np.newaxis]


def new_module(
    config: ConfigDict, hyperparameters: Any, *, compute_dtype: Any, frozen_trunk: bool = False
) -> nn.Module:
    """The same object for the same network, so that JAX knows what it has compiled for it."""
    return _module(
        config.shared_params.model_type,
        replace(hyperparameters, learning_rate=1.0),  # the optimiser's, which changes no program
        config.shared_params.num_classes,
        compute_dtype,
        frozen_trunk,
    )


@functools.cache
def _module(
    model_type: str,
    hyperparameters: Any,
    num_classes: int,
    compute_dtype: Any,
    frozen_trunk: bool,
) -> nn.Module:
    frozen = {"frozen_trunk": True} if frozen_trunk else {}
    module: nn.Module = models.architecture(model_type).build(
        hyperparameters, num_classes=num_classes, dtype=compute_dtype, **frozen
    )
    return module


def initial_variables(config: ConfigDict, hyperparameters: Any, *, seed: int) -> dict[str, Any]:
    """Fresh weights; one seed gives the same every time."""
    chosen = policy(config)
    module = new_module(config, hyperparameters, compute_dtype=chosen.compute_dtype)
    signal = jax.ShapeDtypeStruct((1, config.shared_params.target_length, 1), chosen.param_dtype)
    return initial.variables(module, signal, seed=seed)


def initial_state(
    config: ConfigDict,
    hyperparameters: Any,
    tx: Any,
    *,
    seed: int,
    replace_weights: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    frozen_trunk: bool = False,
) -> TrainState:
    """Fresh weights and optimiser; one seed gives the same state every time.

    replace_weights: what is put in the place of the fresh weights ({"params", "batch_stats"})."""
    chosen = policy(config)
    variables = initial_variables(config, hyperparameters, seed=seed)
    if replace_weights is not None:
        variables = replace_weights(variables)
    module = new_module(
        config, hyperparameters, compute_dtype=chosen.compute_dtype, frozen_trunk=frozen_trunk
    )
    state = _creator(module.apply, tx, chosen)(variables, np.uint32(seed))
    return replace(state, opt_state=schedules.at_start(tx, state.opt_state))


@functools.lru_cache(maxsize=8)
def _creator(apply_fn: Any, tx: Any, chosen: precision.Policy) -> Any:
    """Variables and seed -> all of a state, in one program: array by array, JAX would compile
    fifty."""

    def create(variables: dict[str, Any], seed: jax.Array) -> TrainState:
        _, key_dropout = jax.random.split(jax.random.key(seed))
        return new_state(apply_fn, variables, tx, key_dropout, chosen)

    return jax.jit(create)


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


def probabilities(module: nn.Module, variables: dict[str, Any], signal: Any) -> jax.Array:
    """(B, C) of a module that gives logits, for signals (B, T, 1)."""
    logits: Any = module.apply(variables, signal, train=False)
    return jax.nn.softmax(logits)


def weights_sha256(variables: dict[str, Any]) -> str:
    """64 hex digits, equal for equal weights and statistics."""
    digest = hashlib.sha256()
    for path, value in sorted(flatten_dict(dict(variables)).items()):
        array = np.asarray(value)
        digest.update(f"{'/'.join(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
