"""How many forwards decoding takes, and what the two kinds of a full-attention model's forwards cost."""

import dataclasses

import jax
import numpy as np
import pytest
from compiled import mesh_of

from tracerl_jax.config import RunConfig
from tracerl_jax.config_io import load_config
from tracerl_jax.errors import UserError
from tracerl_jax.models import PRESETS, Model, ModelConfig
from tracerl_jax.plan.decoding import DecodeLoop, Forwards, decode_loop, response_forwards
from tracerl_jax.plan.estimate import estimate_run
from tracerl_jax.plan.programs import model_config, plan_run
from tracerl_jax.plan.topology import parse_topology
from tracerl_jax.plan.workload import Workload, assume
from tracerl_jax.rollout.engine import Engine, EngineConfig, Request, SamplingOptions
from tracerl_jax.training.run import check_canvas, engine_config, rollout_options

B = 4


@pytest.fixture
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


CAUSAL = ModelConfig(vocab_size=32, width=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_width=16,
                     block_size=B, mask_token_id=31, stop_token_ids=(30,), attention="reference")  # fmt: skip
FULL = CAUSAL.replace(attention_mode="full", qk_norm=False)


def run_config(**rollout) -> RunConfig:
    flags = {"cache": "none", "horizon": "none", "block_size": B, "max_tokens": 24, "strategy": "static", **rollout}
    return load_config(RunConfig, "rl_dream_7b_math", [f"--config.rollout.{key}={flags[key]}" for key in flags])


@pytest.mark.parametrize("config, commit", [(CAUSAL, "separate"), (FULL, "auto")], ids=["block_causal", "full"])
def test_forwards_of_a_response_are_those_of_the_engine(config, commit, quick_compilation):
    options = SamplingOptions("static", max_tokens=12, denoising_steps=2, ignore_eos=True, temperature=1.0)
    model = Model(config)
    engine = Engine(model, model.init(jax.random.key(0)), EngineConfig(1, commit=commit))
    (trace,) = engine.generate([Request(np.arange(4), options)])
    run = run_config(denoising_steps=2)
    found = response_forwards(run, config, 12, assume(run, B).tokens_per_step)
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


# Programs

TINY = FULL.replace(vocab_size=1024, width=256, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=512,
                    mask_token_id=1000, eos_token_id=1001, pad_token_id=1001, stop_token_ids=(1001,),
                    logit_alignment="shifted", attention="auto")  # fmt: skip
SLOTS, PROMPT, RESPONSE = 16, 64, 64


def tiny_run(mesh, *arg, **changes):
    """The plan's programs of a full-attention run on the devices of a mesh."""
    flags = {
        "model.path": "none", "model.preset": "tiny_full", "task.max_prompt_tokens": PROMPT,
        "rollout.max_tokens": RESPONSE, "rollout.block_size": B, "rollout.slots_per_device": SLOTS,
        "rollout.prompts_per_step": 8, "rollout.samples_per_prompt": 4, "rollout.strategy": "static",
        "rollout.confidence": "policy", "rollout.top_k": 0, "rollout.top_p": 1.0, "rollout.horizon": 2 * B,
        "rl.row_length": 256, "rl.shrink": 4, **changes,
    }  # fmt: skip
    config = load_config(RunConfig, "rl_dream_7b_math:value", [f"--config.{key}={flags[key]}" for key in flags])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny_full", TINY)
        return plan_run(config, mesh, assume(config, B))


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_programs_of_a_full_attention_run(cache):
    horizon = {"rollout.horizon": "none"} if cache == "none" else {}
    run = tiny_run(mesh_of("cpu", 1, 2, 1), **{"rollout.cache": cache, **horizon})
    programs = {program.name: program for program in run.programs}
    assert list(programs) == ["sync", "decode", "replay", "values", "value gradient", "value apply", "policy gradient",
                              "policy apply"]  # fmt: skip
    whole = RESPONSE if cache == "none" else RESPONSE // B
    assert run.forwards == Forwards(RESPONSE, whole, 0)
    # 32 responses in as many slots. Whole canvases: of up to 4 x 16 tokens at once in the CPU's cached decoding.
    iterations = whole * SLOTS / -(-4 * 16 // (PROMPT + RESPONSE))
    if cache == "none":
        forwards = iterations = RESPONSE
    else:
        forwards = RESPONSE - whole + iterations
    loops = programs["decode"].loops
    assert loops["jit(decode)/while"] == forwards
    assert (loops["body/refresh/while"], loops["body/step/while"]) == (iterations / forwards, 1 - iterations / forwards)
    # A response of 64 steps is 16 canvases of 128 tokens, two to a row, a row to a device.
    counts = {replay.shrink: replay.count for replay in run.replays}
    assert counts[4].states == 32 * 16 and counts[4].rows == 32 * 8 and counts[1].rows == 32 * 32
    assert programs["policy gradient"].runs == programs["value gradient"].runs == 32 * 8 / 2


@pytest.mark.parametrize("flags, complaint", [
    ({"rl.row_length": 100}, "rl.row_length is 100, but a full-attention model is trained on whole canvases of up to "),
    ({"rl.block_size": 8}, "rl.block_size is for block-causal models"),
    ({"rollout.max_tokens": 66}, "max_tokens 66 is no multiple of block_size 4"),
])  # fmt: skip
def test_runs_that_cannot_be(flags, complaint):
    with pytest.raises(UserError, match=complaint):
        tiny_run(mesh_of("cpu", 1, 2, 1), **flags)


FAMILIES = ["dream_7b_math", "diffucoder_7b_code", "llada_8b_math", "mmada_8b_math"]


@pytest.mark.parametrize("name", [f"rl_{family}{arg}" for family in FAMILIES for arg in ("", ":value")])
def test_rl_configs_of_the_families_can_be_decoded_and_trained(name):
    config = load_config(RunConfig, name, [])
    model = model_config(config)
    assert (model.family, model.attention_mode) == (name.split("_")[1].replace("diffucoder", "dream"), "full")
    check_canvas(config, config.task.max_prompt_tokens)
    # Rows are full of canvases of the greatest length.
    assert config.rl.row_length % (config.task.max_prompt_tokens + config.rollout.max_tokens) == 0
    engine = Engine(Model(model), None, engine_config(config.rollout, config.rollout.slots_per_device))
    prompt = np.zeros(config.task.max_prompt_tokens, np.int32)
    engine.check(Request(prompt, rollout_options(config.rollout, seed=0)), "rl")


@pytest.mark.slow
@pytest.mark.parametrize("filters", [False, True])
@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize("topology", ["v5e:1x1", "h100:1"])
def test_flops_of_decoding(topology, cache, filters):
    """Whole canvases for the slots that are gathered, windows of 2 B and a token for all; the head sees blocks."""
    changes = {"rollout.cache": cache, **({"rollout.top_k": 5} if filters else {})}
    changes |= {"rollout.horizon": "none"} if cache == "none" else {}
    run = tiny_run(mesh_of(topology, 1, 1, 1), **changes)
    run = dataclasses.replace(run, programs=[p for p in run.programs if p.name == "decode"])
    (decode,) = estimate_run(run, parse_topology(topology), mesh_of(topology, 1, 1, 1)).programs
    weights = 3 * (2 * 256 * 64 * (4 + 2) + 3 * 256 * 512)
    free = 256 if topology.startswith("h100") else 128
    gathered = SLOTS if cache == "none" else min(SLOTS, -(-4 * free // (PROMPT + RESPONSE)))
    whole = RESPONSE // B * 2 * SLOTS / gathered if cache == "dual" else 2 * RESPONSE
    windows = 2 * (RESPONSE - RESPONSE // B) if cache == "dual" else 0

    def body(slots, queries, keys):
        return slots * (2 * weights * queries + 4 * queries * keys * 64 * 4 * 3)

    head = 2 * 256 * 1024 * B
    expected = whole * (body(gathered, PROMPT + RESPONSE, PROMPT + RESPONSE) + gathered * head)
    expected += windows * (body(SLOTS, 2 * B + 1, PROMPT + RESPONSE) + SLOTS * head)
    assert decode.cost.flops == pytest.approx(expected, rel=0.1)
    assert not decode.cost.unknown_loops and not decode.cost.unknown_kernels
