"""Mixture of experts without drops: tokens sorted by expert, one ragged product per projection."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tracerl_jax.models.config import ModelConfig
from tracerl_jax.models.layers import gated, initializer
from tracerl_jax.parallel.sharding import mesh_spec


class MoE(nn.Module):
    """x [N,T,E] -> [N,T,E]: the router's top experts per token, weights renormalised to sum to 1, no shared expert.

    Under a mesh every device sorts its own rows and holds a slice of every expert's width, so routing moves no token.
    """

    config: ModelConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        probs = Router(c, name="router")(x)
        inner, outer = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")

        def experts(name: str, axes: tuple[str, ...], shape: tuple[int, ...]) -> jax.Array:
            init = nn.with_logical_partitioning(initializer(c), axes)
            return self.param(name, init, shape, jnp.dtype(c.param_dtype)).astype(c.dtype)

        gate = experts("gate_proj", inner, (c.num_experts, c.width, c.expert_width))
        up = experts("up_proj", inner, (c.num_experts, c.width, c.expert_width))
        down = experts("down_proj", outer, (c.num_experts, c.expert_width, c.width))

        def local(x, probs, gate, up, down):
            out = mix_experts(x, probs, gate, up, down, c.experts_per_token)
            return out if self.mesh is None else jax.lax.psum(out, "tensor")

        if self.mesh is not None:
            rows, narrow, tall = (mesh_spec(axes, self.mesh) for axes in
                                  (("batch",), (None, None, "mlp"), (None, "mlp", None)))
            local = jax.shard_map(local, mesh=self.mesh, in_specs=(rows, rows, narrow, narrow, tall), out_specs=rows)
        return local(x, probs, gate, up, down).astype(c.dtype)


class Router(nn.Module):
    """Softmax over all experts: [N,T,E] -> [N,T,X], in float32 at full precision, so that rollout and replay choose
    the same experts."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        kernel = self.param("kernel", nn.with_logical_partitioning(initializer(c), ("embed", "expert")),
                            (c.width, c.num_experts), jnp.dtype(c.param_dtype))
        logits = jnp.dot(x.astype(jnp.float32), kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        return jax.nn.softmax(logits, axis=-1)


def mix_experts(x: jax.Array, probs: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array,
                experts_per_token: int) -> jax.Array:
    """Weighted sum of each token's experts: x [N,T,E], probs [N,T,X], gate and up [X,E,F], down [X,F,E] -> f32 [N,T,E].

        token     0 0 1 1 2 2        sorted by expert   0 2 | 1 | 0 1 2      one ragged product per projection,
        expert    0 2 1 2 0 2   ->   expert             0 0 | 1 | 2 2 2  ->  then back to the tokens' order
    """
    tokens = x.reshape(-1, x.shape[-1])
    weights, chosen = jax.lax.top_k(probs.reshape(len(tokens), -1), experts_per_token)  # [tokens, k]
    weights /= jnp.sum(weights, axis=-1, keepdims=True)

    order = jnp.argsort(chosen.reshape(-1), stable=True)
    sizes = jnp.bincount(chosen.reshape(-1), length=gate.shape[0]).astype(jnp.int32)
    inputs = tokens[order // experts_per_token]
    hidden = gated(jax.lax.ragged_dot(inputs, gate, sizes), jax.lax.ragged_dot(inputs, up, sizes))
    outputs = jax.lax.ragged_dot(hidden, down, sizes, preferred_element_type=jnp.float32)

    outputs = outputs[jnp.argsort(order)].reshape(*chosen.shape, -1)  # [tokens, k, E]
    return jnp.einsum("tk,tke->te", weights, outputs).reshape(x.shape)
