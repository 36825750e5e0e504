"""Model FLOPs by hand, by other means, and by XLA's count of a compiled program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tracerl_jax.diffusion.packing import pack
from tracerl_jax.diffusion.replay import causal_item, trace_item
from tracerl_jax.models import Model
from tracerl_jax.models.config import ModelConfig
from tracerl_jax.plan.workload import Workload, sample_traces
from tracerl_jax.report.flops import TRAINED, Work, head_flops, replay_work, rollout_work, trunk_flops

SMALL = ModelConfig(
    vocab_size=50, width=8, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, mlp_width=20, block_size=4
)
MIXTURE = SMALL.replace(num_experts=16, experts_per_token=2, expert_width=5)
ATTENTION = 8 * 24 + 2 * 8 * 12 + 24 * 8  # q, k and v, o


def traces_of(count: int, prompt: int = 10, response: int = 21):
    return sample_traces(Workload(prompt, response, 2.0), count, block_size=4, temperature=1.0)


def items_of(traces):
    return [
        trace_item(
            t.prompt_ids, t.ids, t.step_map, block_size=4, mask_id=49, tail_ids=t.tail_ids,
            tail_step_map=t.tail_step_map,
        )
        for t in traces
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "mlp"), [(SMALL, 3 * 8 * 20), (MIXTURE, 8 * 16 + 2 * 3 * 8 * 5)], ids=["dense", "experts"]
)
def test_a_forward_by_hand(config, mlp):
    assert trunk_flops(config, 7, 0) == 2 * 7 * 3 * (ATTENTION + mlp)
    assert trunk_flops(config, 0, 11) == 3 * 4 * 2 * 2 * 6 * 11  # layers, heads, two products, 2, head_dim
    assert head_flops(config, 5) == 2 * 5 * 8 * 50 and head_flops(config, 5, "value") == 2 * 5 * 8


def test_all_weights_but_norms_and_embedding_take_part_in_a_token():
    norms = 3 * (2 * 8 + 2 * 6) + 8
    assert trunk_flops(SMALL, 1, 0) + head_flops(SMALL, 1) == 2 * (SMALL.num_params() - norms - 50 * 8)


@pytest.mark.parametrize("items", [items_of(traces_of(5)), [causal_item(np.arange(5), np.arange(9))]])
def test_replay_counts_what_packed_rows_hold(items):
    rows = pack(items, row_length=256)
    s1, e1, s2, e2 = np.moveaxis(rows.intervals, -1, 0)
    pairs = int((e1 - s1 + e2 - s2).sum())
    forward = trunk_flops(SMALL, rows.token_count, pairs) + head_flops(SMALL, rows.target_count)
    assert replay_work(SMALL, items) == Work(rows.token_count, forward)
    assert replay_work(SMALL, items, trunk=TRAINED, heads=TRAINED).flops == 3 * forward
    shared = replay_work(SMALL, items, heads=TRAINED, head="value").flops
    assert shared == trunk_flops(SMALL, rows.token_count, pairs) + 3 * head_flops(SMALL, rows.target_count, "value")


def test_rollout_counts_prompts_once_and_every_step_and_commit():
    """Forward by forward, for two responses to one prompt of 10 tokens, B = 4."""
    traces = traces_of(2)
    want = trunk_flops(SMALL, 8, 4 * 4 + 4 * 8)  # the prompt's two whole blocks
    for trace in traces:
        steps = np.concatenate([[0, 0], trace.step_map, trace.tail_step_map]).reshape(-1, 4)  # blocks 2, 3, ..
        for block, of_block in enumerate(steps, start=2):
            end = 4 * (block + 1)
            denoise = len(set(of_block) - {0})
            want += denoise * (trunk_flops(SMALL, 4, 4 * end) + head_flops(SMALL, 4))
            if block < 1 + len(steps):
                want += trunk_flops(SMALL, 4, 4 * end)
    found = rollout_work(SMALL, traces)
    assert found.tokens == 42 and found.flops == pytest.approx(want, rel=1e-12)


def test_full_attention_computes_the_canvas_at_every_step_and_caches_are_not_known():
    (trace,) = traces_of(1, prompt=8, response=8)
    trace = dataclasses.replace(trace, canvas_len=16)
    steps = trace.denoise_forwards
    want = steps * (trunk_flops(SMALL, 16, 16 * 16) + head_flops(SMALL, 4))
    assert rollout_work(SMALL, [trace]).flops == want
    assert rollout_work(SMALL, [trace], cache="dual") == Work(8, None)
    assert Work(1, 2.0) + Work(3, None) == Work(4, None)


@pytest.mark.parametrize("passes", [1, 3], ids=["forward", "gradient"])
def test_xla_counts_the_same(passes):
    """Of a model wide enough that products are nearly all of it, every token seeing every other; not in a loop, whose
    body XLA counts once. The forward pass as it is compiled, the gradient as it is lowered."""
    config = ModelConfig(
        vocab_size=512, width=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=384,
        block_size=64, attention="reference", scan_layers=False,
    )  # fmt: skip
    model, N, T = Model(config), 2, 64
    ids, positions = jnp.zeros((N, T), jnp.int32), jnp.broadcast_to(jnp.arange(T), (N, T))
    intervals = jnp.broadcast_to(jnp.array([0, T, 0, 0], jnp.int32), (N, T, 4))

    def forward(params):
        return model.logits(params, model.hidden(params, ids, positions, intervals)).sum()

    function = forward if passes == 1 else jax.value_and_grad(forward)
    lowered = jax.jit(function).lower(model.abstract_params())
    found = (lowered.compile() if passes == 1 else lowered).cost_analysis()["flops"]
    want = passes * (trunk_flops(config, N * T, N * T * T) + head_flops(config, N * T))
    assert found == pytest.approx(want, rel=0.03)
