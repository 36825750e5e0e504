"""Arrays between the host and the devices of a mesh, which other processes may own.

A job's host arrays are the same in every process; its global arrays lie on the devices of all. Programs run on global
arrays. Decoding, which waits for nobody, runs on arrays of the devices of this process alone.
"""

import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tracerl_jax.parallel import distributed
from tracerl_jax.parallel.mesh import AXES


def put(tree: Any, shardings: Any) -> Any:
    """Host arrays to the devices; `shardings`: one for all, or a tree of them (None: the default device)."""
    if not distributed.is_job():
        return jax.device_put(tree, shardings)
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def place(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(place, tree, shardings)


def fetch(tree: Any) -> Any:
    """Arrays to the host, all of each. Those that are split over processes are whole on every device meanwhile, one
    after the other."""
    return jax.device_get(jax.tree.map(_whole, tree) if distributed.is_job() else tree)


def _whole(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return leaf
    return np.asarray(_replicate(leaf.sharding.mesh)(leaf))


@functools.cache
def _replicate(mesh: Mesh) -> Any:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def local_mesh(mesh: Mesh) -> Mesh:
    """The devices of this process, split as `mesh` splits all devices, as far as there are enough of them."""
    if not distributed.is_job():
        return mesh
    devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    tensor = math.gcd(mesh.shape["tensor"], len(devices))
    fsdp = math.gcd(mesh.shape["fsdp"], len(devices) // tensor)
    return Mesh(np.reshape(devices, (-1, fsdp, tensor)), AXES, axis_types=mesh.axis_types[: len(AXES)])


def replicas(tree: Any, shardings: Any) -> Any:
    """Global arrays in arrays of this process's devices, as `shardings` of its own mesh split them; nothing passes
    through the host. Each process gets all of every array."""

    def place(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        alike = jax.device_put(leaf, NamedSharding(of_all_processes(leaf.sharding.mesh, sharding.mesh), sharding.spec))
        shards = {shard.device: shard.data for shard in alike.addressable_shards}
        local = [shards[device] for device in sharding.mesh.devices.flat]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, local)

    return jax.tree.map(place, tree, shardings)


@functools.cache
def of_all_processes(mesh: Mesh, local: Mesh) -> Mesh:
    """The local meshes of all processes, side by side along the data axis."""
    devices = sorted(mesh.devices.flat, key=lambda device: device.process_index)  # stable: as in each local mesh
    shape = np.array(local.devices.shape) * (distributed.process_count(), 1, 1)
    return Mesh(np.reshape(devices, shape), AXES, axis_types=local.axis_types)
