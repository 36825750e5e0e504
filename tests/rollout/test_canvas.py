"""Decoding of full-attention models: against a loop of dense forwards on the host, whatever the batch, and errors."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_utils import assert_same

from tracerl_jax.diffusion.reveal import schedule
from tracerl_jax.errors import ConfigError, DataError
from tracerl_jax.models import Model, ModelConfig
from tracerl_jax.parallel.mesh import make_mesh
from tracerl_jax.parallel.sharding import param_shardings
from tracerl_jax.rollout import batch
from tracerl_jax.rollout.engine import Engine, EngineConfig, Request, SamplingOptions
from tracerl_jax.rollout.stream import stream
from tracerl_jax.rollout.warm_up import warm_up

B, MASK, PAD = 4, 63, 0
LENGTH = 24  # of the longest canvas
CONFIG = ModelConfig(
    vocab_size=64, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48, qk_norm=False,
    attention_mode="full", block_size=B, mask_token_id=MASK, pad_token_id=PAD, initializer_range=0.3,
)  # fmt: skip
MODELS = {alignment: Model(CONFIG.replace(logit_alignment=alignment)) for alignment in ("same_position", "shifted")}
PARAMS = MODELS["shifted"].init(jax.random.key(1))
PROMPTS = [[5, 9, 33, 2, 41], [17], [8, 8, 1, 60, 21, 7, 30, 11, 2]]
CACHES = [
    {}, {"cache": "prefix"}, {"cache": "prefix", "horizon": 6}, {"cache": "prefix", "horizon": 4, "refresh": 2},
    {"cache": "dual"}, {"cache": "dual", "horizon": 4}, {"cache": "dual", "horizon": 7, "refresh": 3},
]  # fmt: skip


@pytest.fixture(autouse=True)
def _one_program(monkeypatch):
    """All slots take part in every forward: fewer programs to compile."""
    monkeypatch.setattr(batch, "HALVINGS", 0)


def make_engine(slots=4, alignment="same_position", **config):
    return Engine(MODELS[alignment], PARAMS, EngineConfig(slots, **config))


class HostLoop:
    """One greedy request, a step after the other: dense forwards, and what they say taken apart in numpy."""

    def __init__(self, alignment, cache="none", horizon=None, refresh=None):
        self.model, self.cache, self.horizon, self.refresh = MODELS[alignment], cache, horizon, refresh
        self.shift = int(alignment == "shifted")

    def __call__(self, request):
        o, p = request.options, len(request.prompt_ids)
        canvas = np.array([*request.prompt_ids, *[MASK] * o.max_tokens])
        steps, logprobs, step = np.zeros(len(canvas), int), np.zeros(len(canvas)), 0
        plan = schedule(o.strategy, B, o.denoising_steps or B, o.first_token)
        for s in range(p, len(canvas), B):
            at = 0
            while (masked := np.flatnonzero(canvas[s : s + B] == MASK)).size:
                if self.cache == "none" or at == 0 or (self.refresh and at % self.refresh == 0):
                    logits, kv = full(self.model, PARAMS, padded(canvas), len(canvas))
                else:
                    logits = self.window(canvas, kv, s)
                rows = logits[0, s - self.shift :][:B]
                step, at = step + 1, at + 1
                policy = np.asarray(jax.nn.log_softmax(rows))
                allowed = np.where(np.arange(CONFIG.vocab_size) == MASK, -np.inf, rows)
                probs = np.asarray(jax.nn.softmax(allowed))
                ids = probs.argmax(-1)
                for i in self.reveal(o, masked, probs, ids, plan[at - 1], at == 1):
                    canvas[s + i], steps[s + i], logprobs[s + i] = ids[i], step, policy[i, ids[i]]
            if np.isin(canvas[s : s + B], o.stop_ids or ()).any():
                break
        return canvas[p:], steps[p:], logprobs[p:]

    def window(self, canvas, kv, s):
        """Logits of the whole canvas, where every token sees the stale keys of what is not in the window, and the
        window's own."""
        end = len(canvas) if self.horizon is None else min(s + self.horizon, len(canvas))
        kept = np.r_[:s, end : len(canvas)] if self.cache == "dual" else np.r_[:s]
        stale = [x[:, :, np.r_[kept, np.zeros(LENGTH - len(kept), int)]] for x in kv]
        seen = np.array([0, len(kept), LENGTH + s, LENGTH + end])
        return windowed(self.model, PARAMS, padded(canvas), seen, *stale)

    @staticmethod
    def reveal(o, masked, probs, ids, count, first):
        if first and o.first_token:
            return masked[:1]
        second, best = np.sort(probs, -1)[:, -2:].T
        entropy = -(probs * np.log(np.maximum(probs, 1e-30))).sum(-1)
        score = {"confidence": best, "margin": best - second, "entropy": -entropy, "uncertainty": entropy}[o.score]
        order = masked if o.strategy == "sequential" else masked[np.argsort(-score[masked], kind="stable")]
        if o.strategy == "dynamic":
            count = max(count, (score[masked] > o.threshold).sum())
        return order[:count]


def padded(canvas):
    return np.pad(canvas, (0, LENGTH - len(canvas)))[None]


@functools.partial(jax.jit, static_argnums=0)
def full(model, params, ids, length):
    everything = jnp.broadcast_to(jnp.array([0, length, 0, 0]), (*ids.shape, 4))
    hidden, kv = model.hidden_and_kv(params, ids, jnp.arange(LENGTH)[None], everything)
    return model.logits(params, hidden), kv


@functools.partial(jax.jit, static_argnums=0)
def windowed(model, params, ids, seen, k, v):
    intervals = jnp.broadcast_to(seen, (*ids.shape, 4))
    positions = jnp.arange(LENGTH)[None]
    hidden, _ = model.hidden_and_kv(params, ids, positions, intervals, lambda layer: (k[layer], v[layer]))
    return model.logits(params, hidden)


GREEDY = [
    {"strategy": "static", "denoising_steps": 3}, {"strategy": "dynamic", "threshold": 0.3},
    {"strategy": "linspace", "denoising_steps": 3, "first_token": True},
    {"strategy": "dynamic", "threshold": 0.1, "score": "margin", "first_token": True},
    {"strategy": "static", "score": "entropy"}, {"strategy": "static", "score": "uncertainty", "denoising_steps": 2},
    {"strategy": "sequential", "denoising_steps": 2},
]  # fmt: skip


@pytest.mark.parametrize(("alignment", "config"), [
    ("shifted", CACHES[0]), ("shifted", CACHES[-1]), ("same_position", CACHES[2]),
    *(pytest.param("shifted", config, marks=pytest.mark.slow) for config in CACHES[1:-1]),
    *(pytest.param("same_position", config, marks=pytest.mark.slow) for config in CACHES[::6]),
], ids=str)  # fmt: skip
def test_engine_decodes_as_a_loop_of_dense_forwards(alignment, config):
    stops = [(11, 30), None, (5, 22, 40, 41, 50)]
    requests = [
        Request(PROMPTS[i % 3], SamplingOptions(**options, max_tokens=12, temperature=0.0, stop_ids=stops[i % 3]))
        for i, options in enumerate(GREEDY)
    ]
    loop = HostLoop(alignment, **config)
    for request, trace in zip(requests, make_engine(3, alignment, **config).generate(requests), strict=True):
        ids, steps, logprobs = loop(request)
        r, end = len(trace.ids), len(trace.ids) + len(trace.tail_ids)
        np.testing.assert_array_equal(np.append(trace.ids, trace.tail_ids), ids[:end])
        np.testing.assert_array_equal(np.append(trace.step_map, trace.tail_step_map), steps[:end])
        np.testing.assert_allclose(trace.logprobs, logprobs[:r], atol=1e-4)
        assert not steps[end:].any()
        assert trace.denoise_forwards == trace.forwards == steps.max()
        assert trace.canvas_len == len(request.prompt_ids) + 12
        assert trace.stop_reason == ("stop" if np.isin(ids[:r], request.options.stop_ids or ()).any() else "length")


def draw_requests(count):
    rng = np.random.default_rng(0)
    kinds = itertools.cycle([("dynamic", 1.0), ("static", 0.0), ("linspace", 0.7), ("dynamic", 0.0)])
    return [
        Request(PROMPTS[i % 3], SamplingOptions(strategy, threshold=0.2, temperature=temperature, seed=i % 2,
                                                max_tokens=B * int(rng.integers(1, 5)), stop_ids=(11, 30, 7)), i)
        for i, (strategy, temperature) in zip(range(count), kinds, strict=False)
    ]  # fmt: skip


@pytest.mark.parametrize(("config", "setups"), [
    ({"cache": "dual", "horizon": 6, "refresh": 2}, [(5, {"forwards_per_chunk": 2, "pages": 17, "page_size": 4})]),
    *(pytest.param(config, [(3, {"forwards_per_chunk": 5}), (16, {"page_size": 8})], marks=pytest.mark.slow)
      for config in CACHES),
], ids=str)  # fmt: skip
def test_results_do_not_depend_on_the_batch(config, setups, monkeypatch):
    monkeypatch.setattr(batch, "HALVINGS", 1)
    requests = draw_requests(12)
    fixed = {"max_length": 32} | config
    want = list(make_engine(1, "shifted", **fixed).generate(requests))  # one after the other
    for slots, more in setups:
        engine = make_engine(slots, "shifted", **fixed, **more)
        for order in (1, -1):
            for trace, one in zip(engine.generate(requests[::order]), want[::order], strict=True):
                assert_same(trace, one)
        assert all(pool.held == 0 for pool in engine._batch._pools)


def test_a_cache_made_anew_at_every_step_is_exact():
    requests = draw_requests(8)
    exact = list(make_engine().generate(requests))
    for trace, one in zip(make_engine(cache="dual", refresh=1).generate(requests), exact, strict=True):
        assert_same(trace, one)


@pytest.mark.slow
def test_on_a_mesh():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    model = Model(MODELS["shifted"].config, mesh=mesh)
    params = jax.device_put(PARAMS, param_shardings(model, mesh))
    config = {"cache": "dual", "horizon": 8}
    requests = draw_requests(10)
    on_mesh = Engine(model, params, EngineConfig(8, **config))
    alone = make_engine(4, "shifted", **config)
    for trace, one in zip(on_mesh.generate(requests), alone.generate(requests), strict=True):
        assert_same(trace, one)


@pytest.mark.slow
def test_int8_cache_stays_near():
    requests = [Request(PROMPTS[0], SamplingOptions("static", denoising_steps=2, max_tokens=4, temperature=0.0))]
    (exact,) = make_engine(cache="dual", horizon=4).generate(requests)
    (rounded,) = make_engine(cache="dual", horizon=4, kv_dtype="int8").generate(requests)
    np.testing.assert_allclose(exact.logprobs, rounded.logprobs, atol=0.1)
    assert (exact.logprobs != rounded.logprobs).any()


def test_blocks_are_seen_as_they_finish_and_requests_can_be_cancelled():
    engine = make_engine(2, forwards_per_chunk=3)
    request = Request(PROMPTS[0], SamplingOptions("static", max_tokens=16, temperature=0.0))
    pieces = list(stream(engine, [request]))
    (whole,) = engine.generate([request])
    np.testing.assert_array_equal(np.concatenate([piece.ids for piece in pieces]), whole.ids)
    assert len(pieces) == 4
    number = engine.submit(request)
    engine.step()
    assert engine.cancel(number)
    assert_same(next(engine.generate([request])), whole)


def test_new_weights_and_memory():
    engine = make_engine(2, cache="dual", horizon=8, max_length=64)
    sizes = engine.memory_bytes()
    values = CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 2
    assert sizes["cache"] >= 2 * 64 * values * 4
    assert make_engine(2, max_length=64).memory_bytes()["cache"] == 0
    request = Request(PROMPTS[1], SamplingOptions("static", max_tokens=8, temperature=0.0))
    (before,) = engine.generate([request])
    engine.update_params(jax.tree.map(lambda x: x * 0.5, PARAMS))
    (after,) = engine.generate([request])
    assert not np.array_equal(before.logprobs, after.logprobs)


@pytest.mark.slow
def test_warm_up_decodes():
    engine = make_engine(2, cache="dual", horizon=8, max_length=64)
    warm_up(engine, [SamplingOptions(temperature=0.0)], prompt_tokens=4)
    assert not engine.busy


@pytest.mark.parametrize(("config", "options", "message"), [
    ({}, {"max_tokens": 10}, "max_tokens 10 is no multiple of block_size 4.*use 8 or 12"),
    ({}, {"max_tokens": 12, "block_size": 8}, "max_tokens 12 is no multiple of block_size 8.*use 8 or 16"),
    ({"cache": "dual", "horizon": 3}, {}, "horizon 3 is smaller than block_size 4"),
    ({"cache": "prefix", "horizon": 4}, {"block_size": 8}, "horizon 4 is smaller than block_size 8"),
])  # fmt: skip
def test_requests_that_do_not_fit_are_refused(config, options, message):
    engine = make_engine(**config)
    with pytest.raises(DataError, match=message):
        engine.submit(Request(PROMPTS[0], SamplingOptions(**{"max_tokens": 16} | options)))
    assert not engine.busy


@pytest.mark.parametrize(("config", "message"), [
    ({"cache": "paged"}, "cache is 'paged'; use one of none, prefix, dual"),
    ({"horizon": 8}, "horizon is 8, but cache is 'none'"),
    ({"refresh": 2}, "refresh is 2, but cache is 'none'"),
    ({"cache": "dual", "refresh": 0}, "refresh is 0"),
    ({"commit": "fused"}, "nothing is committed"),
    ({"drafts": 2}, "nothing is committed"),
])  # fmt: skip
def test_configurations_that_cannot_work_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        make_engine(**config)


def test_other_attention_modes():
    causal = Model(CONFIG.replace(attention_mode="block_causal"))
    with pytest.raises(ConfigError, match="always decodes with an exact cache"):
        Engine(causal, PARAMS, EngineConfig(cache="dual"))
    with pytest.raises(ConfigError, match="attention_mode 'causal'"):
        Engine(Model(CONFIG.replace(attention_mode="causal")), PARAMS)


def test_a_pad_penalty_needs_a_pad_token():
    engine = Engine(Model(CONFIG.replace(pad_token_id=None)), PARAMS)
    with pytest.raises(DataError, match="pad_penalty needs pad_token_id"):
        engine.submit(Request(PROMPTS[0], SamplingOptions(max_tokens=8, pad_penalty=2.0)))
