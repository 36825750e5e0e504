"""Supervised fine-tuning of SDAR-4B on rows with `prompt` and `response` (JSONL), masked block by block.

    tracerl sft --config sft_sdar_4b --config.model.path=SDAR-4B-Chat --config.sft.path=rows.jsonl

Long reasoning: raise sft.max_response_tokens and sft.row_length together.
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "name": "sft_sdar_4b",
            "model": {"path": "SDAR-4B-Chat", "dtype": "bfloat16", "remat": "full"},
            "mesh": {"data": 1, "fsdp": -1},
            "task": {"name": "jsonl", "path": "rows.jsonl", "template": "math", "max_prompt_tokens": 784},
            "sft": {
                "steps": 1000, "sequences_per_update": 128, "row_length": 8192, "rows_per_device": 1,
                "max_response_tokens": 4000,
                "optimizer": {"learning_rate": 1e-5, "schedule": "cosine", "warmup_updates": 50},
            },
            "rl": {"steps": 0},
        }
    )  # fmt: skip
