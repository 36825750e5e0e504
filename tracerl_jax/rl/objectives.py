"""Losses of the policy, the value model and supervised training, at the loss targets only, in float32.

All of them take arrays of one shape [...] (usually [N,P]) and return `(sum, metrics)`: the weighted sum of the targets'
losses, still to be divided by the denominator of `loss_weights`, and a dict of `(sum, count)` pairs. Both add up over
micro-batches of any size, so accumulation is exact. A weight of 0 is padding; what stands there has no influence.
"""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Metrics = dict[str, tuple[Array, Array]]  # name -> (sum, count)
KlEstimator = Literal["k1", "k2", "k3"]
Normaliser = Literal["tokens", "sequences", "constant", "reference"]

LOG_RATIO_LIMIT = 10.0  # exp() of a log-ratio is taken inside +-10 only; beyond, the gradient is zero


def policy_loss(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    weights: Array,
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    kl_estimator: KlEstimator = "k3",
    reference_logp: Array | None = None,
    behaviour_weights: Array | None = None,
) -> tuple[Array, Metrics]:
    """PPO's clipped surrogate plus a KL penalty (PPO, arXiv 1707.06347; TraceRL, arXiv 2509.06949).

    Per target, with d = logp - old_logp, ratio = exp(clamp(d, -10, 10)) and A the advantage:

        loss = -min(ratio A, clamp(ratio, 1 - clip_low, 1 + clip_high) A) * behaviour_weight + kl_coef * kl

    kl, with d' = logp - (reference_logp, or old_logp when there is none): k1 = d', k2 = d'^2 / 2,
    k3 = exp(clamp(-d', -10, 10)) - 1 + d' (http://joschu.net/blog/kl-approx.html).

    Args:
        logp: [...] log-prob of each target under the policy in training; the only argument with a gradient.
        old_logp: [...] log-prob under the policy before the update.
        advantages: [...].
        weights: [...] f32, 0 = padding.
        reference_logp: [...] log-prob under a frozen reference.
        behaviour_weights: [...] importance weights (rl/importance.py); they scale the surrogate, not the KL.

    Returns:
        weighted sum, and the metrics policy_loss and kl_loss (weighted means; kl_loss without its coefficient), and as
        means over the targets: ratio, approx_kl (k3 to the old policy), clip_fraction = clip_fraction_low +
        clip_fraction_high (targets whose gradient the lower or upper bound stopped).
    """
    live = weights != 0
    weights = weights.astype(jnp.float32)
    old_logp = jax.lax.stop_gradient(old_logp)
    # Zeroing the difference (not the result) keeps inf and NaN of padding out of the gradient as well.
    log_ratio = jnp.where(live, _f32(logp) - _f32(old_logp), 0.0)
    advantages = jnp.where(live, jax.lax.stop_gradient(_f32(advantages)), 0.0)
    ratio = jnp.exp(_clamp(log_ratio))
    surrogate = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages)
    if behaviour_weights is not None:
        surrogate = surrogate * jnp.where(live, jax.lax.stop_gradient(_f32(behaviour_weights)), 0.0)

    if reference_logp is None:
        kl_log_ratio = log_ratio
    else:
        kl_log_ratio = jnp.where(live, _f32(logp) - jax.lax.stop_gradient(_f32(reference_logp)), 0.0)
    kl = _kl(kl_log_ratio, kl_estimator)

    policy_sum, kl_sum, weight_sum = -jnp.sum(weights * surrogate), jnp.sum(weights * kl), jnp.sum(weights)
    low = (ratio < 1.0 - clip_low) & (advantages < 0)
    high = (ratio > 1.0 + clip_high) & (advantages > 0)
    metrics = {
        "policy_loss": (policy_sum, weight_sum),
        "kl_loss": (kl_sum, weight_sum),
        "ratio": _mean(ratio, live),
        "approx_kl": _mean(_kl(log_ratio, "k3"), live),
        "clip_fraction": _mean(low | high, live),
        "clip_fraction_low": _mean(low, live),
        "clip_fraction_high": _mean(high, live),
    }
    return policy_sum + kl_coef * kl_sum, jax.lax.stop_gradient(metrics)


def value_loss(
    values: Array, old_values: Array, returns: Array, weights: Array, *, clip: float
) -> tuple[Array, Metrics]:
    """Clipped squared error: 0.5 max((v - R)^2, (v_old + clamp(v - v_old, -clip, clip) - R)^2) per target.

    Args:
        values: [...] of the model in training; the only argument with a gradient.
        old_values, returns, weights: [...].
        clip: how far a value may move from its old one, in units of the return.

    Returns:
        weighted sum, and the metrics value_loss (weighted mean), value, value_clip_fraction (targets on which the
        clipped branch was the larger) and the four means that `explained_variance` wants, for the old values.
    """
    live = weights != 0
    weights = weights.astype(jnp.float32)
    returns = jnp.where(live, jax.lax.stop_gradient(_f32(returns)), 0.0)
    old_values = jnp.where(live, jax.lax.stop_gradient(_f32(old_values)), 0.0)
    values = jnp.where(live, _f32(values), 0.0)
    clipped = old_values + jnp.clip(values - old_values, -clip, clip)
    free_error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    loss_sum = jnp.sum(weights * 0.5 * jnp.maximum(free_error, clipped_error))
    residual = returns - old_values
    metrics = {
        "value_loss": (loss_sum, jnp.sum(weights)),
        "value": _mean(values, live),
        "value_clip_fraction": _mean(clipped_error > free_error, live),
        "return": _mean(returns, live),
        "return_squared": _mean(returns**2, live),
        "value_residual": _mean(residual, live),
        "value_residual_squared": _mean(residual**2, live),
    }
    return loss_sum, jax.lax.stop_gradient(metrics)


def explained_variance(means: Mapping[str, float]) -> float:
    """1 - Var(return - old value) / Var(return) from the averaged metrics of `value_loss`.

    1 is a perfect value model, 0 one that predicts a constant; NaN when all returns are equal.
    """
    return_variance = means["return_squared"] - means["return"] ** 2
    residual_variance = means["value_residual_squared"] - means["value_residual"] ** 2
    if return_variance <= 1e-6 * max(1.0, means["return_squared"]):  # float32 residue of a constant
        return float("nan")
    return float(1.0 - residual_variance / return_variance)


def cross_entropy(logp: Array, weights: Array) -> tuple[Array, Metrics]:
    """Weighted sum of -logp [...], with the metrics cross_entropy (weighted mean) and token_nll (mean over targets)."""
    live = weights != 0
    nll = jnp.where(live, -_f32(logp), 0.0)
    weights = weights.astype(jnp.float32)
    loss_sum = jnp.sum(weights * nll)
    metrics = {"cross_entropy": (loss_sum, jnp.sum(weights)), "token_nll": _mean(nll, live)}
    return loss_sum, jax.lax.stop_gradient(metrics)


def loss_weights(
    normaliser: Normaliser, target_counts: np.ndarray, *, length: int | None = None, rounds: int | None = None
) -> tuple[np.ndarray, float]:
    """How much one target of each response counts: loss = sum over targets of weight * loss / denominator.

        normaliser   weight of a target of response i   denominator
        tokens       1                                   number of targets
        sequences    1 / number of targets of i          responses that have targets
        constant     1 / length                          responses
        reference    1 / length                          rounds

    `reference` is the published code's: `length` is the padded response length L1 of the whole update, `rounds` its
    number of rows, one per response and replay round that has targets.

    Args:
        target_counts: [n] targets of each response of the whole update, summed over its replay groups.

    Returns:
        weights [n] float32 and the denominator (1 where it would be 0, when there is nothing to train on).
    """
    target_counts = np.asarray(target_counts)
    if normaliser == "tokens":
        weights, denominator = np.ones(target_counts.shape), target_counts.sum()
    elif normaliser == "sequences":
        weights, denominator = 1.0 / np.maximum(target_counts, 1), (target_counts > 0).sum()
    elif normaliser == "constant":
        weights, denominator = np.full(target_counts.shape, 1.0 / length), target_counts.size
    elif normaliser == "reference":
        weights, denominator = np.full(target_counts.shape, 1.0 / length), rounds
    else:
        raise ValueError(f"unknown normaliser {normaliser!r}; use tokens, sequences, constant or reference")
    return weights.astype(np.float32), float(max(denominator, 1))


def _f32(x: Array) -> Array:
    return jnp.asarray(x, jnp.float32)


def _clamp(log_ratio: Array) -> Array:
    return jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _kl(log_ratio: Array, estimator: KlEstimator) -> Array:
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    if estimator == "k3":
        return jnp.exp(_clamp(-log_ratio)) - 1.0 + log_ratio
    raise ValueError(f"unknown KL estimator {estimator!r}; use k1, k2 or k3")


def _mean(x: Array, live: Array) -> tuple[Array, Array]:
    return jnp.sum(jnp.where(live, x, 0)).astype(jnp.float32), jnp.sum(live).astype(jnp.float32)
