"""Supervised fine-tuning of MMaDA-8B on text: rows with `prompt` and `response` (JSONL), random masking.

    tracerl sft --config sft_mmada_8b --config.model.path=MMaDA-8B-MixCoT --config.sft.path=rows.jsonl

The rows of its vocabulary that are image codes take part in the softmax, as in its published training.
"""

from tracerl_jax.configs.sft_dream_7b import like_dream


def get_config():
    return like_dream("sft_mmada_8b", "MMaDA-8B-MixCoT", "llada", "random_masking")
