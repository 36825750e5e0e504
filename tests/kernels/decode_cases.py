"""Operands of block decode attention, all that must not matter poisoned, and what float64 maths makes of them."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from tracerl_jax.kernels.decode import KVCache, quantize_kv


class Case(NamedTuple):
    """Shape of a call. `page`: tokens of a page, None = slot-contiguous. `store`: dtype of the cache."""

    N: int
    Q: int
    S: int
    H: int
    K: int
    D: int
    dtype: str = "float32"
    page: int | None = None
    store: str | None = None

    @property
    def tolerance(self) -> float:
        """Of |v| = 1: bfloat16 rounds the weights and the result, float32 the scores and the sums."""
        return 2**-8 if self.dtype == "bfloat16" else 2e-6


LAYER = 1  # of two


def operands(case: Case, cache_len, new_intervals=None, seed=0, poison=np.nan, scale=1.0) -> dict:
    """Keyword arguments of `decode_attention`. The other layer, what lies behind cache_len, pages of no slot, and page
    numbers of dead pages are garbage."""
    N, Q, S, H, K, D = case[:6]
    rng = np.random.default_rng(seed)
    cache_len = np.asarray(cache_len, np.int32)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) * scale, case.dtype)

    C = case.page or S
    W, spare = S // C, 3 if case.page else 0
    pages = rng.permutation(N * W + spare)[: N * W].reshape(N, W) if case.page else np.arange(N)[:, None]

    def store(x, garbage):  # [N,K,S,..] -> [2,P,K,C,..]
        dead = (np.arange(S) >= cache_len[:, None]).reshape(N, 1, S, *[1] * (x.ndim - 3))
        x = np.where(dead, garbage, x).astype(x.dtype)
        out = np.full((2, N * W + spare, K, C, *x.shape[3:]), garbage, x.dtype)
        out[LAYER, pages] = np.moveaxis(x.reshape(N, K, W, C, *x.shape[3:]), 2, 1)
        return jnp.asarray(out)

    values, scales = [], [None, None]
    for i in range(2):
        x = draw(N, K, S, D)
        if case.store == "int8":
            x, factor = quantize_kv(x)
            scales[i] = store(np.asarray(factor), poison)
        values.append(store(np.asarray(x), 77 if case.store == "int8" else poison))
    table = None
    if case.page:
        dead = np.arange(W) * C >= cache_len[:, None]
        table = jnp.asarray(np.where(dead, -1, pages), jnp.int32)
    return {
        "q": draw(N, Q, H, D), "cache": KVCache(*values, *scales, table), "layer": jnp.int32(LAYER),
        "k_new": draw(N, Q, K, D), "v_new": draw(N, Q, K, D), "cache_len": jnp.asarray(cache_len),
        "new_intervals": jnp.asarray(all_new(case) if new_intervals is None else new_intervals, jnp.int32),
    }  # fmt: skip


def all_new(case: Case) -> np.ndarray:
    return np.broadcast_to(np.array([0, case.Q], np.int32), (case.N, case.Q, 2))


def fused(case: Case, finished) -> np.ndarray:
    """[finished block | current block] in slots where `finished` [N], else the current block alone beside garbage."""
    B = case.Q // 2
    old, new = [[0, B]] * B + [[0, 2 * B]] * B, [[0, 0]] * B + [[B, 2 * B]] * B
    return np.array([old if f else new for f in finished], np.int32)


def random_intervals(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Of every kind, the empty ones and the fused ones included."""
    drawn = np.sort(rng.integers(0, case.Q + 1, (case.N, case.Q, 2)))
    return np.where(rng.random((case.N, 1, 1)) < 0.5, fused(case, rng.random(case.N) < 0.5), drawn)


def dense(q, cache, layer, k_new, v_new, cache_len, new_intervals) -> np.ndarray:
    """Query by query, on the keys that count only, in float64."""
    N, Q, H, D = q.shape
    K, C = cache.k.shape[2:4]
    out = np.zeros((N, Q, H, D))

    def committed(values, scale, n, length):  # -> [length, K, D]
        tokens = []
        for t in range(length):
            page = n if cache.pages is None else int(cache.pages[n, t // C])
            x = np.asarray(values[layer, page, :, t % C], np.float64)
            tokens.append(x if scale is None else x * np.asarray(scale[layer, page, :, t % C], np.float64)[:, None])
        return np.array(tokens).reshape(length, K, D)

    cache = KVCache(*(None if x is None else np.asarray(x) for x in cache))
    for n, length in enumerate(np.asarray(cache_len)):
        old = committed(cache.k, cache.k_scale, n, length), committed(cache.v, cache.v_scale, n, length)
        for i, (start, end) in enumerate(np.asarray(new_intervals[n])):
            k, v = (
                np.concatenate([x, np.asarray(new[n, start:end], np.float64)])
                for x, new in zip(old, (k_new, v_new), strict=True)
            )
            if not len(k):
                continue
            k, v = (np.repeat(x, H // K, axis=1) for x in (k, v))
            scores = np.einsum("hd,shd->hs", np.asarray(q[n, i], np.float64), k) / np.sqrt(D)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[n, i] = np.einsum("hs,shd->hd", weights / weights.sum(-1, keepdims=True), v)
    return out


def lengths(case: Case, tile: int):
    """Strategy: cache_len [N], mostly at the edges of tiles."""
    edges = sorted({x for x in (0, 1, tile - 1, tile, tile + 1, case.S - 1, case.S) if 0 <= x <= case.S})
    return st.lists(st.one_of(st.sampled_from(edges), st.integers(0, case.S)), min_size=case.N, max_size=case.N)


def check(run, case: Case, cache_len, new_intervals=None, seed=0, poison=np.nan) -> None:
    given = operands(case, cache_len, new_intervals, seed, poison)
    out = run(**given)
    assert out.dtype == case.dtype
    largest = 5.5  # of |v|: standard normal numbers
    np.testing.assert_allclose(np.asarray(out, np.float64), dense(**given), atol=largest * case.tolerance, rtol=0)
