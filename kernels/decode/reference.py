"""Dense block decode attention: the oracle every other implementation is tested against."""

from functools import partial

import jax
import jax.numpy as jnp

from tracerl_jax.kernels.decode.cache import KVCache


def reference_decode_attention(
    q: jax.Array,  # [N, Q, H, D]
    cache: KVCache,
    layer: jax.Array,  # []
    k_new: jax.Array,  # [N, Q, K, D]
    v_new: jax.Array,  # [N, Q, K, D]
    cache_len: jax.Array,  # [N] in [0, S]
    new_intervals: jax.Array,  # [N, Q, 2]
) -> jax.Array:  # [N, Q, H, D]
    """See `decode_attention`. Holds [N, H, Q, S] scores and a float32 copy of one layer of the cache."""
    N, Q, H, D = q.shape
    K, S = k_new.shape[2], cache.capacity
    einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    # The G queries of a key/value head see the same keys: [N, K, G * Q, D].
    rows = q.astype(jnp.float32).reshape(N, Q, K, H // K, D).transpose(0, 2, 3, 1, 4).reshape(N, K, -1, D)
    committed = (jnp.arange(S) < cache_len[:, None])[:, None, None]  # [N, 1, 1, S]
    start, end = new_intervals[..., :1], new_intervals[..., 1:]
    visible = jnp.tile((jnp.arange(Q) >= start) & (jnp.arange(Q) < end), (1, H // K, 1))[:, None]  # [N, 1, G * Q, Q]

    def load(values: jax.Array, scale: jax.Array | None) -> jax.Array:  # -> [N, K, S, D]
        x = values[layer].astype(jnp.float32)
        if scale is not None:
            x = x * scale[layer][..., None]
        if cache.pages is not None:
            x = jnp.swapaxes(x[cache.pages], 1, 2).reshape(N, K, S, D)
        # A weight of zero does not silence NaN or inf left in an uncommitted entry, a select does.
        return jnp.where(jnp.swapaxes(committed, 2, 3), x, 0)

    def scores(k: jax.Array, seen: jax.Array) -> jax.Array:
        return jnp.where(seen, einsum("nkxd,nksd->nkxs", rows, k) * D**-0.5, -jnp.inf)

    k_new, v_new = (jnp.swapaxes(x.astype(jnp.float32), 1, 2) for x in (k_new, v_new))
    old, new = scores(load(cache.k, cache.k_scale), committed), scores(k_new, visible)
    peak = jnp.maximum(jnp.max(old, axis=-1, keepdims=True), jnp.max(new, axis=-1, keepdims=True))
    peak = jnp.where(jnp.isfinite(peak), peak, 0)  # no key at all: exp(-inf - 0) = 0
    old, new = jnp.exp(old - peak), jnp.exp(new - peak)
    total = jnp.sum(old, axis=-1, keepdims=True) + jnp.sum(new, axis=-1, keepdims=True)
    out = einsum("nkxs,nksd->nkxd", old, load(cache.v, cache.v_scale)) + einsum("nkxs,nksd->nkxd", new, v_new)
    out = out / jnp.where(total > 0, total, 1)
    return out.reshape(N, K, H // K, Q, D).transpose(0, 3, 1, 2, 4).reshape(N, Q, H, D).astype(q.dtype)
