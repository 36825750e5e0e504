"""Filters and proposals against the golden sampler, the written rule and the exact distribution."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tracerl_jax.diffusion.reveal import STATIC, choose_reveals
from tracerl_jax.diffusion.sampling import banned_ids, entropy, filter_logits, propose
from tracerl_jax.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_cases():
    for folder in ("sdar_tiny", "sdar_tied"):
        for case in json.loads(str(np.load(GOLDEN / folder / "sampler.npz")["meta"])):
            yield folder, case


@pytest.mark.parametrize(("folder", "case"), list(golden_cases()))
def test_golden_sampler(folder, case):
    arrays = np.load(GOLDEN / folder / "sampler.npz")
    options = json.loads(str(arrays["meta"]))[case]
    scaled = jnp.asarray(arrays[options["logits"]]) / options["temperature"]
    rows = scaled.shape[:-1]
    filtered = filter_logits(scaled, jnp.full(rows, options["top_k"]), jnp.full(rows, options["top_p"]))
    probs = np.asarray(jax.nn.softmax(filtered, axis=-1))
    np.testing.assert_array_equal(probs > 0, arrays[case + ".probs"] > 0)
    np.testing.assert_allclose(probs, arrays[case + ".probs"], atol=1e-6)
    chosen = np.take_along_axis(probs, arrays[case + ".tokens"][:, None], 1)[:, 0]
    np.testing.assert_allclose(chosen, arrays[case + ".confidence"], atol=1e-6)


def written_rule(scaled: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Kept ids of one row, token by token."""
    order = np.argsort(-scaled, kind="stable")
    if top_k:
        order = order[scaled[order] >= scaled[order[min(top_k, len(order)) - 1]]]
    weights = np.exp(scaled[order] - scaled[order[0]])
    kept, before = [], 0.0
    for token, prob in zip(order, weights / weights.sum(), strict=True):
        if before <= top_p or top_p >= 1:
            kept.append(token)
        before += prob
    return np.sort(kept)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 12), st.sampled_from([0.01, 0.33, 0.57, 0.91, 1.0]), st.booleans())
def test_filter_follows_the_written_rule(seed, top_k, top_p, ties):
    logits = np.random.default_rng(seed).normal(size=9).astype(np.float32)
    if ties:
        logits = np.round(logits)
    kept = np.flatnonzero(np.isfinite(jax.jit(filter_logits)(logits, np.int32(top_k), np.float32(top_p))))
    np.testing.assert_array_equal(kept, written_rule(logits.astype(np.float64), top_k, top_p))


jitted_propose = jax.jit(propose, static_argnames=("use_filters", "use_entropy"))


def make_proposal(logits, *, temperature, top_k, top_p, truncated=False, banned=(), seed=0, **flags):
    rows, _, vocab = logits.shape
    ban = np.zeros(vocab, bool)
    ban[list(banned)] = True
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))
    full = [jnp.broadcast_to(jnp.asarray(x), (rows,)) for x in (temperature, top_k, top_p, truncated)]
    flags = {"use_filters": True, "use_entropy": True} | flags
    return jitted_propose(jnp.asarray(logits), jnp.eye(vocab), keys, jnp.asarray(ban), *full, **flags)


def test_probabilities_of_a_proposal():
    logits = np.random.default_rng(0).normal(size=(4, 3, 11)).astype(np.float32) * 2
    temperature = np.array([0.0, 0.7, 1.6, 1.0], np.float32)
    got = make_proposal(logits, temperature=temperature, top_k=[4, 4, 0, 1], top_p=[0.5, 0.8, 1.0, 1.0], banned=[2])
    used = np.where(temperature == 0, 1, temperature)[:, None, None]
    allowed = (logits / used).copy()
    allowed[..., 2] = -np.inf
    ids = np.asarray(got.ids)

    def chosen(values):
        return np.take_along_axis(np.asarray(values), ids[..., None], -1)[..., 0]

    np.testing.assert_allclose(got.logprobs, chosen(jax.nn.log_softmax(logits / used)), atol=1e-5)
    np.testing.assert_allclose(got.confidence, chosen(jax.nn.softmax(allowed)), atol=1e-5)
    np.testing.assert_allclose(got.entropy, entropy(jnp.asarray(allowed)), atol=1e-5)
    np.testing.assert_array_equal(ids[0], allowed[0].argmax(-1))
    np.testing.assert_allclose(got.behaviour_logprobs[0], np.log(got.confidence[0]), atol=1e-5)  # greedy: no filter
    for row, (k, p) in {1: (4, 0.8), 2: (0, 1.0), 3: (1, 1.0)}.items():
        filtered = filter_logits(jnp.asarray(allowed[row]), jnp.full(3, k), jnp.full(3, p))
        want = np.take_along_axis(np.asarray(jax.nn.log_softmax(filtered)), ids[row][:, None], 1)[:, 0]
        np.testing.assert_allclose(got.behaviour_logprobs[row], want, atol=1e-5)
    np.testing.assert_array_equal(ids[3], allowed[3].argmax(-1))  # top_k = 1


def test_truncated_confidence_is_the_reference_rule():
    logits = np.random.default_rng(1).normal(size=(2, 4, 8)).astype(np.float32)
    got = make_proposal(logits, temperature=1.0, top_k=1, top_p=1.0, truncated=[True, False])
    np.testing.assert_array_equal(got.confidence[0], 1.0)
    np.testing.assert_array_equal(got.entropy[0], 0.0)
    assert (np.asarray(got.confidence[1]) < 0.9).all()
    assert (np.asarray(got.entropy[1]) > 0.5).all()


def test_a_greedy_row_ranked_by_what_top_k_leaves():
    """`confidence=truncated` is the published SDAR rule: a score is the probability after top-k and top-p. Greedy is
    top_k=1 there, so that all scores are 1 and ties decide what is revealed. At temperature 0 ours ranks by the share
    of the best among what top-k leaves at temperature 1; by `policy`, the default, top-k has no say."""
    logits = np.random.default_rng(4).normal(size=(3, 4, 8)).astype(np.float32) * 2
    got = make_proposal(logits, temperature=0.0, top_k=[3, 1, 3], top_p=1.0, truncated=[True, True, False])
    np.testing.assert_array_equal(got.ids, logits.argmax(-1))
    weights = np.exp(-np.sort(-logits, axis=-1))
    np.testing.assert_allclose(got.confidence[0], (weights[..., 0] / weights[..., :3].sum(-1))[0], rtol=1e-5)
    np.testing.assert_array_equal(got.confidence[1], 1.0)
    np.testing.assert_allclose(got.confidence[2], (weights[..., 0] / weights.sum(-1))[2], rtol=1e-5)
    ties = choose_reveals(
        jnp.ones((1, 4), bool), got.confidence[1:2], got.entropy[1:2], jnp.full(1, STATIC), jnp.full(1, 2),
        jnp.full(1, 0.9), jnp.full(1, 0.3),
    )  # fmt: skip
    np.testing.assert_array_equal(ties, [[True, True, False, False]])  # from left to right


def test_greedy_takes_the_lowest_index_of_a_tie():
    logits = np.zeros((1, 2, 6), np.float32)
    logits[0, 1, [3, 5]] = 2.0
    got = make_proposal(logits, temperature=0.0, top_k=0, top_p=1.0, banned=[0])
    np.testing.assert_array_equal(got.ids[0], [1, 3])


def test_a_row_does_not_notice_the_flags_of_its_batch():
    logits = np.random.default_rng(2).normal(size=(3, 4, 16)).astype(np.float32)
    options = {"temperature": [0.0, 0.5, 1.3], "top_k": 0, "top_p": 1.0}
    plain = make_proposal(logits, use_filters=False, **options)
    with_filters = make_proposal(logits, use_filters=True, **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, with_filters)


def test_draws_follow_the_filtered_distribution():
    """Chi-square of 20000 draws; the expected failure rate of a correct sampler is 1e-4."""
    logits = np.random.default_rng(3).normal(size=10).astype(np.float32)
    rows = 20_000
    got = make_proposal(
        np.tile(logits, (rows, 1, 1)), temperature=0.8, top_k=7, top_p=0.9, banned=[4], use_entropy=False
    )
    allowed = jnp.asarray(logits / np.float32(0.8)).at[4].set(-jnp.inf)
    probs = np.asarray(jax.nn.softmax(filter_logits(allowed, jnp.int32(7), jnp.float32(0.9))), np.float64)
    counts = np.bincount(np.asarray(got.ids)[:, 0], minlength=10)
    assert counts[probs == 0].sum() == 0
    assert 1 < (probs > 0).sum() < 7
    kept = probs > 0
    assert stats.chisquare(counts[kept], rows * probs[kept] / probs[kept].sum()).pvalue > 1e-4


def test_banned_ids():
    np.testing.assert_array_equal(banned_ids(6, mask_id=2, valid_vocab=4), [0, 0, 1, 0, 1, 1])
    np.testing.assert_array_equal(banned_ids(4, mask_id=3), [0, 0, 0, 1])
    with pytest.raises(ConfigError, match="valid_vocab is 7"):
        banned_ids(6, mask_id=2, valid_vocab=7)


@pytest.mark.parametrize("use_filters", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_give_an_allowed_id_and_say_so(value, use_filters):
    """A banned id, MASK above all, would leave its block incomplete for ever. Other rows notice nothing."""
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(2, 4, 8)).astype(np.float32), rng.normal(size=(8, 12)).astype(np.float32)
    banned = jnp.array(banned_ids(12, mask_id=0, valid_vocab=10))
    keys, ones = jax.vmap(jax.random.key)(jnp.arange(2)), jnp.ones(2)
    zeros = jnp.zeros(2, jnp.int32)

    def proposal(hidden):
        return propose(hidden, kernel, keys, banned, jnp.array([1.0, 0.0]), zeros, ones, zeros > 0,
                       use_filters=use_filters, use_entropy=False)  # fmt: skip

    good = proposal(hidden)
    bad = proposal(np.where(np.arange(2)[:, None, None] == 0, np.float32(value), hidden))
    assert np.all(bad.ids[0] == 1) and not np.isfinite(bad.logprobs[0]).any()
    np.testing.assert_array_equal(bad.ids[1], good.ids[1])
    np.testing.assert_array_equal(bad.logprobs[1], good.logprobs[1])
