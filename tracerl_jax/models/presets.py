"""Published architectures and small ones, by name.

Read from published `config.json` files: sdar_4b and sdar_8b; trado_4b and trado_8b are fine-tuned from them and share
their shapes. Inferred, not read: sdar_1_7b and sdar_30b_a3b take the shapes of the Qwen3-1.7B and Qwen3-30B-A3B
backbones they were adapted from, with SDAR's untied head, ids and block size. dream_7b and diffucoder_7b (one model
code, Qwen2.5-7B's shapes), llada_8b (1.0 and 1.5 are alike) and mmada_8b (LLaDA's, with rows for image codes) follow
published descriptions of their configs. Loading a checkpoint folder always uses the folder's own config.
"""

from __future__ import annotations

from tracerl_jax.models.config import ModelConfig

_SDAR = {
    "vocab_size": 151936, "head_dim": 128, "mask_token_id": 151669, "eos_token_id": 151643, "pad_token_id": 151643,
    "stop_token_ids": (151643, 151645),  # <|endoftext|>, <|im_end|>
}

_SDAR_4B = ModelConfig(width=2560, num_layers=36, num_heads=32, num_kv_heads=8, mlp_width=9728, **_SDAR)
_SDAR_8B = ModelConfig(width=4096, num_layers=36, num_heads=32, num_kv_heads=8, mlp_width=12288, **_SDAR)

_FULL = {"attention_mode": "full", "qk_norm": False}
_DREAM = {"family": "dream", "logit_alignment": "shifted", "qkv_bias": True, "rope_dtype": "compute", **_FULL}
_LLADA = {"norm_eps": 1e-5, **_FULL}

_DREAM_7B = ModelConfig(
    vocab_size=152064, width=3584, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128, mlp_width=18944,
    max_positions=131072, block_size=32, mask_token_id=151666, eos_token_id=151643, pad_token_id=151643,
    stop_token_ids=(151643, 151645), **_DREAM,  # <|endoftext|>, <|im_end|>
)  # fmt: skip
_LLADA_8B = ModelConfig(
    family="llada", vocab_size=126464, width=4096, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128,
    mlp_width=12288, rope_theta=5e5, max_positions=4096, block_size=32, mask_token_id=126336, eos_token_id=126081,
    pad_token_id=126081, stop_token_ids=(126081, 126348), **_LLADA,  # <|endoftext|>, <|eot_id|>
)  # fmt: skip

# Vocabulary and ids are replaced by those of the task's tokenizer. An initializer range of 0.02 suits large widths
# only: from there these learn several times more slowly.
_DEMO = {
    "vocab_size": 128, "rope_theta": 1e4, "initializer_range": 0.07, "mask_token_id": 127, "eos_token_id": 126,
    "pad_token_id": 126, "stop_token_ids": (126,),
}
_DEMO_FULL = {"width": 128, "num_layers": 3, "num_heads": 4, "head_dim": 32, "mlp_width": 384, "block_size": 4, **_DEMO}

PRESETS: dict[str, ModelConfig] = {
    "sdar_1_7b": ModelConfig(width=2048, num_layers=28, num_heads=16, num_kv_heads=8, mlp_width=6144, **_SDAR),
    "sdar_4b": _SDAR_4B,
    "sdar_8b": _SDAR_8B,
    "sdar_30b_a3b": ModelConfig(width=2048, num_layers=48, num_heads=32, num_kv_heads=4, mlp_width=6144,
                                num_experts=128, experts_per_token=8, expert_width=768, family="sdar_moe", **_SDAR),
    "trado_4b": _SDAR_4B,
    "trado_8b": _SDAR_8B,
    "dream_7b": _DREAM_7B,
    "diffucoder_7b": _DREAM_7B,
    "llada_8b": _LLADA_8B,
    "llada_1_5_8b": _LLADA_8B,
    "mmada_8b": _LLADA_8B.replace(family="mmada", vocab_size=134656, text_vocab_size=126464),  # and 8192 image codes
    # Small enough for tests; the last ids are special.
    "sdar_tiny": ModelConfig(vocab_size=384, width=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16,
                             mlp_width=96, mask_token_id=375, eos_token_id=363, pad_token_id=363,
                             stop_token_ids=(363,)),
    # What the quick start trains: 1.2M parameters, and half of that for full attention.
    "sdar_demo": ModelConfig(width=192, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=32, mlp_width=512, **_DEMO),
    "dream_demo": ModelConfig(num_kv_heads=2, **_DEMO_FULL, **_DREAM),
    "llada_demo": ModelConfig(family="llada", num_kv_heads=4, **_DEMO_FULL, **_LLADA),
}
