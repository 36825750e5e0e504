"""`tracerl plan` end to end: a two-layer model with SDAR-8B's shapes on H100s, and a tiny one on a TPU slice.

Compiling takes most of the time, so the programs are compiled once and looked at by many tests.
"""

import contextlib
import dataclasses
import io
import json
import re

import jax
import pytest
from compiled import mesh_of

from tracerl_jax.config import RunConfig
from tracerl_jax.config_io import load_config
from tracerl_jax.errors import ConfigError
from tracerl_jax.launch.cli import main
from tracerl_jax.models import PRESETS, ModelConfig
from tracerl_jax.plan import estimate, programs, topology
from tracerl_jax.plan.chips import GIB
from tracerl_jax.plan.estimate import estimate_program, estimate_run
from tracerl_jax.plan.hlo import Module, parse
from tracerl_jax.plan.kernel_costs import live_pairs
from tracerl_jax.plan.programs import model_config, plan_run
from tracerl_jax.plan.topology import parse_topology
from tracerl_jax.plan.workload import Workload, assume

ROLLOUT = ["sync", "prefill", "decode"]
POLICY = ["replay", "policy gradient", "policy apply"]
VALUE = ["values", "value gradient", "value apply"]

TINY = ModelConfig(vocab_size=1024, width=256, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=512,
                   mask_token_id=1000, eos_token_id=1001, pad_token_id=1001, stop_token_ids=(1001,))  # fmt: skip
TINY_FLAGS = [
    f"--config.{key}={value}" for key, value in {
        "model.path": "none", "model.preset": "tiny", "task.max_prompt_tokens": 100, "rollout.max_tokens": 256,
        "rollout.slots_per_device": 8, "rollout.samples_per_prompt": 4, "rollout.prompts_per_step": 16,
        "rl.row_length": 1024, "rl.minibatches": 2,
    }.items()
]  # fmt: skip


@pytest.fixture(scope="module")
def presets():
    """PRESETS with a tiny model, and SDAR-8B cut down to two layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        patch.setitem(PRESETS, "sdar_8b", PRESETS["sdar_8b"].replace(num_layers=2))
        yield PRESETS


@pytest.fixture(scope="module")
def large(presets):
    """(plan, config, workload, {program: its compiled text as data}) of rl_sdar_8b_math:value with two layers."""
    mesh, texts = mesh_of("h100:8", 1, 8, 1), []
    config = load_config(RunConfig, "rl_sdar_8b_math:value", [])
    workload = assume(config, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "parse", lambda text: texts.append(parse(text)) or texts[-1])
        run = plan_run(config, mesh, workload)
        plan = estimate_run(run, parse_topology("h100:8"), mesh)
    return plan, config, workload, dict(zip([p.name for p in plan.programs], texts, strict=True))


def by_name(plan):
    return {program.name: program for program in plan.programs}


# What is planned


def test_every_program_of_a_run_is_there(large):
    plan, *_ = large
    assert {*ROLLOUT, *POLICY, *VALUE} == {p.name for p in plan.programs} and len(plan.programs) == 9
    assert plan.resident_bytes.keys() == {"policy", "policy optimizer", "value", "value optimizer"}
    assert (plan.mesh, plan.rollout_mesh) == (
        {"data": 1, "fsdp": 8, "tensor": 1}, {"data": 8, "fsdp": 1, "tensor": 1}
    )  # fmt: skip


def test_runs_are_those_of_an_rl_step(large):
    plan, config, workload, _ = large
    runs = {p.name: p.runs for p in plan.programs}
    responses = 128 * 32
    assert (runs["sync"], runs["prefill"], runs["decode"]) == (1, responses / (64 * 8), responses / (64 * 8))
    # A response of 2000 tokens and its groups fill a row of 8192; 8 rows are a micro-batch.
    assert runs["policy gradient"] == runs["value gradient"] == responses / 8
    assert runs["replay"] == runs["values"] == responses / 8
    assert runs["policy apply"] == runs["value apply"] == config.rl.minibatches
    assert plan.response_tokens == responses * workload.response_tokens


def test_memory_adds_up(large):
    plan, *_ = large
    parameters = PRESETS["sdar_8b"].num_params() * 4 / 8
    assert plan.resident_bytes["policy"] == pytest.approx(parameters, rel=0.01)
    assert plan.resident_bytes["policy optimizer"] == pytest.approx(2 * parameters, rel=0.01)
    resident = sum(plan.resident_bytes.values())
    for p in plan.programs:
        assert p.overflow is None
        assert p.peak_bytes >= resident + p.temp_bytes
        assert p.peak_bytes >= p.argument_bytes + p.temp_bytes
    assert plan.peak_bytes == max(p.peak_bytes for p in plan.programs)
    found = by_name(plan)
    # Beside what stays: the sums of gradients; the decoding copy in bf16; and its cache.
    assert found["policy gradient"].argument_bytes == pytest.approx(2 * parameters, rel=0.02)
    copy, cache = PRESETS["sdar_8b"].num_params() * 2, 64 * 3072 * 2 * 2 * 8 * 128 * 2
    assert found["sync"].peak_bytes - resident >= copy
    assert found["decode"].argument_bytes == pytest.approx(copy + cache, rel=0.02)
    assert found["decode"].temp_bytes < cache / 4  # the cache is updated in place


def test_times_add_up(large):
    plan, *_ = large
    chip = plan.topology.chip
    for p in plan.programs:
        assert p.compute_seconds == p.cost.flops / chip.flops
        assert p.memory_seconds == p.cost.hbm_bytes / chip.hbm_bandwidth
        assert p.seconds == max(p.compute_seconds, p.memory_seconds, p.link_seconds)
    assert plan.step_seconds == pytest.approx(sum(p.runs * p.seconds for p in plan.programs))
    assert {p.name: p.bound for p in plan.programs if p.name in ("decode", "policy gradient", "replay")} == {
        "decode": "HBM", "policy gradient": "compute", "replay": "compute"
    }  # fmt: skip
    assert not any(p.cost.unknown_kernels | p.cost.unknown_loops for p in plan.programs)


def layer_parameters(model: ModelConfig) -> int:
    attention = 2 * model.width * model.head_dim * (model.num_heads + model.num_kv_heads)
    return model.num_layers * (attention + 3 * model.width * model.mlp_width)


def test_flops_of_training(large):
    """2 per parameter and token forward, 4 backward, 2 again for what is recomputed; the head on targets only."""
    plan, config, workload, _ = large
    model, tokens, targets = PRESETS["sdar_8b"], 8192, 2048  # of a chip's row; 2000 targets in slots of 2048
    intervals = programs._replays(config, model, workload, 1)  # noqa: SLF001
    found = by_name(plan)
    body, head = 2 * layer_parameters(model) * tokens, 2 * model.width * model.vocab_size * targets
    from tracerl_jax.diffusion.packing import pack

    rows = pack([replay.item for replay in intervals], row_length=tokens)
    attention = 2 * 128 * live_pairs(rows.intervals) * model.num_heads * model.num_layers
    assert found["replay"].cost.flops == pytest.approx(body + head + 2 * attention, rel=0.02)
    assert found["values"].cost.flops == pytest.approx(body + 2 * attention, rel=0.02)
    # Attention: scores and output, again when recomputed, and 3 + 4 products for the gradients.
    gradient = 4 * body + 4 * head + (2 + 2 + 7) * attention
    assert found["policy gradient"].cost.flops == pytest.approx(gradient, rel=0.02)
    assert found["value gradient"].cost.flops == pytest.approx(gradient - 4 * head, rel=0.02)
    assert found["policy apply"].cost.flops == 0


def test_cost_of_decoding(large):
    """Each forward reads every weight once and the committed keys and values of every slot."""
    plan, _, workload, _ = large
    model, slots, B = PRESETS["sdar_8b"], 64, 4
    forwards = workload.response_tokens / workload.tokens_per_step + workload.response_tokens / B - 1
    found = by_name(plan)["decode"].cost
    weights = layer_parameters(model) + model.width * model.vocab_size
    live = workload.prompt_tokens + workload.response_tokens / 2
    attention = 4 * slots * B * (live + B) * model.num_heads * model.head_dim * model.num_layers
    assert found.flops == pytest.approx(forwards * (2 * weights * slots * B + attention), rel=0.05)
    cache = slots * live * model.num_layers * 2 * model.num_kv_heads * model.head_dim * 2
    needed = forwards * (2 * weights + cache)
    assert needed <= found.hbm_bytes <= 3.5 * needed  # XLA:GPU copies each layer's weights out of their stack first
    assert found.collective_bytes.total() < 1e6


def test_bytes_sent_in_training(large):
    """Weights are gathered in bf16 for the forward pass, for what is recomputed and for the backward pass; gradients
    are summed in pieces."""
    plan, *_ = large
    found = by_name(plan)["policy gradient"].cost.collective_bytes
    model, others = PRESETS["sdar_8b"], 7 / 8
    body, head = 2 * layer_parameters(model), 2 * model.width * model.vocab_size
    gathered, scattered = found["all-gather", "fsdp"], found["reduce-scatter", "fsdp"]
    assert others * (2 * body + 2 * head) <= gathered <= others * 1.1 * (3 * body + 2 * head)
    assert others * (body + head) <= scattered <= others * 1.1 * (2 * body + 2 * head)
    assert {kind for kind, _ in found} <= {"all-gather", "reduce-scatter", "all-reduce", "all-to-all"}


# What the compiled 8B programs hold: nothing that grows with tokens^2 or tokens x vocabulary, never all layers at once


def largest_unlike(module: Module, *allowed: int) -> list[str]:
    """The arrays of a program, largest first, but those of `allowed` sizes."""


def check_buffers(module: Module, model: ModelConfig, tokens: int, layers: int) -> None:
    """No array of tokens^2 or tokens x vocabulary elements, and no collective that returns the weights of all layers.

    An array of N tokens may have dimensions split and merged, so it is known by its number of elements: none may be as
    large as tokens^2 (a mask) or tokens * V (logits), unless it is made of the model's own parameters or cache.
    """
    for scope in module.computations.values():
        for i in scope.values():
            for a in i.outputs:
                assert a.shape.count(tokens) < 2, f"{i.name} is {a.dtype}{list(a.shape)}"
                whole = model.vocab_size in a.shape and tokens in a.shape
                assert not whole, f"{i.name} is {a.dtype}{list(a.shape)}"
            if i.opcode.startswith("all-gather"):
                for a in i.outputs:
                    assert a.shape[:1] != (layers,) or len(a.shape) < 3, f"{i.name} gathers {a.dtype}{list(a.shape)}"
