"""How many forwards decoding takes: those of a response, and the iterations of the decode program in an RL step.

    model           a response of R tokens, B to a block, k revealed per denoise step
    block-causal    R / k denoise steps, and R / B - 1 commits unless they are fused
    full, no cache  R / k denoise steps, each the whole canvas
    full, cached    R / k denoise steps; the first of a block and then every `refresh` the whole canvas, others a window
"""

import math
from dataclasses import dataclass

from tracerl_jax.config import RunConfig
from tracerl_jax.models import ModelConfig
from tracerl_jax.plan.workload import Workload


@dataclass(frozen=True)
class Forwards:
    """Of a response of one length."""

    steps: float  # denoise steps
    whole: float  # those of them that compute a whole canvas; 0 for block-causal models
    commits: float  # forwards on top that only commit a block; 0 for full-attention models

    @property
    def total(self) -> float:
        return self.steps + self.commits


@dataclass(frozen=True)
class DecodeLoop:
    """Iterations of the decode program in an RL step."""

    forwards: float
    whole: float  # those of them that compute whole canvases, of a few slots where there is a cache


def response_forwards(
    config: RunConfig, model: ModelConfig, tokens: float, tokens_per_step: float, *, fused: bool = False
) -> Forwards:
    """Of a response of `tokens` tokens. `fused`: commits need no forwards of their own."""
    rollout = config.rollout
    block_size = rollout.block_size or model.block_size
    steps, blocks = tokens / tokens_per_step, math.ceil(tokens / block_size)
    if model.attention_mode != "full":
        return Forwards(steps, 0.0, 0.0 if fused else blocks - 1.0)
    if rollout.cache == "none":
        return Forwards(steps, steps, 0.0)
    fresh = 1 if rollout.refresh is None else math.ceil(block_size / tokens_per_step / rollout.refresh)
    return Forwards(steps, min(steps, float(blocks * fresh)), 0.0)


def decode_loop(
    config: RunConfig, model: ModelConfig, workload: Workload, samples: int, slots: int, *, fused: bool = False,
    gathered: int | None = None,
) -> DecodeLoop:  # fmt: skip
    """Of `samples` responses in `slots` slots, at least.

    Slots are refilled as they become free, so all of them work until the samples run out, and then the last ones as
    long as the longest response takes beyond the mean. Where there is a cache, whole canvases are computed `gathered`
    slots at once in iterations of their own; that the others wait meanwhile is in them, that slots wait to be gathered
    is not counted.
    """
    mean, last = (
        response_forwards(config, model, tokens, workload.tokens_per_step, fused=fused)
        for tokens in (workload.response_tokens, config.rollout.max_tokens)
    )
    rounds = max(1.0, samples / slots)

    def of(cost) -> float:
        return rounds * cost(mean) + cost(last) - cost(mean)

    if gathered is None:
        return DecodeLoop(of(lambda f: f.total), of(lambda f: f.whole))
    whole = min(samples, slots) / gathered * of(lambda f: f.whole)
    return DecodeLoop(of(lambda f: f.steps - f.whole) + whole, whole)
