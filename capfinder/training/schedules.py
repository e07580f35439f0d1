"""Learning rates: by the step (cyclic, SGDR), by the epoch (plateau), or held constant.

All act through Optax: the first two are `optax.Schedule`s, the plateau rule sets the rate that
`optax.inject_hyperparams` holds."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

CYCLIC_MODES = ("triangular", "triangular2", "exp_range")
MAX_STEPS = 2**31 - 1  # what Optax's int32 step counter can hold
ADAM_BETA1, ADAM_BETA2 = 0.9, 0.999
ADAM_EPSILON = 1e-7  # Keras's value; Optax's own is 1e-8
PLATEAU_MIN_DELTA = 1e-4  # Keras's value: a val_loss must fall by more than this to count


@dataclass(frozen=True)
class PlateauState:
    best: float | None = None  # lowest val_loss so far
    wait: int = 0  # epochs since then, or since the last cut


@dataclass(frozen=True)
class Plateau:
    """Cuts the rate after `patience` epochs in a row without a val_loss lower by over 1e-4.

    Source: Keras 3, keras.callbacks.ReduceLROnPlateau, with mode "min" and no cooldown."""

    factor: float
    patience: int  # epochs; 0 does what 1 does
    min_lr: float

    def after_epoch(
        self, state: PlateauState, val_loss: float, learning_rate: float
    ) -> tuple[PlateauState, float]:
        """The rule's next state and the rate for the next epoch."""
        # In float32, as Keras compares: it decides near-ties.
        lowered = np.float32(val_loss + PLATEAU_MIN_DELTA)
        if state.best is None or lowered < np.float32(state.best):
            return PlateauState(best=val_loss), learning_rate
        wait = state.wait + 1
        # float32: the rate comes from the optimiser, and must be seen to have reached min_lr.
        if wait >= self.patience and learning_rate > np.float32(self.min_lr):
            return PlateauState(best=state.best), max(learning_rate * self.factor, self.min_lr)
        return PlateauState(best=state.best, wait=wait), learning_rate


@dataclass(frozen=True)
class Schedule:
    """What `optimizer` is made with, and the rule `loop.fit` asks after each epoch, if any."""

    learning_rate: float | optax.Schedule
    plateau: Plateau | None = None


def make_schedule(
    type: str, params: Mapping[str, Any], *, learning_rate: float, steps_per_epoch: int
) -> Schedule:
    """The schedule that lr_scheduler_params.type names, with the parameters of its own group.

    learning_rate: the tuned one. "constant" holds it and "reduce_lr_on_plateau" starts from it;
    "cyclic_lr" and "sgdr" have rates of their own."""
    match type:
        case "constant":
            return Schedule(learning_rate)
        case "reduce_lr_on_plateau":
            return Schedule(learning_rate, Plateau(**params))
        case "cyclic_lr":
            own = dict(params)
            step_size = round(own.pop("step_size_factor") * steps_per_epoch)
            # A cycle may be longer than all steps there are; its length only has to fit the type.
            return Schedule(cyclic(**own, step_size=min(max(1, step_size), MAX_STEPS // 2)))
        case "sgdr":
            return Schedule(sgdr(**params, steps_per_epoch=steps_per_epoch))
    raise ValueError(f"unknown learning rate schedule {type!r}")


def cyclic(
    *, base_lr: float, max_lr: float, step_size: int, mode: str, gamma: float
) -> optax.Schedule:
    """A rate that climbs from base_lr to max_lr in `step_size` steps and falls back in as many.

    triangular: all cycles alike; triangular2: each cycle half as high as the one before;
    exp_range: the height shrinks by `gamma` at every step.

    Source: Smith 2017, Cyclical learning rates for training neural networks, section 3."""
    if mode not in CYCLIC_MODES:
        raise ValueError(f"cyclic mode {mode!r}: expected one of {CYCLIC_MODES}")

    def schedule(step: jax.Array) -> jax.Array:
        # Whole numbers first: float32 can't tell late steps apart.
        cycle, position = jnp.divmod(step, 2 * step_size)
        height = 1 - jnp.abs(position / step_size - 1)
        if mode == "triangular2":
            height *= 0.5**cycle
        elif mode == "exp_range":
            height *= gamma**step
        return base_lr + (max_lr - base_lr) * height

    return schedule


def sgdr(
    *,
    min_lr: float,
    max_lr: float,
    lr_decay: float,
    cycle_length: int,
    mult_factor: float,
    steps_per_epoch: int,
) -> optax.Schedule:
    """Warm restarts: cosine decay to min_lr, over and over, from a lower top and for longer.

    Cycle i falls from max(min_lr, max_lr * lr_decay**i); cycle 0 takes `cycle_length` epochs and
    each next one ceil(mult_factor * the one before). A cycle's first step has its top rate.

    Source: Loshchilov and Hutter 2017, SGDR, equation 5."""
    starts, lengths = _sgdr_cycles(cycle_length, mult_factor, MAX_STEPS // steps_per_epoch)

    def schedule(step: jax.Array) -> jax.Array:
        epoch = step // steps_per_epoch
        row = jnp.searchsorted(jnp.asarray(starts), epoch, side="right") - 1
        length = jnp.asarray(lengths)[row]
        repeats = (epoch - jnp.asarray(starts)[row]) // length  # of the last row, else 0
        start = jnp.asarray(starts)[row] + repeats * length
        done = (step - start * steps_per_epoch) / steps_per_epoch / length
        top = jnp.maximum(min_lr, max_lr * lr_decay ** (row + repeats))
        return min_lr + (top - min_lr) * 0.5 * (1 + jnp.cos(jnp.pi * done))

    return schedule


def _sgdr_cycles(
    cycle_length: int, mult_factor: float, max_epochs: int
) -> tuple[np.ndarray, np.ndarray]:
    """First epoch and length (int32) of each cycle, until lengths stay the same or no step is left.

    Past its end the last cycle repeats. The factor is taken as the decimal number one reads:
    in floating point 10 * 1.1 is above 11 and would round up to 12."""
    factor = Fraction(str(mult_factor))
    starts, lengths = [0], [cycle_length]
    while starts[-1] + lengths[-1] <= max_epochs:
        longer = math.ceil(factor * lengths[-1])
        if longer == lengths[-1]:
            break
        starts.append(starts[-1] + lengths[-1])
        lengths.append(longer)
    # A cycle may be longer than all steps there are; then its length only has to fit the type.
    return np.array(starts, np.int32), np.minimum(lengths, MAX_STEPS).astype(np.int32)


def optimizer(learning_rate: float | optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Adam that keeps its learning rate in its state, where it can be read and set.

    It is Keras's Adam to the last term, so that a comparison with Capfinder 0.4.3 compares nothing
    else: epsilon is added before the second moment's bias is corrected, not after.

    Optimisers of a constant rate are equal to each other: they differ in the state they begin with
    (`at_start`), and JAX compiles the steps of all of them once.

    Source: Kingma and Ba 2015, Adam, the form at the end of section 2."""
    if callable(learning_rate):
        return _adam(learning_rate)
    return optax.GradientTransformationExtraArgs(_Init(learning_rate), _held().update)


@dataclass(frozen=True)
class _Init:
    """Adam's first state, with a constant rate."""

    learning_rate: float = field(compare=False)

    def __call__(self, params: Any) -> Any:
        return with_learning_rate(_held().init(params), self.learning_rate)


def at_start(tx: optax.GradientTransformation, opt_state: Any) -> Any:
    """A first state as `tx` itself makes it, from one made by an equal optimiser."""
    if not isinstance(tx.init, _Init):
        return opt_state
    return with_learning_rate(opt_state, tx.init.learning_rate)


@functools.cache
def _held() -> optax.GradientTransformationExtraArgs:
    return _adam(0.0)


def _adam(learning_rate: float | optax.Schedule) -> optax.GradientTransformationExtraArgs:
    inject = optax.inject_hyperparams(optax.adam, static_args=("b1", "b2", "eps_root", "mu_dtype"))

    def epsilon(step: jax.Array) -> jax.Array:
        return ADAM_EPSILON / jnp.sqrt(1 - ADAM_BETA2 ** (step + 1))

    def adam(params: Any) -> optax.GradientTransformationExtraArgs:
        # What follows from the step is float64 in x64 mode, whatever the parameters are.
        dtype = jnp.result_type(*jax.tree.leaves(params))

        def cast(schedule: optax.Schedule) -> optax.Schedule:
            return lambda step: jnp.asarray(schedule(step), dtype)

        rate = cast(learning_rate) if callable(learning_rate) else learning_rate
        return inject(learning_rate=rate, b1=ADAM_BETA1, b2=ADAM_BETA2, eps=cast(epsilon))

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, optax.OptState]:
        return adam(updates if params is None else params).update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(lambda params: adam(params).init(params), update)


def learning_rate_of(opt_state: Any) -> jax.Array:
    """() float: the rate of the last step taken (before the first: that of the first)."""
    return opt_state.hyperparams["learning_rate"]


def with_learning_rate(opt_state: Any, learning_rate: float) -> Any:
    """The same state with another rate to go on with; has no effect on a schedule of the step."""
    old = learning_rate_of(opt_state)
    held = opt_state.hyperparams | {"learning_rate": jnp.full_like(old, learning_rate)}
    return opt_state._replace(hyperparams=held)
