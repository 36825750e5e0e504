"""What two half-open intervals per query say about keys and about tiles of keys."""

import jax
import jax.numpy as jnp


def visible_keys(intervals: jax.Array, keys: jax.Array) -> jax.Array:
    """intervals [..., 4], keys [..., S] (positions) -> [..., S] bool: the key lies in either interval of the query."""
    s1, e1, s2, e2 = (intervals[..., i, None] for i in range(4))
    return ((keys >= s1) & (keys < e1)) | ((keys >= s2) & (keys < e2))


def live_tiles(intervals: jax.Array, queries: int, keys: int, key_tiles: int) -> jax.Array:
    """Which tiles of queries x keys hold a visible pair.

    intervals [N,T,4], T a multiple of `queries` -> [N, T / queries, key_tiles] bool. No array of T x key_tiles is kept:
    the comparison is fused into the reduction.
    """
    N, T = intervals.shape[:2]
    s1, e1, s2, e2 = (intervals[..., i, None] for i in range(4))
    first = jnp.arange(key_tiles, dtype=jnp.int32) * keys
    touched = ((s1 < first + keys) & (e1 > first) & (s1 < e1)) | ((s2 < first + keys) & (e2 > first) & (s2 < e2))
    return jnp.any(touched.reshape(N, T // queries, queries, key_tiles), axis=2)


def tile_ranges(intervals: jax.Array, size: int) -> jax.Array:
    """The tiles of `size` keys that a tile of queries must visit, as two disjoint ranges.

    intervals [..., BQ, 4], not negative -> [..., 4] = (first, count) of either range, in ascending order. Where the
    tiles of interval 1 and of interval 2 overlap, the later range gives way, so that no tile is visited twice:

        tiles of interval 2   ####______          (first, count) = (0, 4)
        tiles of interval 1   __######__    ->                     (4, 4)
    """
    s1, e1, s2, e2 = (intervals[..., i] for i in range(4))  # [..., BQ]

    def cover(start: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:  # [...], [...]
        some = end > start
        # No query with a key: an empty range beyond all others, which sorts last.
        first = jnp.min(jnp.where(some, start, jnp.iinfo(jnp.int32).max), axis=-1) // size
        last = -(-jnp.max(jnp.where(some, end, 0), axis=-1) // size)
        return first, jnp.maximum(first, last)

    (first1, last1), (first2, last2) = cover(s1, e1), cover(s2, e2)
    swap = first2 < first1
    first1, last1, first2, last2 = (
        jnp.where(swap, other, own)
        for other, own in ((first2, first1), (last2, last1), (first1, first2), (last1, last2))
    )
    first2 = jnp.maximum(first2, last1)
    return jnp.stack([first1, last1 - first1, first2, jnp.maximum(last2 - first2, 0)], axis=-1)


def nth_tile(ranges: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array]:
    """ranges [..., 4] of `tile_ranges` -> (j-th tile to visit, else the last [...]; whether there is a j-th [...])."""
    first1, count1, first2, count2 = (ranges[..., i] for i in range(4))
    live = j < count1 + count2
    j = jnp.minimum(j, count1 + count2 - 1)
    return jnp.where(j < count1, first1 + j, first2 + j - count1), live
