"""The engine: invariants of traces, independence of the batch, edge cases, and errors."""

import jax
import numpy as np
import pytest
from engine_utils import assert_same
from golden_utils import load_golden
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tracerl_jax.errors import ConfigError, DataError
from tracerl_jax.models import Model
from tracerl_jax.parallel.mesh import make_mesh
from tracerl_jax.parallel.sharding import param_shardings
from tracerl_jax.rollout import batch as batch_module
from tracerl_jax.rollout.engine import Engine, EngineConfig, Request, SamplingOptions

GOLDEN = load_golden("sdar_tiny")
CONFIG, PARAMS = GOLDEN.config, GOLDEN.params
MODEL = Model(CONFIG)
VALID = 300  # ids from here on are banned in these tests; the mask id 375 is among them
STOP = (7, 55)
PROMPT = [199, 6, 95, 56, 170, 88]
# Its needs are a superset of every row's: batches with it share one compiled program.
EVERYTHING = Request(PROMPT, SamplingOptions("entropy_bounded", top_k=9, top_p=0.9, max_tokens=16, stop_ids=(1, 2)))


def make_engine(slots=8, params=PARAMS, model=MODEL, **config):
    return Engine(model, params, EngineConfig(slots, **{"valid_vocab": VALID, "stop_ids": STOP} | config))


def decode_one(engine, prompt=PROMPT, sample_index=0, **options):
    return next(engine.generate([Request(prompt, SamplingOptions(**options), sample_index), EVERYTHING]))


@jax.jit
def block_causal_logits(params, ids):  # [N,T] -> [N,T,V]
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    ends = (positions // CONFIG.block_size + 1) * CONFIG.block_size
    intervals = np.stack([0 * ends, ends, 0 * ends, 0 * ends], -1)
    return MODEL.logits(params, MODEL.hidden(params, ids, positions, intervals))


def state_logprobs(trace, temperature):
    """Policy log-probs by dense forwards over the whole canvas as it was before each denoise step."""
    p, r = len(trace.prompt_ids), np.arange(len(trace.ids))
    canvas = np.concatenate([trace.prompt_ids, trace.ids, trace.tail_ids])
    steps = np.concatenate([np.zeros(p, int), trace.step_map, trace.tail_step_map])
    states = np.zeros((24, 32), np.int32)  # fixed shape; later blocks are invisible
    for state, step in zip(states, range(1, trace.denoise_forwards + 1), strict=False):
        state[: len(canvas)] = np.where(steps < step, canvas, CONFIG.mask_token_id)
    logprobs = np.asarray(jax.nn.log_softmax(block_causal_logits(PARAMS, states) / (temperature or 1.0)))
    return logprobs[trace.step_map - 1, p + r, trace.ids]


def check_invariants(trace, options, stop_ids):
    p, B = len(trace.prompt_ids), trace.block_size
    generated = np.concatenate([trace.ids, trace.tail_ids])
    steps = np.concatenate([trace.step_map, trace.tail_step_map])
    assert 1 <= len(trace.ids) <= options.max_tokens
    assert generated.max() < VALID
    assert (p + len(generated)) % B == 0
    assert len(trace.tail_ids) < B
    assert set(steps) == set(range(1, trace.denoise_forwards + 1))  # every forward revealed something
    blocks = np.arange(p, p + len(generated)) // B
    for block in set(blocks[blocks > blocks[0]]):  # blocks are denoised one after the other
        assert steps[blocks == block].min() == steps[blocks == block - 1].max() + 1
    stops = np.isin(trace.ids, stop_ids)
    assert not stops[:-1].any()
    assert stops[-1] == (trace.stop_reason == "stop")
    if trace.stop_reason == "length":
        assert len(trace.ids) == options.max_tokens
    most = options.denoising_steps or B
    if options.strategy in ("static", "sequential") and most <= B:
        per_block = [len(set(steps[blocks == block])) for block in set(blocks)]
        assert max(per_block) <= most
    assert (trace.logprobs <= 0).all() and (trace.behaviour_logprobs <= 1e-6).all()


options_strategy = st.builds(
    SamplingOptions,
    strategy=st.sampled_from(["static", "dynamic", "sequential", "entropy_bounded"]),
    threshold=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
    entropy_bound=st.sampled_from([0.0, 0.35, 3.0]),
    denoising_steps=st.sampled_from([None, 1, 2, 3, 6]),
    max_tokens=st.integers(1, 14),
    temperature=st.sampled_from([0.0, 0.4, 1.0]),
    top_k=st.sampled_from([0, 1, 5]),
    top_p=st.sampled_from([0.5, 1.0]),
    seed=st.integers(0, 2**32 - 1),
    confidence=st.sampled_from(["policy", "truncated"]),
    stop_ids=st.sampled_from([None, (PROMPT[0], 192)]),
)
prompts = st.lists(st.integers(0, VALID - 1), min_size=1, max_size=12)
requests_strategy = st.lists(st.builds(Request, prompts, options_strategy, st.integers(0, 3)), min_size=7, max_size=7)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(requests_strategy)
def test_invariants_and_exact_logprobs(requests):
    traces = list(make_engine().generate([*requests, EVERYTHING]))
    for request, trace in zip([*requests, EVERYTHING], traces, strict=True):
        options = request.options
        np.testing.assert_array_equal(trace.prompt_ids, request.prompt_ids)
        check_invariants(trace, options, STOP + (options.stop_ids or ()))
    trace = traces[0]
    np.testing.assert_allclose(trace.logprobs, state_logprobs(trace, requests[0].options.temperature), atol=1e-4)


def test_results_do_not_depend_on_the_batch():
    mixed = [
        Request(PROMPT, SamplingOptions("dynamic", threshold=0.2, max_tokens=9, seed=3), 0),
        Request(PROMPT, SamplingOptions("dynamic", threshold=0.2, max_tokens=9, seed=3), 1),
        Request([5, 6], SamplingOptions("static", denoising_steps=2, max_tokens=11, temperature=0.7, top_p=0.8)),
        Request(PROMPT[:5], SamplingOptions("static", max_tokens=6, temperature=0.0)),
        Request(list(range(10, 50)), SamplingOptions("sequential", max_tokens=40, temperature=1.3)),
        Request([9] * 11, SamplingOptions("dynamic", threshold=0.2, max_tokens=7, block_size=3)),
    ]
    together = list(make_engine(slots=6).generate([*mixed, EVERYTHING]))
    assert [trace.block_size for trace in together] == [4, 4, 4, 4, 4, 3, 4]
    pairs = make_engine(slots=2)  # other neighbours, and a shorter cache without the long row
    for request, one in list(zip(mixed, together, strict=False))[:4]:
        assert_same(one, next(pairs.generate([request, EVERYTHING])))
    (alone,) = make_engine(slots=1).generate(mixed[:1])  # a program without what only the others need
    assert_same(together[0], alone)


def test_sample_index_and_seed_tell_samples_apart():
    engine = make_engine()
    options = SamplingOptions(max_tokens=8, ignore_eos=True)
    *samples, _ = engine.generate([*(Request(PROMPT, options, i) for i in range(7)), EVERYTHING])
    assert len({trace.ids.tobytes() for trace in samples}) == 7
    assert [trace.sample_index for trace in samples] == list(range(7))
    other = decode_one(engine, sample_index=3, max_tokens=8, ignore_eos=True, seed=1)
    assert other.ids.tobytes() != samples[3].ids.tobytes()


def test_top_k_1_is_greedy():
    engine = make_engine()
    greedy = decode_one(engine, temperature=0.0, max_tokens=10)
    sampled = decode_one(engine, temperature=1.0, top_k=1, max_tokens=10, seed=5)
    np.testing.assert_array_equal(sampled.ids, greedy.ids)
    np.testing.assert_array_equal(sampled.step_map, greedy.step_map)
    np.testing.assert_array_equal(sampled.behaviour_logprobs, 0.0)


def test_truncated_confidence_takes_whole_blocks_when_greedy():
    """The reference ranks by the truncated probability, which top_k=1 makes 1 everywhere."""
    trace = decode_one(make_engine(), top_k=1, confidence="truncated", max_tokens=10, ignore_eos=True)
    np.testing.assert_array_equal(trace.step_map, [1, 1, 2, 2, 2, 2, 3, 3, 3, 3])


def test_stop_id_in_the_prompt_tail_does_not_stop():
    engine = make_engine()
    free = decode_one(engine, temperature=0.0, max_tokens=10, ignore_eos=True)
    assert PROMPT[-1] not in free.ids  # the prompt's tail of 2 opens the first block
    stopped = decode_one(engine, temperature=0.0, max_tokens=10, ignore_eos=True, stop_ids=(PROMPT[-1], PROMPT[-2]))
    assert_same(stopped, free)


def test_stop_cuts_behind_the_first_stop_id_and_keeps_the_tail():
    engine = make_engine()
    free = decode_one(engine, temperature=0.0, max_tokens=10, ignore_eos=True)
    stop = int(free.ids[3])
    first = free.ids.tolist().index(stop)
    trace = decode_one(engine, temperature=0.0, max_tokens=10, ignore_eos=True, stop_ids=(stop,))
    assert trace.stop_reason == "stop"
    np.testing.assert_array_equal(trace.ids, free.ids[: first + 1])
    end = -(-(len(PROMPT) + first + 1) // 4) * 4 - len(PROMPT)
    np.testing.assert_array_equal(trace.tail_ids, free.ids[first + 1 : end])
    np.testing.assert_array_equal(trace.tail_step_map, free.step_map[first + 1 : end])


def test_a_stop_id_beyond_max_tokens_is_not_part_of_the_completion():
    engine = make_engine()
    free = decode_one(engine, temperature=0.0, max_tokens=10, ignore_eos=True)
    new = next(i for i in (1, 3, 4, 5) if free.ids[i] not in free.ids[:i])  # not the last of its block
    short = decode_one(engine, temperature=0.0, max_tokens=new, ignore_eos=True, stop_ids=(int(free.ids[new]),))
    assert short.stop_reason == "length"
    np.testing.assert_array_equal(short.ids, free.ids[:new])
    assert short.tail_ids[0] == free.ids[new]


@pytest.mark.parametrize(("max_tokens", "forwards"), [(5, 6), (8, 10), (9, 10)])
def test_denoise_forwards_of_the_reference_engine(max_tokens, forwards):
    """Counts recorded from the reference with a prompt of 2 mod 4 tokens, B = S = 4, static."""
    prompt = [*PROMPT, *PROMPT, 1, 2]
    trace = decode_one(make_engine(), prompt, strategy="static", max_tokens=max_tokens, ignore_eos=True)
    assert (len(trace.ids), trace.denoise_forwards) == (max_tokens, forwards)
    assert sorted(trace.step_map[:2]) == [1, 2]


def test_more_denoising_steps_than_positions():
    trace = decode_one(make_engine(), PROMPT[:4], strategy="static", denoising_steps=9, max_tokens=8, ignore_eos=True)
    assert trace.denoise_forwards == 8
    assert sorted(trace.step_map) == list(range(1, 9))


def test_every_distinct_prompt_is_encoded_once(monkeypatch):
    encoded = []
    real = batch_module.prefill

    def spy(model, params, cache, prompts, start, stop, *args):
        encoded.extend(np.asarray(prompts)[i, : n].tolist() for i, n in enumerate(np.asarray(stop - start)) if n)
        return real(model, params, cache, prompts, start, stop, *args)

    monkeypatch.setattr(batch_module, "prefill", spy)
    requests = [Request(p, SamplingOptions(max_tokens=4), i) for p in (PROMPT, PROMPT[::-1]) for i in range(4)]
    traces = list(make_engine(slots=4).generate([*requests, EVERYTHING]))
    assert len(traces) == 9
    assert sorted(encoded) == sorted([PROMPT[:4], PROMPT[::-1][:4]])


def test_update_params():
    engine = make_engine()
    before = decode_one(engine, max_tokens=8)
    engine.update_params(GOLDEN.params_new)
    after = decode_one(engine, max_tokens=8)
    assert_same(after, decode_one(make_engine(params=GOLDEN.params_new), max_tokens=8))
    assert not np.allclose(before.logprobs[:1], after.logprobs[:1])


def test_sharded_engine_gives_the_same_traces():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    model = Model(CONFIG, mesh=mesh)
    params = jax.device_put(PARAMS, param_shardings(model, mesh))
    requests = [
        Request(PROMPT[:length], SamplingOptions(strategy, threshold=0.3, max_tokens=9, temperature=temperature))
        for length, strategy, temperature in [(6, "dynamic", 1.0), (5, "static", 0.0), (1, "sequential", 0.5)]
    ]
    sharded = make_engine(3, params, model).generate(requests)
    for one, two in zip(sharded, make_engine(3).generate(requests), strict=True):
        assert_same(one, two, atol=1e-4)


def test_length_and_slot_buckets():
    lengths = [batch_module.length_bucket(n) for n in (0, 1, 32, 33, 48, 49, 64, 65, 97, 150)]
    assert lengths == [32, 32, 32, 48, 48, 64, 64, 96, 128, 192]
    slots = [batch_module._fraction_bucket(n, 64, 4) for n in (1, 2, 4, 5, 16, 17, 64, 99)]
    assert slots == [1, 4, 4, 16, 16, 64, 64, 64]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "request 1: prompt_ids is empty"),
        ([1, 384], "request 1: prompt_ids must be a list of integers from 0 to 383"),
        ([-1], "request 1: prompt_ids must be a list of integers"),
        ([[1, 2]], "request 1: prompt_ids must be a list of integers"),
        ([0.5], "request 1: prompt_ids must be a list of integers"),
        ([1, 375], "request 1: prompt_ids contains the mask id 375"),
        ([1] * 32767, "request 1: prompt of 32767 tokens and max_tokens 256"),
    ],
)
def test_bad_prompts(prompt, message):
    with pytest.raises(DataError, match=message):
        make_engine().generate([Request(PROMPT), Request(prompt)])


@pytest.mark.parametrize("change", [{"mask_token_id": None}, {"attention_mode": "causal"}])
def test_models_that_cannot_be_decoded(change):
    with pytest.raises(ConfigError):
        make_engine(model=Model(CONFIG.replace(**change)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("strategy", "remask"), ("threshold", 1.5), ("entropy_bound", -1.0), ("denoising_steps", 0),
        ("block_size", 0), ("max_tokens", 0), ("max_tokens", 2.0), ("temperature", -0.1), ("temperature", "1"),
        ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("seed", -1),
        ("ignore_eos", 1), ("confidence", "none"), ("stop_ids", [1.5]), ("stop_ids", 5),
    ],
)  # fmt: skip
def test_bad_options_are_named(field, value):
    with pytest.raises(ConfigError, match=rf"^{field} is "):
        SamplingOptions(**{field: value})
