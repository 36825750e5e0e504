"""TraceRL on LLaDA-8B-Instruct or LLaDA-1.5, MATH levels 3-5: the paper's settings (arXiv 2509.06949).

    tracerl rl --config rl_llada_8b_math --config.model.path=LLaDA-8B-Instruct \
        --config.task.path=math_train.jsonl --config.task.eval_path=math500.jsonl

`rl_llada_8b_math:value` adds the diffusion value model. Not yet run here.
"""

from tracerl_jax.configs.rl_dream_7b_math import like_dream

LLADA = {
    "task": {"template": "llada"},
    "rollout": {"strategy": "dynamic", "first_token": False, "confidence": "untempered", "max_tokens": 512, "top_k": 0,
                "top_p": 1.0},
    "eval": {"top_k": 0, "top_p": 1.0},
}  # fmt: skip


def get_config(arg=None):
    return like_dream("rl_llada_8b_math", "LLaDA-8B-Instruct", arg, **LLADA)
