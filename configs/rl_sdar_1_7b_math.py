"""TraceRL on SDAR-1.7B-Chat, MATH levels 3-5; `rl_sdar_1_7b_math:value` adds the value model.

    tracerl rl --config rl_sdar_1_7b_math --config.model.path=SDAR-1.7B-Chat \
        --config.task.path=math_train.jsonl --config.task.eval_path=math500.jsonl

The settings of SDAR-4B; the paper has no figures for this size.
"""

from tracerl_jax.configs.rl_sdar_4b_math import like_4b


def get_config(arg=None):
    return like_4b("rl_sdar_1_7b_math", "SDAR-1.7B-Chat", arg)
