"""Reads tests/golden/<name>: configuration, parameters and arrays, without the conversion code under test elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file

from tracerl_jax.models import ModelConfig

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("sdar_tiny", "sdar_tied")
FULL_NAMES = ("dream_tiny", "llada_tiny", "mmada_tiny")  # full attention


class Arrays:
    """Callable reader: `arrays("forward")` opens forward.npz; `arrays("forward", "bc")` gives its `bc.*` as a dict."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, file: str, case: str | None = None) -> Mapping[str, np.ndarray]:
        arrays = np.load(self.folder / f"{file}.npz")
        if case is None:
            return arrays
        return {key.removeprefix(case + "."): arrays[key] for key in arrays.files if key.startswith(case + ".")}


class Golden(NamedTuple):
    config: ModelConfig
    params: dict  # old weights
    params_new: dict
    arrays: Arrays


def load_golden(name: str) -> Golden:
    """The language model of tests/golden/<name>."""
    folder = GOLDEN / name
    config = _config(folder)
    return Golden(config, _params(folder / "model.safetensors", config),
                  _params(folder / "model_new.safetensors", config), Arrays(folder))


def load_value_golden(name: str) -> Golden:
    """The value model of tests/golden/<name>: the same backbones, each with its value head and without lm head."""
    golden = load_golden(name)
    for params, file in ((golden.params, "value_head"), (golden.params_new, "value_head_new")):
        params.pop("lm_head", None)
        head = load_file(GOLDEN / name / f"{file}.safetensors")["value_head.weight"]
        params["value_head"] = {"kernel": head.T}
    return golden


def _config(folder: Path) -> ModelConfig:
    c = json.loads((folder / "config.json").read_text())
    ids = {"mask_token_id": c["mask_token_id"], "eos_token_id": c["eos_token_id"], "pad_token_id": c["eos_token_id"],
           "stop_token_ids": (c["eos_token_id"],)}
    if "d_model" in c:
        return ModelConfig(
            family=c["model_type"], vocab_size=c["vocab_size"], width=c["d_model"], num_layers=c["n_layers"],
            num_heads=c["n_heads"], num_kv_heads=c["n_kv_heads"], head_dim=c["d_model"] // c["n_heads"],
            mlp_width=c["mlp_hidden_size"], norm_eps=c["rms_norm_eps"], rope_theta=c["rope_theta"],
            max_positions=c["max_sequence_length"], text_vocab_size=c.get("llm_vocab_size"), **_FULL, **ids)
    shape = {
        "vocab_size": c["vocab_size"], "width": c["hidden_size"], "num_layers": c["num_hidden_layers"],
        "num_heads": c["num_attention_heads"], "num_kv_heads": c["num_key_value_heads"],
        "mlp_width": c["intermediate_size"], "norm_eps": c["rms_norm_eps"], "rope_theta": c["rope_theta"],
        "tie_embeddings": c["tie_word_embeddings"]}
    if c["model_type"] == "Dream":
        return ModelConfig(family="dream", head_dim=c["hidden_size"] // c["num_attention_heads"], qkv_bias=True,
                           rope_dtype="compute", logit_alignment="shifted",
                           max_positions=c["max_position_embeddings"], **shape, **_FULL, **ids)
    return ModelConfig(head_dim=c["head_dim"], block_size=c["block_size"], **shape, **ids)


_FULL = {"attention_mode": "full", "qk_norm": False, "block_size": 32}
_LLAMA_NAMES = {
    "layer": "model.layers.{}.", "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
    "attention": {f"{p}_proj": f"self_attn.{p}_proj" for p in "qkvo"},
    "norms": {f"{p}_norm": f"self_attn.{p}_norm" for p in "qk"},
    "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "mlp": {f"{p}_proj": f"mlp.{p}_proj" for p in ("gate", "up", "down")}}
_OLMO_NAMES = {
    "layer": "model.transformer.blocks.{}.", "embed": "model.transformer.wte", "norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
    "attention": {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "attn_out"},
    "norms": {}, "attention_norm": "attn_norm", "mlp_norm": "ff_norm",
    "mlp": {"gate_proj": "ff_proj", "up_proj": "up_proj", "down_proj": "ff_out"}}


def checkpoint_names(family: str) -> dict:
    """Where the parts of our tree are in a checkpoint of a family."""
    return _OLMO_NAMES if family in ("llada", "mmada") else _LLAMA_NAMES


def _params(file: Path, config: ModelConfig) -> dict:
    tensors, names = load_file(file), checkpoint_names(config.family)

    def stack(name: str) -> np.ndarray:
        return np.stack([tensors[names["layer"].format(i) + name] for i in range(config.num_layers)])

    def linear(name: str) -> dict:
        leaves = {"kernel": stack(f"{name}.weight").swapaxes(1, 2)}
        biased = f"{names['layer'].format(0)}{name}.bias" in tensors
        return leaves | ({"bias": stack(f"{name}.bias")} if biased else {})

    params = {
        "embed": {"embedding": tensors[f"{names['embed']}.weight"]},
        "layers": {
            "attention": {ours: linear(theirs) for ours, theirs in names["attention"].items()},
            "attention_norm": {"scale": stack(f"{names['attention_norm']}.weight")},
            "mlp_norm": {"scale": stack(f"{names['mlp_norm']}.weight")},
            "mlp": {ours: linear(theirs) for ours, theirs in names["mlp"].items()},
        },
        "final_norm": {"scale": tensors[f"{names['norm']}.weight"]},
    }
    if config.qk_norm:
        norms = {ours: {"scale": stack(f"{theirs}.weight")} for ours, theirs in names["norms"].items()}
        params["layers"]["attention"] |= norms
    if not config.tie_embeddings:
        params["lm_head"] = {"kernel": tensors[f"{names['head']}.weight"].T}
    return params
