"""How every op of this folder picks an implementation."""

from collections.abc import Callable, Mapping

import jax


def select(op: str, implementations: Mapping[str, Callable], name: str) -> Callable:
    """The implementation of `op` called `name`. Raises ValueError, listing the known names, for any other name.

    An implementation that cannot run on the present backend or shapes raises by itself; nothing falls back from a name.
    """
    if name not in implementations:
        raise ValueError(f"{op}: unknown implementation {name!r}; known: {', '.join(sorted(implementations))}")
    return implementations[name]


def target_device():
    """What the code being traced will run on: a device, its description or its platform's name; None: nothing says so.

    The devices of the mesh in force (inside shard_map, or under jax.set_mesh) decide, then jax.default_device. So a
    program compiled ahead of time for a TPU on a CPU machine takes the TPU's kernels.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.config.jax_default_device if device is None else device


def target_platform(device=None) -> str:
    """ "cpu", "gpu" or "tpu": that of `device`, else of `target_device`, else the default backend."""
    device = target_device() if device is None else device
    if device is None:
        return jax.default_backend()
    platform = device if isinstance(device, str) else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform
