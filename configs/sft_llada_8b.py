"""Supervised fine-tuning of LLaDA-8B (1.0 or 1.5) on rows with `prompt` and `response` (JSONL), random masking.

    tracerl sft --config sft_llada_8b --config.model.path=LLaDA-8B-Instruct --config.sft.path=rows.jsonl

LLaDA's own objective weights targets by one over the mask ratio: `--config.sft.inverse_ratio_weight=true`. End
responses with <|eot_id|> if the model is to end its turn so; <|endoftext|> is added.
"""

from tracerl_jax.configs.sft_dream_7b import like_dream


def get_config():
    return like_dream("sft_llada_8b", "LLaDA-8B-Instruct", "llada", "random_masking")
