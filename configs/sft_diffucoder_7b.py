"""Supervised fine-tuning of DiffuCoder-7B on rows with `prompt` and `response` (JSONL), semi-autoregressive masks.

    tracerl sft --config sft_diffucoder_7b --config.model.path=DiffuCoder-7B-Instruct --config.sft.path=rows.jsonl

Settings and methods are those of `sft_dream_7b`, whose model code it shares.
"""

from tracerl_jax.configs.sft_dream_7b import like_dream


def get_config():
    return like_dream("sft_diffucoder_7b", "DiffuCoder-7B-Instruct")
