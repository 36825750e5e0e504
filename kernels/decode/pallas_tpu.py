"""Block decode attention for TPUs: a grid of live work only.

The lengths of the slots are known on the device before the kernel starts, so the grid is not (slots, tiles of S) but a
list of the tiles that hold committed tokens, as long as there are such tiles (its bound is a traced value):

    cache_len = [5, 0, 9], 4 tokens a tile      step    0   1   2   3   4   5
                                                slot    0   0   1   2   2   2
                                                tile    0   1   -   0   1   2

The first step of a slot attends to its new tokens, which starts the running softmax; every step adds the J tiles it
brought; the last one writes the slot's output. A step without a tile of its own (slot 1) names the tile of the step
before, which the pipeline then does not copy again.

Q new tokens of G query heads see the same cached keys, so they are X = G * Q rows of one matrix product per key/value
head. Chips with two cores (v4, v5p) have a list for each of them; neighbouring slots, which often started from one
prompt and are equally long, go to different cores.

A program keeps its arguments and results without padding. So where the last axis is shorter than the 128 lanes of a
register (head_dim 64, 80 and 96; scales of pages of less than 128 tokens) it copies the array once on entry and once on
exit: not at every call of a loop, but a copy of the cache in memory. head_dim 128 and 256 are not copied.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tracerl_jax.kernels.decode.cache import KVCache
from tracerl_jax.kernels.dispatch import target_platform

HEAD_DIMS = (64, 80, 96, 128, 256)
# Below any score and finite, so that a query that has seen no key yet keeps clear of inf - inf.
LOWEST = -1e30
# Keys and values of a step: enough to hide what a grid step costs besides its copies (about 0.35 us, which is 1 MiB on
# a v5p), little enough that a slot's last tile, half empty on average, does not dominate.
STEP_BYTES = 2**20
MAX_TILE = 1024
MAX_TILES_PER_STEP = 8
MAX_STEP_BYTES = 2**22  # two of them are in vector memory, which is 16 MiB at least
DEFAULT_VMEM = 2**24  # of a kernel that asks for no more
MAX_SCHEDULE_BYTES = 960 * 2**10  # of the 1 MiB of scalar memory


class Schedule(NamedTuple):
    """What every step of every core works on, as flat int32 arrays (scalar memory pads the last of two axes)."""

    slot: jax.Array  # [cores * steps]
    source: jax.Array  # [cores * steps * J], page * tiles per page + tile of that page
    first: jax.Array  # [N], the slot's first step on its core
    bound: jax.Array  # [], steps of the busiest core


def pallas_tpu_decode_attention(
    q: jax.Array,  # [N, Q, H, D]
    cache: KVCache,
    layer: jax.Array,  # []
    k_new: jax.Array,  # [N, Q, K, D]
    v_new: jax.Array,  # [N, Q, K, D]
    cache_len: jax.Array,  # [N] in [0, S]
    new_intervals: jax.Array,  # [N, Q, 2]
    *,
    tile: int | None = None,
    cores: int | None = None,
    interpret: pltpu.InterpretParams | bool = False,
) -> jax.Array:  # [N, Q, H, D]
    """See `decode_attention`. `tile` (tokens, slot-contiguous only), `cores`, `interpret`: for tests.

    Raises ValueError where the program is not for a TPU, and for a head_dim, a page size, a number of pages or of new
    tokens that the kernel or the chip is not made for.
    """
    N, Q, H, D = q.shape
    K, C = cache.k.shape[2:4]
    if not interpret and target_platform() != "tpu":
        raise ValueError(f"decode_attention: 'pallas_tpu' runs on a TPU, and this program is for {target_platform()}.")
    if D not in HEAD_DIMS:
        raise ValueError(f"decode_attention: 'pallas_tpu' is made for head_dim {HEAD_DIMS}, not {D}.")
    if cores is None:
        cores = 1 if interpret else pltpu.get_tpu_info().num_cores
    cores = min(cores, N)
    token_bytes = 2 * K * D * cache.k.dtype.itemsize
    if cache.pages is None:
        tile = min(C, tile or _power_of_two(STEP_BYTES // token_bytes, 128, MAX_TILE))
        J, tiles, pages = 1, pl.cdiv(C, tile), jnp.arange(N)[:, None]
    else:
        tile, tiles, pages = C, 1, cache.pages
        J = _power_of_two(min(STEP_BYTES // (token_bytes * C), pages.shape[1]), 1, MAX_TILES_PER_STEP)
    if tile * J * token_bytes > MAX_STEP_BYTES:
        most = MAX_STEP_BYTES // token_bytes
        raise ValueError(f"decode_attention: 'pallas_tpu' takes pages of up to {most} tokens of {K} heads, not {C}.")
    schedule = _schedule(cache_len, pages, tile, tiles, J, cores)
    if (used := 4 * (schedule.slot.size + schedule.source.size + 2 * N)) > MAX_SCHEDULE_BYTES:
        raise ValueError(f"decode_attention: 'pallas_tpu' would need {used} bytes of scalar memory for {N} slots of "
                         f"{pages.shape[1] * tiles} tiles, and {MAX_SCHEDULE_BYTES} are there; use larger pages.")
    steps = schedule.slot.shape[0] // cores
    needed = vmem_bytes(q, k_new)
    if not interpret and not fits(q, k_new):
        raise ValueError(f"decode_attention: 'pallas_tpu' would need {needed} bytes of vector memory for {Q} new "
                         f"tokens of {H} heads, and this chip has {pltpu.get_tpu_info().vmem_capacity_bytes}.")

    G, X = H // K, Q * (H // K)
    rows = q.reshape(N, Q, K, G, D).transpose(0, 2, 3, 1, 4).reshape(N, K, X, D)
    k_new, v_new = (jnp.swapaxes(x, 1, 2) for x in (k_new, v_new))
    new_intervals = jnp.tile(new_intervals, (1, G, 1))  # [N, X, 2]

    def of_slot(*shape: int) -> pl.BlockSpec:
        def index(core, i, slot, source, first, cache_len, layer):
            return slot[core * steps + i], *[0] * len(shape)

        return pl.BlockSpec((None, *shape), index)

    def of_cache(j: int, *minor: int) -> pl.BlockSpec:  # K x tile x D of the values, K x tile of the scales
        def index(core, i, slot, source, first, cache_len, layer):
            at = source[(core * steps + i) * J + j]
            return layer[0], at // tiles, 0, at % tiles, *[0] * len(minor)

        return pl.BlockSpec((None, None, K, tile, *minor), index)

    parts = [(cache.k, (D,)), (cache.v, (D,))]
    if cache.k_scale is not None:
        parts += [(cache.k_scale, ()), (cache.v_scale, ())]
    out = pl.pallas_call(
        partial(_kernel, J, tile, steps, len(parts)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(cores, schedule.bound),
            in_specs=[of_slot(K, X, D), of_slot(K, Q, D), of_slot(K, Q, D), of_slot(X, 2)]
            + [of_cache(j, *minor) for _, minor in parts for j in range(J)],
            out_specs=of_slot(K, X, D),
            scratch_shapes=[pltpu.VMEM((K, X, 1), jnp.float32), pltpu.VMEM((K, X, 1), jnp.float32),
                            pltpu.VMEM((K, X, D), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((N, K, X, D), q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=None if needed <= DEFAULT_VMEM or interpret else pltpu.get_tpu_info().vmem_capacity_bytes,
        ),
        cost_estimate=pl.CostEstimate(  # of full slots: how full they are is not known before the program runs
            flops=4 * N * H * Q * (cache.capacity + Q) * D,
            transcendentals=N * H * Q * (cache.capacity + Q),
            bytes_accessed=N * cache.capacity * token_bytes + 2 * q.size * q.dtype.itemsize,
        ),
        interpret=interpret,
        name="decode_attention",
    )(
        schedule.slot, schedule.source, schedule.first, cache_len, layer[None],
        rows, k_new, v_new, new_intervals, *[array for array, _ in parts for _ in range(J)],
    )  # fmt: skip
    return out.reshape(N, K, G, Q, D).transpose(0, 3, 1, 2, 4).reshape(N, Q, H, D)


def vmem_bytes(q: jax.Array, k_new: jax.Array) -> int:
    """What a step holds of a slot and of the cache, at most; its blocks twice, one of them on its way."""
    (Q, H, D), K = q.shape[1:], k_new.shape[2]
    lanes = pl.cdiv(D, 128) * 128
    blocks = 2 * (2 * Q * H + 2 * Q * K) * lanes * q.dtype.itemsize + 2 * 4 * Q * (H // K) * 128
    return blocks + 4 * Q * H * (2 * 128 + lanes) + 2 * MAX_STEP_BYTES


def fits(q: jax.Array, k_new: jax.Array) -> bool:
    """Whether the chip that the program is for has the vector memory: a window of a full-attention model with many
    heads is too much for the 16 MiB of a v4."""
    return vmem_bytes(q, k_new) <= pltpu.get_tpu_info().vmem_capacity_bytes


def _power_of_two(size: int, low: int, high: int) -> int:
    """The largest power of two up to `size`, in [low, high]."""
    return min(max(1 << (max(size, 1).bit_length() - 1), low), high)


def _schedule(cache_len: jax.Array, pages: jax.Array, tile: int, tiles: int, J: int, cores: int) -> Schedule:
    """cache_len [N], pages [N,W] of `tiles` tiles each -> the steps of every core, J tiles a step."""
    N, W = pages.shape
    slots_per_core = pl.cdiv(N, cores)
    steps = slots_per_core * pl.cdiv(W * tiles, J)
    # Slot n is entry n // cores of core n % cores. It has a step even if it is empty, since its new tokens need one.
    wanted = jnp.maximum(1, pl.cdiv(cache_len, J * tile))
    wanted = jnp.pad(wanted, (0, slots_per_core * cores - N)).reshape(slots_per_core, cores).T
    end = jnp.cumsum(wanted, axis=1)  # [cores, slots_per_core]
    first = (end - wanted).T.reshape(-1)[:N]

    step = jnp.arange(steps)[:, None]
    entry = jnp.sum(step >= end[:, None, :], axis=2)  # [cores, steps]; a core's steps behind its last slot: clipped
    slot = jnp.minimum(entry, jnp.sum(wanted > 0, axis=1)[:, None] - 1) * cores + jnp.arange(cores)[:, None]

    number = (step[:, 0] - first[slot])[..., None] * J + jnp.arange(J)  # [cores, steps, J], tile of the slot
    live = number * tile < cache_len[slot][..., None]
    number = jnp.minimum(number, W * tiles - 1)
    source = jnp.where(live, pages[slot[..., None], number // tiles] * tiles + number % tiles, 0)
    latest = jax.lax.cummax(jnp.where(live, step, 0), axis=1)
    source = jnp.take_along_axis(source, latest, axis=1)
    return Schedule(slot.reshape(-1), source.reshape(-1), first, jnp.max(end))


def _kernel(J: int, tile: int, steps: int, parts: int, slots, source, first, cache_len, layer, q, k_new, v_new,
            new_intervals, *rest) -> None:
    """One step: J tiles of one slot. The running softmax of a row is (peak, total, acc)."""
    *arrays, out, peak, total, acc = rest
    k, v, k_scale, v_scale = [arrays[p * J : (p + 1) * J] for p in range(parts)] + [[None] * J] * (4 - parts)
    i = pl.program_id(1)
    slot = slots[pl.program_id(0) * steps + i]
    length = cache_len[slot]
    own = i - first[slot]  # this step among the slot's
    heads, (X, D), Q = range(q.shape[0]), q.shape[1:], k_new.shape[1]

    def multiply(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
        precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
        dimensions = (((1,), (contract,)), ((), ()))
        return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)

    @pl.when(own == 0)
    def _():
        key = jax.lax.broadcasted_iota(jnp.int32, (X, Q), 1)
        visible = (key >= new_intervals[:, :1]) & (key < new_intervals[:, 1:])
        for h in heads:
            scores = jnp.where(visible, multiply(q[h], k_new[h], 1) * D**-0.5, LOWEST)
            top = jnp.max(scores, axis=1, keepdims=True)
            weights = jnp.where(visible, jnp.exp(scores - top), 0)
            peak[h], total[h] = top, jnp.sum(weights, axis=1, keepdims=True)
            acc[h] = multiply(weights.astype(q.dtype), v_new[h], 0)

    for j in range(J):
        left = length - (own * J + j) * tile  # committed tokens from this tile on

        @pl.when(left > 0)
        def _(k=k[j], v=v[j], k_scale=k_scale[j], v_scale=v_scale[j], left=left):
            committed = jax.lax.broadcasted_iota(jnp.int32, (X, tile), 1) < left
            committed_row = jax.lax.broadcasted_iota(jnp.int32, (tile, D), 0) < left
            for h in heads:
                scores = multiply(q[h], k[h].astype(q.dtype), 1) * D**-0.5
                if k_scale is not None:
                    scores *= k_scale[h : h + 1]
                scores = jnp.where(committed, scores, LOWEST)
                top = jnp.maximum(peak[h], jnp.max(scores, axis=1, keepdims=True))
                weights, fade = jnp.exp(scores - top), jnp.exp(peak[h] - top)
                peak[h], total[h] = top, total[h] * fade + jnp.sum(weights, axis=1, keepdims=True)
                if v_scale is not None:
                    weights = jnp.where(committed, weights * v_scale[h : h + 1], 0)
                # A weight of zero does not silence NaN or inf behind the committed tokens, a select does.
                values = jnp.where(committed_row, v[h].astype(q.dtype), 0)
                acc[h] = acc[h] * fade + multiply(weights.astype(q.dtype), values, 0)

    @pl.when(own == jnp.maximum(1, pl.cdiv(length, J * tile)) - 1)
    def _():
        for h in heads:
            out[h] = (acc[h] / jnp.where(total[h] > 0, total[h], 1)).astype(out.dtype)
