"""Frequencies of decoded blocks against the exact distribution of a toy model, enumerated."""

from itertools import product

import jax
import numpy as np
import pytest
from scipy import stats

from tracerl_jax.models import Model, ModelConfig
from tracerl_jax.rollout.engine import Engine, EngineConfig, Request, SamplingOptions

B, VOCAB, MASK = 4, 5, 4
PROMPT = (2, 0, 1, 3, 0)  # one complete block and a tail that opens the block under test
CONFIG = ModelConfig(vocab_size=VOCAB, width=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_width=8,
                     block_size=B, mask_token_id=MASK)  # fmt: skip
MODEL = Model(CONFIG)
ROWS = 4096


@pytest.fixture(scope="module")
def params():
    """Random weights large enough that every state has its own, far from uniform, distribution."""
    fresh = MODEL.init(jax.random.key(1))
    return jax.tree.map(lambda x: x * 20 if x.ndim > 1 and (np.asarray(x) != 1).any() else x, fresh)


@jax.jit
def dense_logits(params, ids):
    positions = np.arange(2 * B)[None]
    ends = (positions // B + 1) * B
    intervals = np.stack([0 * ends, ends, 0 * ends, 0 * ends], -1)
    return MODEL.logits(params, MODEL.hidden(params, ids, positions, intervals))


def state_logits(params, block):
    """[B,V] logits of a state of the second block, by a dense forward."""
    return np.asarray(dense_logits(params, np.array([[*PROMPT[:B], *block]])), np.float64)[0, B:]


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def exact_outcomes(params, options):
    """{(block, step of each position): probability}, from the written rules."""
    steps_asked = options.denoising_steps or B
    schedule = [B // steps_asked + (s < B % steps_asked) for s in range(steps_asked)]
    logits, outcomes = {}, {}

    def visit(block, steps, probability):
        masked = [i for i in range(B) if block[i] == MASK]
        if not masked:
            outcomes[block, steps] = outcomes.get((block, steps), 0.0) + probability
            return
        if block not in logits:
            logits[block] = state_logits(params, block)
        step = max(steps) + 1
        rank_probs, draw_probs = {}, {}
        for i in masked:
            allowed = logits[block][i][:MASK] / options.temperature
            rank_probs[i] = softmax(allowed)
            kept = np.argsort(-allowed)[: options.top_k or MASK]
            draw_probs[i] = {int(v): p for v, p in zip(kept, softmax(allowed[kept]), strict=True)}
        for drawn in product(*(draw_probs[i] for i in masked)):
            token = dict(zip(masked, drawn, strict=True))
            chance = np.prod([draw_probs[i][token[i]] for i in masked])
            confidence = {i: rank_probs[i][token[i]] for i in masked}
            entropy = {i: -(rank_probs[i] * np.log(rank_probs[i])).sum() for i in masked}
            chosen = reveal(options, masked, confidence, entropy, schedule[step - 1])
            visit(
                tuple(token[i] if i in chosen else block[i] for i in range(B)),
                tuple(step if i in chosen else steps[i] for i in range(B)),
                probability * chance,
            )

    r = len(PROMPT) - B
    visit((*PROMPT[B:], *[MASK] * (B - r)), (0,) * B, 1.0)
    return outcomes


def reveal(options, masked, confidence, entropy, count):
    surest = sorted(masked, key=lambda i: -confidence[i])
    if options.strategy == "sequential":
        return masked[:count]
    if options.strategy == "dynamic":
        return surest[: max(count, sum(confidence[i] > options.threshold for i in masked))]
    if options.strategy == "entropy_bounded":
        order = sorted(masked, key=lambda i: entropy[i])
        return order[: max(1, int((np.cumsum([entropy[i] for i in order]) < options.entropy_bound).sum()))]
    return surest[:count]


CASES = [
    SamplingOptions("static", max_tokens=3, temperature=1.2),
    SamplingOptions("dynamic", threshold=0.5, max_tokens=3, temperature=0.8, top_k=3),
    SamplingOptions("sequential", denoising_steps=2, max_tokens=3),
    SamplingOptions("entropy_bounded", entropy_bound=1.6, max_tokens=3, temperature=0.8),
]


def test_frequencies_match_the_exact_distribution(params):
    """Chi-square over (ids, step map) of each strategy, all in one batch; a correct sampler fails once in 2500 runs."""
    requests = [Request(PROMPT, options, i) for options in CASES for i in range(ROWS)]
    traces = list(Engine(MODEL, params, EngineConfig(len(requests))).generate(requests))
    for case, options in enumerate(CASES):
        expected = exact_outcomes(params, options)
        assert abs(sum(expected.values()) - 1) < 1e-9
        counts = dict.fromkeys(expected, 0)
        for trace in traces[case * ROWS : (case + 1) * ROWS]:
            counts[(*PROMPT[B:], *trace.ids.tolist()), (0, *trace.step_map.tolist())] += 1
        order = sorted(expected, key=expected.get)
        want = np.array([expected[o] * ROWS for o in order])
        seen = np.array([counts[o] for o in order])
        rare = max(1, int((want < 5).sum()))  # outcomes too rare for the test count as one
        want, seen = (np.array([x[:rare].sum(), *x[rare:]]) for x in (want, seen))
        assert len(want) > 5, options.strategy
        assert stats.chisquare(seen, want).pvalue > 1e-4, options.strategy


def test_cases_have_something_to_tell_apart(params):
    """The dynamic and entropy cases must take a different number of steps in different states."""
    for options in (CASES[1], CASES[3]):
        assert len({max(steps) for _, steps in exact_outcomes(params, options)}) > 1, options.strategy
