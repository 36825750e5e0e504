"""Two-interval flash attention for TPUs, forward and backward. What is fetched and computed: see tpu_tiles.

Scores are held transposed, keys by queries. What belongs to a query is then a row along the lanes: its intervals, its
running maximum and sum, its log-sum-exp broadcast over the keys without a relayout. The G query heads of a key/value
head see the same keys, so a tile of 128 tokens is X = G * 128 columns of one matrix product, and the mask of a tile is
made once for all heads.

    scores  [keys, X] = k q^T          out^T [D, X] += v^T weights
    d_v     [keys, D] += weights d_out    d_k [keys, D] += d_scores q    d_q^T [D, X] += k^T d_scores

The backward pass takes one window of keys at a time and walks the queries beneath it: d_k and d_v of the window stay in
vector memory and scores are computed once for all three gradients. d_q is summed over the windows; there is only one
where a row's keys fit.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tracerl_jax.kernels.attention.tpu_tiles import TILE, fetched_windows, make_plan, tile_lists
from tracerl_jax.kernels.dispatch import target_platform

HEAD_DIMS = (64, 80, 96, 128, 256)
# Below any score and finite, so that a query that has seen no key yet keeps clear of inf - inf.
LOWEST = -1e30
LOG2_E = 1.4426950408889634
LEAST_VMEM = 16 * 2**20  # of the chips there are; for tests without one


def pallas_tpu_attention(
    q: jax.Array,  # [N, T, H, D]
    k: jax.Array,  # [N, S, K, D]
    v: jax.Array,  # [N, S, K, D]
    intervals: jax.Array,  # [N, T, 4]
    *,
    block: int | None = None,
    window: int | None = None,
    interpret: pltpu.InterpretParams | bool = False,
) -> tuple[jax.Array, jax.Array]:  # [N, T, H, D], [N, T, H] f32
    """See `attention`. `block` and `window` (tiles of a query block and of a window of keys), `interpret`: for tests.

    Raises ValueError where the program is not for a TPU, and for a head_dim the kernel is not made for.
    """
    if not interpret and target_platform() != "tpu":
        raise ValueError(f"attention: 'pallas_tpu' runs on a TPU, and this program is for {target_platform()}.")
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(f"attention: 'pallas_tpu' is made for head_dim {HEAD_DIMS}, not {q.shape[3]}.")
    return _attend((block, window, interpret), q, k, v, intervals)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, intervals):
    return _forward(options, q, k, v, intervals)[0]


def _forward(options, q, k, v, intervals):
    block, window, interpret = options
    (N, T, H, D), (S, K) = q.shape, k.shape[1:3]
    G, size, vmem = H // K, q.dtype.itemsize, _vmem(interpret)
    # q and out, k and v in two buffers each; the sum of out.
    plan = make_plan((T, S, K, G, D), vmem=vmem, query_bytes=4 * size + 4, key_bytes=4 * size, itemsize=size,
                     block=block, window=window)  # fmt: skip
    lists = tile_lists(_pad(intervals, plan.blocks * plan.block), plan)
    X, queries, keys = G * TILE, plan.block * TILE, plan.window * TILE

    def of_queries(*shape):
        return pl.BlockSpec((None, plan.heads, *shape), lambda n, h, i, w, fetched: (n, h, *_block(i, shape)))

    def of_keys(n, h, i, w, fetched):
        return n, h, fetched[(n * plan.blocks + i) * plan.windows + w], 0

    out, lse = pl.pallas_call(
        partial(_forward_kernel, plan, D**-0.5 * LOG2_E),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(N, K // plan.heads, plan.blocks, plan.windows),
            in_specs=[
                pl.BlockSpec((None, None, None, *lists.shape[3:]), lambda n, h, i, w, fetched: (n, w, i, 0, 0),
                             memory_space=pltpu.SMEM),
                pl.BlockSpec((None, None, plan.block, 4, TILE), lambda n, h, i, w, fetched: (n, i, 0, 0, 0)),
                of_queries(G, queries, D),
                pl.BlockSpec((None, plan.heads, keys, D), of_keys),
                pl.BlockSpec((None, plan.heads, keys, D), of_keys),
            ],
            out_specs=[of_queries(G, queries, D), of_queries(None, plan.block, X)],
            scratch_shapes=[
                pltpu.VMEM((plan.block, plan.heads, 1, X), jnp.float32),
                pltpu.VMEM((plan.block, plan.heads, 1, X), jnp.float32),
                pltpu.VMEM((plan.block, plan.heads, D, X), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((N, K, G, plan.blocks * queries, D), q.dtype),
            jax.ShapeDtypeStruct((N, K, plan.blocks, plan.block, X), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem),
        cost_estimate=_cost(q, k, products=2, moved=2 * q.size + 2 * k.size),
        interpret=interpret,
        name="attention_forward",
    )(
        fetched_windows(lists).reshape(-1), lists, _interval_rows(intervals, plan), _query_heads(q, K, plan),
        *(_key_heads(x, plan) for x in (k, v)),
    )  # fmt: skip
    out, lse = _from_query_heads(out, T), _from_rows(lse, T, G)
    return (out, lse), (q, k, v, intervals, out, lse)


def _forward_kernel(plan, scale, fetched, lists, intervals, q, k, v, out, lse, peak, total, acc):
    """One query block under one window of keys. The running softmax of a query is (peak, total, acc), base 2."""
    w = pl.program_id(3)

    @pl.when(w == 0)
    def _():
        peak[...] = jnp.full_like(peak, LOWEST)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def query_tile(i, _):
        def visit(j, _):
            tiles = _visited(plan, lists, i, j)
            bias = _bias(intervals[i], tiles, q.shape[1])
            for h in range(plan.heads):
                scores = _dot(_keys(plan, k, h, tiles, w), _queries(q, h, i), 1, 1) * scale + bias
                top = jnp.maximum(peak[i, h], jnp.max(scores, axis=0, keepdims=True))
                weights, fade = jnp.exp2(scores - top), jnp.exp2(peak[i, h] - top)
                peak[i, h], total[i, h] = top, total[i, h] * fade + jnp.sum(weights, axis=0, keepdims=True)
                acc[i, h] = acc[i, h] * fade + _dot(_keys(plan, v, h, tiles, w), weights.astype(v.dtype), 0, 0)

        jax.lax.fori_loop(0, lists[i, 0], visit, None)

        @pl.when(w == plan.windows - 1)
        def _():
            for h in range(plan.heads):
                some = total[i, h] > 0
                sums = jnp.where(some, total[i, h], 1)
                _write_queries(out, h, i, acc[i, h] / sums)
                lse[h, pl.ds(i, 1), :] = jnp.where(some, (peak[i, h] + jnp.log2(sums)) / LOG2_E, -jnp.inf)

    jax.lax.fori_loop(0, plan.block, query_tile, None)


def _backward(options, residuals, cotangents):
    block, window, interpret = options
    q, k, v, intervals, out, lse = residuals
    d_out, d_lse = cotangents
    (N, T, H, D), (S, K) = q.shape, k.shape[1:3]
    G, size, vmem = H // K, q.dtype.itemsize, _vmem(interpret)
    # q, d_out and d_q, k, v and their gradients in two buffers each; the sums of the gradients.
    plan = make_plan((T, S, K, G, D), vmem=vmem, query_bytes=4 * size + 12, key_bytes=8 * size + 8, itemsize=size,
                     block=block, window=window)  # fmt: skip
    seen = jnp.isfinite(lse)
    mean = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_lse
    # A query without a key has weights exp2(-inf - 0) = 0 instead of exp2(inf - inf).
    lse, mean = jnp.where(seen, lse * LOG2_E, 0), jnp.where(seen, mean, 0)
    lists = tile_lists(_pad(intervals, plan.blocks * plan.block), plan)
    X, queries, keys = G * TILE, plan.block * TILE, plan.window * TILE

    def of_queries(*shape):
        return pl.BlockSpec((None, plan.heads, *shape), lambda n, h, i, w: (n, h, *_block(i, shape)))

    of_window = pl.BlockSpec((None, plan.heads, keys, D), lambda n, h, i, w: (n, h, w[0], 0))
    d_window = pl.BlockSpec((None, plan.heads, keys, D), lambda n, h, i, w: (n, h, 0, 0))
    d_keys = jax.ShapeDtypeStruct((N, K, keys, D), k.dtype)
    call = pl.pallas_call(
        partial(_backward_kernel, plan, D**-0.5),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(N, K // plan.heads, plan.blocks),
            in_specs=[
                pl.BlockSpec((None, None, None, *lists.shape[3:]), lambda n, h, i, w: (n, w[0], i, 0, 0),
                             memory_space=pltpu.SMEM),
                pl.BlockSpec((None, None, plan.block, 4, TILE), lambda n, h, i, w: (n, i, 0, 0, 0)),
                of_queries(G, queries, D),
                of_window,
                of_window,
                of_queries(G, queries, D),
                of_queries(None, plan.block, X),
                of_queries(None, plan.block, X),
            ],
            out_specs=[of_queries(G, queries, D), d_window, d_window],
            scratch_shapes=[
                pltpu.VMEM((plan.heads, D, X), jnp.float32),
                pltpu.VMEM((plan.heads, keys, D), jnp.float32),
                pltpu.VMEM((plan.heads, keys, D), jnp.float32),
            ],
        ),
        # Summed over several windows in fp32.
        out_shape=[jax.ShapeDtypeStruct((N, K, G, plan.blocks * queries, D),
                                        q.dtype if plan.windows == 1 else jnp.float32), d_keys, d_keys],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem),
        cost_estimate=_cost(q, k[:, :keys], products=5, moved=3 * q.size + 4 * k.size // plan.windows),
        interpret=interpret,
        name="attention_backward",
    )  # fmt: skip
    operands = (
        lists, _interval_rows(intervals, plan), _query_heads(q, K, plan), *(_key_heads(x, plan) for x in (k, v)),
        _query_heads(d_out.astype(q.dtype), K, plan), *(_rows(x, K, plan) for x in (lse, mean)),
    )  # fmt: skip
    if plan.windows == 1:
        d_q, *d_kv = call(jnp.zeros(1, jnp.int32), *operands)
    else:

        def add_window(d_q, w):
            # Fused with what stores its results, the kernel would lose its share of vector memory.
            part, *d_kv = jax.lax.optimization_barrier(call(w[None], *operands))
            return d_q + part, d_kv

        start = jnp.zeros((N, K, G, plan.blocks * queries, D), jnp.float32)
        d_q, d_kv = jax.lax.scan(add_window, start, jnp.arange(plan.windows, dtype=jnp.int32))
        d_kv = [jnp.moveaxis(x, 0, 2).reshape(N, K, -1, D) for x in d_kv]
    d_k, d_v = (x.swapaxes(1, 2)[:, :S] for x in d_kv)
    return _from_query_heads(d_q.astype(q.dtype), T), d_k, d_v, None


def _backward_kernel(
    plan, scale, window, lists, intervals, q, k, v, d_out, lse, mean, d_q, d_k, d_v, d_q_sum, d_k_sum, d_v_sum
):
    """One query block under the window: its d_q, and its part of d_k and d_v."""
    w = window[0]

    @pl.when(pl.program_id(2) == 0)
    def _():
        d_k_sum[...] = jnp.zeros_like(d_k_sum)
        d_v_sum[...] = jnp.zeros_like(d_v_sum)

    def query_tile(i, _):
        d_q_sum[...] = jnp.zeros_like(d_q_sum)

        def visit(j, _):
            tiles = _visited(plan, lists, i, j)
            bias = _bias(intervals[i], tiles, q.shape[1])
            for h in range(plan.heads):
                keys, queries, d_result = _keys(plan, k, h, tiles, w), _queries(q, h, i), _queries(d_out, h, i)
                scores = _dot(keys, queries, 1, 1) * (scale * LOG2_E) + bias
                weights = jnp.exp2(scores - lse[h, pl.ds(i, 1), :])
                d_weights = _dot(_keys(plan, v, h, tiles, w), d_result, 1, 1)
                d_scores = (weights * (d_weights - mean[h, pl.ds(i, 1), :])).astype(q.dtype)
                d_values = _dot(weights.astype(q.dtype), d_result, 1, 0)
                d_keys = _dot(d_scores, queries, 1, 0)
                d_q_sum[h] += _dot(keys, d_scores, 0, 0)
                for m in range(plan.visit):
                    at, part = _place(plan, tiles, m, w), slice(m * TILE, (m + 1) * TILE)
                    d_k_sum[h, at, :] += d_keys[part]
                    d_v_sum[h, at, :] += d_values[part]

        jax.lax.fori_loop(0, lists[i, 0], visit, None)
        for h in range(plan.heads):
            _write_queries(d_q, h, i, d_q_sum[h] * scale)

    jax.lax.fori_loop(0, plan.block, query_tile, None)

    @pl.when(pl.program_id(2) == plan.blocks - 1)
    def _():
        d_k[...] = (d_k_sum[...] * scale).astype(d_k.dtype)
        d_v[...] = d_v_sum[...].astype(d_v.dtype)


_attend.defvjp(_forward, _backward)


# Inside the kernels: refs of one block, [heads, G, queries, D], [heads, keys, D].


def _dot(a, b, contract_a, contract_b):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _visited(plan, lists, i, j):
    """Key tiles of the j-th visit of query tile i."""
    return [lists[i, 1 + j * plan.visit + m] for m in range(plan.visit)]


def _place(plan, tiles, m, w):
    """Where the window holds the m-th tile of a visit; behind the end of the list, the first tile, seen by no query."""
    tile = jnp.where(tiles[m] < plan.windows * plan.window, tiles[m], tiles[0])
    return pl.ds(pl.multiple_of((tile - w * plan.window) * TILE, TILE), TILE)


def _keys(plan, ref, h, tiles, w):
    return jnp.concatenate([ref[h, _place(plan, tiles, m, w), :] for m in range(plan.visit)], axis=0)


def _queries(ref, h, i):
    """-> [X, D]"""
    return ref[h, :, pl.ds(pl.multiple_of(i * TILE, TILE), TILE), :].reshape(-1, ref.shape[3])


def _write_queries(ref, h, i, value):
    """value [D, X] f32."""
    at = pl.ds(pl.multiple_of(i * TILE, TILE), TILE)
    for g in range(ref.shape[1]):
        ref[h, g, at, :] = value[:, g * TILE : (g + 1) * TILE].T.astype(ref.dtype)


def _bias(intervals, tiles, G):
    """intervals [4, TILE] -> [visited keys, X] f32: 0 where the query sees the key, else -inf."""
    s1, e1, s2, e2 = (intervals[i : i + 1] for i in range(4))
    key = jax.lax.broadcasted_iota(jnp.int32, (TILE, TILE), 0)
    parts = []
    for tile in tiles:
        at = key + tile * TILE
        visible = ((at >= s1) & (at < e1)) | ((at >= s2) & (at < e2))
        parts.append(jnp.where(visible, 0.0, -jnp.inf))
    return jnp.concatenate([jnp.concatenate(parts, axis=0)] * G, axis=1)


# Outside: layouts. Operands have their heads first, and whole blocks and windows.


def _vmem(interpret):
    return LEAST_VMEM if interpret else pltpu.get_tpu_info().vmem_capacity_bytes


def _block(i, shape):
    """Index of the i-th block of queries: [G, queries, D], or [blocks] of [block, X]."""
    return (i, 0, 0) if shape[0] is None else (0, i, 0)


def _pad(x, tiles):
    """x [N,T,..] -> [N, tiles * TILE, ..]"""
    return jnp.pad(x, ((0, 0), (0, tiles * TILE - x.shape[1])) + ((0, 0),) * (x.ndim - 2))


def _query_heads(x, K, plan):
    """[N,T,H,D] -> [N,K,G,T,D]"""
    N, _, H, D = x.shape
    x = _pad(x, plan.blocks * plan.block)
    return x.reshape(N, -1, K, H // K, D).transpose(0, 2, 3, 1, 4)


def _from_query_heads(x, T):
    N, K, G, _, D = x.shape
    return x[:, :, :, :T].transpose(0, 3, 1, 2, 4).reshape(N, T, K * G, D)


def _key_heads(x, plan):
    """[N,S,K,D] -> [N,K,S,D]"""
    return _pad(x, plan.windows * plan.window).swapaxes(1, 2)


def _rows(x, K, plan):
    """[N,T,H] -> [N, K, blocks, block, X]"""
    N, _, H = x.shape
    x = _pad(x, plan.blocks * plan.block).reshape(N, plan.blocks, plan.block, TILE, K, H // K)
    return x.transpose(0, 4, 1, 2, 5, 3).reshape(N, K, plan.blocks, plan.block, -1)


def _from_rows(x, T, G):
    N, K, blocks, block, X = x.shape
    x = x.reshape(N, K, blocks, block, G, TILE).transpose(0, 2, 3, 5, 1, 4)
    return x.reshape(N, -1, K * G)[:, :T]


def _interval_rows(intervals, plan):
    """[N,T,4] -> [N, blocks, block, 4, TILE]"""
    x = _pad(intervals, plan.blocks * plan.block)
    return x.reshape(len(x), plan.blocks, plan.block, TILE, 4).swapaxes(3, 4)


def _cost(q, k, products, moved):
    """Of queries that see all keys; how many they see is not known before the program runs. `moved`: values."""
    (N, T, H, D), S = q.shape, k.shape[1]
    return pl.CostEstimate(
        flops=2 * products * N * H * T * S * D,
        transcendentals=N * H * T * S,
        bytes_accessed=moved * q.dtype.itemsize,
    )
