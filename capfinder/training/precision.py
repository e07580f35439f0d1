"""Which number types a run computes in, and the loss scale that keeps float16 gradients alive."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import struct

COMPUTE_DTYPES = ("float16", "bfloat16", "float32", "float64")
FLOAT16_ON = {"gpu": "float16", "cuda": "float16", "rocm": "float16", "tpu": "bfloat16"}
INITIAL_SCALE = 2.0**15
LARGEST_SCALE = 2.0**24  # float32 losses times this are still far from overflow


@dataclass(frozen=True)
class Policy:
    """compute_dtype is for activations; parameters and Adam's moments stay in param_dtype."""

    compute_dtype: jnp.dtype
    param_dtype: jnp.dtype
    loss_scaling: bool


def policy(dtype: str, compute_dtype_override: str | None, platform: str) -> Policy:
    """The precision for a storage `dtype` on a JAX `platform` ("cpu", "gpu", "tpu").

    float16 means mixed precision where the hardware is fast at it: float16 on a GPU, bfloat16
    on a TPU, and float32 on a CPU, which has no float16 arithmetic to gain from.

    Raises: ValueError for an unknown dtype, and for float64 while JAX's x64 mode is off."""
    compute = compute_dtype_override or (
        FLOAT16_ON.get(platform, "float32") if dtype == "float16" else dtype
    )
    if compute not in COMPUTE_DTYPES:
        raise ValueError(f"compute dtype {compute!r}: expected one of {COMPUTE_DTYPES}")
    if compute == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError("float64 needs jax.config.update('jax_enable_x64', True) first")
    return Policy(
        compute_dtype=jnp.dtype(compute),
        param_dtype=jnp.dtype("float64" if compute == "float64" else "float32"),
        loss_scaling=compute == "float16",
    )


@struct.dataclass
class LossScale:
    """Dynamic loss scale: halved after an overflow, doubled after a run of finite steps.

    Source: Micikevicius et al. 2018, Mixed precision training, section 3.2."""

    scale: jax.Array  # () float32
    finite_steps: jax.Array  # () int32, since the scale last changed
    growth_interval: int = struct.field(pytree_node=False, default=2000)  # steps

    @classmethod
    def initial(cls) -> "LossScale":
        return cls(scale=jnp.float32(INITIAL_SCALE), finite_steps=jnp.int32(0))

    def after(self, is_finite: jax.Array) -> "LossScale":
        """The scale for the next step, given whether this step's gradients were all finite."""
        finite_steps = self.finite_steps + 1
        is_due = finite_steps >= self.growth_interval
        grown = jnp.where(is_due, jnp.minimum(self.scale * 2, LARGEST_SCALE), self.scale)
        shrunk = jnp.maximum(self.scale / 2, 1.0)
        return replace(
            self,
            scale=jnp.where(is_finite, grown, shrunk),
            finite_steps=jnp.where(is_finite & ~is_due, finite_steps, 0),
        )


def all_finite(tree: object) -> jax.Array:
    """() bool: no NaN and no infinity in any leaf."""
    leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(leaves).all() if leaves else jnp.bool_(True)
