"""TraceRL on TraDo-8B-Instruct, MATH levels 3-5; `rl_trado_8b_math:value` adds the value model.

    tracerl rl --config rl_trado_8b_math --config.model.path=TraDo-8B-Instruct \
        --config.task.path=math_train.jsonl --config.task.eval_path=math500.jsonl

TraDo is SDAR after TraceRL on math and code: these go on from there.
"""

from tracerl_jax.configs.rl_sdar_4b_math import like_4b


def get_config(arg=None):
    return like_4b("rl_trado_8b_math", "TraDo-8B-Instruct", arg)
