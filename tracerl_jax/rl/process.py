"""Rewards of steps, normalised inside a group as its total rewards are: what GAE over the denoise steps starts from."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from tracerl_jax.diffusion.trace import Trace
from tracerl_jax.rl.advantages import group_zscore, leave_one_out

Steps = tuple[tuple[int, float], ...]  # (end in tokens, reward)


class Judged(Protocol):
    """What is needed of a `Sample`."""

    group: int
    reward: float  # NaN: no verdict
    reward_of_whole: float  # of it, what is not of steps
    steps: Steps
    trace: Trace


def normalised_steps(
    samples: Sequence[Judged], advantages: np.ndarray, advantage: str, normalise: str
) -> list[Steps]:
    """Steps of each sample whose rewards say what it did better or worse than its group.

    With T a sample's total reward, of steps and of the whole, and a(T) its advantage inside the group:

    total: steps are scaled as `advantage` scales T (by 1 / std for group_zscore, not at all for leave_one_out), and
        what a(T) has beyond their sum (the rewards of the whole, less the baseline) is one more step at the end of the
        response. So the rewards of a sample add up to a(T), and without rewards of steps that step is all there is.
    position: the k-th step is z-scored among the k-th steps of the group (0 where there is one only), and the rewards
        of the whole keep their own advantage, at the end. This is how the published code trains on chunks.

    Args:
        advantages: [n], a(T).
        advantage: "group_zscore" or "leave_one_out".
        normalise: "total" or "position".

    Returns:
        [n]; empty for a sample without verdict or response.
    """
    groups = np.array([s.group for s in samples])
    rewards = np.array([s.reward for s in samples])
    if normalise == "position":
        baseline = group_zscore if advantage == "group_zscore" else leave_one_out
        steps = _by_position(samples, groups)
        last = baseline([np.nan if np.isnan(s.reward) else s.reward_of_whole for s in samples], groups)
    else:
        sums = np.array([sum(reward for _, reward in s.steps) for s in samples])
        scale = _scale(rewards, groups) if advantage == "group_zscore" else np.ones(len(samples))
        steps = [tuple((end, reward * scale[i]) for end, reward in s.steps) for i, s in enumerate(samples)]
        last = advantages - sums * scale
    return [
        () if np.isnan(s.reward) or not len(s.trace.ids) else (*steps[i], (len(s.trace.ids), float(last[i])))
        for i, s in enumerate(samples)
    ]


def _scale(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """[n]: 1 / std of the group's rewards, 0 where they all agree."""
    scale = np.zeros(len(rewards))
    for group in np.unique(groups):
        members = groups == group
        known = rewards[members & ~np.isnan(rewards)]
        if len(known) and known.min() < known.max():
            scale[members] = 1.0 / known.std()
    return scale


def _by_position(samples: Sequence[Judged], groups: np.ndarray) -> list[Steps]:
    longest = max(len(s.steps) for s in samples)
    scored = [
        group_zscore([s.steps[k][1] if k < len(s.steps) else None for s in samples], groups) for k in range(longest)
    ]
    return [
        tuple((end, float(scored[k][i])) for k, (end, _) in enumerate(s.steps)) for i, s in enumerate(samples)
    ]
