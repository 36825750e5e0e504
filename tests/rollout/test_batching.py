"""Continuous batching: what a request gets does not depend on how the engine is set up or what else it does."""

import itertools
import resource

import jax
import numpy as np
import pytest
from engine_utils import assert_same, compilations
from golden_utils import load_golden

from tracerl_jax.errors import ConfigError, DataError
from tracerl_jax.models import Model
from tracerl_jax.parallel.mesh import make_mesh
from tracerl_jax.parallel.sharding import param_shardings
from tracerl_jax.rollout import batch
from tracerl_jax.rollout.engine import Engine, EngineConfig, Request, SamplingOptions

GOLDEN = load_golden("sdar_tiny")
MODEL = Model(GOLDEN.config)
STEM = list(range(20, 36))  # 4 blocks
PROMPTS = [[*STEM, 1, 2], [*STEM, 1, 2, 3, 4, 5], [*STEM[:8], 7], [9, 8], STEM]
FIXED = {"valid_vocab": 300, "stop_ids": (7, 55), "max_length": 48}


def make_engine(slots=4, **config):
    return Engine(MODEL, GOLDEN.params, EngineConfig(slots, **FIXED | {"page_size": 8, "commit": "separate"} | config))


def draw_requests(count, seed, prompts=PROMPTS):
    rng = np.random.default_rng(seed)
    kinds = itertools.cycle([("dynamic", 1.0), ("static", 0.0), ("sequential", 0.7), ("dynamic", 0.0)])
    return [
        Request(
            prompts[rng.integers(len(prompts))],
            SamplingOptions(strategy, threshold=0.2, temperature=temperature, max_tokens=int(rng.integers(1, 14)),
                            seed=int(rng.integers(3))),
            sample_index=i,
        )
        for i, (strategy, temperature) in zip(range(count), kinds, strict=False)
    ]  # fmt: skip


REQUESTS = draw_requests(24, 0)


@pytest.fixture(scope="module")
def expected():
    """Every request alone, committed separately, without anything cached."""
    engine = make_engine(1, commit="separate", prefix_cache=False)
    return [next(engine.generate([request])) for request in REQUESTS]


@pytest.mark.parametrize("config", [
    {"slots": 3, "commit": "separate"}, {"slots": 3, "commit": "fused", "forwards_per_chunk": 1},
    {"slots": 64, "commit": "fused"}, {"slots": 3, "commit": "separate", "forwards_per_chunk": 3, "pages": 8},
    pytest.param({"slots": 5, "commit": "fused", "prefix_cache": False, "page_size": 64}, marks=pytest.mark.slow),
    pytest.param({"slots": 9, "commit": "fused", "drafts": 2}, marks=pytest.mark.slow),
    pytest.param({"slots": 24, "commit": "fused", "drafts": 3}, marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_slots_chunks_pages_prefixes_and_commits_change_nothing(config, expected):
    engine, atol = make_engine(**config), 1e-4 if config["commit"] == "fused" else 1e-5
    for trace, want in zip(engine.generate(REQUESTS), expected, strict=True):
        assert_same(trace, want, atol)
    again = list(engine.generate(REQUESTS[::-1]))[::-1]  # another order, and prompts that are known by now
    for trace, want in zip(again, expected, strict=True):
        assert_same(trace, want, atol)
    assert all(pool.held == 0 for pool in engine._batch._pools)


def test_a_fused_commit_costs_no_forward(expected):
    fused = list(make_engine(commit="fused").generate(REQUESTS))
    assert all(trace.forwards <= trace.denoise_forwards for trace in fused)
    for trace in expected:
        p, total = len(trace.prompt_ids), len(trace.prompt_ids) + len(trace.ids) + len(trace.tail_ids)
        assert trace.forwards == trace.denoise_forwards + total // trace.block_size - p // trace.block_size - 1


def test_drafts_save_forwards():
    forwards = [sum(trace.forwards for trace in make_engine(commit="fused", drafts=drafts).generate(REQUESTS))
                for drafts in (1, 3)]  # fmt: skip
    steps = sum(trace.denoise_forwards for trace in make_engine(commit="fused").generate(REQUESTS))
    assert forwards[1] < forwards[0] < steps


def test_forwards_go_on_with_the_slots_that_are_left(monkeypatch, expected):
    """Where every token costs: the longest of many requests does not keep all slots going. (Each number of rows sums in
    an order of its own, 24 of them to 1.3e-5 of one.)"""
    monkeypatch.setitem(batch.FREE_TOKENS, "cpu", 4)
    taking_part = []
    decode = batch.decode

    def watched(*args):
        taking_part.append(len(args[3].seed) if args[7] is None else len(args[7]))
        return decode(*args)

    monkeypatch.setattr(batch.Batch, "run", staticmethod(watched))
    engine = make_engine(24, commit="separate")
    for trace, want in zip(engine.generate(REQUESTS), expected, strict=True):
        assert_same(trace, want, atol=1e-4)
    assert taking_part[0] == 24 and set(taking_part) >= {24, 12, 6} and taking_part == sorted(taking_part)[::-1]


def test_slots_go_on_at_their_own_pace():
    """A short request behind a long one is not held up by it, and the slots are never all waiting."""
    engine = make_engine(2, forwards_per_chunk=1)
    long = engine.submit(Request([5, 6], SamplingOptions("static", temperature=0.0, max_tokens=40, ignore_eos=True)))
    short = [engine.submit(Request([i + 60], SamplingOptions(temperature=0.0, max_tokens=2))) for i in range(4)]
    order = []
    while engine.busy:
        order += engine.step()
    assert order == [*short, long]


def test_streamed_blocks_are_the_beginning_of_the_result():
    engine = make_engine(2, forwards_per_chunk=2)
    number = engine.submit(Request(STEM, SamplingOptions(max_tokens=20, ignore_eos=True)))
    seen, finished = [], {}
    while not finished:
        finished = engine.step()
        seen += [blocks.ids for blocks in engine.blocks().values()]
    ids = finished[number].ids
    lengths = [len(part) for part in seen]
    assert lengths == sorted(lengths) and lengths[-1] >= 12 and 0 < len(set(lengths))
    for part in seen:
        assert len(part) % 4 == 0
        np.testing.assert_array_equal(part, ids[: len(part)])


@pytest.mark.parametrize("seed", range(3))
def test_cancelled_requests_leave_no_trace_and_disturb_nobody(seed, expected):
    engine, rng = make_engine(4, forwards_per_chunk=2, pages=9), np.random.default_rng(seed)
    numbers = {engine.submit(request): i for i, request in enumerate(REQUESTS)}
    gone, finished = set(), {}
    while engine.busy:
        finished |= engine.step()
        for number in rng.choice(sorted(numbers), size=rng.integers(3)).tolist():
            if engine.cancel(number):
                gone.add(number)
            else:
                assert number in finished or number in gone
    assert finished.keys() == numbers.keys() - gone
    for number, trace in finished.items():
        assert_same(trace, expected[numbers[number]])
    assert all(pool.held == 0 for pool in engine._batch._pools)


def test_a_closed_stream_cancels_the_rest():
    engine = make_engine(2)
    stream = engine.generate(REQUESTS)
    next(stream)
    stream.close()
    assert not engine.busy
    assert len(list(engine.generate(REQUESTS[:3]))) == 3


def test_streams_do_not_take_each_others_results(expected):
    engine = make_engine(3)
    number = engine.submit(REQUESTS[0])
    pairs = list(zip(engine.generate(REQUESTS[1:6]), engine.generate(REQUESTS[6:11]), strict=True))
    results = engine.step()
    assert not engine.busy and results.keys() == {number}
    found = [results[number], *(one for one, _ in pairs), *(two for _, two in pairs)]
    for trace, want in zip(found, expected[:11], strict=True):
        assert_same(trace, want)


def test_a_repeated_prompt_fits_where_it_fitted_before(expected):
    """The cache holds one request and nothing else."""
    request = Request(PROMPTS[1], SamplingOptions(temperature=0.0, max_tokens=3))
    engine = make_engine(4, pages=4)
    one, two = engine.generate([request, request])
    assert_same(one, two)


def test_requests_that_trickle_in_share_the_engine():
    engine = Engine(MODEL, GOLDEN.params, EngineConfig(8, valid_vocab=300, forwards_per_chunk=1))
    engine.submit(Request([1, 2], SamplingOptions(max_tokens=2)))
    while engine.busy:
        engine.step()
    for i in range(8):
        engine.submit(Request([1, 2], SamplingOptions(max_tokens=8), i))
    engine.step()
    assert engine._batch.running == 8


def test_an_engine_that_failed_starts_afresh(monkeypatch, expected):
    engine = make_engine(3)

    def fail(*args):
        raise MemoryError("no room")

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("tracerl_jax.rollout.batch.refill", fail)
        list(engine.generate(REQUESTS[:5]))
    assert not engine.busy
    for trace, want in zip(engine.generate(REQUESTS[:5]), expected[:5], strict=True):
        assert_same(trace, want)


@pytest.mark.parametrize(("request_", "message"), [
    (Request([1], SamplingOptions(stop_ids=(384,))), "stop_ids must be integers from 0 to 383"),
    (Request([1], sample_index=-1), "sample_index is -1"),
])  # fmt: skip
def test_what_the_device_could_not_hold_is_refused(request_, message):
    with pytest.raises(DataError, match=f"request: {message}"):
        make_engine().submit(request_)


def test_other_block_sizes_wait_for_their_turn(expected):
    options = SamplingOptions("dynamic", threshold=0.2, max_tokens=7, block_size=3)
    other = [Request([9] * 11, options, i) for i in (0, 1)]
    engine = make_engine(3)
    mixed = list(engine.generate([*REQUESTS[:4], *other, *REQUESTS[4:8]]))
    for trace, want in zip([*mixed[:4], *mixed[6:]], expected[:8], strict=True):
        assert_same(trace, want)
    assert [trace.block_size for trace in mixed] == [4] * 4 + [3] * 2 + [4] * 4


def test_nothing_is_compiled_once_it_is_warm():
    engine = make_engine(4)
    list(engine.generate(REQUESTS))
    with compilations() as names:
        list(engine.generate(draw_requests(24, 5)))
    assert names == []


@pytest.mark.parametrize("config", [
    {"commit": "separate"}, pytest.param({"commit": "fused", "drafts": 2}, marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_a_mesh_changes_nothing_and_compiles_nothing_twice(config, monkeypatch, expected):
    """Prompts behind cached prefixes, page copies, slots that go on alone: two slots on each of four shards."""
    monkeypatch.setitem(batch.FREE_TOKENS, "cpu", 1)
    model = Model(GOLDEN.config, mesh=make_mesh(data=2, fsdp=2, tensor=2))
    params = jax.device_put(GOLDEN.params, param_shardings(model, model.mesh))
    engine = Engine(model, params, EngineConfig(8, page_size=8, **FIXED, **config))
    for _ in range(2):
        for trace, want in zip(engine.generate(REQUESTS), expected, strict=True):
            assert_same(trace, want, atol=1e-4)
    engine.update_params(jax.tree.map(lambda x: x + 0, params))
    with compilations() as names:
        for trace, want in zip(engine.generate(REQUESTS), expected, strict=True):
            assert_same(trace, want, atol=1e-4)
    assert names == []


def test_int8_cache_stays_close():
    exact, rounded = (
        next(make_engine(1, kv_dtype=dtype).generate([Request(STEM, SamplingOptions(temperature=0.0, max_tokens=8))]))
        for dtype in ("compute", "int8")
    )
    np.testing.assert_array_equal(exact.ids[:4], rounded.ids[:4])
    np.testing.assert_allclose(exact.logprobs[:4], rounded.logprobs[:4], atol=0.05)
    assert not np.array_equal(exact.logprobs, rounded.logprobs)


def test_memory_is_known_before_anything_runs():
    memory = make_engine(4).memory_bytes()
    pages = 5 * 6 + 1  # of 4 slots of 48 tokens, one slot's worth of prompts, and nobody's
    assert memory["cache"] == 2 * 4 * pages * 8 * 3 * 2 * 16 + 4 * 4 * 6


def test_weights_do_not_change_under_running_requests():
    engine = make_engine(2)
    engine.submit(REQUESTS[0])
    with pytest.raises(RuntimeError, match="waiting or running"):
        engine.update_params(GOLDEN.params_new)


@pytest.mark.parametrize(("field", "value"), [
    ("slots", 0), ("drafts", 0), ("commit", "both"), ("kv_dtype", "fp8"), ("pages", 0),
                                              ("max_length", -1), ("page_size", 1.5)])  # fmt: skip
def test_bad_configs_are_named(field, value):
    with pytest.raises(ConfigError, match=f"^{field} is "):
        EngineConfig(**{"slots": 4, field: value})


def test_what_can_never_fit_is_refused_at_once():
    with pytest.raises(DataError, match=r"request: prompt of 16 tokens .* max_length is 48"):
        make_engine().submit(Request(STEM, SamplingOptions(max_tokens=40)))
    with pytest.raises(DataError, match="the cache has 3 pages of 8 tokens"):
        make_engine(pages=3).submit(Request(STEM, SamplingOptions(max_tokens=8)))


@pytest.mark.slow
def test_thousands_of_requests_come_and_go():
    """Every request is answered once or cancelled, nothing is held at the end, and the process does not grow."""
    engine, rng = make_engine(16, forwards_per_chunk=4, pages=40), np.random.default_rng(0)
    stems = [rng.integers(20, 60, 24).tolist() for _ in range(5)]
    prompts = [[*stem[: rng.integers(1, 25)], *rng.integers(0, 300, rng.integers(1, 6)).tolist()]
               for stem in stems for _ in range(8)]  # fmt: skip
    requests, answered, cancelled, sizes = draw_requests(5000, 1, prompts), {}, set(), []
    numbers: list[int] = []
    while len(numbers) < len(requests) or engine.busy:
        for request in requests[len(numbers) : len(numbers) + int(rng.integers(0, 12))]:
            numbers.append(engine.submit(request))
        finished = engine.step()
        assert not finished.keys() & (answered.keys() | cancelled)
        answered |= dict.fromkeys(finished)
        for number in rng.choice(numbers[-40:], size=rng.integers(2)).tolist() if numbers else []:
            if engine.cancel(number):
                cancelled.add(number)
        sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert answered.keys() | cancelled == set(numbers) and len(numbers) == 5000 and len(cancelled) > 100
    assert all(pool.held == 0 for pool in engine._batch._pools)
    assert sizes[-1] < 1.05 * sizes[len(sizes) // 2]
