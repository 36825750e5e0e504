"""Likelihood estimates: the sampler's own log-probs, enumeration of all masks, and that they are probabilities."""

import itertools

import jax
import numpy as np
import pytest

from tracerl_jax.diffusion.replay import masking_item
from tracerl_jax.errors import ConfigError
from tracerl_jax.evals.likelihood import log_likelihoods
from tracerl_jax.models import Model, ModelConfig
from tracerl_jax.rl.logprobs import score_items
from tracerl_jax.rollout.engine import Engine, EngineConfig, Request, SamplingOptions

MASK, VOCABULARY = 2, 12


@pytest.fixture(scope="module")
def model():
    return Model(ModelConfig(
        vocab_size=VOCABULARY, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32,
        mask_token_id=MASK, eos_token_id=1, pad_token_id=0, stop_token_ids=(1,), block_size=4,
    ))  # fmt: skip


@pytest.fixture(scope="module")
def params(model):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(leaf.dtype), model.abstract_params())


def test_left_to_right_is_the_probability_of_sequential_sampling(model, params):
    engine = Engine(model, params, EngineConfig(4))
    options = SamplingOptions(strategy="sequential", temperature=1.0, max_tokens=11, seed=4)
    traces = list(engine.generate([Request([5, 6, 7, 8, 9, 3][:p], options) for p in (1, 4, 6)]))
    pairs = [(trace.prompt_ids, trace.ids) for trace in traces]
    found = log_likelihoods(model, params, pairs, estimate="left_to_right")
    np.testing.assert_allclose(found, [trace.logprobs.sum() for trace in traces], rtol=1e-5)


@pytest.mark.parametrize("prompt", [[5, 6, 7], [5, 6]])  # one and two tokens are left of the block
def test_left_to_right_probabilities_of_all_completions_sum_to_one(model, params, prompt):
    completions = list(itertools.product(range(VOCABULARY), repeat=2))
    found = log_likelihoods(model, params, [(prompt, list(c)) for c in completions], estimate="left_to_right")
    assert np.exp(found).sum() == pytest.approx(1, abs=1e-5)


def test_monte_carlo_is_the_mean_over_all_masks(model, params):
    prompt, completion = [5, 6, 7], [4, 3, 9, 8, 11, 5]  # blocks of 1, 4 and 1 tokens
    masks = np.array(list(itertools.product([False, True], repeat=6)))[1:]
    items = [masking_item(prompt, completion, mask, block_size=4, mask_id=MASK) for mask in masks]
    rows, scores = score_items(model, params, items, [1.0] * len(items))
    logprobs = np.array(rows.scatter(scores))  # 0 where nothing is hidden
    expected = 0.0
    for block in (slice(0, 1), slice(1, 5), slice(5, 6)):
        alone = ~np.delete(masks, np.r_[block], axis=1).any(axis=1)
        hidden, values = masks[alone, block].sum(1), logprobs[alone, block].sum(1)
        length = block.stop - block.start
        expected += np.mean([length / n * values[hidden == n].mean() for n in range(1, length + 1)])
    few = [log_likelihoods(model, params, [(prompt, completion)], draws=3, seed=s)[0] for s in range(100)]
    error = np.std(few) / 10
    assert 0 < error < 0.2 and np.mean(few) == pytest.approx(expected, abs=4 * error)  # unbiased however few are drawn
    many = log_likelihoods(model, params, [(prompt, completion)], draws=4096)[0]
    assert many == pytest.approx(expected, abs=4 * error * (300 / 4096) ** 0.5)


def test_a_block_of_one_token_leaves_nothing_to_chance(model, params):
    for pairs, block_size in (([([5, 6, 7], [4])], None), ([([5, 6, 7], [4, 3, 9]), ([5], [11, 6])], 1)):
        expected = log_likelihoods(model, params, pairs, estimate="left_to_right", block_size=block_size)
        found = log_likelihoods(model, params, pairs, draws=2, block_size=block_size)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_size_of_a_call_does_not_matter(model, params):
    pairs = [([5, 6, 7], [4, 3, 9, 8, 11, 5]), ([5], [4]), ([7, 7], [])]
    expected = log_likelihoods(model, params, pairs, draws=8)
    assert expected[2] == 0
    np.testing.assert_allclose(
        log_likelihoods(model, params, pairs, draws=8, tokens_per_batch=40), expected, rtol=1e-5
    )
    np.testing.assert_allclose(log_likelihoods(model, params, pairs[:1], draws=8), expected[:1], rtol=1e-5)


def test_wrong_settings(model, params):
    with pytest.raises(ConfigError, match="unknown estimate 'exact' of a likelihood; use one of monte_carlo, "):
        log_likelihoods(model, params, [([5], [6])], estimate="exact")
    with pytest.raises(ConfigError, match="draws is 0"):
        log_likelihoods(model, params, [([5], [6])], draws=0)
