"""Evaluation of DiffuCoder-7B as the TraceRL paper's code decodes it (arXiv 2509.06949): the settings of Dream
(`eval_dream_7b`), three programs a problem.

    tracerl eval --config eval_diffucoder_7b --model DiffuCoder-7B-Instruct --tasks humaneval,mbpp \
        --output results/diffucoder_7b

`--cache none` decodes without the cache, which is an approximation.
"""

from tracerl_jax.configs import rl_diffucoder_7b_code
from tracerl_jax.configs.rl_dream_7b_math import evaluation_of


def get_config():
    return evaluation_of("eval_diffucoder_7b", rl_diffucoder_7b_code.get_config())
