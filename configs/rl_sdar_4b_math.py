"""TraceRL on SDAR-4B-Chat, MATH levels 3-5: the paper's settings (arXiv 2509.06949, sections 4.3 and 5).

    tracerl rl --config rl_sdar_4b_math --config.model.path=SDAR-4B-Chat \
        --config.task.path=math_train.jsonl --config.task.eval_path=math500.jsonl

`rl_sdar_4b_math:value` adds the diffusion value model. It starts from the policy's weights and doubles the training
state; `--config.value.shared_trunk=true` trains a head on the policy's features instead.

Expected without it (the paper, not yet reproduced here): MATH500 70.2 -> 75.6 static, 67.4 -> 71.8 dynamic after 160
steps. Which chips it fits: docs/presets.md, or `tracerl plan --config rl_sdar_4b_math --topology h100:8`.
"""

from ml_collections import ConfigDict


def get_config(arg=None):
    config = ConfigDict(
        {
            "name": "rl_sdar_4b_math",
            "model": {"path": "SDAR-4B-Chat", "dtype": "bfloat16", "remat": "full"},
            "mesh": {"data": 1, "fsdp": -1},
            "task": {"name": "math", "path": "math_train.jsonl", "eval_path": "math500.jsonl", "template": "math",
                     "max_prompt_tokens": 784, "on_bad_row": "skip"},
            "rollout": {
                "prompts_per_step": 128, "samples_per_prompt": 32, "slots_per_device": 64, "max_tokens": 2000,
                "strategy": "dynamic", "threshold": 0.9, "temperature": 1.0,
            },
            "rl": {
                "steps": 160, "minibatches": 4, "row_length": 8192, "rows_per_device": 1,
                # bf16 rollout and replay round differently; the ratio must start at 1.
                "old_logprobs": "recompute",
                "optimizer": {"learning_rate": 1e-6},
            },
            "eval": {"every": 10, "samples_per_prompt": 3},
            "checkpoint": {"every": 10, "keep_every": 50},
        }
    )  # fmt: skip
    if arg == "value":
        config.name += "_value"
        config.rl.optimizer.learning_rate = 5e-6  # the value model permits more (the paper's authors)
        config.value = {"enabled": True, "gamma": 1.0, "lam": 1.0, "optimizer": {"learning_rate": 5e-6}}
    elif arg:
        raise ValueError(f"the argument of this config is 'value' or nothing, not {arg!r}")
    return config


def like_4b(name, path, arg):
    """The same settings for another checkpoint."""
    config = get_config(arg)
    config.name = config.name.replace("rl_sdar_4b_math", name)
    config.model.path = path
    return config
