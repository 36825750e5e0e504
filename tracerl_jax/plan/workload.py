"""What a plan must assume about a run because only the data will tell: lengths, speed of reveal, what is kept."""

from dataclasses import dataclass

import numpy as np

from tracerl_jax.config import RunConfig
from tracerl_jax.diffusion.grid import round_up
from tracerl_jax.diffusion.reveal import LINSPACE, SEQUENTIAL, STATIC, schedule, strategy_code
from tracerl_jax.diffusion.trace import Trace
from tracerl_jax.errors import ConfigError

# Spread of the blocks' difficulty, in logits of the chance of a reveal: easy blocks go in one step, hard ones slowly.
DIFFICULTY_SPREAD = 2.0


TOKENS_PER_STEP = 2.6  # what the paper's SDAR models reach with dynamic decoding is 2 to 2.7


@dataclass(frozen=True)
class Workload:
    """Of one RL step, on average."""

    prompt_tokens: int
    response_tokens: int
    tokens_per_step: float = TOKENS_PER_STEP  # revealed per denoise step and sequence
    kept_fraction: float = 1.0  # of the responses, after the accuracy filter

    def __post_init__(self):
        if self.prompt_tokens < 1 or self.response_tokens < 1:
            raise ConfigError("a plan needs at least one prompt token and one response token")
        if self.tokens_per_step < 1:
            raise ConfigError(f"tokens_per_step is {self.tokens_per_step}; every step reveals at least one token")
        if not 0 < self.kept_fraction <= 1:
            raise ConfigError(f"kept_fraction is {self.kept_fraction}, must lie in (0, 1]")


def assume(
    config: RunConfig,
    block_size: int,
    *,
    prompt_tokens: int | None = None,
    response_tokens: int | None = None,
    tokens_per_step: float | None = None,
    kept_fraction: float = 1.0,
) -> Workload:
    """The workload of a run, where None: prompts and responses as long as the config allows, and as many tokens per
    step as a static or sequential schedule says, else TOKENS_PER_STEP, in blocks of `block_size` tokens.

    Raises ConfigError for what the config rules out.
    """
    rollout = config.rollout
    if tokens_per_step is None:
        tokens_per_step = min(TOKENS_PER_STEP, block_size)
        if strategy_code(rollout.strategy) in (STATIC, SEQUENTIAL, LINSPACE):
            steps = rollout.denoising_steps or block_size
            counts = schedule(rollout.strategy, block_size, steps, rollout.first_token)
            tokens_per_step = block_size / (1 + np.searchsorted(np.cumsum(counts), block_size))
    found = Workload(
        config.task.max_prompt_tokens if prompt_tokens is None else prompt_tokens,
        rollout.max_tokens if response_tokens is None else response_tokens,
        float(tokens_per_step),
        kept_fraction,
    )
    for name, size, limit, key in (
        ("prompt_tokens", found.prompt_tokens, config.task.max_prompt_tokens, "task.max_prompt_tokens"),
        ("response_tokens", found.response_tokens, rollout.max_tokens, "rollout.max_tokens"),
        ("tokens_per_step", found.tokens_per_step, block_size, "the block size"),
    ):
        if size > limit:
            raise ConfigError(f"{name} is {size}, more than {key}, {limit}; give no more than that")
    return found


def sample_traces(
    workload: Workload, count: int, *, block_size: int, temperature: float, canvas_response: int = 0, seed: int = 0
) -> list[Trace]:
    """Traces of the workload's lengths with random steps; ids and log-probs are zeros.

    canvas_response: tokens of a response at full length, of a full-attention model; 0: block-causal.
    """
    rng = np.random.default_rng(seed)
    p, r = workload.prompt_tokens, workload.response_tokens
    first = p if canvas_response else p // block_size * block_size  # start of the first block
    end = first + round_up(p + r - first, block_size)
    traces = []
    for index in range(count):
        # Steps are drawn for whole blocks; those of prompt tokens in the first block drop out.
        steps = random_steps(rng, end - first, block_size, workload.tokens_per_step)
        steps = np.unique(steps[p - first :], return_inverse=True)[1] + 1
        zeros = np.zeros(r, np.float32)
        trace = Trace(
            prompt_ids=np.zeros(p, np.int32), ids=np.zeros(r, np.int32), step_map=steps[:r].astype(np.int32),
            logprobs=zeros, behaviour_logprobs=zeros, tail_ids=np.zeros(end - p - r, np.int32),
            tail_step_map=steps[r:].astype(np.int32), block_size=block_size, temperature=temperature,
            denoise_forwards=int(steps.max()), stop_reason="length", sample_index=index,
            canvas_len=p + canvas_response if canvas_response else 0,
        )  # fmt: skip
        traces.append(trace)
    return traces


def random_steps(rng: np.random.Generator, length: int, B: int, tokens_per_step: float) -> np.ndarray:
    """A step map [length] with easy and hard blocks that reveals about `tokens_per_step` tokens per denoise step.

    Each step reveals each hidden token with the chance of its block, but at least one. The chances are logistic-normal;
    their mean is found by bisection on the same random draws. `length` is a multiple of B.
    """
    blocks = length // B
    difficulty, draws, order = rng.normal(size=blocks), rng.random((B, blocks, B)), rng.random((B, blocks, B))

    def decode(ease: float) -> np.ndarray:
        steps, chance = np.zeros((blocks, B), int), 1 / (1 + np.exp(DIFFICULTY_SPREAD * difficulty - ease))
        for t in range(B):
            hidden = steps == 0
            reveal = hidden & (draws[t] < chance[:, None])
            first = np.where(hidden, order[t], -1).argmax(1)
            reveal[np.arange(blocks), first] |= hidden.any(1)
            steps[reveal] = t + 1
        before = np.cumsum(steps.max(1)) - steps.max(1)
        return (steps + before[:, None]).ravel()

    low, high = -10.0, 10.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if length / decode(middle).max() < tokens_per_step else (low, middle)
    return decode(high)
