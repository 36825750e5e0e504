"""The device mesh: data (replicas of the weights) x fsdp (weights split by width) x tensor (split by heads)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from tracerl_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes (data, fsdp, tensor) over all `devices` (default: every device of every host).

    At most one size may be -1: it takes the devices the other two leave.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    count = len(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(f"mesh ({asked}): sizes must be positive and at most one may be -1.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and count % fixed == 0:
        sizes[free[0]] = count // fixed
    if math.prod(sizes.values()) != count:
        product = f"a multiple of {fixed}" if free else str(fixed)
        raise ConfigError(f"mesh ({asked}) needs {product} devices but there are {count}; choose sizes whose product "
                          f"is {count}, or set one of them to -1.")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
