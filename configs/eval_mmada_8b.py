"""Evaluation of MMaDA-8B on text as the TraceRL paper's code decodes it (arXiv 2509.06949): the settings of
LLaDA (`eval_llada_8b`).

    tracerl eval --config eval_mmada_8b --model MMaDA-8B-MixCoT --tasks math500,gsm8k --output results/mmada_8b

`--cache none` decodes without the cache, which is an approximation.
"""

from tracerl_jax.configs import rl_mmada_8b_math
from tracerl_jax.configs.rl_dream_7b_math import evaluation_of


def get_config():
    return evaluation_of("eval_mmada_8b", rl_mmada_8b_math.get_config())
