"""TraceRL on SDAR-8B-Chat, MATH levels 3-5; `rl_sdar_8b_math:value` adds the value model.

    tracerl rl --config rl_sdar_8b_math --config.model.path=SDAR-8B-Chat \
        --config.task.path=math_train.jsonl --config.task.eval_path=math500.jsonl

Expected (the paper, not yet reproduced here): MATH500 74.3 -> 78.5 static, 70.7 -> 75.5 dynamic.
"""

from tracerl_jax.configs.rl_sdar_4b_math import like_4b


def get_config(arg=None):
    return like_4b("rl_sdar_8b_math", "SDAR-8B-Chat", arg)
