"""What a plan assumes: made-up traces that are valid and as fast as said, and refusals of the impossible."""

import dataclasses

import numpy as np
import pytest

from tracerl_jax.config import RolloutSection, RunConfig
from tracerl_jax.config_io import load_config
from tracerl_jax.diffusion.replay import trace_item
from tracerl_jax.diffusion.trace import Trace
from tracerl_jax.errors import ConfigError
from tracerl_jax.plan.workload import Workload, assume, random_steps, sample_traces


@pytest.mark.parametrize("B", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.65, 1.0])
def test_steps_reveal_as_many_tokens_as_said(B, share):
    wanted = 1 + share * (B - 1)
    steps = random_steps(np.random.default_rng(0), 2048, B, wanted)
    assert steps.shape == (2048,)
    blocks = steps.reshape(-1, B)
    # Block after block, no step without a token.
    assert (np.diff(blocks.min(1)) > 0).all() and (blocks.min(1)[1:] == blocks.max(1)[:-1] + 1).all()
    assert set(steps) == set(range(1, steps.max() + 1))
    assert 2048 / steps.max() == pytest.approx(wanted, rel=0.02)


def test_blocks_differ_in_how_long_they_take():
    blocks = random_steps(np.random.default_rng(0), 8192, 8, 3.0).reshape(-1, 8)
    took = blocks.max(1) - blocks.min(1) + 1
    assert {1, 2, 3, 4, 5, 6} <= set(took)


@pytest.mark.parametrize("prompt, response, B", [(1, 1, 1), (8, 16, 4), (9, 17, 4), (7, 1, 8), (130, 200, 16)])
def test_sampled_traces_are_traces(prompt, response, B):
    traces = sample_traces(Workload(prompt, response, 1 + B / 4), 3, block_size=B, temperature=0.7)
    assert [trace.sample_index for trace in traces] == [0, 1, 2]
    for trace in traces:
        assert (len(trace.prompt_ids), len(trace.ids)) == (prompt, response)
        again = Trace.from_row(trace.to_row())  # raises for what is no trace
        assert (again.step_map == trace.step_map).all() and (again.tail_step_map == trace.tail_step_map).all()
        assert (again.block_size, again.temperature) == (B, 0.7)
        steps = np.concatenate([trace.step_map, trace.tail_step_map])
        assert (prompt + len(steps)) % B == 0
        assert set(steps) == set(range(1, trace.denoise_forwards + 1))
        item = trace_item(trace.prompt_ids, trace.ids, trace.step_map, block_size=B, mask_id=1,
                          tail_ids=trace.tail_ids, tail_step_map=trace.tail_step_map)  # fmt: skip
        assert len(item.target_ids) == response


def test_traces_differ_and_repeat():
    first, second = sample_traces(Workload(8, 64), 2, block_size=4, temperature=1.0)
    assert (first.step_map != second.step_map).any()
    (again,) = sample_traces(Workload(8, 64), 1, block_size=4, temperature=1.0)
    assert (first.step_map == again.step_map).all()


@pytest.mark.parametrize(
    "numbers, complaint",
    [
        ((0, 10), "at least one prompt token"),
        ((10, 0), "one response token"),
        ((10, 10, 0.5), "tokens_per_step is 0.5"),
        ((10, 10, 2.0, 0.0), "kept_fraction is 0.0"),
        ((10, 10, 2.0, 1.5), "kept_fraction is 1.5"),
    ],
)
def test_impossible_workloads(numbers, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Workload(*numbers)


def config(**rollout):
    found = load_config(RunConfig, "rl_sdar_4b_math", [])
    return dataclasses.replace(found, rollout=RolloutSection(max_tokens=2000, **rollout))


def test_assumed_are_the_longest_and_the_schedule():
    assert assume(config(), 4) == Workload(784, 2000, 2.6, 1.0)
    assert assume(config(), 2).tokens_per_step == 2
    assert assume(config(strategy="static"), 4).tokens_per_step == 1
    assert assume(config(strategy="static", denoising_steps=2), 4).tokens_per_step == 2
    assert assume(config(strategy="sequential", denoising_steps=9), 4).tokens_per_step == 1
    assert assume(config(strategy="static"), 4, tokens_per_step=1.5).tokens_per_step == 1.5
    given = assume(config(), 4, prompt_tokens=100, response_tokens=800, tokens_per_step=3.0, kept_fraction=0.5)
    assert given == Workload(100, 800, 3.0, 0.5)


@pytest.mark.parametrize(
    "given, complaint",
    [
        ({"prompt_tokens": 785}, "prompt_tokens is 785, more than task.max_prompt_tokens, 784"),
        ({"prompt_tokens": 0}, "at least one prompt token"),
        ({"response_tokens": 2001}, "response_tokens is 2001, more than rollout.max_tokens, 2000"),
        ({"tokens_per_step": 4.5}, "tokens_per_step is 4.5, more than the block size, 4"),
    ],
)
def test_assumptions_that_the_config_rules_out(given, complaint):
    with pytest.raises(ConfigError, match=complaint):
        assume(config(), 4, **given)
