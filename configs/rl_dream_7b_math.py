"""TraceRL on Dream-7B, MATH levels 3-5: the paper's settings (arXiv 2509.06949), 56 problems x 8 responses a step.

    tracerl rl --config rl_dream_7b_math --config.model.path=Dream-v0-Instruct-7B \
        --config.task.path=math_train.jsonl --config.task.eval_path=math500.jsonl

`rl_dream_7b_math:value` adds the diffusion value model, which the published code does not have for this family. Not yet
run here; which chips it fits, and what a step costs: docs/presets.md. `--config.rollout.strategy=dynamic` decodes
several tokens per step. What the cache does to samples, and what is measured of it: docs/full_attention.md.
"""

from ml_collections import ConfigDict


def get_config(arg=None):
    config = ConfigDict(
        {
            "name": "rl_dream_7b_math",
            "model": {"path": "Dream-v0-Instruct-7B", "dtype": "bfloat16", "remat": "full"},
            "mesh": {"data": 1, "fsdp": -1},
            "task": {"name": "math", "path": "math_train.jsonl", "eval_path": "math500.jsonl", "template": "dream",
                     "max_prompt_tokens": 512, "on_bad_row": "skip"},
            "rollout": {
                "prompts_per_step": 56, "samples_per_prompt": 8, "slots_per_device": 16, "max_tokens": 1024,
                "block_size": 32, "strategy": "linspace", "first_token": True, "confidence": "truncated",
                "threshold": 0.95, "temperature": 0.8, "top_k": 50, "top_p": 0.9,
                # The reference counts its horizon of 128 from the end of the block.
                "cache": "prefix", "horizon": 160,
            },
            "rl": {
                # A row holds four of the longest canvases, of 512 + 1024 tokens.
                "steps": 100, "shrink": 8, "row_length": 6144, "rows_per_device": 1,
                # Merged steps are states that the sampler did not visit, and its cache is approximate: the weights,
                # which the paper does not have, correct for both.
                "old_logprobs": "recompute", "importance_sampling": "token",
                "optimizer": {"learning_rate": 1e-6},
            },
            "eval": {"every": 10, "samples_per_prompt": 3, "temperature": 0.1, "static_temperature": 0.1,
                     "top_k": 40, "top_p": 0.95},
            "checkpoint": {"every": 10, "keep_every": 50},
        }
    )  # fmt: skip
    if arg == "value":
        config.name += "_value"
        config.value = {"enabled": True, "gamma": 1.0, "lam": 1.0, "optimizer": {"learning_rate": 5e-6}}
    elif arg:
        raise ValueError(f"the argument of this config is 'value' or nothing, not {arg!r}")
    return config


def like_dream(name, path, arg=None, **sections):
    """The same settings for another checkpoint, with other values of some sections."""
    config = get_config(arg)
    config.name = config.name.replace("rl_dream_7b_math", name)
    config.model.path = path
    config.update(sections)
    return config


def evaluation_of(name, config):
    """How a run evaluates, for `tracerl eval`, whose tasks have rows of their own; nothing is trained."""
    config.name, config.rl = name, {"steps": 0}
    config.task.path = config.task.eval_path = None
    return config
