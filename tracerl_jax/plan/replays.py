"""What training an RL step replays, by `rl.shrink`, and how often it runs each program; nothing is compiled here.

    responses  ->  states (replay groups)  ->  rows  ->  micro-batches  ->  runs of "replay", "policy gradient", ..
                   `plan_replays`              `pack`

The responses are made up (plan/workload.py); states and rows are those that the loop would build of them, for it is
its own code that builds them. Of many responses some are built and their numbers scaled up.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tracerl_jax.config import RLSection, RunConfig
from tracerl_jax.data.prompts import Problem
from tracerl_jax.diffusion.packing import pack
from tracerl_jax.diffusion.replay import ReplayItem
from tracerl_jax.models import ModelConfig
from tracerl_jax.plan.workload import Workload, sample_traces
from tracerl_jax.rl.experience import Sample
from tracerl_jax.rl.update import Replay, plan_replays

# Responses that are built, at most, and tokens that they may take in rows, about.
BUILT_SAMPLES, BUILT_TOKENS = 64, 2**21


@dataclass(frozen=True)
class ReplayCount:
    """What one pass over some responses replays."""

    states: float
    tokens: float  # of the rows, without padding
    rows: float
    row_length: int  # tokens of a row, padding included

    def scaled(self, factor: float) -> "ReplayCount":
        return ReplayCount(factor * self.states, factor * self.tokens, factor * self.rows, self.row_length)


@dataclass(frozen=True)
class StepReplay:
    """What an RL step replays with one `rl.shrink`."""

    shrink: int
    responses: float  # that are kept
    count: ReplayCount  # of one pass over them
    runs: dict[str, float]  # of each training program


def count_replay(items: Sequence[ReplayItem], row_length: int | Sequence[int]) -> ReplayCount:
    """Of the replay items of a pass; `row_length` as of `pack`. Raises DataError for an item that no row holds."""
    rows = pack(items, row_length=row_length)
    return ReplayCount(sum(len(item.group_start) for item in items), rows.token_count, *rows.shape)


def shrinks(rl: RLSection, block_size: int) -> list[int]:
    """Values of `rl.shrink` to compare: powers of two up to the decoding's block size, and the run's own."""
    if rl.method != "tracerl":
        return [rl.shrink]  # random masks do not depend on it
    return sorted({rl.shrink, *(2**k for k in range(block_size.bit_length()))})


def step_replay(
    config: RunConfig, model: ModelConfig, workload: Workload, shrink: int, row_lengths: Sequence[int],
    micro_batch_tokens: int,
) -> StepReplay:  # fmt: skip
    """Of an RL step with rows of one of `row_lengths` whose micro-batches hold so many tokens, padding included."""
    rl, samples = dataclasses.replace(config.rl, shrink=shrink), samples_of(config)
    built = built_responses(config, rl, model, workload)
    items = [replay.item for replay in made_up_replays(config, rl, model, workload, built)]
    longest = longest_replays(config, rl, model, workload)
    need = max(replay.item.row_tokens for replay in longest)
    lengths = [length for length in row_lengths if length >= need]
    kept = samples * workload.kept_fraction
    count = count_replay(items, lengths or row_lengths).scaled(kept / built)
    micro_batches = count.rows * count.row_length / micro_batch_tokens
    return StepReplay(shrink, kept, count, training_runs(rl, micro_batches, config.value.train_every))


def training_runs(rl: RLSection, micro_batches: float, value_every: int) -> dict[str, float]:
    """How often an RL step runs each program, with so many micro-batches in a pass over its responses."""
    updates = rl.minibatches * rl.epochs
    gradients = updates * max(1, math.ceil(micro_batches / rl.minibatches))
    forwards = max(1, math.ceil(micro_batches * rl.epochs))
    # The sampler's log-probs are of no use for merged states. Where the sampler's own states are not replayed anyway,
    # they are for one micro-batch, to compare.
    recompute = rl.old_logprobs == "recompute" or rl.shrink > 1
    compared = not recompute or rl.shrink > 1 or rl.method != "tracerl"
    replay = forwards * recompute + compared + forwards * (rl.kl_to == "reference")
    return {
        "replay": replay, "policy gradient": gradients, "policy apply": updates,
        "values": forwards, "value gradient": gradients / value_every, "value apply": updates / value_every,
    }  # fmt: skip


def samples_of(config: RunConfig) -> int:
    """Responses of an RL step."""
    return config.rollout.prompts_per_step * config.rollout.samples_per_prompt


def longest_replays(config: RunConfig, rl: RLSection, model: ModelConfig, workload: Workload) -> list[Replay]:
    """Of one response of the greatest length: all rows are as long as it needs."""
    longest = Workload(config.task.max_prompt_tokens, config.rollout.max_tokens, workload.tokens_per_step)
    return made_up_replays(config, rl, model, longest, 1)


def built_responses(config: RunConfig, rl: RLSection, model: ModelConfig, workload: Workload) -> int:
    """How many of an RL step's responses are not too many to build."""
    first = made_up_replays(config, rl, model, workload, 1)
    fitting = BUILT_TOKENS // max(1, sum(replay.item.size for replay in first))
    return min(samples_of(config), BUILT_SAMPLES, max(1, fitting))


def made_up_replays(
    config: RunConfig, rl: RLSection, model: ModelConfig, workload: Workload, count: int
) -> list[Replay]:
    """Those of `count` made-up responses in one pass. `coupled` makes two of each."""
    rollout, B = config.rollout, config.rollout.block_size or model.block_size
    traces = sample_traces(
        workload, count, block_size=B, temperature=rollout.temperature,
        canvas_response=rollout.max_tokens if model.attention_mode == "full" else 0,
    )  # fmt: skip
    problem = Problem(index=0, prompt_text="", prompt_ids=traces[0].prompt_ids, columns={})
    zeros = np.zeros(workload.response_tokens, np.float32)  # values do not matter here
    numbers = dict.fromkeys(("old_logp", "reference_logp", "old_values", "returns", "advantages"), zeros)
    updates = plan_replays(
        [Sample(problem, trace, "", 0, 0.0, {}, 0.0) for trace in traces],
        dataclasses.replace(rl, minibatches=1, epochs=1),
        mask_id=model.mask_token_id, block_size=rl.block_size or B, seed=0, step=1,
    )  # fmt: skip
    return [dataclasses.replace(replay, **numbers) for update in updates for replay in update]
