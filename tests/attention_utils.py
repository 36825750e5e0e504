"""Shared by the attention tests: float64 maths, random arrays, and every kind of intervals the project makes."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

RESULTS = ("out", "lse", "d_q", "d_k", "d_v")


def dense(q, k, v, intervals, d_out, d_lse):
    """Plain maths in float64 -> (out, lse, d_q, d_k, d_v)."""
    q, k, v, d_out, d_lse = (np.asarray(x, np.float64) for x in (q, k, v, d_out, d_lse))
    (N, S, K, D), H = k.shape, q.shape[2]
    k, v = (np.repeat(x, H // K, axis=2) for x in (k, v))
    visible = visible_pairs(intervals, S)[:, None]  # [N, 1, T, S]
    scores = np.where(visible, np.einsum("nthd,nshd->nhts", q, k) / np.sqrt(D), -np.inf)
    peak = np.max(scores, -1, keepdims=True, initial=-1e30)
    weights = np.where(visible, np.exp(scores - peak), 0)
    total = weights.sum(-1, keepdims=True)
    lse = np.where(total > 0, peak + np.log(np.maximum(total, 1e-300)), -np.inf)[..., 0]
    weights = weights / np.maximum(total, 1e-300)
    d_weights = np.einsum("nthd,nshd->nhts", d_out, v)
    mean = (weights * d_weights).sum(-1) - d_lse.swapaxes(1, 2)
    d_scores = weights * (d_weights - mean[..., None]) / np.sqrt(D)

    def per_kv_head(x):
        return x.reshape(N, S, K, H // K, D).sum(3)

    return (
        np.einsum("nhts,nshd->nthd", weights, v),
        lse.swapaxes(1, 2),
        np.einsum("nhts,nshd->nthd", d_scores, k),
        per_kv_head(np.einsum("nhts,nthd->nshd", d_scores, q)),
        per_kv_head(np.einsum("nhts,nthd->nshd", weights, d_out)),
    )


def visible_pairs(intervals, S):
    """[N,T,4] -> [N,T,S] bool."""
    s1, e1, s2, e2 = np.moveaxis(np.asarray(intervals), -1, 0)[..., None]
    keys = np.arange(S)
    return ((keys >= s1) & (keys < e1)) | ((keys >= s2) & (keys < e2))


def draw_arrays(N, T, S, H, K, D, seed=0, dtype=jnp.float32):
    """(q, k, v, d_out, d_lse)."""
    rng = np.random.default_rng(seed)
    shapes = [(N, T, H, D), (N, S, K, D), (N, S, K, D), (N, T, H, D)]
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    return [*arrays, jnp.asarray(rng.normal(size=(N, T, H)), jnp.float32)]


@cache
def value_and_gradients(run):
    """run(q, k, v, intervals) -> (out, lse) as a jitted (q, k, v, intervals, d_out, d_lse) -> RESULTS."""

    @jax.jit
    def compute(q, k, v, intervals, d_out, d_lse):
        results, pull = jax.vjp(lambda *qkv: run(*qkv, intervals), q, k, v)
        return *results, *pull((d_out, d_lse))

    return compute


def check(run, arrays, intervals, atol=3e-6):
    """Compares all RESULTS with `dense`, to `atol` of the largest value of each."""
    q, k, v, d_out, d_lse = arrays
    intervals = np.clip(intervals, 0, k.shape[1])
    actual = value_and_gradients(run)(q, k, v, jnp.asarray(intervals, jnp.int32), d_out, d_lse)
    for name, a, e in zip(RESULTS, actual, dense(q, k, v, intervals, d_out, d_lse), strict=True):
        assert a.shape == e.shape and a.dtype == (jnp.float32 if name == "lse" else q.dtype), name
        bound = atol * max(1, np.abs(e, where=np.isfinite(e), out=np.zeros_like(e)).max())
        np.testing.assert_allclose(np.asarray(a, np.float64), e, atol=bound, rtol=0, err_msg=name)
    return actual


# Interval patterns: [T, 4] for T queries over T keys.


def causal(T, rng):
    t = np.arange(T)
    return np.stack([0 * t, t + 1, 0 * t, 0 * t], -1)


def block_causal(T, rng):
    B, start = rng.integers(1, 9), rng.integers(0, T // 2)
    t = np.arange(T)
    return np.stack([0 * t, 0 * t, 0 * t + start, np.minimum((t // B + 1) * B, T)], -1)  # nothing before `start`


def left_padding(T, rng):
    first = rng.integers(0, T)
    return np.where(np.arange(T)[:, None] < first, 0, [[first, T, 0, 0]])


def everything(T, rng):
    return np.tile([0, T, 0, 0], (T, 1))


def single_key(T, rng):
    key = rng.integers(0, T, size=T)
    return np.stack([0 * key, 0 * key, key, key + 1], -1)


def replay(T, rng, B=None, longest=5):
    """Responses `clean | group group ...` of up to `longest` blocks one after another, then padding."""
    rows, B = [], B or int(rng.integers(1, 6))
    while len(rows) < T - 3 * B:
        start, blocks = len(rows), int(rng.integers(1, longest))
        rows += [(start, start + (i // B + 1) * B, 0, 0) for i in range(blocks * B)]
        for b in sorted(rng.integers(0, blocks, size=rng.integers(1, 2 * longest))):
            rows += [(start, start + b * B, len(rows), len(rows) + B)] * B
    return np.minimum((rows + [(0, 0, 0, 0)] * T)[:T], T)


def padding(T, rng):
    return np.zeros((T, 4), np.int64)


def anything(T, rng):
    """Overlapping, inverted, empty."""
    return rng.integers(0, T + 1, size=(T, 4))


def tile_edges(T, rng):
    """Starts and ends at or one off multiples of 16."""
    return np.clip(16 * rng.integers(0, T // 16 + 1, size=(T, 4)) + rng.integers(-1, 2, size=(T, 4)), 0, T)


def short_ranges(T, rng):
    start = rng.integers(0, T, size=(T, 2))
    return np.stack([start, start + rng.integers(0, 4, size=(T, 2))], -1).reshape(T, 4)


PATTERNS = [causal, block_causal, left_padding, everything, single_key, replay, partial(replay, longest=40), padding,
            anything, tile_edges, short_ranges]  # fmt: skip
