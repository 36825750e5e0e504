"""Where committed keys and values wait: one layout for slots and pages, floats and int8."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class KVCache(NamedTuple):
    """Keys and values of all layers, cut into P pages of C tokens, a page's tokens of one head side by side.

        k[l, p, h]     C x D      what a kernel copies and multiplies: tokens on sublanes, head_dim on lanes
        pages[n]       W          the pages of slot n in order: token t is entry t % C of page pages[n, t // C]

    Without `pages`, page n is all of slot n (P = N). Slots may share pages, and an entry of `pages` whose page would
    hold no committed token may be anything. Under shard_map over rows, every shard numbers its own pages from 0.
    """

    k: jax.Array  # [L, P, K, C, D], the compute dtype or int8
    v: jax.Array  # [L, P, K, C, D]
    k_scale: jax.Array | None = None  # [L, P, K, C] f32, with int8 only
    v_scale: jax.Array | None = None  # [L, P, K, C] f32
    pages: jax.Array | None = None  # [N, W] int32

    @property
    def capacity(self) -> int:
        """S: how many tokens a slot can hold."""
        return self.k.shape[3] * (1 if self.pages is None else self.pages.shape[1])

    @classmethod
    def from_tokens(cls, k: jax.Array, v: jax.Array) -> KVCache:
        """The slot-contiguous cache of k, v [L,N,S,K,D], which is how a forward returns them."""
        return cls(jnp.swapaxes(k, 2, 3), jnp.swapaxes(v, 2, 3))


def quantize_kv(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [..,D] -> (int8 [..,D], scale f32 [..]): one scale per token and head, symmetric, rounded to nearest.

    |value * scale - x| <= max|x| / 254 over the head's D numbers, up to float32 rounding. A scale of 0 means all zeros.
    """
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    values = jnp.round(x / jnp.where(scale > 0, scale, 1)[..., None])
    return values.astype(jnp.int8), scale
