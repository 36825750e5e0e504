"""Dense two-interval attention: the oracle every other implementation is tested against."""

import jax
import jax.numpy as jnp

from tracerl_jax.kernels.attention.masks import visible_keys


def reference_attention(
    q: jax.Array,  # [N, T, H, D]
    k: jax.Array,  # [N, S, K, D]
    v: jax.Array,  # [N, S, K, D]
    intervals: jax.Array,  # [N, T, 4]
) -> tuple[jax.Array, jax.Array]:  # [N, T, H, D], [N, T, H] f32
    """See `attention`. Holds [N, H, T, S] scores."""
    N, T, H, D = q.shape
    S, K = k.shape[1:3]
    grouped = q.reshape(N, T, K, H // K, D)
    scores = jnp.einsum("ntkgd,nskd->nkgts", grouped, k, preferred_element_type=jnp.float32) * D**-0.5
    visible = visible_keys(intervals, jnp.arange(S))[:, None, None]  # [N, 1, 1, T, S]
    # A row without visible keys has maximum -inf; subtracting 0 instead keeps inf - inf out of values and gradients.
    scores = jnp.where(visible, scores, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    weights = (weights / total).astype(v.dtype)
    out = jnp.einsum("nkgts,nskd->ntkgd", weights, v, preferred_element_type=jnp.float32)
    lse = jnp.where(some, peak + jnp.log(total), -jnp.inf)[..., 0]  # [N, K, G, T]
    return out.reshape(N, T, H, D).astype(q.dtype), lse.reshape(N, H, T).swapaxes(1, 2)
