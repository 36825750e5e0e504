"""Evaluation of Dream-7B as the TraceRL paper's code decodes it (arXiv 2509.06949): blocks of 32, their
first token first, top-k 40, top-p 0.95, temperature 0.1, three answers a problem, prefix cache; static, and dynamic at
0.95.

    tracerl eval --config eval_dream_7b --model Dream-v0-Instruct-7B --tasks math500,gsm8k --output results/dream_7b

`--cache none` decodes without the cache, which is an approximation.
"""

from tracerl_jax.configs import rl_dream_7b_math
from tracerl_jax.configs.rl_dream_7b_math import evaluation_of


def get_config():
    return evaluation_of("eval_dream_7b", rl_dream_7b_math.get_config())
