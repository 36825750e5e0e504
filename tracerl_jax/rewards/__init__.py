"""Verifiable rewards: a registry of functions and the built-in ones."""

from tracerl_jax.rewards import code, exact, judge, math, reward_model, shape
from tracerl_jax.rewards.registry import (
    Answers,
    RewardResult,
    Verdict,
    check_row,
    get_answers,
    get_reward,
    register_reward,
    rewards_of_steps,
    score,
    start_rewards,
    step_verdict,
)

__all__ = [
    "Answers",
    "RewardResult",
    "Verdict",
    "check_row",
    "code",
    "exact",
    "get_answers",
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
