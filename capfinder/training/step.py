"""The training step: pure functions of an immutable state, to be jitted or scanned as one likes."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from capfinder.training.accumulate import over_parts
from capfinder.training.precision import LossScale, Policy, all_finite
from capfinder.training.schedules import learning_rate_of

Batch = Mapping[str, Any]
Sums = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """All that a resume needs; nothing a step depends on lives anywhere else."""

    step: jax.Array  # () int32, steps taken, those skipped for an overflow included
    params: Any
    batch_stats: Any  # {} for a model without batch norm
    opt_state: Any
    rng: jax.Array  # JAX key, the same for the whole run
    loss_scale: LossScale | None  # None unless the policy asks for loss scaling
    rate_factor: jax.Array  # () float32, on every learning rate; halved by each rollback
    apply_fn: Callable[..., Any] = struct.field(pytree_node=False)
    tx: optax.GradientTransformation = struct.field(pytree_node=False)

    @property
    def variables(self) -> dict[str, Any]:
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def learning_rate(self) -> jax.Array:
        """() float: of the last step taken (before the first: of the first)."""
        return learning_rate_of(self.opt_state) * self.rate_factor


def new_state(
    apply_fn: Callable[..., Any],
    variables: Mapping[str, Any],
    tx: optax.GradientTransformation,
    rng: jax.Array,
    policy: Policy,
) -> TrainState:
    """A state at step 0. apply_fn and variables: a Linen module's `apply` and what `init` gave."""

    def cast(leaf: jax.Array) -> jax.Array:
        leaf = jnp.asarray(leaf)
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(policy.param_dtype) if is_float else leaf

    params = jax.tree.map(cast, variables["params"])
    return TrainState(
        step=jnp.int32(0),
        params=params,
        batch_stats=jax.tree.map(cast, variables.get("batch_stats", {})),
        opt_state=tx.init(params),
        rng=rng,
        loss_scale=LossScale.initial() if policy.loss_scaling else None,
        rate_factor=jnp.float32(1),
        apply_fn=apply_fn,
        tx=tx,
    )


def train_step(
    state: TrainState, batch: Batch, *, microbatch: int | None = None, shards: int = 1
) -> tuple[TrainState, Sums]:
    """One update of Adam on the batch's mean cross-entropy.

    batch: signal (B, T, 1) float, cap_class (B,) int. The sums: loss, correct and count over the
    batch, and diverged, true when the loss (with loss scaling: also a gradient) isn't finite
    and no smaller loss scale is left that could mend it. With loss scaling, a step whose
    gradients aren't finite leaves parameters, batch statistics and Adam as they were: it counts
    for `state.step`, and with it for dropout and the order of the data, but not for Adam's bias
    correction nor for a learning-rate schedule of the step, which are Optax's own counts.

    microbatch: rows whose activations are held at a time (`accumulate.over_parts`); the same step
    but for dropout's draws, and for batch norm, which then normalises within each part ("ghost
    batch norm") and averages over all parts in turn. shards: devices that share the rows."""
    # Nothing hidden: the dropout of step n is the same however often the run was resumed.
    dropout_rng = jax.random.fold_in(state.rng, state.step)
    scale = 1.0 if state.loss_scale is None else state.loss_scale.scale
    size = batch["cap_class"].shape[0]

    def gradients_of(part: Batch, batch_stats: Any, rng: jax.Array) -> tuple[Any, Any]:
        def loss_fn(params: Any) -> tuple[jax.Array, tuple[Any, tuple[jax.Array, jax.Array]]]:
            logits, updated = state.apply_fn(
                {"params": params, "batch_stats": batch_stats},
                part["signal"],
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": rng},
            )
            losses, correct = _score(logits, part["cap_class"])
            loss = losses.sum()
            sums = (loss, correct.sum(dtype=jnp.int32))
            return loss / size * scale, (updated.get("batch_stats", {}), sums)

        gradients: Any = jax.grad(loss_fn, has_aux=True)(state.params)
        return gradients

    if microbatch is None or microbatch >= size:
        found = gradients_of(batch, state.batch_stats, dropout_rng)
    else:
        found = over_parts(
            gradients_of,
            dict(batch),
            state.batch_stats,
            dropout_rng,
            microbatch=microbatch,
            shards=shards,
        )
    gradients, (batch_stats, (loss, correct)) = found
    sums = {"loss": loss, "correct": correct, "count": jnp.int32(size)}
    if state.loss_scale is None:
        return _update(state, gradients, batch_stats), sums | {"diverged": ~jnp.isfinite(loss)}

    # In float32, the parameters' type: float16 would lose what the scale has kept alive.
    gradients = jax.tree.map(lambda gradient: gradient / scale, gradients)
    is_finite = all_finite(gradients) & jnp.isfinite(loss)
    # A loss that overflowed in float16 would spoil the epoch's mean; its step isn't counted.
    sums = {name: jnp.where(jnp.isfinite(loss), value, 0) for name, value in sums.items()}
    updated = _update(state, gradients, batch_stats)
    skipped = replace(state, step=updated.step)
    new = jax.tree.map(lambda yes, no: jnp.where(is_finite, yes, no), updated, skipped)
    new = replace(new, loss_scale=state.loss_scale.after(is_finite))
    return new, sums | {"diverged": ~is_finite & (scale <= 1.0)}


def eval_step(state: TrainState, batch: Batch) -> Sums:
    """Loss, correct and count over the rows of weight 1; padded rows have weight 0.

    batch: signal (B, T, 1) float, cap_class (B,) int, weight (B,) 0 or 1."""
    losses, correct = _score(predict_step(state, batch["signal"]), batch["cap_class"])
    is_real = jnp.asarray(batch["weight"]) > 0
    return {
        "loss": jnp.where(is_real, losses, 0).sum(),
        "correct": (correct & is_real).sum(dtype=jnp.int32),
        "count": is_real.sum(dtype=jnp.int32),
    }


def predict_step(state: TrainState, signal: jax.Array) -> jax.Array:
    """signal (B, T, 1) -> logits (B, num_classes), dropout off, running batch statistics."""
    return state.apply_fn(state.variables, signal, train=False)


def _update(state: TrainState, gradients: Any, batch_stats: Any) -> TrainState:
    updates, opt_state = state.tx.update(gradients, state.opt_state, state.params)
    # Adam's updates are proportional to the learning rate, whichever schedule it comes from.
    updates = jax.tree.map(lambda one: one * state.rate_factor.astype(one.dtype), updates)
    return replace(
        state,
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )


def _score(logits: jax.Array, cap_class: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and hit of each row; never in less than float32, whatever the model's dtype."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, cap_class)
    return losses, logits.argmax(-1) == cap_class
