"""A small random model with a byte-level tokenizer, as a model folder."""

from pathlib import Path

import jax
from tokenizer_utils import build_byte_tokenizer

from tracerl_jax.interop.hf_save import save_hf
from tracerl_jax.models.config import ModelConfig
from tracerl_jax.models.decoder import Model


def make_folder(folder: Path) -> Path:
    config = ModelConfig(
        vocab_size=260, width=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, mlp_width=64, block_size=4,
        max_positions=2048, mask_token_id=259, eos_token_id=256, pad_token_id=256, stop_token_ids=(256, 258),
        initializer_range=0.2,
    )  # fmt: skip
    model = Model(config)
    save_hf(folder, model, model.init(jax.random.key(0)))
    build_byte_tokenizer().save_pretrained(folder)
    return folder
