"""Rewards to advantages, on the host in numpy: per group of samples, or per trace step with a value model.

A reward of None or NaN is "no verdict" (the verifier could not tell): it takes no part in any statistic.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike


def reward_array(rewards: Sequence[float | None]) -> np.ndarray:
    """Rewards [n] as float64 with NaN where there is no verdict."""
    return np.array([np.nan if reward is None else reward for reward in rewards], np.float64)


def group_zscore(rewards: Sequence[float | None], groups: ArrayLike) -> np.ndarray:
    """(reward - mean) / std of the samples of one prompt (GRPO with outcome supervision, arXiv 2402.03300).

    Args:
        rewards: [n] one per sample, None or NaN for no verdict.
        groups: [n] integers; samples of one prompt share a number.

    Returns:
        advantages [n] float32: population standard deviation; 0 where all rewards of a group agree and for samples
        without verdict.
    """
    rewards = reward_array(rewards)
    advantages = np.zeros(rewards.shape, np.float32)
    for members in _members(rewards, groups):
        group = rewards[members]
        if group.min() < group.max():  # not std > 0: the std of equal numbers may be a rounding residue
            advantages[members] = (group - group.mean()) / group.std()
    return advantages


def leave_one_out(rewards: Sequence[float | None], groups: ArrayLike) -> np.ndarray:
    """Reward minus the mean of the other samples of its prompt (RLOO, arXiv 2402.14740).

    Returns:
        advantages [n] float32: 0 for samples without verdict and for a sample that is alone in its group.
    """
    rewards = reward_array(rewards)
    advantages = np.zeros(rewards.shape, np.float32)
    for members in _members(rewards, groups):
        if len(members) > 1:
            group = rewards[members]
            advantages[members] = group - (group.sum() - group) / (len(members) - 1)
    return advantages


def accuracy_filter(accuracy: ArrayLike, low: float, high: float) -> np.ndarray:
    """Which groups to train on: keep[g] is True where low <= accuracy[g] <= high, bounds included.

    A group without any verdict (NaN accuracy) is dropped. Accuracies may be float32, where 4/5 lies above 0.8, hence
    the slack of 1e-6.
    """
    accuracy = np.asarray(accuracy, np.float64)
    return (accuracy >= low - 1e-6) & (accuracy <= high + 1e-6)


def trace_gae(
    steps: ArrayLike,
    values: ArrayLike,
    rewards: float | ArrayLike,
    trainable: ArrayLike,
    gamma: float,
    lam: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimation over the denoise steps of one trace (TraceRL, arXiv 2509.06949).

    With t_1 < ... < t_S the distinct steps of the trainable tokens, r*_i and V*_i the means of token rewards and values
    over the tokens of step t_i, and everything beyond S zero:

        R*_i = r*_i + gamma R*_{i+1}
        A*_i = r*_i - V*_i + gamma V*_{i+1} + gamma lam A*_{i+1}

    A token of step t_i keeps its own reward r and value V in place of the means of its step:

        return    = r + gamma R*_{i+1}
        advantage = r - V + gamma V*_{i+1} + gamma lam A*_{i+1}

    Args:
        steps: [r] step at which each response token was revealed (after shrink). Global numbers, so that their order is
            the order of decoding.
        values: [r] value of each token in the state its step started from.
        rewards: one number, given to every trainable token of the last trainable step, or [r] per-token rewards.
        trainable: [r] bool, tokens that carry loss.
        gamma: discount per denoise step.
        lam: GAE's lambda.

    Returns:
        returns [r], advantages [r] float32; 0 where not trainable.
    """
    trainable = np.asarray(trainable, bool)
    token_steps = np.asarray(steps)[trainable]
    token_values = np.asarray(values, np.float64)[trainable]
    returns = np.zeros(trainable.shape, np.float32)
    advantages = np.zeros(trainable.shape, np.float32)
    if token_steps.size == 0:
        return returns, advantages
    if np.ndim(rewards) == 0:
        token_rewards = np.where(token_steps == token_steps.max(), np.float64(rewards), 0.0)
    else:
        token_rewards = np.asarray(rewards, np.float64)[trainable]

    distinct, step = np.unique(token_steps, return_inverse=True)
    count = np.bincount(step)
    step_reward = np.bincount(step, token_rewards) / count
    step_value = np.bincount(step, token_values) / count
    # next_*[i] is the quantity of step i + 1; the entry of the last step stays 0.
    next_return, next_advantage = np.zeros(len(distinct)), np.zeros(len(distinct))
    next_value = np.append(step_value[1:], 0.0)
    for i in range(len(distinct) - 1, 0, -1):
        next_return[i - 1] = step_reward[i] + gamma * next_return[i]
        delta = step_reward[i] - step_value[i] + gamma * next_value[i]
        next_advantage[i - 1] = delta + gamma * lam * next_advantage[i]

    returns[trainable] = token_rewards + gamma * next_return[step]
    ahead = gamma * next_value[step] + gamma * lam * next_advantage[step]
    advantages[trainable] = token_rewards - token_values + ahead
    return returns, advantages


def whiten(advantages: Sequence[np.ndarray], trainable: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Advantages of a whole update shifted and scaled to mean 0 and population std 1 over all its trainable tokens.

    Args:
        advantages: one [r] array per response.
        trainable: one [r] bool array per response.

    Returns:
        one [r] float32 array per response, 0 where not trainable; only centred when all advantages are equal.
    """
    tokens = np.concatenate([np.zeros(0), *(a[t] for a, t in zip(advantages, trainable, strict=True))])
    mean, std = (tokens.mean(), tokens.std()) if tokens.size else (0.0, 0.0)
    scale = 1.0 / std if std > 1e-8 else 1.0
    return [
        np.where(t, (a - mean) * scale, 0.0).astype(np.float32) for a, t in zip(advantages, trainable, strict=True)
    ]


def _members(rewards: np.ndarray, groups: ArrayLike) -> Iterator[np.ndarray]:
    """Indices of the samples with a verdict, group by group."""
    groups = np.asarray(groups)
    for group in np.unique(groups[~np.isnan(rewards)]):
        yield np.flatnonzero((groups == group) & ~np.isnan(rewards))
