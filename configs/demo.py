"""Quick start: a 1.2M-parameter SDAR learns arithmetic from imperfect solutions, then from rewards, on two CPU cores.

    tracerl demo                       (or: tracerl rl --config demo)
    tracerl demo --config demo:llada   (or demo:dream: a full-attention model, docs/full_attention.md)

Half of the worked solutions leave out the last number. Supervised training imitates that; TraceRL, rewarded for the
true answer only, unlearns it. Expected: 45% -> 80% of 256 held-out problems (dynamic decoding), 1.3 -> 1.7 tokens per
denoise step, in about four minutes. Of full attention: 27% -> 56% (LLaDA) and 67% (Dream).
"""

from ml_collections import ConfigDict


def get_config(arg=None):
    config = ConfigDict(
        {
            "name": "demo",
            "model": {"preset": "sdar_demo"},
            "task": {
                "name": "arithmetic",
                "options": {"min_operands": 3, "max_operands": 3, "digits": 1, "shortcuts": 50,
                            "train_count": 1300, "test_count": 256},
            },
            "sft": {
                "steps": 400, "sequences_per_update": 64, "row_length": 512, "rows_per_device": 4,
                "max_response_tokens": 32, "log_every": 25,
                "optimizer": {"learning_rate": 3e-3, "warmup_updates": 20, "schedule": "cosine", "end_scale": 0.1},
            },
            "rollout": {"prompts_per_step": 16, "samples_per_prompt": 16, "slots_per_device": 256, "max_tokens": 32},
            "rl": {
                "steps": 24, "minibatches": 2, "row_length": 512, "rows_per_device": 4,
                # Small groups of an easy task: drop only those that are all right or all wrong.
                "accuracy_low": 0.01, "accuracy_high": 0.99,
                # One update moves a small model far: the k3 penalty explodes on the few tokens that become unlikely.
                "kl_coef": 0.0,
                "optimizer": {"learning_rate": 3e-4, "warmup_updates": 4},
            },
            "value": {"enabled": True, "optimizer": {"learning_rate": 5e-4}},
            "eval": {"every": 0},
            "checkpoint": {"every": 10, "sft_every": 400},
        }
    )  # fmt: skip
    if arg in ("dream", "llada"):
        full_attention(config, arg)
    elif arg:
        raise ValueError(f"the argument of this config is 'dream', 'llada' or nothing, not {arg!r}")
    return config


def full_attention(config, family):
    """The same task for a small Dream or LLaDA."""
    config.name, config.model.preset = f"demo_{family}", f"{family}_demo"
    # The whole canvas is seen and computed at every step: it is as long as the longest solution and its EOS. A row of
    # 108 tokens holds nine canvases (6 tokens of question, 6 of response).
    config.rollout.max_tokens = config.sft.max_response_tokens = 6
    config.sft.row_length = config.rl.row_length = 108
    # Blocks of 2, so that the first total is there when the second is asked for, and weight decay: with neither the
    # models learned their problems by heart, and few of the held-out ones were right.
    config.rollout.block_size = 2
    config.sft.update({"steps": 600, "sequences_per_update": 162, "rows_per_device": 18, "mask_low": 0.3})
    config.sft.optimizer.update({"learning_rate": 3e-3, "weight_decay": 1.0})
    # Merged denoise steps (rl.shrink above 1) are states that the sampler did not visit: their log-probs are made anew.
    # Smaller updates than SDAR's: at 3e-4 the sums got worse while the shortcut was unlearned.
    config.rl.update({"steps": 72, "rows_per_device": 18, "old_logprobs": "recompute"})
    config.rl.optimizer.learning_rate = 1e-4
    config.checkpoint.sft_every = 600
