"""RMSNorm, dense layer, embedding, rotary embedding and gated MLP: the parts every decoder shares.

Parameters are created with logical axis names; `tracerl_jax.parallel.sharding.RULES` maps the names to mesh axes.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tracerl_jax.models.config import ModelConfig
from tracerl_jax.parallel.sharding import constrain_rows, mesh_spec


def initializer(config: ModelConfig) -> nn.initializers.Initializer:
    return nn.initializers.normal(config.initializer_range)


class RMSNorm(nn.Module):
    """x * (mean(x^2) + eps)^(-1/2) * scale over the last axis: in float32, rounded to `dtype` once."""

    eps: float
    axis: str  # logical name of the normalised axis
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
        scale = self.param("scale", init, (x.shape[-1],), jnp.dtype(self.param_dtype))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale.astype(jnp.float32)).astype(self.dtype)


class Dense(nn.Module):
    """x [.., in] @ kernel [in, out] (+ bias [out]), computed in the compute dtype."""

    features: int
    axes: tuple[str, str]  # logical names of in, out
    config: ModelConfig
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, param_dtype = self.config, jnp.dtype(self.config.param_dtype)
        kernel = self.param("kernel", nn.with_logical_partitioning(initializer(c), self.axes),
                            (x.shape[-1], self.features), param_dtype)
        y = x.astype(c.dtype) @ kernel.astype(c.dtype)
        if self.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            y += self.param("bias", init, (self.features,), param_dtype).astype(c.dtype)
        return y


class Embed(nn.Module):
    """Rows of the embedding table: ids [N,T] -> [N,T,E].

    Under a mesh every device looks the ids of its data group up in its own part of the table (vocabulary over tensor,
    width over fsdp and expert): neither the table nor its gradient is ever whole on a device.
    """

    config: ModelConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        c = self.config
        table = self.param("embedding", nn.with_logical_partitioning(initializer(c), ("vocab", "embed")),
                           (c.vocab_size, c.width), jnp.dtype(c.param_dtype))
        if self.mesh is None:
            return table[ids].astype(c.dtype)

        def local(table, ids):
            ids -= jax.lax.axis_index("tensor") * len(table)
            mine = (0 <= ids) & (ids < len(table))
            rows = jnp.where(mine[..., None], table[jnp.where(mine, ids, 0)].astype(c.dtype), 0)
            return jax.lax.psum(rows, "tensor")

        parts = mesh_spec(("vocab", "embed"), self.mesh)
        x = jax.shard_map(local, mesh=self.mesh, in_specs=(parts, P("data")), out_specs=P("data", None, parts[1]),
                          )(table, ids)  # fmt: skip
        return constrain_rows(x, self.mesh)  # columns traded for rows, within each data group


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), silu in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [N,T,E] -> [N,T,E]
        c = self.config
        gate = Dense(c.mlp_width, ("embed", "mlp"), c, name="gate_proj")(x)
        up = Dense(c.mlp_width, ("embed", "mlp"), c, name="up_proj")(x)
        return Dense(c.width, ("mlp", "embed"), c, name="down_proj")(gated(gate, up))


def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate.astype(jnp.float32)).astype(up.dtype) * up


def rotary_tables(positions: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin [N,T,1,D/2] of position * theta^(-2j/D), computed in float32, in the dtype the rotation runs in."""
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    angle = positions[..., None, None].astype(jnp.float32) * config.rope_theta**-exponent
    dtype = config.dtype if config.rope_dtype == "compute" else "float32"
    return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding of x [N,T,H,D], first half against second half, in the tables' dtype; returns x's dtype."""
    cos, sin = tables
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
