"""Data-parallel training: which devices share a batch, and what lies on each of them.

A step is one jitted function of global arrays. Its batch is split among the devices of a mesh and
its state is the same on all of them; XLA divides the work and sums the gradients. So batch norm and
the loss see the whole batch, and a step is the one that a single device would take."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from capfinder.errors import SettingsError
from capfinder.log import logger

AXIS = "batch"


@dataclass(frozen=True)
class Spread:
    """A batch's rows among the devices of a mesh: equally many each, in the order of `processes`,
    the indices of those that take part."""

    mesh: Mesh  # of one axis
    processes: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        return int(self.mesh.size)

    def rows(self, batch_size: int) -> slice:
        """The rows that lie on this process's devices."""
        share = batch_size // len(self.processes)
        number = self.processes.index(jax.process_index())
        return slice(number * share, (number + 1) * share)

    def split(self, arrays: Any, *, axis: int) -> Any:
        """One global array of every process's rows (NumPy), which lie along `axis`."""
        return self._put(arrays, PartitionSpec(*(None,) * axis, AXIS))

    def replicate(self, arrays: Any) -> Any:
        """Equal in every process, and then on every device."""
        return self._put(arrays, PartitionSpec())

    def _put(self, arrays: Any, spec: PartitionSpec) -> Any:
        sharding = NamedSharding(self.mesh, spec)
        if len(self.processes) == 1:
            return jax.device_put(arrays, sharding)
        return jax.tree.map(lambda leaf: _global(leaf, sharding), arrays)


def _global(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Without a word between the processes, which device_put would compare the values with."""
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raw = _global(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(raw, impl=jax.random.key_impl(leaf))
    return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))


def put_like(value: Any, like: jax.Array) -> jax.Array:
    """The value, equal in every process, where `like` lies: all of it on each device."""
    if isinstance(like.sharding, NamedSharding):
        return _global(value, NamedSharding(like.sharding.mesh, PartitionSpec()))
    return jax.numpy.asarray(value)


def spread(batch_size: int, *, limit: int | None, every_process: bool) -> Spread | None:
    """The devices that share batches of this size; None for one device alone.

    limit: of devices (runtime_params.mesh), None for all that there are, of `every_process` or of
    this one. As many are taken as divide the batch, equally many of each process.
    Raises: SettingsError when there are fewer than `limit`, or the processes can't share a batch.
    """
    devices, most = _sharing(batch_size, limit, every_process)
    if len(devices) < most:
        logger.warning(
            "%d of %d devices are used: more can't share batches of %d reads evenly",
            len(devices),
            most,
            batch_size,
        )
    if len(devices) == 1:
        return None  # the default device
    share = batch_size // len(devices)
    logger.info("Each of %d devices takes %d reads of a batch", len(devices), share)
    processes = tuple(sorted({device.process_index for device in devices}))
    mesh = Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))
    return Spread(mesh, processes)


def sharing(batch_size: int, *, limit: int | None, every_process: bool) -> list[jax.Device]:
    """The devices that `spread` takes, without a word about it."""
    return _sharing(batch_size, limit, every_process)[0]


def check_limit(limit: int | None) -> None:
    """Raises: SettingsError when there are fewer devices, of all processes, than asked for."""
    if limit is not None and limit > jax.device_count():
        raise SettingsError(f"runtime_params.mesh={limit}: there are {jax.device_count()} devices")


def own_part(limit: int | None) -> int:
    """How many of this process's devices are among `limit` of all processes'; None: all of them."""
    own = len(jax.local_devices())
    return own if limit is None else max(1, min(own, limit // jax.process_count()))


def _sharing(
    batch_size: int, limit: int | None, every_process: bool
) -> tuple[list[jax.Device], int]:
    """The devices, process by process, and how many there were to take."""
    available = jax.devices() if every_process else jax.local_devices()
    check_limit(limit)
    if limit is not None and not every_process:
        limit = own_part(limit)
    processes = tuple(sorted({device.process_index for device in available}))
    own = [[d for d in available if d.process_index == process] for process in processes]
    if batch_size % len(processes):
        raise SettingsError(
            f"{len(processes)} processes can't share a batch of {batch_size} reads; set "
            f"shared_params.batch_size to a multiple of {len(processes)}"
        )
    most = min(len(available) if limit is None else limit, len(processes) * min(map(len, own)))
    if most < len(processes):
        raise SettingsError(
            f"runtime_params.mesh={limit}: must be at least the {len(processes)} processes"
        )
    each = max(
        each
        for each in range(1, most // len(processes) + 1)
        if batch_size // len(processes) % each == 0
    )
    return [device for part in own for device in part[:each]], most
