"""Tables of parameter names: ours, the Hugging Face checkpoint's, and how a tensor gets from one to the other.

Ours are stacked over layers (and experts) and multiply from the right, [in, out]; theirs are one tensor per layer and
expert in torch's Linear layout, [out, in].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

# our path: (their name with {0} = layer and {1} = expert, whether the last two axes swap)
Tensors = Mapping[str, tuple[str, bool]]

_LAYER = "model.layers.{0}."
_VALUE_HEAD = {"value_head/kernel": ("value_head.weight", True)}  # ours: no published checkpoint has one

# SDAR, Dream: the names of transformers' Llama and its descendants
LLAMA_TENSORS: Tensors = {
    "embed/embedding": ("model.embed_tokens.weight", False),
    "layers/attention_norm/scale": (f"{_LAYER}input_layernorm.weight", False),
    **{
        f"layers/attention/{proj}_proj/{ours}": (f"{_LAYER}self_attn.{proj}_proj.{theirs}", ours == "kernel")
        for proj in "qkvo"
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    },
    "layers/attention/q_norm/scale": (f"{_LAYER}self_attn.q_norm.weight", False),
    "layers/attention/k_norm/scale": (f"{_LAYER}self_attn.k_norm.weight", False),
    "layers/mlp_norm/scale": (f"{_LAYER}post_attention_layernorm.weight", False),
    **{f"layers/mlp/{proj}_proj/kernel": (f"{_LAYER}mlp.{proj}_proj.weight", True) for proj in ("gate", "up", "down")},
    "layers/moe/router/kernel": (f"{_LAYER}mlp.gate.weight", True),
    **{
        f"layers/moe/{proj}_proj": (f"{_LAYER}mlp.experts.{{1}}.{proj}_proj.weight", True)
        for proj in ("gate", "up", "down")
    },
    "final_norm/scale": ("model.norm.weight", False),
    "lm_head/kernel": ("lm_head.weight", True),
    **_VALUE_HEAD,
}

_TRUNK = "model.transformer."
_BLOCK = f"{_TRUNK}blocks.{{0}}."

# LLaDA, MMaDA: the names of OLMo, whose ff_proj is the gate
OLMO_TENSORS: Tensors = {
    "embed/embedding": (f"{_TRUNK}wte.weight", False),
    "layers/attention_norm/scale": (f"{_BLOCK}attn_norm.weight", False),
    **{
        f"layers/attention/{proj}_proj/{ours}": (f"{_BLOCK}{proj}_proj.{theirs}", ours == "kernel")
        for proj in "qkv"
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    },
    "layers/attention/o_proj/kernel": (f"{_BLOCK}attn_out.weight", True),
    "layers/mlp_norm/scale": (f"{_BLOCK}ff_norm.weight", False),
    "layers/mlp/gate_proj/kernel": (f"{_BLOCK}ff_proj.weight", True),
    "layers/mlp/up_proj/kernel": (f"{_BLOCK}up_proj.weight", True),
    "layers/mlp/down_proj/kernel": (f"{_BLOCK}ff_out.weight", True),
    "final_norm/scale": (f"{_TRUNK}ln_f.weight", False),
    "lm_head/kernel": (f"{_TRUNK}ff_out.weight", True),
    **_VALUE_HEAD,
}


@dataclass(frozen=True)
class HfTensor:
    """One tensor of a Hugging Face checkpoint and the slice of our parameters it holds."""

    name: str
    path: str  # of our leaf
    index: tuple[int, ...]  # into the leaf's leading axes: (), (layer,) or (layer, expert)
    shape: tuple[int, ...]  # theirs
    transpose: bool


def hf_tensors(abstract_params: Mapping[str, Any], tensors: Tensors) -> list[HfTensor]:
    """Every tensor of the checkpoint that `abstract_params` (arrays or ShapeDtypeStructs) corresponds to.

    In the order of the model: embedding, layer by layer, final norm, head.
    """
    found = []
    for path, leaf in leaves_by_path(abstract_params).items():
        pattern, transpose = tensors[path]
        leading = pattern.count("{")
        shape = leaf.shape[leading:]
        found += [
            HfTensor(pattern.format(*index), path, index, shape[::-1] if transpose else shape, transpose)
            for index in np.ndindex(*leaf.shape[:leading])
        ]
    position = {path: i for i, path in enumerate(tensors)}
    first_layer = position["layers/attention_norm/scale"]

    def order(tensor: HfTensor) -> tuple[int, ...]:
        place = position[tensor.path]
        return (first_layer, tensor.index[0], place, *tensor.index[1:]) if tensor.index else (place,)

    return sorted(found, key=order)


def leaves_by_path(params: Mapping[str, Any]) -> dict[str, Any]:
    """{"layers/mlp/up_proj/kernel": leaf, ...}"""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
