"""Attention layer: projections, per-head norms before rotation, and the kernels, run per shard under a mesh."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tracerl_jax.kernels.attention import attention
from tracerl_jax.kernels.decode import KVCache, decode_attention
from tracerl_jax.models.config import ModelConfig
from tracerl_jax.models.layers import Dense, RMSNorm, rotate
from tracerl_jax.parallel.sharding import mesh_spec

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (q[N,T,H,D], k[N,T,K,D], v[N,T,K,D]) -> [N,T,H,D]


class Attention(nn.Module):
    """x [N,T,E] -> (out [N,T,E], rotated keys [N,T,K,D], values [N,T,K,D]); `attend` decides who sees what."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, tables: tuple[jax.Array, jax.Array],
                 attend: Attend) -> tuple[jax.Array, jax.Array, jax.Array]:
        c = self.config
        dtypes = {"dtype": c.dtype, "param_dtype": c.param_dtype}

        def project(name: str, heads: int, axis: str) -> jax.Array:
            y = Dense(heads * c.head_dim, ("embed", axis), c, use_bias=c.qkv_bias, name=name)(x)
            return y.reshape(*x.shape[:-1], heads, c.head_dim)

        q = project("q_proj", c.num_heads, "heads")
        k = project("k_proj", c.num_kv_heads, "kv_heads")
        v = project("v_proj", c.num_kv_heads, "kv_heads")
        if c.qk_norm:
            q = RMSNorm(c.norm_eps, "head_dim", name="q_norm", **dtypes)(q)
            k = RMSNorm(c.norm_eps, "head_dim", name="k_norm", **dtypes)(k)
        q, k = rotate(q, tables), rotate(k, tables)
        mixed = attend(q, k, v).reshape(*x.shape[:-1], c.num_heads * c.head_dim)
        out = Dense(c.width, ("heads", "embed"), c, use_bias=c.out_bias, name="o_proj")(mixed)
        return out, k, v


def sequence_attend(intervals: jax.Array, implementation: str | None, mesh: Mesh | None,
                    prefix: tuple[jax.Array, jax.Array] | None = None) -> Attend:
    """Attention inside a sequence: the query at t sees the two key ranges of intervals [N,T,4].

    With a `prefix` (keys, values) [N,S,K,D] the keys are those, then the sequence's own.
    """

    def attend(q, k, v):
        def local(q, k, v, intervals):
            return attention(q, k, v, intervals, implementation=implementation)

        if prefix is not None:
            k, v = (jnp.concatenate(pair, axis=1) for pair in zip(prefix, (k, v), strict=True))
        return _per_shard(local, mesh, "qkkr")(q, k, v, intervals)

    return attend


def cache_attend(cache: KVCache, layer: jax.Array, cache_len: jax.Array, new_intervals: jax.Array | None,
                 mesh: Mesh | None) -> Attend:
    """Attention of Q new tokens to one layer of the cache, up to cache_len [N], and to each other."""

    def attend(q, k, v):
        def local(q, layer, k, v, cache_len, new_intervals, *cache):
            return decode_attention(q, KVCache(*cache), layer, k, v, cache_len, new_intervals=new_intervals)

        return _per_shard(local, mesh, "qlkkrrccccr")(q, layer, k, v, cache_len, new_intervals, *cache)

    return attend


_OPERANDS = {
    "q": ("batch", None, "heads", None),  # [N,T,H,D]
    "k": ("batch", None, "kv_heads", None),  # [N,S,K,D]
    "r": ("batch",),  # [N,..]
    "l": (),  # []
    "c": ("layers", "batch", "kv_heads"),  # [L,P,K,..]
}


def _per_shard(function: Callable, mesh: Mesh | None, operands: str) -> Callable:
    """Runs a kernel on each device's rows and heads: the compiler cannot split a hand-written kernel by itself."""
    if mesh is None:
        return function
    specs = tuple(mesh_spec(_OPERANDS[letter], mesh) for letter in operands)
    # Kernels loop over freshly made accumulators, which the varying-axes check refuses; every operand that is
    # differentiated is split over all mesh axes, so the check has nothing to protect.
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
