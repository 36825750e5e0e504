"""Two-interval attention: one integer description of every mask this project needs.

    query t of row n sees keys [s1, e1) u [s2, e2),   (s1, e1, s2, e2) = intervals[n, t]

    causal          [0, t+1)   -              replay group    [start, start of block)  [group start, group end)
    block-causal    [0, end of own block)     left padding    [first real token, end)  -

A backend takes (q, k, v, intervals) with intervals in [0, S] and returns (out [N,T,H,D], lse [N,T,H] f32), both
differentiable in q, k and v. It raises ValueError, in one sentence, for what it cannot run.
"""

import jax
import jax.numpy as jnp

from tracerl_jax.kernels.attention.chunked import chunked_attention
from tracerl_jax.kernels.attention.pallas_gpu import pallas_gpu_attention
from tracerl_jax.kernels.attention.pallas_tpu import HEAD_DIMS, pallas_tpu_attention
from tracerl_jax.kernels.attention.reference import reference_attention
from tracerl_jax.kernels.dispatch import select, target_platform
from tracerl_jax.kernels.pallas_triton import preferred

IMPLEMENTATIONS = {
    "reference": reference_attention,
    "chunked": chunked_attention,
    "pallas_gpu": pallas_gpu_attention,
    "pallas_tpu": pallas_tpu_attention,
}

DTYPES = ("bfloat16", "float32")

# Rows of at most this many (query, key) pairs are a tile or two: one dense softmax beats starting a loop over them.
DENSE_PAIRS = 128 * 128


def attention(
    q: jax.Array,  # [N, T, H, D]
    k: jax.Array,  # [N, S, K, D]
    v: jax.Array,  # [N, S, K, D]
    intervals: jax.Array,  # [N, T, 4] int32
    *,
    implementation: str | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:  # [N, T, H, D], dtype of q; with return_lse also [N, T, H] f32
    """Softmax attention of scale D**-0.5 over the keys of two half-open intervals per query.

    The intervals may be traced, differ per row and query, overlap, be empty (end <= start) or come in any order; they
    are clipped to [0, S]. A query that sees no key returns zeros and passes no gradient. Head h reads key/value head
    h // (H // K). Softmax and accumulation are fp32. Differentiable in q, k and v.

    `return_lse` adds the log-sum-exp of each query's scaled scores, -inf without a key. Its cotangent is
    differentiated as well, so that outputs over different keys can be merged.

    `implementation`: "reference" (dense, the oracle), "chunked" (tiles in plain XLA, O(T) memory), "pallas_tpu",
    "pallas_gpu" or None: the kernel of the platform where it fits (on GPUs: for bfloat16); otherwise "reference" for
    short rows and "chunked" for long ones.

    Raises ValueError for an unknown or unfit implementation, and for shapes and dtypes that do not fit.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[::3] != k.shape[::3] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attention: q {q.shape}, k {k.shape}, v {v.shape} are not [N,T,H,D], [N,S,K,D] twice, K dividing H"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype.name not in DTYPES:
        raise ValueError(f"attention: q {q.dtype}, k {k.dtype}, v {v.dtype} are not one of {', '.join(DTYPES)}")
    if intervals.shape != (*q.shape[:2], 4) or not jnp.issubdtype(intervals.dtype, jnp.integer):
        raise ValueError(f"attention: intervals {intervals.dtype} {intervals.shape} are not int {(*q.shape[:2], 4)}")
    if implementation is None:
        implementation = _default(q, k)
    run = select("attention", IMPLEMENTATIONS, implementation)
    out, lse = run(q, k, v, jnp.clip(intervals, 0, k.shape[1]).astype(jnp.int32))
    return (out, lse) if return_lse else out


def _default(q: jax.Array, k: jax.Array) -> str:
    if target_platform() == "tpu" and q.shape[3] in HEAD_DIMS:
        return "pallas_tpu"
    if target_platform() == "gpu" and preferred(q.shape[3], q.dtype):
        return "pallas_gpu"
    return "reference" if q.shape[1] * k.shape[1] <= DENSE_PAIRS else "chunked"
