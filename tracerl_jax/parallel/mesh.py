"""The device mesh: data (replicas of the weights) x fsdp (weights split by width) x expert (experts of a mixture) x
tensor (split by heads).

    links inside a slice, ICI or NVLink        fsdp, expert, tensor, and what is left of data
    network between slices, DCN                data only: its slowest part counts the slices

So of the collectives of training only the reduction of gradients that fsdp has already cut into shards leaves a slice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from tracerl_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, expert: int = 1, slices: int | None = None,
              devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes (data, fsdp, tensor) over all `devices` (default: every device of every host); with an axis
    `expert` before `tensor` where that is not 1.

    At most one size may be -1: it takes the devices the others leave.

    Args:
      data, fsdp, tensor, expert: devices along each axis.
      slices: groups of devices with a slower network between them, a divisor of `data`; None: as many as TPUs report,
        1 elsewhere. Devices that do not say which slice they are in are grouped by process, in order.
      devices: default `jax.devices()`.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or the slices do not divide `data` or the
        devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "expert": expert, "tensor": tensor}
    sizes = {axis: size for axis, size in sizes.items() if axis != "expert" or size != 1}
    asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(f"mesh ({asked}): sizes must be positive and at most one may be -1.")
    count, fixed = len(devices), math.prod(size for size in sizes.values() if size != -1)
    if free and count % fixed == 0:
        sizes[free[0]] = count // fixed
    if math.prod(sizes.values()) != count:
        product = f"a multiple of {fixed}" if free else str(fixed)
        raise ConfigError(f"mesh ({asked}) needs {product} devices but there are {count}; choose sizes whose product "
                          f"is {count}, or set one of them to -1.")
    types = (AxisType.Auto,) * len(sizes)
    slices = _reported_slices(devices) if slices is None else slices
    if sizes["data"] % slices:
        raise ConfigError(f"mesh ({asked}) over {slices} slices: data is {sizes['data']}, but each slice holds whole "
                          f"replicas of the weights; set mesh.data to a multiple of {slices} (or -1) and the others "
                          f"so that their product is at most {count // slices}, the devices of a slice.")
    inner = (sizes["data"] // slices, *list(sizes.values())[1:])
    groups = [devices] if slices == 1 else slice_groups(devices, slices)
    grids = [mesh_utils.create_device_mesh(inner, group, allow_split_physical_axes=True) for group in groups]
    return Mesh(np.concatenate(grids), tuple(sizes), axis_types=types)


def slice_groups(devices: Sequence[jax.Device], slices: int) -> list[list[jax.Device]]:
    """The devices of each of `slices` slices: by the slice they report, or where all report the same, by process.

    Raises ConfigError where there are not so many, or they are not of one size.
    """
    places = [getattr(device, "slice_index", 0) for device in devices]
    by_process = len(set(places)) == 1
    places = [device.process_index for device in devices] if by_process else places
    found = {place: [d for d, p in zip(devices, places, strict=True) if p == place] for place in sorted(set(places))}
    what = f"process{'es' * (len(found) > 1)} of {_sizes(found)} devices" if by_process else "slices"
    if slices < 1 or len(found) % slices or (not by_process and len(found) != slices):
        divisors = [n for n in range(1, len(found) + 1) if len(found) % n == 0] if by_process else [len(found)]
        raise ConfigError(f"mesh.slices is {slices}, but the {len(devices)} devices are in {len(found)} {what}: set it "
                          f"to {' or '.join(map(str, divisors))}.")
    parts, together = list(found.values()), len(found) // slices
    groups = [list(itertools.chain(*parts[i : i + together])) for i in range(0, len(parts), together)]
    if len({len(group) for group in groups}) > 1:
        raise ConfigError(f"mesh.slices is {slices}, but they would have {_sizes(dict(enumerate(groups)))} devices: "
                          "start the job on slices of one size.")  # fmt: skip
    return groups


def _sizes(groups: dict[int, list]) -> str:
    return ", ".join(map(str, sorted({len(group) for group in groups.values()})))


def _reported_slices(devices: Sequence[jax.Device]) -> int:
    """GPUs report one for each host: whether fsdp should stay inside a host is the user's to say."""
    return len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
