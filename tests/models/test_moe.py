"""The mixture of experts against a plain loop over experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tracerl_jax.models.config import ModelConfig
from tracerl_jax.models.layers import gated
from tracerl_jax.models.moe import Kernels, MoE, mix_experts, top_experts
from tracerl_jax.parallel.mesh import make_mesh
from tracerl_jax.parallel.sharding import batch_sharding

CONFIG = ModelConfig(vocab_size=8, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=8,
                     num_experts=6, experts_per_token=3, expert_width=10)


def loop_over_experts(params, x, experts_per_token):
    """Every expert on every token, weighted by its renormalised probability if it is among the token's best."""
    probs = jax.nn.softmax(x @ params["router"]["kernel"], axis=-1)
    kept = jnp.argsort(-probs, axis=-1)[..., :experts_per_token]
    chosen = jax.nn.one_hot(kept, probs.shape[-1]).sum(-2)
    weights = probs * chosen / (probs * chosen).sum(-1, keepdims=True)
    out = jnp.zeros_like(x)
    for e in range(probs.shape[-1]):
        y = gated(x @ params["gate_proj"][e], x @ params["up_proj"][e]) @ params["down_proj"][e]
        out += weights[..., e : e + 1] * y
    return out


def inputs(seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = {"router": {"kernel": (16, 6)}, "gate_proj": (6, 16, 10), "up_proj": (6, 16, 10), "down_proj": (6, 10, 16)}
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda s: isinstance(s, tuple))
    params = tree.unflatten([jax.random.normal(k, s) * 0.5 for k, s in zip(keys[1:], leaves, strict=True)])
    return params, jax.random.normal(keys[0], (2, 7, 16))


@pytest.mark.parametrize("experts_per_token", [1, 3, 6])
def test_moe_equals_a_loop_over_experts_with_gradients(experts_per_token):
    params, x = inputs()
    module = MoE(CONFIG.replace(experts_per_token=experts_per_token))

    def ours(params, x):
        return module.apply({"params": params}, x)

    def theirs(params, x):
        return loop_over_experts(params, x, experts_per_token)

    np.testing.assert_allclose(ours(params, x), theirs(params, x), atol=1e-5, rtol=0)
    grads = [jax.grad(lambda p, x, f=f: jnp.sum(jnp.sin(f(p, x))), (0, 1))(params, x) for f in (ours, theirs)]
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max() + 1), rtol=0)


def test_experts_without_tokens_and_crowded_experts_drop_nothing():
    """All tokens choose experts 5 and 0; ties go to the lowest index."""
    params, x = inputs()
    probs = jnp.zeros((2, 7, 6)).at[..., 5].set(0.5).at[..., 0].set(0.25)
    kernels = Kernels(params["gate_proj"], params["up_proj"], params["down_proj"])
    out = mix_experts(x, *top_experts(probs, 2), kernels)
    tied = mix_experts(x, *top_experts(jnp.full((2, 7, 6), 1 / 6), 2), kernels)

    def expert(e):
        return gated(x @ params["gate_proj"][e], x @ params["up_proj"][e]) @ params["down_proj"][e]

    np.testing.assert_allclose(out, (2 * expert(5) + expert(0)) / 3, atol=1e-5, rtol=0)
    np.testing.assert_allclose(tied, (expert(0) + expert(1)) / 2, atol=1e-5, rtol=0)


@pytest.mark.parametrize("favour", ["none", "two"])
def test_experts_split_over_devices_drop_nothing(favour):
    """Values and gradients are those of one device; also where all tokens choose two experts of one device, which then
    has four times its share of rows and takes them in several rounds."""
    params, x = inputs()
    x = jnp.concatenate([x, x + 1])
    params = params if favour == "none" else {**params, "router": {"kernel": 0 * params["router"]["kernel"]}}
    mesh = make_mesh(2, 1, 2, 2)

    def run(module, x):
        def loss(params, x):
            return jnp.sum(jnp.sin(module.apply({"params": params}, x)))

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)

    split = run(MoE(CONFIG, mesh), jax.device_put(x, batch_sharding(mesh)))
    for got, want in zip(jax.tree.leaves(split), jax.tree.leaves(run(MoE(CONFIG), x)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()), rtol=0)
