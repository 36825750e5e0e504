"""Evaluation of LLaDA-8B (1.0 or 1.5) as the TraceRL paper's code decodes it (arXiv 2509.06949): blocks of
32, scores at temperature 1, drawn at 0.1, three answers a problem, prefix cache; static, and dynamic at 0.95.

    tracerl eval --config eval_llada_8b --model LLaDA-8B-Instruct --tasks math500,gsm8k --output results/llada_8b

`--cache none` decodes without the cache, which is an approximation.
"""

from tracerl_jax.configs import rl_llada_8b_math
from tracerl_jax.configs.rl_dream_7b_math import evaluation_of


def get_config():
    return evaluation_of("eval_llada_8b", rl_llada_8b_math.get_config())
