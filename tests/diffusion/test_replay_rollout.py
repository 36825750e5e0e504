"""Replay gives back the sampler's own log-probs: same grid, same visible tokens, same conventions."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracerl_jax.errors import DataError
from tracerl_jax.models import Model, ModelConfig
from tracerl_jax.rl.logprobs import score_traces
from tracerl_jax.rollout.engine import Engine, EngineConfig, Request, SamplingOptions

V, MASK, STOPS = 24, 22, (3, 4)
MODEL = Model(
    ModelConfig(vocab_size=V, width=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=12, mlp_width=32,
                mask_token_id=MASK, stop_token_ids=STOPS)
)  # fmt: skip
BATCH = 12


def sharp_params(model, seed):
    """Random weights, sharp enough for attention to matter."""
    params = model.init(jax.random.key(seed))
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 2 else x, params)
    params["lm_head"]["kernel"] *= 20
    return params


@st.composite
def options(draw):
    return SamplingOptions(
        strategy=draw(st.sampled_from(["static", "dynamic", "sequential", "entropy_bounded"])),
        threshold=draw(st.sampled_from([0.1, 0.3, 0.9])),
        entropy_bound=draw(st.sampled_from([0.5, 3.0])),
        denoising_steps=draw(st.sampled_from([None, 1, 2])),
        max_tokens=draw(st.integers(1, 19)),
        temperature=draw(st.sampled_from([0.0, 0.5, 1.0, 1.7])),
        top_k=draw(st.sampled_from([0, 3])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        seed=draw(st.integers(0, 2**31)),
        ignore_eos=draw(st.booleans()),
        block_size=None,
    )


@settings(max_examples=4, deadline=None)
@given(
    st.integers(0, 1000), st.sampled_from([1, 4, 6]), st.lists(options(), min_size=BATCH, max_size=BATCH),
    st.lists(st.integers(1, 13), min_size=BATCH, max_size=BATCH),
)  # fmt: skip
def test_replayed_logprobs_are_the_samplers(seed, block_size, options, prompt_lens):
    params = sharp_params(MODEL, seed)
    rng = np.random.default_rng(seed)
    requests = [
        Request(rng.integers(0, MASK, p), SamplingOptions(**vars(o) | {"block_size": block_size}), i)
        for i, (o, p) in enumerate(zip(options, prompt_lens, strict=True))
    ]
    traces = list(Engine(MODEL, params, EngineConfig(BATCH)).generate(requests))
    scores = score_traces(MODEL, params, traces, row_length=(256, 1024), tokens_per_batch=1024)
    assert len(traces) == BATCH
    for trace, score in zip(traces, scores, strict=True):
        np.testing.assert_allclose(score, trace.logprobs, atol=1e-4)


@pytest.mark.parametrize("alignment", ["shifted", pytest.param("same_position", marks=pytest.mark.slow)])
def test_replayed_logprobs_of_a_whole_canvas(alignment):
    """Full attention, no cache: every replay group is the canvas as it was, the MASKs of later blocks included."""
    model = Model(MODEL.config.replace(attention_mode="full", logit_alignment=alignment, block_size=4))
    params, rng = sharp_params(model, 0), np.random.default_rng(0)
    requests = [
        Request(rng.integers(0, MASK, rng.integers(1, 14)), SamplingOptions(
            ("static", "dynamic", "linspace", "sequential")[i % 4], threshold=0.3, max_tokens=4 * (1 + i % 4),
            denoising_steps=(None, 2)[i % 2], first_token=i % 3 == 0, temperature=(0.0, 0.5, 1.0)[i % 3], top_k=i % 5,
            top_p=0.8, ignore_eos=i % 2 == 0), i)
        for i in range(BATCH)
    ]  # fmt: skip
    traces = list(Engine(model, params, EngineConfig(BATCH)).generate(requests))
    scores = score_traces(model, params, traces, row_length=256, tokens_per_batch=1024)
    assert {trace.stop_reason for trace in traces} == {"stop", "length"}
    for trace, score in zip(traces, scores, strict=True):
        np.testing.assert_allclose(score, trace.logprobs, atol=1e-4)


def test_a_trace_of_the_other_attention_is_refused():
    (trace,) = Engine(MODEL, MODEL.init(jax.random.key(0)), EngineConfig(1)).generate([Request([1])])
    full = Model(MODEL.config.replace(attention_mode="full"))
    with pytest.raises(DataError, match=r"canvas_len 0, but the model .* has full attention"):
        score_traces(full, None, [trace])


def test_tails_matter():
    """The property above would say little if the traces had no tails, or if tails did not matter."""
    params = MODEL.init(jax.random.key(0))
    options = SamplingOptions(max_tokens=9, block_size=4, strategy="static")
    requests = [Request([1, 2, 5], options, i) for i in range(BATCH)]
    traces = list(Engine(MODEL, params, EngineConfig(BATCH)).generate(requests))
    assert {trace.stop_reason for trace in traces} == {"stop", "length"}
    assert sum(len(trace.tail_ids) > 0 for trace in traces) > 3
    none = np.zeros(0, np.int32)
    cut = [dataclasses.replace(trace, tail_ids=none, tail_step_map=none) for trace in traces]
    scores = np.concatenate(score_traces(MODEL, params, cut))
    assert np.abs(scores - np.concatenate([trace.logprobs for trace in traces])).max() > 1e-3
