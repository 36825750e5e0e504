"""Supervised fine-tuning of Dream-7B on rows with `prompt` and `response` (JSONL), semi-autoregressive masks in blocks
of 16: the TraceRL paper's settings (arXiv 2509.06949).

    tracerl sft --config sft_dream_7b --config.model.path=Dream-v0-Instruct-7B --config.sft.path=rows.jsonl

`--config.sft.method=random_masking` hides tokens all over a response, `trace` replays a recorded order (`step_map`),
`ar` trains the next token, for a start from autoregressive weights (docs/families.md). End responses with <|im_end|> if
the model is to end its turn so; <|endoftext|> is added.
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "name": "sft_dream_7b",
            "model": {"path": "Dream-v0-Instruct-7B", "dtype": "bfloat16", "remat": "full"},
            "mesh": {"data": 1, "fsdp": -1},
            "task": {"name": "jsonl", "path": "rows.jsonl", "template": "dream", "max_prompt_tokens": 784},
            "rollout": {"block_size": 16},
            "sft": {
                "steps": 1000, "method": "semi_ar", "sequences_per_update": 128, "row_length": 4096,
                "rows_per_device": 1, "max_response_tokens": 1024,
                "optimizer": {"learning_rate": 1e-5, "schedule": "cosine", "warmup_updates": 50},
            },
            "rl": {"steps": 0},
        }
    )  # fmt: skip


def like_dream(name, path, template="dream", method="semi_ar"):
    """The same settings for another checkpoint."""
    config = get_config()
    config.name, config.model.path, config.task.template, config.sft.method = name, path, template, method
    return config
