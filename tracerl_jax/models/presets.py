"""Published architectures and small ones, by name.

Read from published `config.json` files: sdar_4b and sdar_8b; trado_4b and trado_8b are fine-tuned from them and share
their shapes. Inferred, not read: sdar_1_7b and sdar_30b_a3b take the shapes of the Qwen3-1.7B and Qwen3-30B-A3B
backbones they were adapted from, with SDAR's untied head, ids and block size. Loading a checkpoint folder always uses
the folder's own config.
"""

from __future__ import annotations

from tracerl_jax.models.config import ModelConfig

_SDAR = {
    "vocab_size": 151936, "head_dim": 128, "mask_token_id": 151669, "eos_token_id": 151643, "pad_token_id": 151643,
    "stop_token_ids": (151643, 151645),  # <|endoftext|>, <|im_end|>
}

_SDAR_4B = ModelConfig(width=2560, num_layers=36, num_heads=32, num_kv_heads=8, mlp_width=9728, **_SDAR)
_SDAR_8B = ModelConfig(width=4096, num_layers=36, num_heads=32, num_kv_heads=8, mlp_width=12288, **_SDAR)

PRESETS: dict[str, ModelConfig] = {
    "sdar_1_7b": ModelConfig(width=2048, num_layers=28, num_heads=16, num_kv_heads=8, mlp_width=6144, **_SDAR),
    "sdar_4b": _SDAR_4B,
    "sdar_8b": _SDAR_8B,
    "sdar_30b_a3b": ModelConfig(width=2048, num_layers=48, num_heads=32, num_kv_heads=4, mlp_width=6144,
                                num_experts=128, experts_per_token=8, expert_width=768, family="sdar_moe", **_SDAR),
    "trado_4b": _SDAR_4B,
    "trado_8b": _SDAR_8B,
    # Small enough for tests; the last ids are special.
    "sdar_tiny": ModelConfig(vocab_size=384, width=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16,
                             mlp_width=96, mask_token_id=375, eos_token_id=363, pad_token_id=363,
                             stop_token_ids=(363,)),
    # 1.2M parameters; vocabulary and ids are replaced by those of the task's tokenizer. 0.02 suits large widths only:
    # from there this one learns several times more slowly.
    "sdar_demo": ModelConfig(vocab_size=128, width=192, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=32,
                             mlp_width=512, rope_theta=1e4, initializer_range=0.07, mask_token_id=127,
                             eos_token_id=126, pad_token_id=126, stop_token_ids=(126,)),
}
