"""Verifiable rewards: a registry of functions and the built-in ones."""

from tracerl_jax.rewards import code, exact, math, shape
from tracerl_jax.rewards.registry import (
    Answers,
    RewardResult,
    Verdict,
    check_row,
    get_answers,
    get_reward,
    register_reward,
    score,
    start_rewards,
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
    "math",
    "register_reward",
    "score",
    "shape",
    "start_rewards",
]
