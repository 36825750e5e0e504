"""Attention of a denoising step: Q new tokens of every slot over its committed cache and each other.

    keys of slot n:   cache[0 : cache_len[n]]   new[0 : Q]
                      |---- committed -----|    |- new --|

    separate commit    Q = B     every query sees the whole block: new_intervals = None
    fused commit       Q = 2B    new = [finished block | current block], finished sees [0, B), current sees [0, 2B);
                                 in a slot without a finished block, current sees [B, 2B)

A backend takes (q, cache, layer, k_new, v_new, cache_len, new_intervals), with cache_len in [0, S] and new_intervals
never None, and raises ValueError, in one sentence, for what it cannot run. Inference only: no gradient is defined.
"""

import jax
import jax.numpy as jnp

from tracerl_jax.kernels.decode.cache import KVCache
from tracerl_jax.kernels.decode.chunked import chunked_decode_attention
from tracerl_jax.kernels.decode.pallas_gpu import pallas_gpu_decode_attention
from tracerl_jax.kernels.decode.pallas_tpu import HEAD_DIMS, fits, pallas_tpu_decode_attention
from tracerl_jax.kernels.decode.reference import reference_decode_attention
from tracerl_jax.kernels.dispatch import select, target_platform
from tracerl_jax.kernels.pallas_triton import addressable, preferred

IMPLEMENTATIONS = {
    "reference": reference_decode_attention,
    "chunked": chunked_decode_attention,
    "pallas_gpu": pallas_gpu_decode_attention,
    "pallas_tpu": pallas_tpu_decode_attention,
}

DTYPES = ("bfloat16", "float32")


def decode_attention(
    q: jax.Array,  # [N, Q, H, D]
    cache: KVCache,
    layer: jax.Array | int,  # [] int32
    k_new: jax.Array,  # [N, Q, K, D]
    v_new: jax.Array,  # [N, Q, K, D]
    cache_len: jax.Array,  # [N] int32
    *,
    new_intervals: jax.Array | None = None,  # [N, Q, 2] int32
    implementation: str | None = None,
) -> jax.Array:  # [N, Q, H, D], dtype of q
    """Softmax attention of scale D**-0.5; every query sees cache[:cache_len[n]] and the new tokens of its interval.

    One softmax over both parts, accumulated in float32. What the cache holds behind cache_len, NaN and inf included,
    has no influence, and a slot's result does not depend on the others; new keys and values must be finite. A query
    without any key returns zeros. Head h reads key/value head h // (H // K).

    The whole cache and a layer number, not the layer's slice: a slice of a stack that a loop over layers hands to a
    kernel is a copy of all S tokens of all slots, however few are committed.

    Args:
      q, k_new, v_new: bfloat16 or float32, the same for all.
      cache: in the dtype of q, or int8 with scales; slot-contiguous or paged.
      layer: which layer of the cache, in [0, L).
      cache_len: committed tokens per slot; clipped to [0, S].
      new_intervals: per query the half-open range of new tokens it sees; None: all of them.
      implementation: "reference" (dense, the oracle), "chunked" (plain XLA, as long as the longest slot),
        "pallas_tpu" and "pallas_gpu" (as long as all slots together) or None: the kernel of the platform where it fits
        (on GPUs: for bfloat16), otherwise "chunked".

    Raises:
      ValueError: shapes or dtypes that do not fit, an unknown implementation, or a named one that cannot run here.
    """
    _check(q, cache, k_new, v_new, cache_len, new_intervals)
    N, Q = q.shape[:2]
    if new_intervals is None:
        new_intervals = jnp.broadcast_to(jnp.array([0, Q], jnp.int32), (N, Q, 2))
    if implementation is None:
        implementation = _default(q, cache, k_new)
    run = select("decode_attention", IMPLEMENTATIONS, implementation)
    layer, new_intervals = (jnp.asarray(x, jnp.int32) for x in (layer, new_intervals))
    cache_len = jnp.clip(jnp.asarray(cache_len, jnp.int32), 0, cache.capacity)
    return run(q, cache, layer, k_new, v_new, cache_len, new_intervals)


def _default(q: jax.Array, cache: KVCache, k_new: jax.Array) -> str:
    D = q.shape[-1]
    if target_platform() == "tpu" and D in HEAD_DIMS and fits(q, k_new):
        return "pallas_tpu"
    if target_platform() == "gpu" and preferred(D, q.dtype) and addressable(cache.k):
        return "pallas_gpu"
    return "chunked"


def _check(q, cache, k_new, v_new, cache_len, new_intervals) -> None:
    """Raises ValueError with one sentence about the first operand that does not fit."""

    def refuse(what: str) -> None:
        raise ValueError(f"decode_attention: {what}")

    if q.ndim != 4 or k_new.ndim != 4 or cache.k.ndim != 5:
        refuse(f"q {q.shape}, k_new {k_new.shape}, cache.k {cache.k.shape} are not [N,Q,H,D], [N,Q,K,D], [L,P,K,C,D].")
    N, Q, H, D = q.shape
    K = k_new.shape[2]
    if k_new.shape != (N, Q, K, D) or v_new.shape != k_new.shape or H % K:
        refuse(f"q {q.shape}, new {k_new.shape} and {v_new.shape} are not [N,Q,H,D] and twice [N,Q,K,D], K dividing H.")
    if k_new.dtype != q.dtype or v_new.dtype != q.dtype or q.dtype.name not in DTYPES:
        refuse(f"q {q.dtype}, k_new {k_new.dtype}, v_new {v_new.dtype} are not one of {', '.join(DTYPES)}.")
    L, P, _, C, _ = cache.k.shape
    if cache.k.shape != (L, P, K, C, D) or cache.v.shape != cache.k.shape or 0 in (L, P, C):
        refuse(f"cache {cache.k.shape} and {cache.v.shape} are not twice [L,P,K,C,D] with K = {K}, D = {D}.")
    if cache.k.dtype != cache.v.dtype or cache.k.dtype not in (q.dtype, jnp.int8):
        refuse(f"cache of {cache.k.dtype} and {cache.v.dtype} is neither {q.dtype} like q nor int8.")
    for name, scale in (("k_scale", cache.k_scale), ("v_scale", cache.v_scale)):
        if (scale is not None) != (cache.k.dtype == jnp.int8):
            refuse(f"a cache of {cache.k.dtype} {'needs' if scale is None else 'has no'} {name}.")
        if scale is not None and (scale.shape != (L, P, K, C) or scale.dtype != jnp.float32):
            refuse(f"{name} {scale.dtype}{scale.shape} is not float32 [L,P,K,C] = {(L, P, K, C)}.")
    if cache.pages is None and P != N:
        refuse(f"a cache without page table has one page per slot, not {P} for {N} slots.")
    W = "W" if cache.pages is None else cache.pages.shape[-1]
    for name, array, shape in (
        ("cache.pages", cache.pages, (N, W)),
        ("cache_len", cache_len, (N,)),
        ("new_intervals", new_intervals, (N, Q, 2)),
    ):
        if array is not None and (array.shape != shape or not jnp.issubdtype(array.dtype, jnp.integer)):
            refuse(f"{name} {array.dtype}{array.shape} is not an integer array of shape {shape}.")
