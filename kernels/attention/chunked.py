"""Flash-style two-interval attention in plain XLA: O(T) memory, work only where the intervals are.

Queries and keys are cut into tiles. A tile of queries visits the key tiles that its intervals touch and no other; how
many is a traced loop bound, so layouts change from step to step without recompilation.

    keys           | clean stream          | groups      |
    clean queries  | # # # # . . . . . . . | . . . . . . |   one range
    group queries  | # # # # # # . . . . . | . . # . . . |   two ranges, joined where they overlap

A *unit* is one key/value head of one row: units share nothing. The G query heads of a unit see the same keys, so a tile
of BQ tokens is one matrix of X = G * BQ query rows. C groups of U units are worked off in turn, the units of a group
at once.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tracerl_jax.kernels.attention.masks import nth_tile, tile_ranges, visible_keys
from tracerl_jax.kernels.dispatch import target_platform

# Below any score and finite, so that a query that has seen no key yet keeps clear of inf - inf.
LOWEST = -1e30


class Plan(NamedTuple):
    """Static shape of the work: query rows X and keys of a tile, and whether units run one by one or all at once."""

    rows: int
    keys: int
    one_by_one: bool


# A core does best on one unit at a time with tiles that stay in its nearest cache: 128 x 64 took the least processor
# time of 64..256 x 32..128 (H = 8, K = 4, D = 64). An accelerator wants few large steps over all units.
CPU_PLAN = Plan(rows=128, keys=64, one_by_one=True)
ACCELERATOR_PLAN = Plan(rows=512, keys=256, one_by_one=False)


def chunked_attention(
    q: jax.Array,  # [N, T, H, D]
    k: jax.Array,  # [N, S, K, D]
    v: jax.Array,  # [N, S, K, D]
    intervals: jax.Array,  # [N, T, 4]
    *,
    plan: Plan | None = None,
) -> tuple[jax.Array, jax.Array]:  # [N, T, H, D], [N, T, H] f32
    """See `attention`. `plan`: for tuning and tests; by default the one for the platform of the program."""
    plan = plan or (CPU_PLAN if target_platform() == "cpu" else ACCELERATOR_PLAN)
    N, T, H, D = q.shape
    S, K = k.shape[1:3]
    G = H // K
    BQ, BK = min(T, max(1, plan.rows // G)), min(S, plan.keys)
    n_q, n_k = -(-T // BQ), -(-S // BK)
    C, U = (N * K, 1) if plan.one_by_one else (1, N * K)

    def pad(x: jax.Array, length: int) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, length - x.shape[1])) + ((0, 0),) * (x.ndim - 2))

    q = pad(q, n_q * BQ).reshape(N, n_q, BQ, K, G, D).transpose(1, 0, 3, 4, 2, 5)  # [n_q, N, K, G, BQ, D]
    q = q.reshape(n_q, C, U, G * BQ, D).swapaxes(0, 1)
    k, v = (pad(x, n_k * BK).swapaxes(1, 2).reshape(C, U, n_k * BK, D) for x in (k, v))
    intervals = pad(intervals, n_q * BQ).reshape(N, n_q, BQ, 4)
    intervals = jnp.broadcast_to(intervals[:, None], (N, K, n_q, BQ, 4)).reshape(C, U, n_q, BQ, 4).swapaxes(1, 2)
    out, lse = _attend(BK, q, k, v, intervals)  # [C, n_q, U, X, D], [C, n_q, U, X]
    lse = jnp.where(lse > LOWEST, lse, -jnp.inf)

    def unpad(x: jax.Array) -> jax.Array:  # [C, n_q, U, X, d] -> [N, T, H, d]
        x = x.swapaxes(0, 1).reshape(n_q, N, K, G, BQ, -1).transpose(1, 0, 4, 2, 3, 5)
        return x.reshape(N, n_q * BQ, H, -1)[:, :T]

    return unpad(out), unpad(lse)[..., 0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    BK: int,
    q: jax.Array,  # [C, n_q, U, X, D]
    k: jax.Array,  # [C, U, S, D], S a multiple of BK
    v: jax.Array,  # [C, U, S, D]
    intervals: jax.Array,  # [C, n_q, U, BQ, 4] in [0, S]
) -> tuple[jax.Array, jax.Array]:  # [C, n_q, U, X, D], [C, n_q, U, X] (LOWEST without a key)
    return _forward(BK, q, k, v, intervals)[0]


def _take(x: jax.Array, tile: jax.Array, BK: int) -> jax.Array:
    """x [U,S,D], tile [U] -> [U,BK,D]."""
    return jax.vmap(lambda unit, i: jax.lax.dynamic_slice_in_dim(unit, i * BK, BK))(x, tile)


def _put(x: jax.Array, tile: jax.Array, value: jax.Array) -> jax.Array:
    """x [U,S,D] with the tiles [U] replaced by value [U,BK,D]."""
    BK = value.shape[1]
    return jax.vmap(lambda unit, i, new: jax.lax.dynamic_update_slice_in_dim(unit, new, i * BK, 0))(x, tile, value)


def _masked_scores(q: jax.Array, keys: jax.Array, intervals: jax.Array, tile: jax.Array, live: jax.Array) -> jax.Array:
    """q [U,X,D], keys [U,BK,D], intervals [U,BQ,4], tile and live [U] -> scores [U,X,BK] f32, -inf where hidden."""
    (U, X, D), BK = q.shape, keys.shape[1]
    scores = _dot("uxd,usd->uxs", q, keys) * D**-0.5
    positions = tile[:, None, None] * BK + jnp.arange(BK)
    visible = visible_keys(intervals, positions) & live[:, None, None]  # [U, BQ, BK]
    visible = jnp.broadcast_to(visible[:, None], (U, X // visible.shape[1], *visible.shape[1:])).reshape(U, X, BK)
    return jnp.where(visible, scores, -jnp.inf)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _forward(BK, q, k, v, intervals):
    def group(args):
        q, k, v, intervals, ranges = args
        return jax.lax.map(lambda tile: query_tile(*tile, k, v), (q, intervals, ranges))

    def query_tile(q, intervals, ranges, k, v):
        def visit(j, carry):
            peak, total, acc = carry  # [U, X], [U, X], [U, X, D]
            tile, live = nth_tile(ranges, j)
            scores = _masked_scores(q, _take(k, tile, BK), intervals, tile, live)
            higher = jnp.maximum(peak, jnp.max(scores, axis=-1))
            shrink = jnp.exp(peak - higher)
            weights = jnp.exp(scores - higher[..., None])
            part = _dot("uxs,usd->uxd", weights.astype(v.dtype), _take(v, tile, BK))
            return higher, total * shrink + jnp.sum(weights, axis=-1), acc * shrink[..., None] + part

        zeros = jnp.zeros(q.shape, jnp.float32)
        start = (zeros[..., 0] + LOWEST, zeros[..., 0], zeros)
        peak, total, acc = jax.lax.fori_loop(0, _visits(ranges), visit, start)
        total = jnp.where(total > 0, total, 1.0)  # no key: acc is 0, and so shall be the output
        return (acc / total[..., None]).astype(q.dtype), peak + jnp.log(total)

    out, lse = jax.lax.map(group, (q, k, v, intervals, tile_ranges(intervals, BK)))
    return (out, lse), (q, k, v, intervals, out, lse)


def _backward(BK, residuals, cotangents):
    q, k, v, intervals, out, lse = residuals
    d_out, d_lse = cotangents
    scale = q.shape[-1] ** -0.5

    def group(args):
        q, k, v, intervals, out, lse, d_out, d_lse, ranges = args
        zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
        tiles = (q, intervals, out, lse, d_out, d_lse, ranges)
        (d_k, d_v), d_q = jax.lax.scan(lambda carry, tile: query_tile(*carry, *tile, k, v), zeros, tiles)
        return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype)

    def query_tile(d_k, d_v, q, intervals, out, lse, d_out, d_lse, ranges, k, v):
        mean = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
        mean = (mean - d_lse)[..., None]

        def visit(j, carry):
            d_q, d_k, d_v = carry
            tile, live = nth_tile(ranges, j)
            keys, values = _take(k, tile, BK), _take(v, tile, BK)
            weights = jnp.exp(_masked_scores(q, keys, intervals, tile, live) - lse[..., None])
            d_scores = weights * (_dot("uxd,usd->uxs", d_out, values) - mean) * scale
            d_scores, weights = d_scores.astype(q.dtype), weights.astype(q.dtype)
            d_k = _put(d_k, tile, _take(d_k, tile, BK) + _dot("uxs,uxd->usd", d_scores, q))
            d_v = _put(d_v, tile, _take(d_v, tile, BK) + _dot("uxs,uxd->usd", weights, d_out))
            return d_q + _dot("uxs,usd->uxd", d_scores, keys), d_k, d_v

        d_q, d_k, d_v = jax.lax.fori_loop(0, _visits(ranges), visit, (jnp.zeros(q.shape, jnp.float32), d_k, d_v))
        return (d_k, d_v), d_q.astype(q.dtype)

    ranges = tile_ranges(intervals, BK)
    d_q, d_k, d_v = jax.lax.map(group, (q, k, v, intervals, out, lse, d_out, d_lse, ranges))
    return d_q, d_k, d_v, None


def _visits(ranges: jax.Array) -> jax.Array:
    """Of the unit that needs most."""
    return jnp.max(ranges[..., 1] + ranges[..., 3])


_attend.defvjp(_forward, _backward)
