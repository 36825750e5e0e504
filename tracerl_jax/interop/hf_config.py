"""Hugging Face `config.json` of SDAR and SDAR-MoE to `ModelConfig` and back."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tracerl_jax.errors import CheckpointError, ConfigError
from tracerl_jax.interop.folders import read_json
from tracerl_jax.interop.tokenizer import load_tokenizer, mask_token_id
from tracerl_jax.models import ModelConfig

SDAR_MASK_ID = 151669  # of the published checkpoints, whose config may not say it

_REQUIRED = object()
# our field: (their key, default of their configuration class)
_KEYS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", _REQUIRED),
    "width": ("hidden_size", _REQUIRED),
    "mlp_width": ("intermediate_size", _REQUIRED),
    "num_layers": ("num_hidden_layers", _REQUIRED),
    "num_heads": ("num_attention_heads", _REQUIRED),
    "num_kv_heads": ("num_key_value_heads", None),  # null: as many as heads
    "head_dim": ("head_dim", 128),
    "max_positions": ("max_position_embeddings", 32768),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "rope_theta": ("rope_theta", 10000.0),
    "qkv_bias": ("attention_bias", False),
    "tie_embeddings": ("tie_word_embeddings", False),
    "block_size": ("block_size", 4),
    "initializer_range": ("initializer_range", 0.02),
}
_EXPERT_KEYS: dict[str, tuple[str, Any]] = {
    "num_experts": ("num_experts", _REQUIRED),
    "experts_per_token": ("num_experts_per_tok", _REQUIRED),
    "expert_width": ("moe_intermediate_size", _REQUIRED),
}
_ID_KEYS = ("eos_token_id", "pad_token_id")  # the same in both


def read_model_config(folder: str | os.PathLike, **overrides: Any) -> ModelConfig:
    """`ModelConfig` of a model folder; stop ids also from `generation_config.json`, mask id also from the tokenizer.

    Raises:
        CheckpointError: not a model folder, another architecture, an unsupported feature, or no mask id.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; give a Hugging Face model folder (with config.json)")
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file; give a Hugging Face model folder, or convert a run folder first (tracerl convert)"
        )
    config = read_json(path)
    if "model_type" not in config and (folder / "checkpoints").is_dir():
        raise CheckpointError(
            f"{folder}: a run folder, not a model folder; give {folder / 'hf'} (written when the run ends), or convert "
            f"a checkpoint of it (tracerl convert --from {folder} --to DIR)"
        )
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    if config.get("mask_token_id") is None and "mask_token_id" not in overrides:
        tokenizer = load_tokenizer(folder)
        config["mask_token_id"] = None if tokenizer is None else mask_token_id(tokenizer)
    return model_config_from_hf(config, generation=generation, source=str(path), **overrides)


def model_config_from_hf(
    config: Mapping[str, Any], *, generation: Mapping[str, Any] | None = None, source: str = "config.json",
    **overrides: Any,
) -> ModelConfig:  # fmt: skip
    """`ModelConfig` of the contents of a `config.json`.

    Special ids: the mask id is the config's, or 151669 when the vocabulary is large enough for it. The end id is the
    first of `eos_token_id`; stop ids are all end ids of the config and of `generation`. The pad id is the config's,
    else the generation config's, else the end id.

    Args:
        config: contents of `config.json`; `model_type` must contain "sdar", and "moe" selects experts in every layer.
        generation: contents of `generation_config.json`.
        source: file name for messages.
        overrides: fields of `ModelConfig` to set to something else.

    Raises:
        CheckpointError: the model cannot be represented; names the key and the file.
    """
    model_type = str(config.get("model_type", ""))
    experts = "moe" in model_type
    if "sdar" not in model_type:
        raise CheckpointError(
            f"{source}: model_type {model_type!r} is not supported; it must be sdar or sdar_moe (SDAR, TraDo)"
        )
    _refuse_unsupported(config, experts, source)

    fields = {
        field: _value(config, key, default, source)
        for field, (key, default) in (_KEYS | (_EXPERT_KEYS if experts else {})).items()
    }
    fields["rope_theta"] = _rope(config).get("rope_theta", fields["rope_theta"])
    if fields["num_kv_heads"] is None:
        fields["num_kv_heads"] = fields["num_heads"]
    fields["out_bias"] = fields["qkv_bias"]
    fields["family"] = "sdar_moe" if experts else "sdar"
    fields |= _special_ids(config, generation or {}, fields["vocab_size"])
    try:
        model_config = ModelConfig(**fields)
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from None
    model_config = model_config.replace(**overrides)
    if model_config.mask_token_id is None:
        raise CheckpointError(
            f"{source}: no mask id: the file has no mask_token_id, there is no tokenizer with a mask "
            f"token and the vocabulary has no id {SDAR_MASK_ID}; add mask_token_id to the file"
        )
    return model_config


def hf_config_from_model(model_config: ModelConfig, original: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Contents of a `config.json` for `model_config`.

    Every key of `original` is kept (remote code, options we do not read); only keys whose meaning differs from
    `model_config` are written. Without `original` a complete new config is made, without remote code.
    """
    c = model_config
    keys = _KEYS | (_EXPERT_KEYS if c.num_experts else {})
    if original is None:
        config = {
            "architectures": ["SDARMoeForCausalLM" if c.num_experts else "SDARForCausalLM"],
            "model_type": c.family,
            "hidden_act": "silu",
            "rope_scaling": None,
            "fuse_cross_entropy": False,  # the published code reads it
        }
        config |= {key: getattr(c, field) for field, (key, _) in keys.items()}
        ends = list(dict.fromkeys([c.eos_token_id, *c.stop_token_ids]))
        ids = {"mask_token_id": c.mask_token_id, "eos_token_id": ends if len(ends) > 1 else ends[0]}
        return config | ids | {"pad_token_id": c.pad_token_id}

    before = model_config_from_hf(original, mask_token_id=c.mask_token_id)
    changed = {
        key: getattr(c, field)
        for field, key in [(field, key) for field, (key, _) in keys.items()] + [(key, key) for key in _ID_KEYS]
        if getattr(before, field) != getattr(c, field)
    }
    config = {**original, **changed, "mask_token_id": c.mask_token_id}
    if "rope_theta" in changed and "rope_parameters" in config:
        config["rope_parameters"] = _rope(original) | {"rope_theta": c.rope_theta}
    return config


def _refuse_unsupported(config: Mapping[str, Any], experts: bool, source: str) -> None:
    def refuse(key: str, why: str) -> None:
        raise CheckpointError(f"{source}: {key} = {config.get(key)!r} is not supported: {why}")

    if config.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", "only silu")
    scaling = config.get("rope_scaling")
    if scaling is not None and scaling.get("rope_type", scaling.get("type")) != "default":
        refuse("rope_scaling", "only null (plain rotary embedding)")
    if _rope(config).get("rope_type", "default") != "default":
        refuse("rope_parameters", "only rope_type default (plain rotary embedding)")
    if experts:
        if config.get("decoder_sparse_step", 1) != 1:
            refuse("decoder_sparse_step", "every layer must be a mixture of experts (1)")
        if config.get("mlp_only_layers"):
            refuse("mlp_only_layers", "every layer must be a mixture of experts ([])")
        if config.get("shared_expert_intermediate_size"):
            refuse("shared_expert_intermediate_size", "no shared expert")


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The newer spelling of rope_theta and rope_scaling in one dict."""
    return dict(config.get("rope_parameters") or {})


def _value(config: Mapping[str, Any], key: str, default: Any, source: str) -> Any:
    value = config.get(key, default)
    if value is _REQUIRED:
        raise CheckpointError(f"{source}: the key {key} is missing; add it, or fetch the file again")
    return value


def _special_ids(config: Mapping[str, Any], generation: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    mask = config.get("mask_token_id")
    if mask is None and vocab_size > SDAR_MASK_ID:
        mask = SDAR_MASK_ID
    ends = _as_ids(config.get("eos_token_id"))
    stops = tuple(dict.fromkeys(ends + _as_ids(generation.get("eos_token_id"))))
    eos = stops[0] if stops else None
    pads = (config.get("pad_token_id"), generation.get("pad_token_id"), eos)
    pad = next((pad for pad in pads if pad is not None), None)
    return {"mask_token_id": mask, "eos_token_id": eos, "stop_token_ids": stops, "pad_token_id": pad}


def _as_ids(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
