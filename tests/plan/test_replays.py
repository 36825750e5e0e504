"""What an RL step replays by `rl.shrink`: as many states, rows, tokens and micro-batches as the loop builds."""

import dataclasses
import math

import numpy as np
import pytest
from compiled import mesh_of

from tracerl_jax.config import RunConfig
from tracerl_jax.config_io import load_config
from tracerl_jax.data.prompts import Problem
from tracerl_jax.models import Model, ModelConfig
from tracerl_jax.plan.replays import shrinks, step_replay, training_runs
from tracerl_jax.plan.workload import Workload, sample_traces
from tracerl_jax.rl.experience import Sample
from tracerl_jax.rl.loop import make_learner
from tracerl_jax.rl.update import plan_replays

B, MASK, DEVICES = 4, 61, 2
CAUSAL = ModelConfig(vocab_size=64, width=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_width=16,
                     block_size=B, mask_token_id=MASK)  # fmt: skip
FULL = CAUSAL.replace(attention_mode="full", qk_norm=False)


def run_config(**changes) -> RunConfig:
    flags = {"model.path": "none", "model.preset": "sdar_tiny", "task.max_prompt_tokens": 9, "rollout.max_tokens": 16,
             "rollout.prompts_per_step": 4, "rollout.samples_per_prompt": 3, "rollout.cache": "none",
             "rollout.horizon": "none", "rollout.block_size": B, "rl.row_length": 60, "rl.rows_per_device": 3,
             "rl.shrink": 1, "rl.importance_sampling": "none", **changes}  # fmt: skip
    return load_config(RunConfig, "rl_dream_7b_math", [f"--config.{key}={value}" for key, value in flags.items()])


def loops_own(config, model, workload, shrink):
    """(traces, learner, replays of one pass) as `rl.loop.update` makes them of the plan's responses."""
    config = dataclasses.replace(config, rl=dataclasses.replace(config.rl, shrink=shrink))
    learner = make_learner(Model(model, mesh=mesh_of("cpu", 1, DEVICES, 1)), config)
    canvas = config.rollout.max_tokens if model.attention_mode == "full" else 0
    traces = sample_traces(workload, 12, block_size=B, temperature=0.8, canvas_response=canvas)
    samples = [Sample(Problem(0, "", t.prompt_ids, {}), t, "", 0, 0.0, {}, 0.5) for t in traces]
    (replays,) = plan_replays(samples, config.rl, mask_id=MASK, block_size=B, seed=0, step=1)
    zeros = np.zeros(workload.response_tokens, np.float32)
    return traces, learner, [dataclasses.replace(r, old_logp=zeros, advantages=zeros) for r in replays]


# Of a full-attention model with canvases of 25: two of them in rows of 60. The longest block-causal item at shrink 1
# has 24 clean tokens and 6 blocks of up to 4 states: rows of 120.
@pytest.mark.parametrize("model", [CAUSAL, FULL], ids=["block_causal", "full"])
@pytest.mark.parametrize(
    "method, shrink", [("tracerl", 1), ("tracerl", 3), ("random_masking", 1), ("coupled", 1)]
)
@pytest.mark.parametrize("workload", [Workload(9, 16, 1.5), Workload(7, 13, 2.5)], ids=["longest", "shorter"])
def test_counts_are_those_of_the_loop(model, method, shrink, workload):
    config = run_config(**{"rl.method": method})
    traces, learner, replays = loops_own(config, model, workload, shrink)
    if workload.response_tokens < 16:  # all rows are as long as those of the longest response, which a step may hold
        longest = loops_own(config, model, Workload(9, 16, workload.tokens_per_step), shrink)[2]
        length = learner.policy_batches(longest)[0][0]["rows"].row_length
        learner.config = dataclasses.replace(learner.config, row_length=length)
    batches, _ = learner.policy_batches(replays)
    rows = [batch["rows"] for batch in batches]
    T = rows[0].row_length
    found = step_replay(config, model, workload, shrink, learner.row_lengths, learner.rows_per_micro_batch * T)
    assert (found.shrink, found.responses, found.count.row_length) == (shrink, len(traces), T)
    assert found.count.rows == sum(part.intervals.any((1, 2)).sum() for part in rows)
    assert found.count.tokens == sum(part.token_count for part in rows) == sum(r.item.size for r in replays)
    assert found.count.states == sum(len(r.item.group_ids) for r in replays)
    assert found.runs["policy gradient"] == found.runs["values"] == len(batches)


@pytest.mark.parametrize("shrink", [1, 3, 100])
def test_states_of_full_attention_are_the_steps_over_the_shrink(shrink):
    config, workload = run_config(), Workload(9, 16, 1.5)
    steps = [trace.denoise_forwards for trace in loops_own(config, FULL, workload, shrink)[0]]
    count = step_replay(config, FULL, workload, shrink, [60], 100).count
    assert count.states == sum(math.ceil(n / shrink) for n in steps)
    assert count.tokens == count.states * (9 + 16) and count.rows == math.ceil(count.states / 2)


def test_many_responses_are_scaled_up_from_some():
    few = step_replay(run_config(), FULL, Workload(9, 16, 1.6), 1, [60], 180)
    many = run_config(**{"rollout.prompts_per_step": 400})
    all_kept = step_replay(many, FULL, Workload(9, 16, 1.6), 1, [60], 180)
    assert all_kept.responses == 1200
    assert all_kept.count.states / 1200 == pytest.approx(few.count.states / 12, rel=0.05)
    half = step_replay(many, FULL, Workload(9, 16, 1.6, 0.5), 1, [60], 180)
    assert half.responses == 600 and half.count.states == all_kept.count.states / 2
    assert half.runs["policy gradient"] == math.ceil(all_kept.runs["policy gradient"] / 2)


def test_runs_of_the_programs():
    rl = run_config(**{"rl.minibatches": 2, "rl.epochs": 3, "rl.shrink": 2}).rl
    assert training_runs(rl, 5.0, 2) == {
        "replay": 15 + 1, "policy gradient": 6 * 3, "policy apply": 6, "values": 15, "value gradient": 9,
        "value apply": 3,
    }  # fmt: skip
    # One micro-batch of the sampler's own states is replayed to compare, unless those are what is replayed anyway.
    own = dataclasses.replace(rl, shrink=1)
    assert training_runs(own, 5.0, 1)["replay"] == 15
    assert training_runs(dataclasses.replace(own, method="random_masking"), 5.0, 1)["replay"] == 15 + 1
    assert training_runs(dataclasses.replace(own, kl_to="reference"), 5.0, 1)["replay"] == 30
    sampled = dataclasses.replace(own, old_logprobs="rollout")
    assert training_runs(sampled, 5.0, 1)["replay"] == 1
    assert training_runs(dataclasses.replace(sampled, shrink=2), 5.0, 1)["replay"] == 15 + 1  # merged states have none


def test_shrinks_to_compare():
    rl = run_config().rl
    assert shrinks(rl, 32) == [1, 2, 4, 8, 16, 32]
    assert shrinks(dataclasses.replace(rl, shrink=6), 4) == [1, 2, 4, 6]
    assert shrinks(dataclasses.replace(rl, method="random_masking"), 32) == [1]
