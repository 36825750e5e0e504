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
    return ModelConfig(
        vocab_size=c["vocab_size"], width=c["hidden_size"], num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"], num_kv_heads=c["num_key_value_heads"], head_dim=c["head_dim"],
        mlp_width=c["intermediate_size"], norm_eps=c["rms_norm_eps"], rope_theta=c["rope_theta"],
        tie_embeddings=c["tie_word_embeddings"], block_size=c["block_size"], mask_token_id=c["mask_token_id"],
        eos_token_id=c["eos_token_id"], pad_token_id=c["eos_token_id"], stop_token_ids=(c["eos_token_id"],))


def _params(file: Path, config: ModelConfig) -> dict:
    tensors = load_file(file)

    def stack(name: str, transpose: bool = False) -> np.ndarray:
        layers = [tensors[f"model.layers.{i}.{name}.weight"] for i in range(config.num_layers)]
        return np.stack([layer.T if transpose else layer for layer in layers])

    attention = {f"{p}_proj": {"kernel": stack(f"self_attn.{p}_proj", True)} for p in "qkvo"}
    attention |= {f"{p}_norm": {"scale": stack(f"self_attn.{p}_norm")} for p in "qk"}
    params = {
        "embed": {"embedding": tensors["model.embed_tokens.weight"]},
        "layers": {
            "attention": attention,
            "attention_norm": {"scale": stack("input_layernorm")},
            "mlp_norm": {"scale": stack("post_attention_layernorm")},
            "mlp": {f"{p}_proj": {"kernel": stack(f"mlp.{p}_proj", True)} for p in ("gate", "up", "down")},
        },
        "final_norm": {"scale": tensors["model.norm.weight"]},
    }
    if not config.tie_embeddings:
        params["lm_head"] = {"kernel": tensors["lm_head.weight"].T}
    return params
