"""Once it is warm, the engine of a server compiles nothing for requests like those it was warmed with."""

import dataclasses

import pytest
from engine_utils import compilations

from tracerl_jax.interop.hf_load import load_hf
from tracerl_jax.rollout.engine import Engine, EngineConfig, Request, SamplingOptions
from tracerl_jax.rollout.warm_up import warm_up


@pytest.mark.slow
def test_a_warm_engine_compiles_nothing(folder):
    model, params = load_hf(folder)
    engine = Engine(model, params, EngineConfig(16, 128, forwards_per_chunk=8))
    sampled = SamplingOptions(max_tokens=16, temperature=1.0)
    warm_up(engine, [dataclasses.replace(sampled, temperature=0.0), sampled], prompt_tokens=30)
    with compilations() as names:
        for count in (1, 3, 16, 40):
            requests = [
                Request([i + 1, count] * 15, dataclasses.replace(sampled, max_tokens=1 + i, temperature=i % 2 * 1.0))
                for i in range(count)
            ]
            assert len(list(engine.generate(requests))) == count
    assert names == []
