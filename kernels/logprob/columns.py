"""Going through the columns of a head [E, V] in windows, on one device or with the head split over a mesh.

    kernel   | window 0 | window 1 | .. | window n-1 | rest |      a loop over equal windows, then what they leave

Windows start at multiples of their width, which is a multiple of 128 (a TPU tile), so that slicing moves nothing twice.
Under a mesh every device goes through the columns it owns and the windows never cross devices:

    hidden [P, E]    rows over (data, fsdp), the same on every device along tensor
    kernel [E, V]    width over fsdp, gathered window by window; vocabulary over tensor, never gathered
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from tracerl_jax.parallel.sharding import mesh_axes, mesh_spec

# Logits held at a time: 32 MiB. Wider windows read the hidden states, and the sum of their gradient, less often; but a
# CPU copies a window of the kernel before it multiplies, and beyond WIDEST that costs more than the rest.
WINDOW_ELEMENTS = 1 << 23
NARROWEST, WIDEST = 512, 16384
WHOLE_ELEMENTS = 1 << 21  # up to here one window takes all
TILE = 128
# Below any logit and finite: keeps clear of inf - inf, and exp of it is 0.
LOWEST = -1e30

Carry = TypeVar("Carry")


@dataclass(frozen=True)
class Split:
    """The mesh axes of more than one device that share the rows, the width and the vocabulary of a head."""

    rows: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()

    def gather(self, columns: jax.Array) -> jax.Array:  # [E / fsdp, W] -> [E, W]
        return lax.all_gather(columns, self.width, axis=0, tiled=True) if self.width else columns

    def scatter(self, d_columns: jax.Array) -> jax.Array:  # [E, W] of this device's rows -> [E / fsdp, W] of all rows
        if self.width:
            d_columns = lax.psum_scatter(d_columns, self.width, scatter_dimension=0, tiled=True)
        others = tuple(axis for axis in self.rows if axis not in self.width)
        return lax.psum(d_columns, others) if others else d_columns

    def highest(self, x: jax.Array) -> jax.Array:
        return lax.pmax(x, self.vocab) if self.vocab else x

    def lowest(self, x: jax.Array) -> jax.Array:
        return lax.pmin(x, self.vocab) if self.vocab else x

    def sum(self, x: jax.Array) -> jax.Array:
        return lax.psum(x, self.vocab) if self.vocab else x

    def most(self, count: jax.Array) -> jax.Array:
        """Of the devices that gather their columns together and so must go through them equally often."""
        return lax.pmax(count, self.width) if self.width else count

    def first_id(self, V: int) -> jax.Array | int:
        """Vocabulary id of the first of this device's V columns."""
        return lax.axis_index(self.vocab) * V if self.vocab else 0


def per_device(function: Callable, mesh: Mesh | None, axes: tuple, out_axes: tuple) -> Callable:
    """function(split, *operands), run on each device's part; `axes`: the logical axes of every operand and result."""
    if mesh is None:
        return lambda *operands: function(Split(), *operands)
    names = ("batch", "embed", "vocab")
    split = Split(*(tuple(a for a in mesh_axes(name, mesh) if mesh.shape[a] > 1) for name in names))
    specs, out_specs = (tuple(mesh_spec(names, mesh) for names in group) for group in (axes, out_axes))
    # The loops start from accumulators made on the spot, which the varying-axes check refuses. Nothing is
    # differentiated through here: the ops bring their own gradients.
    return jax.shard_map(lambda *operands: function(split, *operands), mesh=mesh, in_specs=specs, out_specs=out_specs,
                         check_vma=False)  # fmt: skip


def check_mesh(op: str, mesh: Mesh | None, rows: int, kernel: jax.Array) -> None:
    """Raises ValueError where rows or the kernel [E, V] cannot be split evenly over the mesh."""
    for name, axis, size in (("rows", "batch", rows), ("E", "embed", kernel.shape[0]), ("V", "vocab", kernel.shape[1])):
        parts = 1 if mesh is None else math.prod(mesh.shape[a] for a in mesh_axes(axis, mesh))
        if size % parts:
            raise ValueError(f"{op}: {name} = {size} cannot be split evenly over {parts} devices of {dict(mesh.shape)}")


def window_width(P: int, V: int) -> int:
    """Columns at a time for P rows, at most V."""
    if P * V <= WHOLE_ELEMENTS:
        return V
    return min(V, max(NARROWEST, min(WIDEST, WINDOW_ELEMENTS // P // TILE * TILE)))


def fold(step: Callable[[Carry, jax.Array | int, int], Carry], carry: Carry, V: int, width: int) -> Carry:
    """carry = step(carry, start, columns of the window) for every window of V columns."""
    count = V // width
    carry = lax.fori_loop(0, count, lambda c, carry: step(carry, c * width, width), carry)
    return step(carry, count * width, V % width) if V % width else carry


def read(split: Split, kernel: jax.Array, start: jax.Array | int, width: int, dtype: jnp.dtype) -> jax.Array:
    """Columns [E, width] of this device's kernel, whole in E, in `dtype`."""
    return split.gather(lax.dynamic_slice_in_dim(kernel, start, width, axis=1).astype(dtype))


def dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def rebase(total: jax.Array, moment: jax.Array, drop: jax.Array) -> tuple[jax.Array, jax.Array]:
    """sum exp(x - m) and sum exp(x - m) (x - m) for a maximum m that is `-drop` higher."""
    shrink = jnp.exp(drop)
    return total * shrink, (moment + total * drop) * shrink
