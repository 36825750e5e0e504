"""How many forwards decoding takes, and what the two kinds of a full-attention model's forwards cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import ONE_CHIP, array, compiled, mesh_of
from jax import lax

from tracerl_jax.config import RunConfig
from tracerl_jax.config_io import load_config
from tracerl_jax.models import Model, ModelConfig
from tracerl_jax.plan.decoding import DecodeLoop, Forwards, decode_loop, response_forwards
from tracerl_jax.plan.hlo_cost import program_cost
from tracerl_jax.plan.workload import Workload, assume
from tracerl_jax.rollout.engine import Engine, EngineConfig, Request, SamplingOptions

B = 4
CAUSAL = ModelConfig(vocab_size=32, width=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_width=16,
                     block_size=B, mask_token_id=31, stop_token_ids=(30,), attention="reference")  # fmt: skip
FULL = CAUSAL.replace(attention_mode="full", qk_norm=False)


def run_config(**rollout) -> RunConfig:
    flags = {"cache": "none", "horizon": "none", "block_size": B, "max_tokens": 24, "strategy": "static", **rollout}
    return load_config(RunConfig, "rl_dream_7b_math", [f"--config.rollout.{key}={flags[key]}" for key in flags])


@pytest.mark.parametrize("steps", [4, 2])
@pytest.mark.parametrize("model", [CAUSAL, FULL], ids=["block_causal", "full"])
def test_forwards_of_a_response_are_those_of_the_engine(model, steps):
    options = SamplingOptions("static", max_tokens=12, denoising_steps=steps, ignore_eos=True, temperature=1.0)
    model = Model(model)
    engine = Engine(model, model.init(jax.random.key(0)), EngineConfig(2, commit="auto" if model.config is FULL else "separate"))
    (trace,) = engine.generate([Request(np.arange(4), options)])
    config = run_config(denoising_steps=steps)
    found = response_forwards(config, model.config, 12, assume(config, B).tokens_per_step)
    assert (found.steps, found.total) == (trace.denoise_forwards, trace.forwards)


def test_forwards_of_a_response():
    def of(model=FULL, tokens=24, per_step=1.0, fused=False, **rollout):
        return response_forwards(run_config(**rollout), model, tokens, per_step, fused=fused)

    assert of(CAUSAL) == Forwards(24, 0, 5) and of(CAUSAL, fused=True) == Forwards(24, 0, 0)
    assert of() == Forwards(24, 24, 0)
    assert of(cache="dual") == Forwards(24, 6, 0)  # a block's first step
    assert of(cache="prefix", refresh=2) == Forwards(24, 12, 0)
    assert of(cache="prefix", refresh=3) == Forwards(24, 12, 0)  # the first and the fourth of a block
    assert of(cache="prefix", refresh=1) == Forwards(24, 24, 0)
    assert of(cache="prefix", per_step=2.0) == Forwards(12, 6, 0)
    assert of(cache="prefix", tokens=22, per_step=4.0) == Forwards(5.5, 5.5, 0)


def test_iterations_of_an_rl_step():
    """40 responses of 16 tokens in 8 slots: 5 rounds, then the longest, of 24, goes on for 8 tokens."""
    workload = Workload(8, 16, 2.0)

    def of(model=FULL, fused=False, gathered=None, **rollout):
        return decode_loop(run_config(**rollout), model, workload, 40, 8, fused=fused, gathered=gathered)

    assert of(CAUSAL) == DecodeLoop(5 * (8 + 3) + (12 + 5) - (8 + 3), 0)
    assert of(CAUSAL, fused=True) == DecodeLoop(5 * 8 + 4, 0)
    assert of() == DecodeLoop(44, 44)
    # Of 8 steps 4 are whole canvases, of 2 slots at once: 4 iterations for all slots.
    whole = 4 * (5 * 4 + 2)
    assert of(cache="dual", gathered=2) == DecodeLoop(5 * 4 + 2 + whole, whole)


def test_tokens_per_step_of_the_schedules():
    def of(block_size, **rollout):
        return assume(run_config(block_size=block_size, max_tokens=64, **rollout), block_size).tokens_per_step

    assert of(32) == 1 and of(32, denoising_steps=8) == 4
    assert of(32, strategy="linspace", first_token=True) == 32 / 31  # the reference's [1, 0, 1 x 29, 2]
    assert of(32, strategy="linspace", first_token=True, denoising_steps=8) == 4
    assert of(32, strategy="dynamic") == 2.6


@pytest.mark.parametrize("topology", ONE_CHIP)
def test_a_conditional_costs_the_shares_of_its_branches(topology):
    def choose(x, w):
        def body(x):
            return lax.cond(jnp.sum(x) > 0, lambda: jnp.dot(jnp.dot(x, w), w), lambda: jnp.dot(x, w))

        return lax.while_loop(lambda x: jnp.max(x) > 1, body, x)

    module, once = compiled(topology, choose, array(256, 256), array(256, 256)), 2 * 256**3
    one = {"data": 1, "fsdp": 1, "tensor": 1}
    shares = {"while/body/cond": (0.75, 0.25)}
    assert program_cost(module, one).flops == 2 * once
    assert program_cost(module, one, loops={"jit(choose)/while": 10}, branches=shares).flops == 10 * 1.25 * once


# Programs

TINY = FULL.replace(vocab_size=1024, width=256, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=512,
                    mask_token_id=1000, eos_token_id=1001, pad_token_id=1001, stop_token_ids=(1001,),
                    attention="auto")  # fmt: skip
