"""GSM8K with the real tokenizer on a small model folder: the whole path on a CPU, a few steps, no quality expected.

    tracerl rl --config rl_gsm8k_small --config.model.path=DIR \
        --config.task.path=gsm8k_train.jsonl --config.task.eval_path=gsm8k_test.jsonl

DIR is any SDAR folder, say a random one of width 128 at vocabulary 151,936 (docs/gsm8k_on_a_cpu.md makes one).
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            "name": "rl_gsm8k_small",
            "model": {"path": "model"},
            "task": {"name": "gsm8k", "path": "gsm8k_train.jsonl", "eval_path": "gsm8k_test.jsonl",
                     "max_prompt_tokens": 256, "on_bad_row": "skip", "train_limit": 200,
                     # A random model is never right; this reward varies all the same, so that updates happen.
                     "rewards": {"math": 1.0, "ascii_share": 1.0}},
            "sft": {"steps": 5, "sequences_per_update": 8, "row_length": 1024, "rows_per_device": 2,
                    "max_response_tokens": 400, "log_every": 1, "optimizer": {"learning_rate": 1e-3}},
            # A random model does not stop by itself, so a cut answer keeps its reward.
            "rollout": {"prompts_per_step": 2, "samples_per_prompt": 4, "slots_per_device": 8, "max_tokens": 64,
                        "truncated_is_wrong": False},
            "rl": {
                "steps": 3, "row_length": 1024, "rows_per_device": 2,
                # Train on groups whatever their accuracy.
                "accuracy_low": 0.0, "accuracy_high": 1.0, "optimizer": {"learning_rate": 1e-4},
            },
            "value": {"enabled": True},
            "eval": {"limit": 8, "max_tokens": 64},
            "checkpoint": {"every": 1},
        }
    )  # fmt: skip
