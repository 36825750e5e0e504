"""The decoder: a frozen description with pure methods over plain parameter dicts.

Parameters of all layers are stacked on a leading L axis and applied by one `lax.scan`:

    embed -> [ x += attention(norm(x)); x += mlp(norm(x)) ] * L -> final norm -> lm head | value head
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tracerl_jax.errors import ConfigError
from tracerl_jax.kernels.decode import KVCache
from tracerl_jax.models.attention import Attend, Attention, cache_attend, sequence_attend
from tracerl_jax.models.config import ModelConfig
from tracerl_jax.models.layers import MLP, Embed, RMSNorm, initializer, rotary_tables
from tracerl_jax.models.moe import MoE
from tracerl_jax.parallel.sharding import check_split, constrain_rows, param_shardings

Params = dict[str, Any]
Prefix = Callable[[jax.Array], tuple[jax.Array, jax.Array]]  # layer -> (keys [N,S,K,D], values [N,S,K,D])

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class KV(NamedTuple):
    """Rotated keys and values of every layer, each [L,N,S,K,D] in the compute dtype."""

    k: jax.Array
    v: jax.Array


class Block(nn.Module):
    """One layer: x [N,T,E] -> (x, (rotated keys, values) each [N,T,K,D])."""

    config: ModelConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: jax.Array, tables: tuple[jax.Array, jax.Array],
                 attend: Attend) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        c = self.config
        mixed, k, v = Attention(c, name="attention")(_norm(c, "attention_norm")(x), tables, attend)
        x += mixed
        mlp = MoE(c, self.mesh, name="moe") if c.num_experts else MLP(c, name="mlp")
        return x + mlp(_norm(c, "mlp_norm")(x)), (k, v)


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder with a language-model or a value head. Hashable: usable as a static argument of `jax.jit`.

    Parameters are plain nested dicts (names and shapes: docs/architecture.md). With a mesh, activations and kernels
    are split over it and `init` returns parameters in `param_shardings(model, mesh)`; the number of rows N must then
    be a multiple of data * fsdp.

    Raises:
      ConfigError: on construction, when the model cannot be split evenly over the mesh.
    """

    config: ModelConfig
    head: Literal["lm", "value"] = "lm"
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        if self.head not in ("lm", "value"):
            raise ConfigError(f"model head {self.head!r} is unknown: choose 'lm' or 'value'.")
        if self.mesh is not None:
            param_shardings(self, self.mesh)

    # Parameters

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters: kernels and embedding normal(0, initializer_range), norms 1, biases and value head 0."""
        return _init_params(self, key)

    def abstract_params(self) -> Params:
        """The parameter tree as `jax.ShapeDtypeStruct`s; allocates nothing."""
        return jax.eval_shape(lambda: nn.unbox(self._boxed_init(jax.random.key(0))))

    def logical_axes(self) -> Params:
        """The parameter tree with a `PartitionSpec` of logical axis names as leaves, one name per dimension."""
        return nn.get_partition_spec(jax.eval_shape(lambda: self._boxed_init(jax.random.key(0))))

    def in_compute_dtype(self, params: Params) -> Params:
        """Parameters cast to the compute dtype, except those that are used in float32. Changes no output."""

        def cast(path: tuple, leaf: jax.Array) -> jax.Array:
            names = {key.key for key in path}
            return leaf if names & {"scale", "router", "value_head"} else leaf.astype(self.config.dtype)

        return jax.tree_util.tree_map_with_path(cast, params)

    def _boxed_init(self, key: jax.Array) -> Params:
        """Parameters in Linen boxes that carry the logical axis names."""
        c = self.config
        keys = jax.random.split(key, 3)
        x = jnp.zeros((1, 1, c.width), c.dtype)
        tables = rotary_tables(jnp.zeros((1, 1), jnp.int32), c)

        def init_layer(key: jax.Array) -> Params:
            return Block(c).init(key, x, tables, lambda q, k, v: q)["params"]

        layers = jax.vmap(init_layer)(jax.random.split(keys[0], c.num_layers))
        params = {
            "embed": Embed(c).init(keys[1], jnp.zeros((1, 1), jnp.int32))["params"],
            "layers": jax.tree.map(_stack_box, layers, is_leaf=_is_box),
            "final_norm": _norm(c).init(key, x)["params"],
        }
        if self.head == "value":
            kernel = jnp.zeros((c.width, 1), c.param_dtype)
            params["value_head"] = {"kernel": nn.LogicallyPartitioned(kernel, ("embed", "value"))}
        elif not c.tie_embeddings:
            kernel = initializer(c)(keys[2], (c.width, c.vocab_size), c.param_dtype)
            params["lm_head"] = {"kernel": nn.LogicallyPartitioned(kernel, ("embed", "vocab"))}
        return params

    # Forward

    def hidden(self, params: Params, ids: jax.Array, positions: jax.Array, intervals: jax.Array) -> jax.Array:
        """Final-normed hidden states [N,T,E] of ids [N,T] at positions [N,T] under intervals [N,T,4]."""
        return self._hidden(params, ids, positions, intervals, keep_kv=False)[0]

    def hidden_and_kv(self, params: Params, ids: jax.Array, positions: jax.Array, intervals: jax.Array,
                      prefix: Prefix | None = None) -> tuple[jax.Array, KV]:
        """`hidden`, and the keys and values [L,N,T,K,D] to start a cache with.

        With `prefix(layer) -> (keys, values)`, each [N,S,K,D], the intervals count these S keys first, then those of
        the T tokens. It is called layer by layer, so that no prefix of all layers is held.
        """
        hidden, kv = self._hidden(params, ids, positions, intervals, keep_kv=True, prefix=prefix)
        return hidden, KV(*kv)

    def _hidden(self, params, ids, positions, intervals, keep_kv, prefix=None):
        tables = rotary_tables(positions, self.config)

        def layer(x, inputs):
            layer_params, index = inputs
            before = None if prefix is None else prefix(index)
            attend = sequence_attend(intervals, self.config.attention, self.mesh, before)
            x, kv = self._apply_block(layer_params, x, tables, attend)
            return x, kv if keep_kv else None

        return self._through_layers(layer, params, ids, (params["layers"], jnp.arange(self.config.num_layers)))

    def decode(self, params: Params, ids: jax.Array, positions: jax.Array, cache: KVCache, cache_len: jax.Array,
               new_intervals: jax.Array | None = None) -> tuple[jax.Array, KV]:
        """One decode forward: Q new tokens that see `cache[:cache_len]` and each other, in both directions.

        Args:
          params: parameters.
          ids, positions: int32 [N,Q].
          cache: keys and values of all layers; read, not written.
          cache_len: int32 [N], valid entries of each row's cache.
          new_intervals: int32 [N,Q,2], the range of new tokens that each of them sees; None: all.

        Returns:
          final-normed hidden states [N,Q,E] and the new tokens' own KV [L,N,Q,K,D], for the caller to commit.
        """
        tables = rotary_tables(positions, self.config)

        def layer(x, inputs):
            layer_params, index = inputs
            attend = cache_attend(cache, index, cache_len, new_intervals, self.mesh)
            return self._apply_block(layer_params, x, tables, attend)

        layers = jnp.arange(self.config.num_layers)
        hidden, kv = self._through_layers(layer, params, ids, (params["layers"], layers))
        return hidden, KV(*kv)

    def _apply_block(self, layer_params, x, tables, attend):
        block = Block(self.config, self.mesh)
        x, kv = block.apply({"params": layer_params}, x, tables, attend)
        return constrain_rows(x, self.mesh), kv

    def _through_layers(self, layer: Callable, params: Params, ids: jax.Array, per_layer: Any) -> tuple[jax.Array, Any]:
        """Embeds, carries x through `layer(x, slice of per_layer) -> (x, y)`, normalises; returns (x, stacked y)."""
        c = self.config
        if self.mesh is not None:
            check_split("rows of the batch", "batch", ids.shape[0], self.mesh)
        if c.remat != "none":
            # Inside a scan the compiler cannot merge the recomputation with the forward pass: no barrier needed.
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[c.remat], prevent_cse=not c.scan_layers)
        x = Embed(c, self.mesh).apply({"params": params["embed"]}, ids)
        if c.scan_layers:
            x, ys = jax.lax.scan(layer, x, per_layer)
        else:
            collected = []
            for i in range(c.num_layers):
                x, y = layer(x, jax.tree.map(lambda leaf, i=i: leaf[i], per_layer))
                collected.append(y)
            ys = jax.tree.map(lambda *leaves: jnp.stack(leaves), *collected)
        return _norm(c).apply({"params": params["final_norm"]}, x), ys

    # Heads

    def predicting(self, columns: jax.Array) -> jax.Array:
        """Columns whose hidden states the head turns into logits of the tokens at `columns`: the same, or those one to
        the left with shifted logits. A value belongs to the token's own column in any model."""
        return jnp.maximum(columns - 1, 0) if self.config.logit_alignment == "shifted" else columns

    def head_kernel(self, params: Params) -> jax.Array:
        """Kernel [E,V] of the language-model head, in the parameters' dtype; the transposed embedding when tied."""
        return params["embed"]["embedding"].T if self.config.tie_embeddings else params["lm_head"]["kernel"]

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Logits [..,V] of hidden [..,E]: product in the compute dtype, float32 result."""
        kernel = self.head_kernel(params).astype(self.config.dtype)
        return jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)

    def values(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Values [..] of hidden [..,E], in float32."""
        kernel = params["value_head"]["kernel"].astype(jnp.float32)
        return jnp.dot(hidden.astype(jnp.float32), kernel[:, 0], precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnums=0)
def _init_params(model: Model, key: jax.Array) -> Params:
    params = nn.unbox(model._boxed_init(key))
    if model.mesh is not None:
        params = jax.lax.with_sharding_constraint(params, param_shardings(model, model.mesh))
    return params


def _norm(config: ModelConfig, name: str | None = None) -> RMSNorm:
    return RMSNorm(config.norm_eps, "norm", config.dtype, config.param_dtype, name=name)


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def _stack_box(box: nn.LogicallyPartitioned) -> nn.LogicallyPartitioned:
    return box.replace(names=("layers", *box.names))
