"""A small problem with everything that training has to cope with: dropout, batch norm, padding."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from capfinder.training.loop import fit
from capfinder.training.precision import Policy, policy
from capfinder.training.schedules import make_schedule, optimizer
from capfinder.training.step import TrainState, new_state

LENGTH, CLASSES, BATCH = 12, 3, 8


class Tiny(nn.Module):
    """signal (B, T, 1) -> logits (B, 3)."""

    dtype: object = np.float32
    dropout_rate: float = 0.3

    @nn.compact
    def __call__(self, signal, *, train):
        x = jnp.asarray(signal[..., 0], self.dtype)
        x = nn.relu(nn.Dense(10, dtype=self.dtype)(x))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype)(x)
        return nn.Dense(CLASSES, dtype=self.dtype)(x)


def examples(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """signal (n, T, 1) and cap_class (n,): classes differ in their mean, with a lot of noise."""
    rng = np.random.default_rng(seed)
    cap_class = rng.integers(0, CLASSES, count)
    signal = rng.normal(cap_class[:, None, None] - 1.0, 2.0, (count, LENGTH, 1))
    return signal.astype(np.float32), cap_class.astype(np.int32)


def materialise(resident, piece):
    """Rows of `resident` by their number, or those that the piece itself brings."""
    if not resident:
        return piece
    return {name: array[piece["row"]] for name, array in resident.items()}


class Batches:
    """Training batches in a new order each epoch; `asked` notes what was asked for."""

    materialise = staticmethod(materialise)

    def __init__(self, steps_per_epoch: int, seed: int = 3, *, on_device: bool = False) -> None:
        self.steps_per_epoch, self.batch_size = steps_per_epoch, BATCH
        self.signal, self.cap_class = examples(steps_per_epoch * BATCH, seed)
        self.num_examples = len(self.signal)
        arrays = {"signal": self.signal, "cap_class": self.cap_class}
        self.resident = jax.device_put(arrays) if on_device else ()
        self.asked: list[tuple[int, int]] = []

    def pieces(self, epoch: int, start_step: int = 0, *, size: int = 1):
        self.asked.append((epoch, start_step))
        order = np.random.default_rng(epoch).permutation(self.num_examples).reshape(-1, BATCH)
        while start_step < len(order):
            end = min((start_step // size + 1) * size, len(order))
            rows = order[start_step:end]
            yield {"row": rows} if self.resident else self.rows(epoch, start_step, rows)
            start_step = end

    def rows(self, epoch: int, first_step: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """What a piece of the epoch brings, from its first step on; rows (steps, B)."""
        return {"signal": self.signal[rows], "cap_class": self.cap_class[rows]}

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        for piece in self.pieces(epoch, start_step):
            part = jax.tree.map(lambda array: array[0], piece)
            yield self.materialise(self.resident, part)


def validation(count: int = 20, seed: int = 1) -> list[dict[str, np.ndarray]]:
    """Validation batches, the last one padded with rows that would spoil any mean."""
    signal, cap_class = examples(count, seed)
    batches = []
    for start in range(0, count, BATCH):
        real = min(BATCH, count - start)
        batch = {
            "signal": np.full((BATCH, LENGTH, 1), 1e3, np.float32),
            "cap_class": np.zeros(BATCH, np.int32),
            "weight": (np.arange(BATCH) < real).astype(np.float32),
        }
        batch["signal"][:real] = signal[start : start + real]
        batch["cap_class"][:real] = cap_class[start : start + real]
        batches.append(batch)
    return batches


FLOAT32 = policy("float32", None, "cpu")
MODULE = Tiny()
CONSTANT = make_schedule("constant", {}, learning_rate=0.1, steps_per_epoch=1)
ADAM = optimizer(CONSTANT.learning_rate)


@functools.cache
def _initial(module: nn.Module):
    init = functools.partial(module.init, train=False)
    return jax.jit(init)(jax.random.key(0), np.zeros((1, LENGTH, 1), np.float32))


def tiny_state(
    module: nn.Module = MODULE,
    tx: optax.GradientTransformation = ADAM,
    precision: Policy = FLOAT32,
    rng: jax.Array | None = None,
) -> TrainState:
    variables = _initial(module)
    rng = jax.random.key(7) if rng is None else rng
    return new_state(module.apply, variables, tx, rng, precision)


def run_fit(state: TrainState | None = None, **changed):
    """`fit` on the tiny problem, with what the test names changed."""
    arguments = {
        "train_batches": Batches(3),
        "validation_batches": validation(),
        "schedule": CONSTANT,
        "max_epochs": 4,
        "patience": 100,
        "checkpoints": None,
        "interrupted": lambda: False,
        "on_step": lambda step: None,
        "on_epoch": lambda row: None,
    }
    return fit(tiny_state() if state is None else state, **(arguments | changed))


def assert_same(left, right) -> None:
    """Bit for bit the same tree, random keys included."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        if jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
