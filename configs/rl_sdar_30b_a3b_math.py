"""TraceRL on SDAR-30B-A3B-Chat, MATH levels 3-5; `rl_sdar_30b_a3b_math:value` adds the value model.

    tracerl rl --config rl_sdar_30b_a3b_math --config.model.path=SDAR-30B-A3B-Chat \
        --config.task.path=math_train.jsonl --config.task.eval_path=math500.jsonl

The settings of SDAR-4B; the paper has no figures for this mixture of experts. In training each device has 16 of the 128
experts (`mesh.expert`): a multiple of eight devices is needed. Four share a copy of the weights in decoding, one
key/value head each.
"""

from tracerl_jax.configs.rl_sdar_4b_math import like_4b


def get_config(arg=None):
    config = like_4b("rl_sdar_30b_a3b_math", "SDAR-30B-A3B-Chat", arg)
    config.mesh.expert = 8
    config.rollout.tensor = 4
    config.rollout.slots_per_device = 128
    return config
