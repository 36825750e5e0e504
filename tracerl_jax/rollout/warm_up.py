"""Compiling what an engine needs before the first request waits for it."""

import dataclasses
from collections.abc import Sequence

from tracerl_jax.rollout.batch import PROMPTS_PER_CALL
from tracerl_jax.rollout.engine import Engine
from tracerl_jax.rollout.options import Request, SamplingOptions


def warm_up(engine: Engine, kinds: Sequence[SamplingOptions], prompt_tokens: int = 64) -> None:
    """Decode throw-away requests like each of `kinds`: every number of slots that decodes by itself, and every number
    of prompts of `prompt_tokens` tokens that are encoded together. Fix the engine's `max_length`, or other requests
    have other shapes.

    What is not compiled: prompts of other length buckets, prompts behind a cached prefix, `entropy_bounded` and other
    block sizes, unless a kind asks for them.
    """
    c, slots = engine.model.config, engine.config.slots
    ids = [i for i in range(c.vocab_size) if i != c.mask_token_id]
    for kind in kinds:
        B = kind.block_size or c.block_size
        longest = B * slots.bit_length()
        length = max(1, min(prompt_tokens, (engine.config.max_length or c.max_positions) - longest - B))
        # What dynamic reveals depends on the weights, and compiles the same program.
        strategy = "static" if kind.strategy == "dynamic" else kind.strategy
        steady = dataclasses.replace(kind, ignore_eos=True, strategy=strategy)
        for count in (slots, *PROMPTS_PER_CALL[:-1]):
            requests = []
            for i in range(min(count, slots)):
                # Half of them end with the first block, a quarter with the second, ..
                blocks = slots.bit_length() - (slots - i - 1).bit_length() + 1
                prompt = [ids[(i + j + count) % len(ids)] for j in range(length)]
                requests.append(Request(prompt, dataclasses.replace(steady, max_tokens=B * blocks)))
            for _ in engine.generate(requests):
                pass
