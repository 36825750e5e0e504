"""Logical axis names to mesh axes, in one table, and the shardings that follow from it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tracerl_jax.errors import ConfigError

# Parameters: fsdp splits the width, tensor splits heads, MLP and vocabulary; small and per-layer axes stay whole. The
# expert axis splits a mixture by its experts, and everything else by width as if it were more fsdp.
# Activations: rows are split over data, fsdp and expert together.
RULES: dict[str, tuple[str, ...]] = {
    "embed": ("fsdp", "expert"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    "norm": (),
    "head_dim": (),
    "expert": ("expert",),
    "expert_embed": ("fsdp",),
    "choice": (),
    "value": (),
    "batch": ("data", "fsdp", "expert"),
}
OPTIONAL = ("expert",)  # axes that a mesh has only where they split something


def mesh_spec(axes: Iterable[str | None], mesh: Mesh, name: str = "array") -> PartitionSpec:
    """Mesh axes of an array whose dimensions carry the logical names `axes` (None: never split).

    Raises:
      ConfigError: a name without a rule, a rule to an axis the mesh lacks, or two names on one mesh axis.
    """
    entries, used = [], {}
    for axis in axes:
        entry = () if axis is None else mesh_axes(axis, mesh, name)
        for mesh_axis in entry:
            if mesh_axis in used:
                raise ConfigError(f"{name}: the logical axes {used[mesh_axis]!r} and {axis!r} both go to the mesh axis "
                                  f"{mesh_axis!r}; give one of them another rule in RULES.")
            used[mesh_axis] = axis
        entries.append(entry or None)
    return PartitionSpec(*entries)


def check_split(name: str, axis: str, size: int, mesh: Mesh) -> None:
    """Refuses `size` units of the logical axis `axis` that the mesh cannot split evenly (ConfigError)."""
    entry = mesh_axes(axis, mesh, name)
    parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in entry)
    if size % parts:
        raise ConfigError(f"{name}: {size} ({axis}) cannot be split evenly over {parts} devices (mesh axis "
                          f"{' x '.join(entry)} of {dict(mesh.shape)}); choose mesh sizes that divide {size}.")


def mesh_axes(axis: str, mesh: Mesh, name: str = "array") -> tuple[str, ...]:
    """Axes of `mesh` that the logical axis `axis` is split over. Raises ConfigError as `mesh_spec` does."""
    if axis not in RULES:
        raise ConfigError(f"{name}: no sharding rule for the logical axis {axis!r}; add it to "
                          f"tracerl_jax.parallel.sharding.RULES (known: {', '.join(RULES)}).")
    missing = [mesh_axis for mesh_axis in RULES[axis] if mesh_axis not in (*mesh.shape, *OPTIONAL)]
    if missing:
        raise ConfigError(f"{name}: the logical axis {axis!r} goes to the mesh axis {missing[0]!r}, but the mesh has "
                          f"{mesh.axis_names}; build it with tracerl_jax.parallel.mesh.make_mesh.")
    return tuple(mesh_axis for mesh_axis in RULES[axis] if mesh_axis in mesh.shape)


def param_shardings(model: Any, mesh: Mesh) -> Any:
    """NamedSharding of every parameter of a `Model`, as a tree like `model.abstract_params()`.

    Raises:
      ConfigError: heads or a parameter's dimension do not divide over the mesh; names and numbers are given.
    """
    check_split("model.num_heads", "heads", model.config.num_heads, mesh)
    check_split("model.num_kv_heads", "kv_heads", model.config.num_kv_heads, mesh)

    def sharding(path: tuple, leaf: jax.ShapeDtypeStruct, axes: PartitionSpec) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = mesh_spec(axes, mesh, name)
        for axis, size in zip(axes, leaf.shape, strict=True):
            check_split(name, axis, size, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, model.abstract_params(), model.logical_axes())


def row_shards(mesh: Mesh | None) -> int:
    """Parts that the rows of a device batch are split into."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in mesh_axes("batch", mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a device batch: rows (the first axis) over data, fsdp and expert, everything else whole."""
    return NamedSharding(mesh, mesh_spec(("batch",), mesh))


def cache_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of the arrays of a `KVCache`, [L,P,K,..]: pages over rows' axes, key/value heads over tensor."""
    return NamedSharding(mesh, mesh_spec(("layers", "batch", "kv_heads"), mesh))


def constrain_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Keeps an activation [N,..] split by rows.

    Applied before the first and after every layer: left alone, the compiler splits the residual stream's width as the
    embedding's is, and gathers every row of the batch in each layer.
    """
    return x if mesh is None else jax.lax.with_sharding_constraint(x, batch_sharding(mesh))
