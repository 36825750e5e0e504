"""Rewards of steps: normalised inside their group, through GAE to advantages of tokens."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest

from tracerl_jax.config import RLSection
from tracerl_jax.rewards.steps import rewards_of_tokens
from tracerl_jax.rl.advantages import group_zscore, leave_one_out, trace_gae
from tracerl_jax.rl.experience import select
from tracerl_jax.rl.process import normalised_steps

OPEN = RLSection(accuracy_low=0.0, accuracy_high=1.0)


@dataclass(frozen=True)
class Sample:
    """What `select` needs of one. Its reward is that of its steps and of the whole."""

    group: int
    steps: tuple
    reward_of_whole: float = 0.0
    reward: float | None = None
    correct: float = 1.0
    advantage: float = 0.0
    trace: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(ids=np.zeros(8, int)))

    def __post_init__(self):
        if self.reward is None:
            total = sum(reward for _, reward in self.steps) + self.reward_of_whole
            object.__setattr__(self, "reward", total)


NO_VERDICT = Sample(0, (), reward=np.nan)
GROUP = [Sample(0, ((3, 1.0), (8, 1.0))), Sample(0, ((8, 0.0),)), Sample(0, ((3, 1.0), (5, 0.0), (8, 0.0)), 0.5)]


@pytest.mark.parametrize("advantage", ["group_zscore", "leave_one_out"])
def test_the_rewards_of_a_sample_add_up_to_its_advantage(advantage):
    others = [replace(s, group=1, reward=None, reward_of_whole=0.1 * i) for i, s in enumerate(GROUP)]
    samples = [*GROUP, NO_VERDICT, *others]
    kept = select(samples, replace(OPEN, advantage=advantage))
    assert len(kept) == 6
    baseline = {"group_zscore": group_zscore, "leave_one_out": leave_one_out}[advantage]
    expected = baseline([s.reward for s in samples], [s.group for s in samples])
    np.testing.assert_allclose([s.advantage for s in kept], np.delete(expected, 3))
    for sample in kept:
        assert sum(reward for _, reward in sample.steps) == pytest.approx(sample.advantage, abs=1e-6)
        assert [end for end, _ in sample.steps][-1] == 8


def test_steps_are_scaled_as_the_total_is_and_the_end_gets_the_rest():
    std = np.std([2.0, 0.0, 1.5])
    mean = np.mean([2.0, 0.0, 1.5])
    first, second, third = select(GROUP, OPEN)
    np.testing.assert_allclose(first.steps, [(3, 1 / std), (8, 1 / std), (8, -mean / std)], atol=1e-6)
    np.testing.assert_allclose(second.steps, [(8, 0), (8, -mean / std)], atol=1e-6)
    np.testing.assert_allclose(third.steps, [(3, 1 / std), (5, 0), (8, 0), (8, (0.5 - mean) / std)], atol=1e-6)


def test_by_position_the_kth_steps_of_a_group_are_compared():
    """As published, but for a k-th step that is alone: 0 there instead of its raw reward beside z-scores."""
    first, second, third = select(GROUP, OPEN, "position")
    root = np.sqrt(2)
    whole = group_zscore([0, 0, 0.5], [0, 0, 0])
    np.testing.assert_allclose(first.steps, [(3, 1 / root), (8, 1), (8, whole[0])], atol=1e-6)
    np.testing.assert_allclose(second.steps, [(8, -root), (8, whole[1])], atol=1e-6)
    np.testing.assert_allclose(third.steps, [(3, 1 / root), (5, -1), (8, 0), (8, whole[2])], atol=1e-6)


def test_by_position_nothing_but_steps_counts_when_only_steps_are_rewarded():
    samples = [Sample(0, ((3, 0.1 * a), (8, 0.1 * b))) for a, b in [(1, 2), (2, 1), (3, 7)]]
    for sample in select(samples, OPEN, "position"):
        assert sample.steps[-1] == (8, 0.0)


def test_groups_that_teach_nothing_are_dropped():
    same = [Sample(0, ((3, 1.0), (8, 0.0)))] * 2
    assert select(same, OPEN) == [] and select(same, OPEN, "position") == []
    turned = [Sample(0, ((3, 1.0), (8, 0.0))), Sample(0, ((3, 0.0), (8, 1.0)))]  # the same total
    assert select(turned, OPEN) == []
    assert len(select(turned, OPEN, "position")) == 2
    assert [s.steps[0][1] for s in select(turned, replace(OPEN, advantage="leave_one_out"))] == [1.0, 0.0]


def test_without_verdict_or_response_there_are_no_steps():
    samples = [*GROUP, NO_VERDICT, Sample(0, (), trace=SimpleNamespace(ids=np.zeros(0, int)))]
    for how in ("total", "position"):
        assert normalised_steps(samples, np.zeros(5), "group_zscore", how)[3:] == [(), ()]


# Through GAE. Four denoise steps, values 0.1, 0.2, .. of their tokens; rewards at the second and the last.

STEP_MAP = np.array([1, 1, 2, 2, 3, 4, 4, 3])
VALUES = np.array([0.1, 0.1, 0.2, 0.2, 0.3, 0.4, 0.4, 0.3])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (0.5, 0.0)])
def test_gae_by_hand(gamma, lam):
    rewards = rewards_of_tokens(STEP_MAP, [(4, 1.0), (8, -2.0)])
    returns, advantages = trace_gae(STEP_MAP, VALUES, rewards, np.ones(8, bool), gamma, lam)
    r, V = [0, 1, 0, -2], [0.1, 0.2, 0.3, 0.4, 0]
    delta = [r[t] - V[t] + gamma * V[t + 1] for t in range(4)]
    R = [sum(gamma ** (k - t) * r[k] for k in range(t, 4)) for t in range(4)]
    A = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, 4)) for t in range(4)]
    np.testing.assert_allclose(returns, [R[t - 1] for t in STEP_MAP], atol=1e-6)
    np.testing.assert_allclose(advantages, [A[t - 1] for t in STEP_MAP], atol=1e-6)


def test_undiscounted_the_return_of_the_first_tokens_is_the_sum_of_all_steps():
    steps = [(2, 0.25), (4, 1.0), (5, -0.5), (8, -2.0)]
    returns, _ = trace_gae(STEP_MAP, VALUES, rewards_of_tokens(STEP_MAP, steps), np.ones(8, bool), 1.0, 1.0)
    np.testing.assert_allclose(returns[:2], sum(reward for _, reward in steps))


def test_one_step_is_the_reward_of_the_whole():
    scalar = trace_gae(STEP_MAP, VALUES, 0.7, np.ones(8, bool), 0.9, 0.8)
    vector = trace_gae(STEP_MAP, VALUES, rewards_of_tokens(STEP_MAP, [(8, 0.7)]), np.ones(8, bool), 0.9, 0.8)
    np.testing.assert_array_equal(vector, scalar)
