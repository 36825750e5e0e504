"""Two-interval flash attention for NVIDIA GPUs, forward and backward, through Triton.

A program of the forward kernel, or of the dq kernel, owns a tile of queries of one head and visits the key tiles that
its intervals touch. A program of the dk/dv kernel owns a tile of keys of one key/value head and visits the query tiles
that touch it, of all G heads. Who visits what is worked out before, as a list per tile:

    queries \\ keys   0  1  2  3
    2                #  .  +  +        order [0, 2, 3, -], counts [1, 3]: tile 0 is seen in full and needs no mask,
                                       2 and 3 straddle the edge of an interval, 1 is neither loaded nor computed

The lists take T / 64 * S / 64 integers.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from tracerl_jax.kernels.attention.masks import live_tiles
from tracerl_jax.kernels.pallas_triton import LOWEST, call, check, load, multiply, padded, store, within

LOG2_E = 1.4426950408889634  # exp2 is the GPU's own exponential
QUERY_MULTIPLE = 128  # of every query tile


class Tile(NamedTuple):
    """Queries and keys of a tile (powers of two), warps of a program, stages of the loop over tiles."""

    q: int
    k: int
    warps: int = 8
    stages: int = 2


class Plan(NamedTuple):
    forward: Tile
    dq: Tile
    dkv: Tile
    interpret: bool = False


def default_plan(head_dim: int, dtype: jnp.dtype) -> Plan:
    """The largest tiles for which no kernel spills registers, on an A100 or an H100, with either tested JAX."""
    if dtype == jnp.float32:
        return Plan(*[Tile(32, 32 if head_dim <= 128 else 16)] * 3)
    if head_dim <= 128:
        return Plan(Tile(64, 64, warps=4), Tile(64, 64), Tile(32, 64))
    return Plan(*[Tile(64, 32)] * 3)


def pallas_gpu_attention(
    q: jax.Array,  # [N, T, H, D]
    k: jax.Array,  # [N, S, K, D]
    v: jax.Array,  # [N, S, K, D]
    intervals: jax.Array,  # [N, T, 4] in [0, S]
    *,
    plan: Plan | None = None,
) -> tuple[jax.Array, jax.Array]:  # [N, T, H, D], [N, T, H] f32
    """See `attention`. `plan`: for tuning and tests.

    Raises ValueError where the program is not for a GPU, and for a head_dim the kernels are not made for.
    """
    T, D = q.shape[1], q.shape[-1]
    plan = plan or default_plan(D, q.dtype)
    check("attention", D, plan.interpret)
    intervals = jnp.pad(intervals.swapaxes(1, 2), ((0, 0), (0, 0), (0, -T % QUERY_MULTIPLE)))
    out, lse = _attend(plan, q, k, v, intervals)
    return out, lse[..., :T].swapaxes(1, 2)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    plan: Plan,
    q: jax.Array,  # [N, T, H, D]
    k: jax.Array,  # [N, S, K, D]
    v: jax.Array,  # [N, S, K, D]
    intervals: jax.Array,  # [N, 4, T'], T' the next multiple of QUERY_MULTIPLE, empty behind T
) -> tuple[jax.Array, jax.Array]:  # [N, T, H, D], [N, H, T'] f32
    return _forward(plan, q, k, v, intervals)[0]


def meetings(intervals: jax.Array, tile: Tile, S: int) -> tuple[jax.Array, jax.Array]:
    """intervals [N,4,T'] -> [N,n_q,n_k] bool twice: any query of the tile sees a key of the tile; one of the two
    intervals covers the tile for all queries."""
    n_k = pl.cdiv(S, tile.k)
    touched = live_tiles(intervals.swapaxes(1, 2), tile.q, tile.k, n_k)
    tiles = intervals.reshape(len(intervals), 4, -1, 1, tile.q)
    latest, earliest = jnp.max(tiles, axis=-1), jnp.min(tiles, axis=-1)  # [N, 4, n_q, 1]
    start = jnp.arange(n_k) * tile.k
    covered = [(latest[:, i] <= start) & (earliest[:, i + 1] >= start + tile.k) for i in (0, 2)]
    return touched, covered[0] | covered[1]


def visits(touched: jax.Array, full: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[N,x,y] bool twice -> order [N,x,y]: the tiles y to visit, full ones first; counts [N,x,2]: of full, of all."""
    edge = touched & ~full
    counts = jnp.cumsum(jnp.stack([jnp.sum(x, axis=-1, dtype=jnp.int32) for x in (full, edge)], axis=-1), axis=-1)
    rank = jnp.where(full, jnp.cumsum(full, axis=-1), counts[..., :1] + jnp.cumsum(edge, axis=-1)) - 1
    row, column, tile = (jax.lax.broadcasted_iota(jnp.int32, full.shape, i) for i in range(3))
    rank = jnp.where(touched, rank, full.shape[2])  # out of bounds, where the scatter drops it
    return jnp.zeros(full.shape, jnp.int32).at[row, column, rank].set(tile, mode="drop"), counts


class _QueryBlocks:
    """Blocks of a program that owns a tile of queries; grid (head, query tile, row).

    The last query tiles, which under a causal layout see most keys, start first. The G heads that read the same keys
    are neighbours.
    """

    def __init__(self, tile: Tile, q: jax.Array, k: jax.Array, n_q: int, n_k: int):
        (N, _, H, D), (S, K) = q.shape, k.shape[1:3]
        self.grid = (H, n_q, N)

        def spec(shape, index):
            return pl.BlockSpec(shape, lambda h, i, n: index(h, n_q - 1 - i, n))

        self.queries = spec((None, tile.q, None, padded(D)), lambda h, i, n: (n, i, h, 0))
        self.keys = spec((None, S, None, padded(D)), lambda h, i, n: (n, 0, h // (H // K), 0))
        self.intervals = spec((None, 4, tile.q), lambda h, i, n: (n, 0, i))
        self.numbers = spec((None, None, tile.q), lambda h, i, n: (n, h, i))
        self.order = spec((None, None, n_k), lambda h, i, n: (n, i, 0))
        self.counts = spec((None, None, 2), lambda h, i, n: (n, i, 0))


def _forward(plan, q, k, v, intervals):
    tile, (N, T, H, D), S = plan.forward, q.shape, k.shape[1]
    order, counts = visits(*meetings(intervals, tile, S))
    of = _QueryBlocks(tile, q, k, *order.shape[1:])
    out, lse = call(
        partial(_forward_kernel, tile, T, D), "attention_forward", of.grid,
        [of.order, of.counts, of.intervals, of.queries, of.keys, of.keys], [of.queries, of.numbers],
        [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((N, H, intervals.shape[2]), jnp.float32)],
        tile.warps, tile.stages, plan.interpret,
    )(order, counts, intervals, q, k, v)  # fmt: skip
    return (out, lse), (q, k, v, intervals, out, lse)


def _backward(plan, residuals, cotangents):
    q, k, v, intervals, out, lse = residuals
    d_out, d_lse = cotangents
    (N, T, H, D), (S, K), T_padded = q.shape, k.shape[1:3], intervals.shape[2]
    # A query without a key has no weights; neither its infinite lse nor the cotangent of that may spread.
    mean = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1).swapaxes(1, 2)  # [N, H, T]
    some = lse > -jnp.inf
    mean = jnp.where(some, jnp.pad(mean, ((0, 0), (0, 0), (0, T_padded - T))) - d_lse, 0)
    lse = jnp.where(some, lse, 0) * LOG2_E

    tile = plan.dq
    order, counts = visits(*meetings(intervals, tile, S))
    of = _QueryBlocks(tile, q, k, *order.shape[1:])
    [d_q] = call(
        partial(_dq_kernel, tile, T, D), "attention_dq", of.grid,
        [of.order, of.counts, of.intervals, of.queries, of.keys, of.keys, of.queries, of.numbers, of.numbers],
        [of.queries], [jax.ShapeDtypeStruct(q.shape, q.dtype)], tile.warps, tile.stages, plan.interpret,
    )(order, counts, intervals, q, k, v, d_out, lse, mean)  # fmt: skip

    tile, G = plan.dkv, H // K
    order, counts = visits(*(x.swapaxes(1, 2) for x in meetings(intervals, tile, S)))
    _, n_k, n_q = order.shape
    keys = pl.BlockSpec((None, tile.k, None, padded(D)), lambda h, j, n: (n, j, h, 0))
    queries = pl.BlockSpec((None, T, G, padded(D)), lambda h, j, n: (n, 0, h, 0))
    numbers = pl.BlockSpec((None, G, T_padded), lambda h, j, n: (n, h, 0))
    d_k, d_v = call(
        partial(_dkv_kernel, tile, S, D), "attention_dkv", (K, n_k, N),
        [pl.BlockSpec((None, None, n_q), lambda h, j, n: (n, j, 0)),
         pl.BlockSpec((None, None, 2), lambda h, j, n: (n, j, 0)),
         pl.BlockSpec((None, 4, T_padded), lambda h, j, n: (n, 0, 0)),
         queries, keys, keys, queries, numbers, numbers],
        [keys, keys], [jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2, tile.warps, tile.stages, plan.interpret,
    )(order, counts, intervals, q, k, v, d_out, lse, mean)  # fmt: skip
    return d_q, d_k, d_v, None


_attend.defvjp(_forward, _backward)


def _visible(intervals: list[jax.Array], keys: jax.Array) -> jax.Array:
    """intervals: 4 arrays and keys, each [x, 1] or [1, y] -> [x, y] bool."""
    s1, e1, s2, e2 = intervals
    return ((keys >= s1) & (keys < e1)) | ((keys >= s2) & (keys < e2))


def _visit_all(counts, visit, carry):
    """Both parts of a list: visit(masked, index into the order, carry) -> carry."""
    carry = jax.lax.fori_loop(0, counts[0], partial(visit, False), carry)
    return jax.lax.fori_loop(counts[0], counts[1], partial(visit, True), carry)


def _forward_kernel(tile: Tile, T: int, D: int, order, counts, intervals, q, k, v, out, lse) -> None:
    S, width = k.shape
    exists = within((pl.num_programs(1) - 1 - pl.program_id(1)) * tile.q, (tile.q, width), (T, D))
    queries = load(q, exists)
    bounds = [intervals[i, :][:, None] for i in range(4)]

    def visit(masked, r, carry):
        peak, total, acc = carry
        start = order[r] * tile.k
        rows, exist = pl.ds(start, tile.k), within(start, (tile.k, width), (S if masked else tile.k, D))
        scores = multiply(queries, load(k.at[rows, :], exist), transpose_b=True) * (D**-0.5 * LOG2_E)
        if masked:
            scores = jnp.where(_visible(bounds, (start + jnp.arange(tile.k))[None]), scores, -jnp.inf)
        higher = jnp.maximum(peak, jnp.max(scores, axis=1))
        shrink = jnp.exp2(peak - higher)
        weights = jnp.exp2(scores - higher[:, None])
        part = multiply(weights.astype(v.dtype), load(v.at[rows, :], exist))
        return higher, total * shrink + jnp.sum(weights, axis=1), acc * shrink[:, None] + part

    peak, total = jnp.full((tile.q,), LOWEST, jnp.float32), jnp.zeros((tile.q,), jnp.float32)
    peak, total, acc = _visit_all(counts, visit, (peak, total, jnp.zeros(queries.shape, jnp.float32)))
    some = total > 0
    total = jnp.where(some, total, 1)
    lse[:] = jnp.where(some, (peak + jnp.log2(total)) / LOG2_E, -jnp.inf)
    store(out, acc / total[:, None], exists)


def _dq_kernel(tile: Tile, T: int, D: int, order, counts, intervals, q, k, v, d_out, lse, mean, d_q) -> None:
    S, width = k.shape
    exists = within((pl.num_programs(1) - 1 - pl.program_id(1)) * tile.q, (tile.q, width), (T, D))
    queries, d_outs = load(q, exists), load(d_out, exists)
    bounds = [intervals[i, :][:, None] for i in range(4)]
    lse, mean = lse[:][:, None], mean[:][:, None]

    def visit(masked, r, acc):
        start = order[r] * tile.k
        rows, exist = pl.ds(start, tile.k), within(start, (tile.k, width), (S if masked else tile.k, D))
        keys, values = load(k.at[rows, :], exist), load(v.at[rows, :], exist)
        weights = jnp.exp2(multiply(queries, keys, transpose_b=True) * (D**-0.5 * LOG2_E) - lse)
        if masked:
            weights = jnp.where(_visible(bounds, (start + jnp.arange(tile.k))[None]), weights, 0)
        d_scores = weights * (multiply(d_outs, values, transpose_b=True) - mean)
        return acc + multiply(d_scores.astype(k.dtype), keys)

    acc = _visit_all(counts, visit, jnp.zeros(queries.shape, jnp.float32))
    store(d_q, acc * D**-0.5, exists)


def _dkv_kernel(tile: Tile, S: int, D: int, order, counts, intervals, q, k, v, d_out, lse, mean, d_k, d_v) -> None:
    """All scores are transposed, keys by queries, as both sums over queries want them."""
    T, G, width = q.shape
    start = pl.program_id(1) * tile.k
    exist = within(start, (tile.k, width), (S, D))
    keys, values = load(k, exist), load(v, exist)
    positions = (start + jnp.arange(tile.k))[:, None]

    def visit(masked, r, carry, g):
        d_k, d_v = carry
        start = order[r] * tile.q
        rows, exists = pl.ds(start, tile.q), within(start, (tile.q, width), (T if masked else tile.q, D))
        queries, d_outs = load(q.at[rows, g, :], exists), load(d_out.at[rows, g, :], exists)
        weights = jnp.exp2(multiply(keys, queries, transpose_b=True) * (D**-0.5 * LOG2_E) - lse[g, rows][None])
        if masked:
            weights = jnp.where(_visible([intervals[i, rows][None] for i in range(4)], positions), weights, 0)
        d_scores = weights * (multiply(values, d_outs, transpose_b=True) - mean[g, rows][None])
        d_k += multiply(d_scores.astype(q.dtype), queries)
        return d_k, d_v + multiply(weights.astype(q.dtype), d_outs)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    carry = jax.lax.fori_loop(0, G, lambda g, carry: _visit_all(counts, partial(visit, g=g), carry), (zeros, zeros))
    store(d_k, carry[0] * D**-0.5, exist)
    store(d_v, carry[1], exist)
