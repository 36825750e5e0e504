"""Rollouts with an approximate cache: the gap is measured whatever is replayed, and weights correct for it.

Everything is compared with dense forwards over written-out canvases.
"""

from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tracerl_jax.config import RLSection, ValueSection
from tracerl_jax.data.prompts import Problem
from tracerl_jax.models import Model, ModelConfig
from tracerl_jax.rl.experience import Sample
from tracerl_jax.rl.loop import with_old_logprobs
from tracerl_jax.rl.update import Learner, plan_replays
from tracerl_jax.rollout.engine import Engine, EngineConfig, Request, SamplingOptions

B, MASK, LIMIT, CAP = 4, 22, 12, 1.1
MODEL = Model(
    ModelConfig(vocab_size=24, width=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=24,
                qk_norm=False, attention_mode="full", block_size=B, mask_token_id=MASK, stop_token_ids=(3,),
                attention="reference", initializer_range=0.3)
)  # fmt: skip
PARAMS = MODEL.init(jax.random.key(5))
PROMPTS = ([5, 1, 7, 2, 9], [8, 8, 2, 0, 4, 6, 1], [11, 12], [13])
CACHES = {"none": {}, "prefix": {"cache": "prefix", "horizon": 6}, "dual": {"cache": "dual", "horizon": B}}
RL = RLSection(row_length=64, rows_per_device=8, kl_coef=0.3, old_logprobs="recompute", importance_cap=CAP)
LONGEST = max(map(len, PROMPTS)) + LIMIT


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@lru_cache
def sampled(cache: str) -> list[Sample]:
    options = SamplingOptions("static", max_tokens=LIMIT, temperature=1.0, denoising_steps=4)
    requests = [Request(prompt, options, i) for i, prompt in enumerate(PROMPTS)]
    traces = list(Engine(MODEL, PARAMS, EngineConfig(len(requests), **CACHES[cache])).generate(requests))
    return [
        Sample(Problem(i, "", trace.prompt_ids, {}), trace, "", i, 0.0, {}, 0.5, (-1.0, 0.5, 2.0, -0.3)[i])
        for i, trace in enumerate(traces)
    ]


@lru_cache
def programs() -> Learner:
    return Learner(
        MODEL, replace(RL, importance_sampling="token"), ValueSection(), optax.sgd(1.0), optax.sgd(1.0)
    )


def learner_of(**changes) -> Learner:
    """What is changed must not be compiled in."""
    learner = programs()
    learner.config = replace(RL, importance_sampling="token", **changes)
    learner.start(jax.tree.map(jnp.array, PARAMS), None)
    return learner


def replays_of(learner, samples):
    (part,) = plan_replays(samples, learner.config, mask_id=MASK, block_size=B, seed=0, step=1)
    return part


@jax.jit
def dense_logprobs(params, states, state, position, ids):
    """Of one token each, in canvases [n,LONGEST]; -1 is behind their end."""
    length = (states >= 0).sum(-1)[:, None] + 0 * states
    intervals = jnp.stack([0 * length, length, 0 * length, 0 * length], -1)
    positions = jnp.broadcast_to(jnp.arange(LONGEST), states.shape)
    logits = MODEL.logits(params, MODEL.hidden(params, jnp.maximum(states, 0), positions, intervals))
    return jax.nn.log_softmax(logits[state, position])[jnp.arange(len(ids)), ids]


def written_out(samples, shrink):
    """Arguments of `dense_logprobs`: every response token in the canvas before the first of the `shrink` steps that its
    own is among."""
    states, tokens = [], []
    for sample in samples:
        trace, p = sample.trace, len(sample.trace.prompt_ids)
        canvas = np.concatenate([trace.prompt_ids, trace.ids, trace.tail_ids])
        steps = np.concatenate([np.zeros(p, int), trace.step_map, trace.tail_step_map])
        distinct = np.unique(trace.step_map)
        for i, step in enumerate(trace.step_map):
            first = distinct[np.searchsorted(distinct, step) // shrink * shrink]
            state = np.full(LONGEST, -1)
            state[: trace.canvas_len] = MASK
            state[: len(canvas)] = np.where(steps < first, canvas, MASK)
            tokens.append((len(states), p + i, trace.ids[i]))
            states.append(state)
    rest = len(PROMPTS) * LIMIT - len(states)  # one shape
    return np.pad(states, ((0, rest), (0, 0))), *np.pad(np.array(tokens), ((0, rest), (0, 0))).T, len(tokens)


@pytest.mark.parametrize("cache", ["none", *(pytest.param(c, marks=pytest.mark.slow) for c in ("dual", "prefix"))])
def test_the_gap_is_the_cache_whatever_is_replayed(cache):
    samples = sampled(cache)
    *dense, count = written_out(samples, 1)
    true = np.asarray(dense_logprobs(PARAMS, *dense))[:count]
    gaps = np.abs(true - np.concatenate([s.trace.logprobs for s in samples]))
    assert (gaps.max() > 0.1) if cache != "none" else (gaps.max() < 1e-4)
    for shrink, old in ((1, "recompute"), (4, "recompute"), (1, "rollout")):
        learner = learner_of(shrink=shrink, old_logprobs=old)
        learner.rows_per_micro_batch = 99  # room for all
        _, metrics = with_old_logprobs(learner, replays_of(learner, samples))
        learner.rows_per_micro_batch = RL.rows_per_device
        np.testing.assert_allclose(metrics["replay/logprob_gap_max"], gaps.max(), atol=1e-4)
        np.testing.assert_allclose(metrics["replay/logprob_gap_mean"], gaps.mean(), atol=1e-4)


@pytest.mark.parametrize(("cache", "shrink"), [
    ("dual", 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("dual", 1), ("prefix", 4))),
])  # fmt: skip
def test_the_corrected_update_is_the_dense_gradient(cache, shrink):
    """Weights are min(pi(token | replayed state) / probability it was drawn with, cap), constants of the objective."""
    samples = sampled(cache)
    learner = learner_of(shrink=shrink)
    replays, _ = with_old_logprobs(learner, replays_of(learner, samples))
    replays = [replace(r, advantages=r.sample.advantage) for r in replays]
    samples = [r.sample for r in replays]
    *dense, count = written_out(samples, shrink)

    def logprobs(params):
        return dense_logprobs(params, *dense)[:count]

    old = np.asarray(logprobs(PARAMS))
    np.testing.assert_allclose(np.concatenate([r.old_logp for r in replays]), old, atol=1e-4)
    weights = np.minimum(np.exp(old - np.concatenate([s.trace.behaviour_logprobs for s in samples])), CAP)
    assert (weights == CAP).sum() > 2 and (weights < 0.9).sum() > 2
    batches, _ = learner.policy_batches(replays)
    used = np.concatenate([batch["importance"][batch["weights"] != 0] for batch in batches])
    np.testing.assert_allclose(np.sort(used), np.sort(weights), rtol=1e-4)
    advantages = np.concatenate([np.full(len(s.trace.ids), s.advantage) for s in samples])

    def loss(params):  # at the old policy nothing is clipped, and the KL has no gradient
        return -jnp.mean(weights * advantages * jnp.exp(logprobs(params) - old))

    want = jax.grad(loss)(PARAMS)
    learner.update_policy(replays)
    for (path, got), y, before in zip(
        jax.tree.leaves_with_path(learner.policy.params), jax.tree.leaves(want), jax.tree.leaves(PARAMS), strict=True
    ):
        scale = max(np.abs(y).max(), 1e-3)
        np.testing.assert_allclose(before - got, y, rtol=0, atol=1e-3 * scale, err_msg=str(path))
