"""Eight virtual devices in every arrangement: rollout, losses, gradients and updates of one device, sharded."""

import functools
from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
from engine_utils import compilations

from tracerl_jax import config_io
from tracerl_jax.config import RLSection, RunConfig, ValueSection
from tracerl_jax.data.prompts import Problem
from tracerl_jax.models import PRESETS, Model, ModelConfig
from tracerl_jax.parallel.mesh import make_mesh
from tracerl_jax.parallel.sharding import param_shardings, row_shards
from tracerl_jax.report.run_dir import intact_rows
from tracerl_jax.rewards import register_reward
from tracerl_jax.rl.experience import Sample
from tracerl_jax.rl.update import Learner, plan_replays
from tracerl_jax.rollout.engine import Engine, EngineConfig, Request, SamplingOptions
from tracerl_jax.training import run as run_module
from tracerl_jax.training.pipeline import train

MASK = 30
CONFIG = ModelConfig(
    vocab_size=32, width=32, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=4, mlp_width=32, mask_token_id=MASK,
    stop_token_ids=(3, 9),
)  # fmt: skip
PROMPTS = ([5, 1, 7, 2, 9], [8, 8, 2, 0, 4, 6, 1], [11, 12, 13, 14], [1])
RL = RLSection(row_length=64, rows_per_device=8)
# (data, fsdp, tensor); 4 key/value heads go over 4 devices at most.
MESHES = [(8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2), (2, 1, 4), (1, 2, 4)]
QUICK = [(2, 2, 2)]


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def random_params(head):
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        return (rng.normal(size=shape.shape) / 8 + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, Model(CONFIG, head).abstract_params())


def rl_step(model, learner):
    """Rollout, values, value update and policy update; everything they give, on the host."""
    options = [SamplingOptions("dynamic", threshold=0.1, max_tokens=9), SamplingOptions(max_tokens=6, temperature=0.0)]
    requests = [Request(prompt, option, i) for prompt in PROMPTS for option in options for i in range(2)]
    traces = list(Engine(model, learner.policy.params, EngineConfig(16, commit="separate")).generate(requests))
    samples = [
        Sample(Problem(0, "", trace.prompt_ids, {}), trace, "", 0, 0.0, {}, 1.0, advantage=(-1) ** i * 0.5)
        for i, trace in enumerate(traces)
    ]
    (replays,) = plan_replays(samples, RL, mask_id=MASK, block_size=CONFIG.block_size, seed=0, step=1)
    logp = learner.logprobs(learner.policy.params, replays)
    replays = [replace(r, old_logp=x + 0.1) for r, x in zip(replays, logp, strict=True)]
    replays = learner.with_values(replays)
    value, _ = learner.update_value(replays)
    policy, _ = learner.update_policy(replays)
    outcome = {
        "ids and steps": [(t.ids, t.step_map, t.tail_ids, t.tail_step_map) for t in traces],
        "sampled log-probs": [(t.logprobs, t.behaviour_logprobs) for t in traces],
        "replayed log-probs": logp,
        "values and advantages": [(r.old_values, r.advantages) for r in replays],
        "value update": with_means(value),
        "policy update": with_means(policy),
        "value state": learner.value,
        "policy state": learner.policy,
    }
    return jax.device_get(outcome)


def with_means(update):
    return update._asdict() | {"metrics": {name: (total / n, n) for name, (total, n) in update.metrics.items()}}


def two_steps(mesh):
    """Two steps with several micro-batches each; every program is compiled once and nothing changes its place."""
    model, value_model = Model(CONFIG, mesh=mesh), Model(CONFIG, "value", mesh)
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2, eps=1e-3, weight_decay=0.1))
    rl = replace(RL, rows_per_device=RL.rows_per_device // row_shards(mesh))
    learner = Learner(model, rl, ValueSection(enabled=True), optimizer, optimizer)
    learner.start(*(jax.device_put(random_params(m.head), param_shardings(m, mesh)) for m in (model, value_model)))
    placed = jax.tree.map(lambda leaf: leaf.sharding, learner.trees())
    with compilations() as compiled:
        first = rl_step(model, learner)
    assert compiled.count("jit(accumulate)") == 2  # of the policy and of the value model
    with compilations() as compiled:
        second = rl_step(model, learner)
    assert compiled == []
    for leaf, sharding in zip(jax.tree.leaves(learner.trees()), jax.tree.leaves(placed), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    return first, second


@pytest.fixture(scope="module")
def one_device():
    return two_steps(make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize(
    "sizes", [pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow, id="x".join(map(str, m))) for m in MESHES]
)
def test_every_mesh_does_what_one_device_does(one_device, sizes):
    for got, want in zip(two_steps(make_mesh(*sizes)), one_device, strict=True):
        assert got["policy update"]["grad_norm"] > 0.1  # clipped, across shards
        for name in want:
            tolerance = 0 if name == "ids and steps" else 1e-5
            leaves = jax.tree.leaves_with_path(got[name])
            for (path, x), y in zip(leaves, jax.tree.leaves(want[name]), strict=True):
                # Losses and metrics are means of terms of order one that may cancel: the terms set the rounding.
                scale = 0.1 if name.endswith("update") else 1e-3
                atol = tolerance * max(scale, np.abs(y).max(initial=0))
                np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=f"{name} {jax.tree_util.keystr(path)}")


# --- a whole run ------------------------------------------------------------------------------------------------------


PRESETS["mesh_run"] = PRESETS["sdar_tiny"].replace(
    width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=32
)
PRESETS["mesh_run_full"] = PRESETS["dream_demo"].replace(
    width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=32, block_size=4
)


@register_reward("mesh_run_digits")
def digits(prompts, completions, **columns):
    """Differs inside nearly every group of a model that knows nothing."""
    return [sum(c.isdigit() for c in text) / 8 for text in completions]


def run(folder, name, mesh, preset, **rl):
    shards = mesh[0] * mesh[1]
    config = {
        "name": name,
        "runs_dir": str(folder),
        "model": {"preset": preset},
        "mesh": dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)),
        "task": {"rewards": {"mesh_run_digits": 1.0}, "options": {"train_count": 24, "test_count": 16}},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "slots_per_device": 16 // shards, "max_tokens": 8,
                    "truncated_is_wrong": False},
        "rl": {"steps": 2, "row_length": 128, "rows_per_device": 4 // shards, "accuracy_low": 0.0, "accuracy_high": 1.0,
               "optimizer": {"learning_rate": 1e-3, "eps": 1e-3}, **rl},
        "value": {"enabled": True, "optimizer": {"learning_rate": 1e-3, "eps": 1e-3}},
        "eval": {"every": 0, "strategies": ["dynamic"]},
    }  # fmt: skip
    train(config_io.from_dict(RunConfig, config))
    return [list(intact_rows(folder / name / file)) for file in ("metrics.jsonl", "samples.jsonl")]


OVERLAP = {"overlap": "one_step_off", "old_logprobs": "recompute", "importance_sampling": "token"}
MERGED = {"shrink": 2, "old_logprobs": "recompute", "importance_sampling": "token"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "rl"), [("mesh_run", {}), ("mesh_run", OVERLAP), ("mesh_run_full", MERGED)],
    ids=["in turn", "overlapped", "full attention"],
)  # fmt: skip
def test_a_run_on_2x2x2_is_the_run_on_one_device(tmp_path, monkeypatch, preset, rl):
    metrics, samples = run(tmp_path, "mesh", (2, 2, 2), preset, **rl)
    one_device = functools.partial(make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(run_module, "make_mesh", one_device)
    want_metrics, want_samples = run(tmp_path, "one", (1, 1, 1), preset, **rl)

    assert len(metrics) == len(want_metrics)
    updates = 0
    for row, want in zip(metrics, want_metrics, strict=True):
        assert row.keys() == want.keys()
        updates += "policy/grad_norm" in row and "value/grad_norm" in row
        for name in row:
            timed = name.startswith(("seconds/", "chips/")) or name.endswith(("_seconds", "tokens_per_second"))
            if not (timed or isinstance(row[name], str)):
                np.testing.assert_allclose(row[name], want[name], rtol=1e-4, atol=1e-4, err_msg=name)
    assert updates == 2
    assert [s["ids"] for s in samples] == [s["ids"] for s in want_samples]
    assert [s["step_map"] for s in samples] == [s["step_map"] for s in want_samples]
