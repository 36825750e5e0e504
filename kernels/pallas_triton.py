"""The one file that touches Pallas' Triton backend, which JAX deprecates: all GPU kernels go through these functions.

Why Triton, and what each version of JAX has of it: docs/kernels.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas import triton
except ImportError:  # a JAX that has removed it
    triton = None

from tracerl_jax.kernels.dispatch import target_device, target_platform

HEAD_DIMS = (64, 80, 96, 128, 256)
# Below any score and finite, so that a query that has seen no key yet keeps clear of inf - inf.
LOWEST = -1e30


def available() -> bool:
    """Whether this JAX can compile Triton kernels."""
    return triton is not None


def check(op: str, head_dim: int, interpret: bool) -> None:
    """Raises ValueError, in one sentence, where a kernel of `op` for heads of `head_dim` cannot run."""
    if not available():
        raise ValueError(f"{op}: 'pallas_gpu' needs Pallas' Triton backend, which JAX {jax.__version__} does not have.")
    if not interpret and target_platform() != "gpu":
        raise ValueError(f"{op}: 'pallas_gpu' runs on an NVIDIA GPU, and this program is for {target_platform()}.")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"{op}: 'pallas_gpu' is made for head_dim {HEAD_DIMS}, not {head_dim}.")


def preferred(head_dim: int, dtype: jnp.dtype) -> bool:
    """Whether GPU programs take the kernels unless told otherwise.

    Not for float32: that is for checking, and with products more precise than TF32 no tile of it fits the registers.
    """
    return available() and head_dim in HEAD_DIMS and dtype == jnp.bfloat16


def addressable(array: jax.Array) -> bool:
    """Whether a kernel reaches all of `array`.

    Up to 4 GiB Pallas counts elements in 32 bits, of which Triton takes one for the sign: what it does not reach is
    the upper half of an array of 2 to 4 GiB of single bytes.
    """
    return array.size <= 2**31 or array.size * array.dtype.itemsize > 2**32


def multiprocessors() -> int:
    """Of the GPU that the code being traced will run on; an H100's where none says."""
    device = target_device() or jax.devices()[0]
    return getattr(device, "num_cores", None) or getattr(device, "core_count", None) or 132


def call(
    kernel: Callable, name: str, grid: Sequence[int], in_specs: Sequence[pl.BlockSpec],
    out_specs: Sequence[pl.BlockSpec], out_shape: Sequence[jax.ShapeDtypeStruct], warps: int, stages: int,
    interpret: bool,
) -> Callable:  # fmt: skip
    """`pl.pallas_call` through Triton: `warps` of 32 threads a program, `stages` of loads in flight in loops."""
    return pl.pallas_call(
        kernel, grid=tuple(grid), in_specs=list(in_specs), out_specs=list(out_specs), out_shape=list(out_shape),
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages), interpret=interpret, name=name,
    )  # fmt: skip


def load(ref, mask: jax.Array | None = None) -> jax.Array:
    """What `ref` (of `.at[...]`) points at, 0 where not `mask`."""
    return triton.load(ref, mask=mask, other=None if mask is None else jnp.zeros((), ref.dtype))


def store(ref, value: jax.Array, mask: jax.Array | None = None) -> None:
    triton.store(ref, value.astype(ref.dtype), mask=mask)


def multiply(a: jax.Array, b: jax.Array, transpose_b: bool = False) -> jax.Array:
    """a [x,y] times b [y,z], or [z,y] transposed -> [x,z] f32.

    Products of float32 are those of JAX on the device: TF32 unless jax_default_matmul_precision asks for more.
    """
    return triton.dot(a, b, trans_b=transpose_b)


def padded(size: int) -> int:
    """The power of two that an axis of `size` takes in a kernel: Triton's arrays have no other sizes."""
    return 1 << (size - 1).bit_length()


def within(start: jax.Array | int, block: tuple[int, int], shape: tuple[int, int]) -> jax.Array | None:
    """Mask of what of `block`, rows from `start` and columns from 0, lies in an array of `shape`; None: all of it."""
    rows = None if shape[0] % block[0] == 0 else (start + jnp.arange(block[0]) < shape[0])[:, None]
    columns = None if block[1] == shape[1] else (jnp.arange(block[1]) < shape[1])[None, :]
    if rows is None or columns is None:
        mask = rows if columns is None else columns
        return None if mask is None else jnp.broadcast_to(mask, block)
    return rows & columns
