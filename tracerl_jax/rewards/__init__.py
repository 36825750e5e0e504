"""Verifiable rewards: a registry of functions and the built-in ones."""

from tracerl_jax.rewards import exact, judge, math, reward_model, shape
from tracerl_jax.rewards.registry import (
    RewardResult,
    Verdict,
    check_row,
    get_reward,
    register_reward,
    rewards_of_steps,
    score,
    start_rewards,
    step_verdict,
)

__all__ = [
    "RewardResult",
    "Verdict",
    "check_row",
    "exact",
    "get_reward",
    "judge",
    "math",
    "register_reward",
    "reward_model",
    "rewards_of_steps",
    "score",
    "shape",
    "start_rewards",
    "step_verdict",
]
