"""Importance weights against their written definitions, and what they do to the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tracerl_jax.rl.importance import importance_metrics, importance_ratios, truncate
from tracerl_jax.rl.objectives import policy_loss

CAP = 1.5
OLD = [np.log(np.float32(p)) for p in ([0.5, 0.2, 0.9], [0.3, 0.6])]
BEHAVIOUR = [np.log(np.float32(p)) for p in ([0.25, 0.4, 0.9], [0.6, 0.4])]


def ratios(level):
    return [importance_ratios(old, behaviour, level) for old, behaviour in zip(OLD, BEHAVIOUR, strict=True)]


def test_a_token_has_its_own_ratio_and_a_sequence_the_product():
    for found, want in zip(ratios("token"), ([2, 0.5, 1], [0.5, 1.5]), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-6)
    for found, want in zip(ratios("sequence"), ([1, 1, 1], [0.75, 0.75]), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-6)
    np.testing.assert_allclose(truncate(ratios("token")[0], CAP), [1.5, 0.5, 1], rtol=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_ratios_beyond_any_use_stay_finite(level):
    far = np.array([-500.0, -300.0], np.float32)
    zeros = np.zeros(2, np.float32)
    np.testing.assert_allclose(importance_ratios(zeros, far, level), np.exp([10, 10]), rtol=1e-6)
    np.testing.assert_allclose(importance_ratios(far, zeros, level), np.exp([-10, -10]), rtol=1e-6)


def test_metrics_count_tokens_or_responses():
    metrics = importance_metrics(ratios("token"), CAP, "token")
    assert metrics == pytest.approx(
        {
            "importance/ratio_mean": (2 + 0.5 + 1 + 0.5 + 1.5) / 5,
            "importance/ratio_max": 2.0,
            "importance/truncated_fraction": 1 / 5,
            "importance/effective_sample_size": 5.0**2 / (5 * (2.25 + 0.25 + 1 + 0.25 + 2.25)),
        }
    )
    metrics = importance_metrics(ratios("sequence"), CAP, "sequence")
    assert metrics == pytest.approx(
        {
            "importance/ratio_mean": 1.75 / 2,
            "importance/ratio_max": 1.0,
            "importance/truncated_fraction": 0.0,
            "importance/effective_sample_size": 1.75**2 / (2 * (1 + 0.5625)),
        }
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_gradient_is_that_of_each_target_times_its_weight(level):
    """At logp = old, the surrogate's gradient is -advantage; weights scale it and have no gradient themselves."""
    old = np.concatenate(OLD)
    weight = np.concatenate([truncate(r, CAP) for r in ratios(level)])
    advantages = np.array([1.0, -2.0, 0.5, 3.0, -1.0], np.float32)
    assert np.ptp(weight) > 0.2

    def loss(logp, behaviour_weights):
        return policy_loss(
            logp, old, advantages, jnp.ones(5), clip_low=0.2, clip_high=0.2, kl_coef=0.0,
            behaviour_weights=behaviour_weights,
        )[0]  # fmt: skip

    through_logp, through_weights = jax.grad(loss, argnums=(0, 1))(jnp.asarray(old), jnp.asarray(weight))
    np.testing.assert_allclose(through_logp, -advantages * weight, rtol=1e-6)
    np.testing.assert_array_equal(through_weights, np.zeros(5))
