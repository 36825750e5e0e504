"""Mixture of experts without drops: tokens sorted by expert, one ragged product per projection."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tracerl_jax.diffusion.grid import round_up
from tracerl_jax.models.config import ModelConfig
from tracerl_jax.models.layers import gated, initializer
from tracerl_jax.parallel.sharding import mesh_spec


class MoE(nn.Module):
    """x [N,T,E] -> [N,T,E]: the router's top experts per token, weights renormalised to sum to 1, no shared expert.

    Under a mesh every device sorts its own rows and holds a slice of every expert's width (tensor), so routing moves no
    token. With an expert axis it holds a share of the experts: the devices along it give each other all their rows, and
    add up what their experts make of them.
    """

    config: ModelConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, mesh = self.config, self.mesh
        weights, chosen = top_experts(Router(c, name="router")(x), c.experts_per_token)
        inner, outer = ("expert", "expert_embed", "mlp"), ("expert", "mlp", "expert_embed")

        def experts(name: str, axes: tuple[str, ...], shape: tuple[int, ...]) -> jax.Array:
            init = nn.with_logical_partitioning(initializer(c), axes)
            return self.param(name, init, shape, jnp.dtype(c.param_dtype)).astype(c.dtype)

        kernels = Kernels(
            experts("gate_proj", inner, (c.num_experts, c.width, c.expert_width)),
            experts("up_proj", inner, (c.num_experts, c.width, c.expert_width)),
            experts("down_proj", outer, (c.num_experts, c.expert_width, c.width)),
        )
        if mesh is None:
            return mix_experts(x, weights, chosen, kernels).astype(c.dtype)

        def local(*operands):
            if "expert" not in mesh.shape:
                return jax.lax.psum(mix_experts(*operands), "tensor")
            return jax.lax.psum(exchange_rows(mesh, *operands), "tensor")

        rows, narrow, tall = (mesh_spec(axes, mesh) for axes in
                              (("batch",), ("expert", None, "mlp"), ("expert", "mlp", None)))
        specs = (rows, rows, rows, Kernels(narrow, narrow, tall))
        local = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=rows)
        return local(x, weights, chosen, kernels).astype(c.dtype)


class Router(nn.Module):
    """Softmax over all experts: [N,T,E] -> [N,T,X], in float32 at full precision, so that rollout and replay choose
    the same experts."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        kernel = self.param("kernel", nn.with_logical_partitioning(initializer(c), ("embed", "choice")),
                            (c.width, c.num_experts), jnp.dtype(c.param_dtype))
        logits = jnp.dot(x.astype(jnp.float32), kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        return jax.nn.softmax(logits, axis=-1)


class Kernels(NamedTuple):
    """Of X experts of width F."""

    gate: jax.Array  # [X,E,F]
    up: jax.Array  # [X,E,F]
    down: jax.Array  # [X,F,E]


def top_experts(probs: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` most probable experts of each token: probs [N,T,X] -> (weights that sum to 1, ids), [N,T,count]."""
    weights, chosen = jax.lax.top_k(probs, count)
    return weights / jnp.sum(weights, axis=-1, keepdims=True), chosen


def mix_experts(x: jax.Array, weights: jax.Array, chosen: jax.Array, kernels: Kernels) -> jax.Array:
    """Weighted sum of each token's experts: x [N,T,E], weights and ids of its k experts [N,T,k] -> f32 [N,T,E].

        token     0 0 1 1 2 2        sorted by expert   0 2 | 1 | 0 1 2      one ragged product per projection,
        expert    0 2 1 2 0 2   ->   expert             0 0 | 1 | 2 2 2  ->  then back to the tokens' order
    """
    k = chosen.shape[-1]
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    sizes = jnp.bincount(chosen.reshape(-1), length=len(kernels.gate)).astype(jnp.int32)
    outputs = _ragged_mlp(x.reshape(-1, x.shape[-1])[order // k], kernels, sizes)
    outputs = outputs[jnp.argsort(order)].reshape(-1, k, x.shape[-1])  # [tokens, k, E]
    return jnp.einsum("tk,tke->te", weights.reshape(-1, k), outputs).reshape(x.shape)


def _ragged_mlp(inputs: jax.Array, kernels: Kernels, sizes: jax.Array) -> jax.Array:
    """inputs [R,E], the first sizes[0] rows for expert 0 and so on -> f32 [R,E]; rows beyond the last are anything."""
    gate, up = (jax.lax.ragged_dot(inputs, kernel, sizes) for kernel in (kernels.gate, kernels.up))
    return jax.lax.ragged_dot(gated(gate, up), kernels.down, sizes, preferred_element_type=jnp.float32)


# Experts split over devices

# Rows that a device makes room for, over its share were all experts chosen equally often. More rows than that go
# through its experts in a second round.
HEADROOM = 1.25


def exchange_rows(mesh: Mesh, x: jax.Array, weights: jax.Array, chosen: jax.Array, kernels: Kernels) -> jax.Array:
    """`mix_experts` inside shard_map, of which each device along `expert` has every other's kernels: f32 [N,T,E].

    Every row goes to every device along the axis. With 8 experts per token, a token's experts are on 5.3 of 8 devices
    on average, so that sending it only where it is needed would save a third at best.
    """
    devices, own = mesh.shape["expert"], len(kernels.gate)
    first = jax.lax.axis_index("expert") * own
    x, weights, chosen = (jax.lax.all_gather(a, "expert", axis=0, tiled=True) for a in (x, weights, chosen))
    tokens, k = x.reshape(-1, x.shape[-1]), chosen.shape[-1]
    chosen = chosen.reshape(-1, k) - first
    chosen = jnp.where((0 <= chosen) & (chosen < own), chosen, own)
    window = min(chosen.size, round_up(math.ceil(HEADROOM * chosen.size / devices), 8))
    # What the loop takes differs from device to device along every axis: sums over devices are taken out here.
    axes = mesh.axis_names
    tokens, weights, chosen = _varying((tokens, weights.reshape(-1, k), chosen), ("tensor",))
    kernels = _varying(kernels, tuple(axis for axis in axes if axis not in ("expert", "tensor")))
    out = mix_own_experts(tokens, weights, chosen, kernels, window, axes).reshape(x.shape)
    return jax.lax.psum_scatter(out, "expert", scatter_dimension=0, tiled=True)


def _varying(tree: Any, axes: tuple[str, ...]) -> Any:
    return jax.tree.map(lambda a: jax.lax.pcast(a, axes, to="varying"), tree) if axes else tree


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def mix_own_experts(tokens: jax.Array, weights: jax.Array, chosen: jax.Array, kernels: Kernels, window: int,
                    axes: tuple[str, ...]) -> jax.Array:
    """What the X experts of this device add to the sum: tokens [R,E], weights [R,k], chosen [R,k] -> f32 [R,E].

    `chosen` is X for experts elsewhere. However uneven the choice no token is dropped: `window` pairs of token and
    expert at a time go through the experts, in as many rounds as there are pairs for. axes: of the mesh, all of which
    the arguments vary over.
    """
    plan = _plan(chosen, len(kernels.gate), window)

    def more(state):
        start, out = state
        return start + window, _add_window(out, start, plan, tokens, weights, kernels, window)

    return _rounds(plan, more, _zeros(tokens, axes), axes)


def _mix_forward(tokens, weights, chosen, kernels, window, axes):
    return mix_own_experts(tokens, weights, chosen, kernels, window, axes), (tokens, weights, chosen, kernels)


def _mix_backward(window, axes, residuals, d_out):
    tokens, weights, chosen, kernels = residuals
    plan = _plan(chosen, len(kernels.gate), window)

    def more(state):
        start, sums = state

        def part(tokens, weights, kernels):
            return _add_window(_zeros(d_out, axes), start, plan, tokens, weights, kernels, window)

        gradients = jax.vjp(part, tokens, weights, kernels)[1](d_out)
        return start + window, jax.tree.map(lambda total, g: total + g.astype(jnp.float32), sums, gradients)

    operands = (tokens, weights, kernels)
    sums = _rounds(plan, more, _zeros(operands, axes), axes)
    d_tokens, d_weights, d_kernels = jax.tree.map(lambda total, a: total.astype(a.dtype), sums, operands)
    return d_tokens, d_weights, None, d_kernels


mix_own_experts.defvjp(_mix_forward, _mix_backward)


class _Plan(NamedTuple):
    """Pairs of token and own expert, sorted by expert."""

    pairs: jax.Array  # [R * k + window], numbers token * k + choice
    ends: jax.Array  # [X], where each expert's pairs end


def _plan(chosen: jax.Array, own: int, window: int) -> _Plan:
    flat = chosen.reshape(-1)
    sizes = jnp.bincount(flat, length=own + 1)[:own].astype(jnp.int32)
    return _Plan(jnp.pad(jnp.argsort(flat, stable=True), (0, window)), jnp.cumsum(sizes))


def _zeros(tree: Any, axes: tuple[str, ...]) -> Any:
    return _varying(jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), tree), axes)


def _rounds(plan: _Plan, more: Callable, start: Any, axes: tuple[str, ...]) -> Any:
    """Applies `more` to (0, start) until the pairs are used up."""
    pairs = plan.ends[-1]
    return jax.lax.while_loop(lambda state: state[0] < pairs, more, (_varying(jnp.int32(0), axes), start))[1]


def _add_window(out: jax.Array, start: jax.Array, plan: _Plan, tokens: jax.Array, weights: jax.Array, kernels: Kernels,
                window: int) -> jax.Array:
    """out [R,E] plus the weighted outputs of the pairs from `start` on."""
    pairs = jax.lax.dynamic_slice_in_dim(plan.pairs, start, window)
    rows, live = pairs // weights.shape[-1], start + jnp.arange(window) < plan.ends[-1]
    within = jnp.clip(plan.ends - start, 0, window)
    inputs = jnp.where(live[:, None], tokens[rows], 0)
    outputs = _ragged_mlp(inputs, kernels, jnp.diff(within, prepend=0))
    share = jnp.where(live, weights.reshape(-1)[pairs], 0.0)
    return out.at[rows].add(jnp.where(live[:, None], outputs, 0.0) * share[:, None])
