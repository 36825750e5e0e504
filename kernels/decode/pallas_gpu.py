"""Block decode attention for NVIDIA GPUs, through Triton: the committed keys of a slot are split over programs.

Q new tokens of G query heads see the same cached keys, so they are X = G * Q rows of one matrix product per key/value
head. A program owns up to `rows` of them and one of the splits of the slot's live tiles:

    tiles        0  1  2  3  4  5  6  7         allocated, 8
    cache_len    #  #  #  #  #                  5 tiles are live
    2 splits     0  0  0  1  1                  split 0 begins with the new tokens

With few slots that is what keeps all multiprocessors busy. Each split leaves its result and the log-sum-exp of its
scores, and they are merged afterwards. How many splits there are is static, and where a slot is cut follows from its
own length: no slot's result depends on another's. A split without a tile of its own writes a log-sum-exp of -inf and
nothing else.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from tracerl_jax.kernels.decode.cache import KVCache
from tracerl_jax.kernels.pallas_triton import (
    LOWEST,
    addressable,
    call,
    check,
    load,
    multiply,
    multiprocessors,
    padded,
    store,
)

LOG2_E = 1.4426950408889634  # exp2 is the GPU's own exponential
LEAST = 16  # rows and columns of a Triton product
# As many as run at a time (an H100 holds up to three). Each has two tiles in flight, so more would not read faster, and
# every split is a result to write, to read and to merge.
PROGRAMS_PER_MULTIPROCESSOR = 2
LEAST_TILES_PER_SPLIT = 4  # below, starting a program and merging its result is no longer small beside its work


class Plan(NamedTuple):
    """Tokens of a tile and query rows of a program (powers of two), splits of a slot, warps of a program, stages of
    the loop over tiles."""

    tile: int
    rows: int
    splits: int
    warps: int = 4
    stages: int = 3
    interpret: bool = False


def default_plan(q: jax.Array, cache: KVCache) -> Plan:
    """Tiles that spill no registers on an A100 or an H100, with either tested JAX (float32 with heads of 256 over int8
    does); splits only as far as the slots alone do not keep the chip busy."""
    (N, Q, H, D), K = q.shape, cache.k.shape[2]
    if q.dtype == jnp.float32:
        tile, rows = 32, LEAST
    else:
        tile, rows = (64, 64) if D <= 128 else (32, 32)
    rows = min(rows, max(LEAST, padded(Q * H // K)))
    warps = 4 if rows * padded(D) * q.dtype.itemsize < 2**14 else 8
    programs = N * K * pl.cdiv(Q * H // K, rows)
    splits = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors() // programs
    splits = max(1, min(splits, cache.capacity // (tile * LEAST_TILES_PER_SPLIT)))
    # Two tiles are in flight; the page numbers, which come before the pages, take two more stages.
    return Plan(tile, rows, splits, warps, stages=3 if cache.pages is None else 5)


def pallas_gpu_decode_attention(
    q: jax.Array,  # [N, Q, H, D]
    cache: KVCache,
    layer: jax.Array,  # []
    k_new: jax.Array,  # [N, Q, K, D]
    v_new: jax.Array,  # [N, Q, K, D]
    cache_len: jax.Array,  # [N] in [0, S]
    new_intervals: jax.Array,  # [N, Q, 2]
    *,
    plan: Plan | None = None,
) -> jax.Array:  # [N, Q, H, D]
    """See `decode_attention`. `plan`: for tuning and tests.

    Raises ValueError where the program is not for a GPU, and for a head_dim or a size of the cache that the kernel is
    not made for.
    """
    (N, Q, H, D), K = q.shape, cache.k.shape[2]
    G = H // K
    plan = plan or default_plan(q, cache)
    check("decode_attention", D, plan.interpret)
    if not addressable(cache.k):
        raise ValueError("decode_attention: 'pallas_gpu' cannot address the upper half of an int8 cache of "
                         f"{cache.k.size / 2**30:.2f} GiB; make it smaller than 2 GiB or larger than 4 GiB.")
    row_tiles = pl.cdiv(G * Q, plan.rows)

    def spec(shape, index):
        return pl.BlockSpec(shape, lambda i, s, n: index(i // row_tiles, s, n))

    def of_cache(array):  # [L, P, K, C, ..]
        if array is None:
            return None
        L, P, _, *rest = array.shape
        return spec((L, P, None, *rest), lambda h, s, n: (0, 0, h, *[0] * len(rest)))

    pages = None if cache.pages is None else spec((None, cache.pages.shape[1]), lambda h, s, n: (n, 0))
    new = spec((None, Q, None, D), lambda h, s, n: (n, 0, h, 0))
    out, lse = call(
        partial(_kernel, plan), "decode_attention", (K * row_tiles, plan.splits, N),
        [
            spec((1,), lambda h, s, n: (0,)), spec((1,), lambda h, s, n: (n,)),
            spec((None, Q, 2), lambda h, s, n: (n, 0, 0)), spec((None, Q, G, D), lambda h, s, n: (n, 0, h, 0)),
            new, new, KVCache(*map(of_cache, cache[:4]), pages),
        ],
        [
            spec((None, None, Q, G, D), lambda h, s, n: (s, n, 0, h, 0)),
            spec((None, None, Q, G), lambda h, s, n: (s, n, 0, h)),
        ],
        [
            jax.ShapeDtypeStruct((plan.splits, *q.shape), q.dtype if plan.splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct((plan.splits, N, Q, H), jnp.float32),
        ],
        plan.warps, plan.stages, plan.interpret,
    )(layer[None], cache_len, new_intervals, q, k_new, v_new, cache)  # fmt: skip
    return out[0] if plan.splits == 1 else _merge(out, lse).astype(q.dtype)


def _merge(out: jax.Array, lse: jax.Array) -> jax.Array:
    """out [splits,N,Q,H,D], not written where lse [splits,N,Q,H] (of base 2) is -inf -> [N,Q,H,D]."""
    peak = jnp.max(lse, axis=0)
    share = jnp.exp2(lse - jnp.where(peak > -jnp.inf, peak, 0))
    total = jnp.sum(share, axis=0)
    out = jnp.sum(jnp.where(share[..., None] > 0, out * share[..., None], 0), axis=0)
    return out / jnp.where(total > 0, total, 1)[..., None]


def tiles_of_split(plan: Plan, length: jax.Array, split: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(first, last + 1) of the tiles of a slot of `length` tokens that fall to `split`; empty if not first < last."""
    live = pl.cdiv(length, plan.tile)
    share = pl.cdiv(live, plan.splits)
    return split * share, jnp.minimum((split + 1) * share, live)


def _kernel(plan: Plan, layer, cache_len, new_intervals, q, k_new, v_new, cache: KVCache, out, lse) -> None:
    """Rows of one head, one split of one slot. The running softmax of a row is (peak, total, acc), of base 2."""
    Q, G, D = q.shape
    row_tiles = pl.cdiv(G * Q, plan.rows)
    split, slot, length = pl.program_id(1), pl.program_id(2), cache_len[0]
    first, last = tiles_of_split(plan, length, split)
    row = jax.lax.rem(pl.program_id(0), row_tiles) * plan.rows + jnp.arange(plan.rows)
    token, head, exists = jax.lax.rem(row, Q), jax.lax.div(row, Q), row < G * Q

    @pl.when((split > 0) & (first >= last))
    def _():
        store(lse.at[token, head], jnp.full(row.shape, -jnp.inf), exists)

    @pl.when((split == 0) | (first < last))
    def _():
        queries = _load_vectors(q, (token, head), exists)
        carry = jnp.full(row.shape, LOWEST), jnp.zeros(row.shape), jnp.zeros(queries.shape)
        start, end = (load(new_intervals.at[token, i], exists)[:, None] for i in range(2))
        for i in range(0, Q, plan.tile):
            key = i + jnp.arange(max(LEAST, min(plan.tile, padded(Q))))
            own = (key < Q) & (split == 0)
            keys, values = (_load_vectors(x, (key,), own) for x in (k_new, v_new))
            carry = _add(carry, queries, keys, values, (key >= start) & (key < end) & own, D)

        def visit(i, carry):
            at = i * plan.tile + jnp.arange(plan.tile)
            committed = at < length
            index = _locate(cache, layer[0], slot, at, committed)
            keys, values = (_load_vectors(x, index, committed) for x in (cache.k, cache.v))
            scales = [load(x.at[*index], committed)[None] for x in (cache.k_scale, cache.v_scale) if x is not None]
            return _add(carry, queries, keys, values, committed[None], D, *scales)

        peak, total, acc = jax.lax.fori_loop(first, last, visit, carry)
        some = total > 0
        total = jnp.where(some, total, 1)
        store(lse.at[token, head], jnp.where(some, peak + jnp.log2(total), -jnp.inf), exists)
        column = jnp.arange(queries.shape[1])[None]
        store(out.at[token[:, None], head[:, None], column], acc / total[:, None], exists[:, None] & (column < D))


def _locate(cache: KVCache, layer, slot, at: jax.Array, committed: jax.Array) -> tuple:
    """Where in the cache [L,P,C] of one head the tokens `at` of a slot are: layer, pages, entries of the pages."""
    if cache.pages is None:
        return layer, slot, at
    C = cache.k.shape[2]
    return layer, load(cache.pages.at[jax.lax.div(at, C)], committed), jax.lax.rem(at, C)


def _load_vectors(ref, index: tuple, mask: jax.Array) -> jax.Array:
    """ref [..,D] at `index`, of scalars and arrays [x], zeros where not mask [x] -> [x, padded(D)]."""
    D = ref.shape[-1]
    column = jnp.arange(padded(D))[None]
    index = (i if jnp.ndim(i) == 0 else i[:, None] for i in index)
    return load(ref.at[*index, column], mask[:, None] & (column < D))


def _add(carry, queries, keys, values, visible, D: int, k_scale=1.0, v_scale=1.0):
    """The running softmax after these keys [x, padded(D)] too. A weight of zero does not silence NaN or inf: values
    that are not visible must be finite."""
    peak, total, acc = carry
    scores = multiply(queries, keys.astype(queries.dtype), transpose_b=True) * (k_scale * (D**-0.5 * LOG2_E))
    scores = jnp.where(visible, scores, -jnp.inf)
    higher = jnp.maximum(peak, jnp.max(scores, axis=1))
    shrink, weights = jnp.exp2(peak - higher), jnp.exp2(scores - higher[:, None])
    part = multiply((weights * v_scale).astype(queries.dtype), values.astype(queries.dtype))
    return higher, total * shrink + jnp.sum(weights, axis=1), acc * shrink[:, None] + part
