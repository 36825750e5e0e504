"""Scalar reward models of Hugging Face: Qwen2, Qwen3 or Llama with a sequence-classification head of one label.

Published as `*ForSequenceClassification`: a causal decoder whose `score.weight` [1,E] reads the last token.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from tracerl_jax.errors import CheckpointError, ConfigError
from tracerl_jax.interop.folders import read_json
from tracerl_jax.interop.hf_load import load_params
from tracerl_jax.interop.names import LLAMA_TENSORS
from tracerl_jax.models import Model, ModelConfig

NAMES = LLAMA_TENSORS | {"value_head/kernel": ("score.weight", True)}

# What a family's configuration class does not say in a key: whether q and k are normalised, q, k and v have biases.
_FAMILIES = {"qwen2": (False, True), "qwen3": (True, None), "llama": (False, None)}  # None: as attention_bias says
_SHARED_KEYS = {
    "vocab_size": "vocab_size", "width": "hidden_size", "mlp_width": "intermediate_size",
    "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
}  # fmt: skip


def load_reward_model(
    folder: str | os.PathLike, *, dtype: str = "bfloat16", mesh: Mesh | None = None
) -> tuple[Model, dict[str, Any]]:
    """The model, with a value head, and its parameters, placed like those of `load_hf`.

    dtype: of parameters and compute; the head is read in float32.
    Raises CheckpointError when the folder holds no such model, ConfigError when it cannot be split over the mesh.
    """
    model = describe_reward_model(folder, dtype=dtype, mesh=mesh)
    return model, load_params(folder, model, NAMES)


def describe_reward_model(folder: str | os.PathLike, *, dtype: str = "bfloat16", mesh: Mesh | None = None) -> Model:
    """The model without its parameters. Raises like `load_reward_model`."""
    path = Path(folder) / "config.json"
    config = reward_config_from_hf(read_json(path), str(path)).replace(dtype=dtype, param_dtype=dtype)
    return Model(config, head="value", mesh=mesh)


def reward_config_from_hf(config: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """`ModelConfig` of the contents of a reward model's `config.json`. Raises CheckpointError naming the key."""

    def refuse(key: str, why: str) -> None:
        raise CheckpointError(f"{source}: {key} is {config.get(key)!r}: {why}")

    kinds = config.get("architectures") or []
    if not any(str(kind).endswith("ForSequenceClassification") for kind in kinds):
        refuse("architectures", "not a reward model; it must be *ForSequenceClassification")
    family = config.get("model_type")
    if family not in _FAMILIES:
        refuse("model_type", f"only reward models of {', '.join(_FAMILIES)} can be read")
    if "id2label" in config and len(config["id2label"]) != 1:
        refuse("id2label", "a reward model has one label, a scalar; this is a classifier")
    if config.get("num_labels", 1) != 1:
        refuse("num_labels", "a reward model has one label, a scalar; this is a classifier")
    if config.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", "only silu")
    if config.get("mlp_bias"):
        refuse("mlp_bias", "only layers without it")
    rope = {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}
    rope |= config.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        refuse("rope_parameters" if "rope_parameters" in config else "rope_scaling", "only plain rotary embedding")
    sliding = "sliding_attention" in (config.get("layer_types") or [])
    if sliding or (config.get("use_sliding_window") and config.get("sliding_window")):
        refuse("layer_types" if sliding else "use_sliding_window", "only full attention")

    qk_norm, qkv_bias = _FAMILIES[family]
    bias = bool(config.get("attention_bias", False))
    try:
        values = {field: config[key] for field, key in _SHARED_KEYS.items()}
        head_dim = config.get("head_dim") or (
            128 if family == "qwen3" else values["width"] // values["num_heads"]
        )
        return ModelConfig(
            **values,
            num_kv_heads=config.get("num_key_value_heads") or values["num_heads"],
            head_dim=head_dim,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=rope["rope_theta"] or 10000.0,
            qk_norm=qk_norm,
            qkv_bias=bias if qkv_bias is None else qkv_bias,
            out_bias=bias if qkv_bias is None else False,
            attention_mode="causal",
            max_positions=config.get("max_position_embeddings", 32768),
            pad_token_id=config.get("pad_token_id"),
        )
    except KeyError as error:
        raise CheckpointError(f"{source}: the key {error} is missing; fetch the file again") from None
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from None
