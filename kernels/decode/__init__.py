"""Attention of blocks of new tokens over a key/value cache."""

from tracerl_jax.kernels.decode.api import decode_attention
from tracerl_jax.kernels.decode.cache import KVCache, quantize_kv

__all__ = ["KVCache", "decode_attention", "quantize_kv"]
