"""Block decode attention in plain XLA: a loop over chunks of the cache that ends with the longest slot.

    chunk          0    1    2    3    4          S / chunk = 5, allocated
    slot 0         ##   #
    slot 1         ##   ##   ##                   3 chunks are read, by all slots at once
    slot 2

The bound is a traced value: the work follows the committed tokens, not the allocated ones.
"""

import jax
import jax.numpy as jnp

from tracerl_jax.kernels.decode.cache import KVCache
from tracerl_jax.kernels.dispatch import target_platform

# By `benchmarks/decode.py` on a CPU: 256 costs a tenth more, a third where slots are short; 64 up to half more, 512 up
# to twice as much. An accelerator wants few steps.
CHUNK = {"cpu": 128, "gpu": 256, "tpu": 256}
# Below any score and finite, so that a query that has seen no key yet keeps clear of inf - inf.
LOWEST = -1e30


def chunked_decode_attention(
    q: jax.Array,  # [N, Q, H, D]
    cache: KVCache,
    layer: jax.Array,  # []
    k_new: jax.Array,  # [N, Q, K, D]
    v_new: jax.Array,  # [N, Q, K, D]
    cache_len: jax.Array,  # [N] in [0, S]
    new_intervals: jax.Array,  # [N, Q, 2]
    *,
    chunk: int | None = None,
) -> jax.Array:  # [N, Q, H, D]
    """See `decode_attention`. `chunk`: for tests."""
    N, Q, H, D = q.shape
    K, C, S = k_new.shape[2], cache.k.shape[3], cache.capacity
    chunk = min(S, chunk or CHUNK[target_platform()])
    size = chunk if cache.pages is None else C * max(1, chunk // C)  # a part of a page, or whole pages
    rows = q.reshape(N, Q, K, H // K, D).transpose(0, 2, 3, 1, 4).reshape(N, K, -1, D)  # [N, K, X, D]

    def load(array: jax.Array | None, start: jax.Array) -> jax.Array | None:  # -> [N, K, size, ..]
        if array is None:
            return None
        if cache.pages is None:
            corner = (layer, 0, 0, start, *[0] * (array.ndim - 4))
            return jax.lax.dynamic_slice(array, corner, (1, N, K, size, *array.shape[4:]))[0]
        pages = jax.lax.dynamic_slice_in_dim(cache.pages, start // C, size // C, axis=1)
        return jnp.swapaxes(array[layer, pages], 1, 2).reshape(N, K, size, *array.shape[4:])

    def add(state, k, k_scale, v, v_scale, visible):  # k, v [N, K, s, D], visible [N, 1, X or 1, s]
        peak, total, acc = state
        scores = jnp.einsum("nkxd,nksd->nkxs", rows, k.astype(q.dtype), preferred_element_type=jnp.float32) * D**-0.5
        if k_scale is not None:
            scores *= k_scale[:, :, None]
        scores = jnp.where(visible, scores, LOWEST)
        top = jnp.maximum(peak, jnp.max(scores, axis=-1, keepdims=True))
        weights, fade = jnp.where(visible, jnp.exp(scores - top), 0), jnp.exp(peak - top)
        total = total * fade + jnp.sum(weights, axis=-1, keepdims=True)
        if v_scale is not None:
            weights = jnp.where(visible, weights * v_scale[:, :, None], 0)
        part = jnp.einsum("nkxs,nksd->nkxd", weights.astype(q.dtype), v.astype(q.dtype),
                          preferred_element_type=jnp.float32)
        return top, total, acc * fade + part

    def visit(i: jax.Array, state):
        start = jnp.minimum(i * size, S - size)  # the last chunk may overlap the one before
        token = start + jnp.arange(size)
        committed = (token >= i * size) & (token < cache_len[:, None])  # [N, size]
        # A weight of zero does not silence NaN or inf behind the committed tokens, a select does.
        v = jnp.where(committed[:, None, :, None], load(cache.v, start), 0)
        k, k_scale, v_scale = (load(x, start) for x in (cache.k, cache.k_scale, cache.v_scale))
        return add(state, k, k_scale, v, v_scale, committed[:, None, None])

    start, end = new_intervals[..., :1], new_intervals[..., 1:]
    visible = (jnp.arange(Q) >= start) & (jnp.arange(Q) < end)  # [N, Q, Q]
    visible = jnp.tile(visible, (1, H // K, 1))[:, None]
    empty = jnp.full((*rows.shape[:3], 1), LOWEST), jnp.zeros((*rows.shape[:3], 1)), jnp.zeros(rows.shape)
    state = add(empty, jnp.swapaxes(k_new, 1, 2), None, jnp.swapaxes(v_new, 1, 2), None, visible)
    _, total, acc = jax.lax.fori_loop(0, -(-jnp.max(cache_len) // size), visit, state)
    out = acc / jnp.where(total > 0, total, 1)
    return out.reshape(N, K, H // K, Q, D).transpose(0, 3, 1, 2, 4).reshape(N, Q, H, D).astype(q.dtype)
