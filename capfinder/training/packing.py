"""A PyTree of arrays as a few flat ones, for a checkpoint that is written often."""

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capfinder.files import fingerprint
from capfinder.training.devices import put_like


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(tree: Any) -> list[Any]:
    """The leaves where they lie, JAX's typed random keys as the numbers they hold."""
    leaves = jax.tree.leaves(tree)
    return [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in leaves]


def layout(tree: Any) -> str:
    """A fingerprint of the leaves' names, shapes and dtypes: whether a saved state fits."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return fingerprint(
        [(jax.tree_util.keystr(path), list(leaf.shape), str(leaf.dtype)) for path, leaf in leaves]
    )


def checksum(arrays: Any) -> str:
    """CRC-32 of a PyTree of NumPy arrays: their names, types, shapes and bytes. It is taken while
    training waits, and nobody is to be fooled: 4.3 GB/s on a core that does 1.0 GB/s of SHA-256."""
    found = 0
    leaves, _ = jax.tree_util.tree_flatten_with_path(arrays)
    for path, leaf in leaves:
        about = f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}\n"
        found = zlib.crc32(about.encode(), found)
        found = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data, found)
    return f"{found:08x}"


def pack(tree: Any) -> tuple[dict[str, np.ndarray], str]:
    """One flat array per dtype, in memory of its own: Orbax's cost is per array, and a state has
    hundreds. Measured on 2 busy cores, 122 arrays: 0.05 s instead of 0.27 s of CPU time a save."""
    parts: dict[str, list[np.ndarray]] = {}
    for leaf in jax.device_get(_raw(tree)):
        parts.setdefault(str(leaf.dtype), []).append(leaf.ravel())
    return {dtype: np.concatenate(arrays) for dtype, arrays in parts.items()}, layout(tree)


def unpack(template: Any, packed: Mapping[str, np.ndarray]) -> Any:
    leaves = jax.tree.leaves(template)
    position = dict.fromkeys(packed, 0)
    restored = []
    for leaf, raw in zip(leaves, _raw(template), strict=True):
        dtype = str(raw.dtype)
        start, position[dtype] = position[dtype], position[dtype] + raw.size
        value = put_like(packed[dtype][start : position[dtype]].reshape(raw.shape), raw)
        if _is_key(leaf):
            value = jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
        restored.append(value)
    return jax.tree.unflatten(jax.tree.structure(template), restored)
