"""Evaluation of MMaDA-8B on text as the TraceRL paper's code decodes it (arXiv 2509.06949): blocks of 32, as LLaDA,
temperature 0.1, three answers a problem, prefix cache; static and dynamic at 0.95.

    tracerl eval --config eval_mmada_8b --model MMaDA-8B-MixCoT --tasks math500,gsm8k --output results/mmada_8b

`--config.rollout.cache=none --config.rollout.horizon=none` decodes without the cache, which is an approximation.
"""

from tracerl_jax.configs import rl_mmada_8b_math
from tracerl_jax.configs.rl_dream_7b_math import evaluation_of


def get_config():
    return evaluation_of("eval_mmada_8b", rl_mmada_8b_math.get_config())
