"""TraceRL on MMaDA-8B, text only, MATH levels 3-5, with the settings of LLaDA.

    tracerl rl --config rl_mmada_8b_math --config.model.path=MMaDA-8B-MixCoT \
        --config.task.path=math_train.jsonl --config.task.eval_path=math500.jsonl

`rl_mmada_8b_math:value` adds the diffusion value model. Not yet run here.
"""

from tracerl_jax.configs.rl_dream_7b_math import like_dream
from tracerl_jax.configs.rl_llada_8b_math import LLADA


def get_config(arg=None):
    return like_dream("rl_mmada_8b_math", "MMaDA-8B-MixCoT", arg, **LLADA)
