"""Greedy generation of the golden models: every case batched with the others, and a few alone."""

import json

import numpy as np
import pytest
from golden_utils import NAMES, load_golden

from tracerl_jax.models import Model
from tracerl_jax.rollout.engine import Engine, EngineConfig, Request, SamplingOptions


def golden_requests(arrays):
    for case, meta in json.loads(str(arrays("generate")["meta"])).items():
        want = arrays("generate", case)
        options = SamplingOptions(
            strategy=meta["strategy"],
            threshold=0.9 if meta["threshold"] is None else meta["threshold"],
            denoising_steps=meta["denoising_steps"],
            max_tokens=len(want["output"]) - len(want["prompt"]),
            temperature=0.0,
            stop_ids=meta["stop_ids"],
            ignore_eos=True,
        )
        yield Request(want["prompt"], options), want, meta


def check(trace, want, meta):
    """The golden canvas keeps the whole last block, which our trace splits into completion and tail."""
    p, r = len(want["prompt"]), len(trace.ids)
    completion = want["output"][p:]
    written = int((want["step_map"] > 0).sum())  # what lies behind a stop block was never generated
    stops = np.flatnonzero(np.isin(completion[:written], meta["stop_ids"] or []))
    assert r == (stops[0] + 1 if stops.size else written)
    assert trace.stop_reason == ("stop" if stops.size else "length")
    np.testing.assert_array_equal(np.concatenate([trace.ids, trace.tail_ids]), completion[:written])
    np.testing.assert_array_equal(np.concatenate([trace.step_map, trace.tail_step_map]), want["step_map"][:written])
    np.testing.assert_allclose(trace.logprobs, want["logp"][:r], atol=2e-4)
    np.testing.assert_allclose(np.exp(trace.behaviour_logprobs), want["confidence"][:r], atol=2e-4)
    assert trace.denoise_forwards == meta["n_denoise"]


@pytest.mark.parametrize("name", NAMES)
def test_golden_generation(name):
    golden = load_golden(name)
    cases = list(golden_requests(golden.arrays))
    assert len(cases) == 45
    batched = Engine(Model(golden.config), golden.params, EngineConfig(45))
    for trace, (_, want, meta) in zip(batched.generate(case[0] for case in cases), cases, strict=True):
        check(trace, want, meta)
    alone = Engine(Model(golden.config), golden.params, EngineConfig(1))
    for request, want, meta in cases[::9]:
        (trace,) = alone.generate([request])
        check(trace, want, meta)
