"""Model FLOPs: what the mathematics of a step needs, whatever the programs do besides.

Counted are matrix products, 2 per weight and token, and attention, 4 D per head and pair of a query and a key it sees;
a gradient costs twice its forward pass. Norms, rotation, softmax and sampling are left out, as is usual. So are
padding, recomputation (`model.remat`), drafts that were wrong and idle slots: these lower the utilisation instead.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tracerl_jax.diffusion.replay import ReplayItem
from tracerl_jax.diffusion.trace import Trace
from tracerl_jax.models.config import ModelConfig

FORWARD, TRAINED = 1, 3  # passes: with gradients, two more of the forward pass's cost


@dataclass(frozen=True)
class Work:
    """What a process did in a phase. `flops` None: not known; `seconds` None: as long as the phase took."""

    tokens: float
    flops: float | None
    seconds: float | None = None

    def __add__(self, other: "Work") -> "Work":
        """Of the same phase; `seconds` must be None."""
        known = self.flops is not None and other.flops is not None
        return Work(self.tokens + other.tokens, self.flops + other.flops if known else None)


def weights_per_token(config: ModelConfig) -> int:
    """Weights of the layers that multiply a token: of a mixture, the router and the token's own experts."""
    projections = 2 * config.width * (config.num_heads + config.num_kv_heads) * config.head_dim
    if config.num_experts:
        mlp = config.width * (config.num_experts + 3 * config.experts_per_token * config.expert_width)
    else:
        mlp = 3 * config.width * config.mlp_width
    return config.num_layers * (projections + mlp)


def head_flops(config: ModelConfig, outputs: float, head: str = "lm") -> float:
    """Of the head at `outputs` positions: logits over the vocabulary ("lm"), or one number ("value")."""
    return 2.0 * outputs * config.width * (config.vocab_size if head == "lm" else 1)


def trunk_flops(config: ModelConfig, tokens: float, pairs: float) -> float:
    """Of the layers for so many tokens, which see `pairs` keys together."""
    attention = 4.0 * config.num_layers * config.num_heads * config.head_dim * pairs
    return 2.0 * tokens * weights_per_token(config) + attention


def replay_work(
    config: ModelConfig, items: Iterable[ReplayItem], *, trunk: int = FORWARD, heads: int = FORWARD, head: str = "lm"
) -> Work:
    """Passes over replay items, `trunk` of the layers and `heads` of the head, which reads the targets alone."""
    tokens = pairs = outputs = 0
    for item in items:
        tokens, pairs, outputs = tokens + item.size, pairs + item.pairs, outputs + len(item.target_ids)
    flops = trunk * trunk_flops(config, tokens, pairs) + heads * head_flops(config, outputs, head)
    return Work(tokens, flops)


def rollout_work(config: ModelConfig, traces: Iterable[Trace], cache: str = "none") -> Work:
    """Decoding of traces: response tokens, and the FLOPs of every denoise step, every block that was committed behind
    it, and every distinct prompt once.

    A full-attention model computes its whole canvas at each step. With a `cache` (`rollout.cache`) it computes what
    traces do not tell, and `flops` is None.
    """
    traces = list(traces)
    tokens = sum(len(trace.ids) for trace in traces)
    if any(trace.canvas_len for trace in traces) and cache != "none":
        return Work(tokens, None)
    flops, prompts = 0.0, set()
    for trace in traces:
        p, B = len(trace.prompt_ids), trace.block_size
        steps, first = np.unique(np.concatenate([trace.step_map, trace.tail_step_map]), return_index=True)
        flops += head_flops(config, B * len(steps))
        if trace.canvas_len:
            n = trace.canvas_len
            flops += len(steps) * trunk_flops(config, n, n * n)
            continue
        ends = ((p + first) // B + 1) * B  # of the block that each step denoises: what its tokens see
        encoded = np.arange(1, p // B + 1) * B if trace.prompt_ids.tobytes() not in prompts else np.zeros(0, int)
        prompts.add(trace.prompt_ids.tobytes())
        committed = np.arange(p // B + 1, ends.max(initial=0) // B) * B  # the last block's K/V nobody needs
        seen = np.concatenate([ends, committed, encoded])
        flops += trunk_flops(config, B * len(seen), B * seen.sum())
    return Work(tokens, flops)
