"""Folders of reward models with random weights, named and shaped as transformers writes them."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizer_utils import build_byte_tokenizer

SIZES = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip
CONFIGS = {
    "qwen2": {"architectures": ["Qwen2ForSequenceClassification"], "rope_theta": 1e6, "pad_token_id": 256},
    "qwen3": {
        "architectures": ["Qwen3ForSequenceClassification"], "head_dim": 16, "pad_token_id": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "id2label": {"0": "LABEL_0"},
    },
    "llama": {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1, "rope_scaling": None},
}  # fmt: skip


def make_folder(folder: Path, family: str, tokenizer=True, tensors=None, **config) -> Path:
    config = SIZES | CONFIGS[family] | {"model_type": family} | config
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = make_weights(config) | (tensors or {})
    save_file({name: w for name, w in weights.items() if w is not None}, folder / "model.safetensors")
    if tokenizer:
        build_byte_tokenizer().save_pretrained(folder)
    return folder


def make_weights(config: dict) -> dict[str, np.ndarray]:
    """Random weights with the names and shapes of transformers."""
    rng = np.random.default_rng(0)
    E, F, H, K = (config[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"))
    D = config.get("head_dim", E // H)

    def random(*shape, scale=0.3):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    weights = {"model.embed_tokens.weight": random(config["vocab_size"], E, scale=1.0), "score.weight": random(1, E)}
    weights["model.norm.weight"] = 1 + random(E)
    for i in range(config["num_hidden_layers"]):
        layer = {f"{name}_layernorm.weight": 1 + random(E) for name in ("input", "post_attention")}
        for name, heads in (("q", H), ("k", K), ("v", K)):
            layer[f"self_attn.{name}_proj.weight"] = random(heads * D, E)
            if config["model_type"] == "qwen2":
                layer[f"self_attn.{name}_proj.bias"] = random(heads * D)
        if config["model_type"] == "qwen3":
            layer |= {f"self_attn.{name}_norm.weight": 1 + random(D) for name in "qk"}
        layer["self_attn.o_proj.weight"] = random(E, H * D)
        layer |= {f"mlp.{name}_proj.weight": random(F, E) for name in ("gate", "up")}
        layer["mlp.down_proj.weight"] = random(E, F)
        weights |= {f"model.layers.{i}.{name}": weight for name, weight in layer.items()}
    return weights
