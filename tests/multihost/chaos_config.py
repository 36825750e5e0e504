"""The quick start's models for seconds instead of minutes: what `chaos.py` runs again and again.

Everything that has a state of its own takes part: warm-up, policy and value model with their optimizers, two updates a
step, evaluation between steps, a checkpoint after each step. The reward likes high digits: a model that has learnt
nothing gets rewards that differ, so that every step updates.

JAX writes compiled programs to its cache in process 0 only, and the others would compile theirs, of their own devices,
at every start: most of what a round takes.
"""

import types

from jax._src import compiler, distributed

from tracerl_jax.configs import demo
from tracerl_jax.rewards import register_reward

CHANGES = {
    "task": {
        "rewards": {"high_digits": 1.0},
        "options": {"min_operands": 2, "max_operands": 2, "digits": 1, "train_count": 40, "test_count": 8},
    },
    "sft": {"steps": 2, "sequences_per_update": 8, "row_length": 128, "rows_per_device": 1, "log_every": 1},
    "rollout": {
        "prompts_per_step": 4, "samples_per_prompt": 4, "slots_per_device": 4, "max_tokens": 8,
        "truncated_is_wrong": False,
    },
    "rl": {"steps": 4, "row_length": 128, "rows_per_device": 1, "accuracy_low": 0.0, "accuracy_high": 1.0},
    "eval": {"every": 2, "strategies": ["dynamic"]},
    "checkpoint": {"every": 1, "sft_every": 1},
    "faults": {"heartbeat": 20.0},
}  # fmt: skip


compiler.distributed = types.SimpleNamespace(global_state=types.SimpleNamespace(
    client=distributed.global_state.client, process_id=0
))  # fmt: skip


@register_reward("high_digits")
def high_digits(prompts, completions, **columns):
    return [sum(character in "56789" for character in text) / 8 for text in completions]


def get_config():
    config = demo.get_config()
    for section, values in CHANGES.items():
        config[section] = {**config.get(section, {}), **values}
    return config
