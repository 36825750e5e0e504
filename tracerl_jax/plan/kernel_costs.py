"""What one call of our own kernels costs on one chip: the compiler sees a call and nothing of its inside.

FLOPs follow the mask at the grain of 128 x 128 pairs at which the kernels follow it. Bytes are each query, key, value
and result once, and of a KV cache the live tokens of one layer.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tracerl_jax.kernels.attention.masks import live_tiles
from tracerl_jax.models import ModelConfig
from tracerl_jax.parallel.sharding import row_shards
from tracerl_jax.plan.hlo_cost import KernelCost, kernel_name

GRAIN = 128
# name: (products of [pairs] x head_dim, arrays of all query heads moved, arrays of all key/value heads moved)
ATTENTION = {
    "attention_forward": (2, 2, 2),  # scores, output
    "attention_backward": (5, 4, 4),  # scores again, d_scores, d_q (in float32), d_k, d_v
    "attention_dq": (3, 3, 2),
    "attention_dkv": (4, 2, 4),
}


def live_pairs(intervals: np.ndarray) -> float:
    """intervals [R,T,4] -> query-key pairs of one head in tiles that hold a visible one."""
    length = -(-intervals.shape[1] // GRAIN) * GRAIN
    with jax.default_device(jax.devices("cpu")[0]):
        padded = jnp.pad(intervals, ((0, 0), (0, length - intervals.shape[1]), (0, 0)))
        tiles = jax.jit(live_tiles, static_argnums=(1, 2, 3))(padded, GRAIN, GRAIN, length // GRAIN)
    return float(tiles.sum()) * GRAIN**2


def attention_cost(config: ModelConfig, mesh: Mesh, intervals: np.ndarray, rows: int) -> KernelCost:
    """Of a program that attends within `rows` rows, over the whole mesh, like those of these intervals [R,T,4]."""
    R, T = intervals.shape[:2]
    local = rows / row_shards(mesh)
    heads, kv_heads = (count / mesh.shape["tensor"] for count in (config.num_heads, config.num_kv_heads))
    pairs = live_pairs(intervals) / R * local * heads
    vectors = local * T * config.head_dim

    def cost(instruction, operands):
        if (name := kernel_name(instruction)) not in ATTENTION:
            return None
        products, of_queries, of_keys = ATTENTION[name]
        # The backward pass on TPUs takes the keys in windows, a call each, and returns the gradients of a window.
        windowed = name == "attention_backward"
        share = min(1.0, instruction.outputs[1].elements / (vectors * kv_heads)) if windowed else 1.0
        moved = vectors * (of_queries * heads + share * of_keys * kv_heads) * jnp.dtype(config.dtype).itemsize
        return 2.0 * products * share * pairs * config.head_dim, moved

    return cost


def decode_cost(
    config: ModelConfig, mesh: Mesh, slots: int, queries: int, live_tokens: float, kv_dtype: str = "compute"
) -> KernelCost:
    """Of a decode program of `slots` sequences over the whole mesh, `queries` new tokens each and `live_tokens`
    committed ones, on average over its forwards. kv_dtype: of the cache, "compute" or "int8"."""
    rows, tensor = slots / row_shards(mesh), mesh.shape["tensor"]
    flops = 4.0 * rows * queries * (live_tokens + queries) * config.num_heads / tensor * config.head_dim
    vector = config.head_dim * jnp.dtype(config.dtype).itemsize
    cached = config.head_dim + 4 if kv_dtype == "int8" else vector  # with a scale
    new = queries * 2 * (config.num_heads + config.num_kv_heads) * vector
    moved = rows * (live_tokens * 2 * config.num_kv_heads * cached + new) / tensor

    def cost(instruction, operands):
        return (flops, moved) if kernel_name(instruction) == "decode_attention" else None

    return cost
