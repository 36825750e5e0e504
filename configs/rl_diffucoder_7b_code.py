"""TraceRL on DiffuCoder-7B, code: the settings of `rl_dream_7b_math`, whose sampler and prompts the paper's code takes.

    tracerl rl --config rl_diffucoder_7b_code --config.model.path=DiffuCoder-7B-Instruct \
        --config.task.path=code_train.jsonl --config.task.eval_path=livecodebench.jsonl

The paper (arXiv 2509.06949) trains Dream-Coder-7B on 6,000 problems of PrimeIntellect this way, after supervised
training on CodeContests: `--config.model.path=Dream-Coder-v0-Instruct-7B`. The reward is the share of the tests that a
program passes; only groups whose rewards all agree are dropped. `rl_diffucoder_7b_code:value` adds the diffusion value
model. Not yet run here.
"""

from tracerl_jax.configs.rl_dream_7b_math import like_dream

CODE = {
    "task": {"name": "code", "path": "code_train.jsonl", "eval_path": "livecodebench.jsonl",
             "rewards": {"code_share": 1.0}},
    "rl": {"accuracy_low": 0.0, "accuracy_high": 1.0},
}  # fmt: skip


def get_config(arg=None):
    return like_dream("rl_diffucoder_7b_code", "DiffuCoder-7B-Instruct", arg, **CODE)
