"""Verifiable rewards: a registry of functions and the built-in ones."""

from tracerl_jax.rewards import countdown, exact, gym, math, option, shape, sudoku
from tracerl_jax.rewards.registry import (
    RewardResult,
    Verdict,
    check_row,
    get_reward,
    register_reward,
    score,
    start_rewards,
)

__all__ = [
    "RewardResult",
    "Verdict",
    "check_row",
    "countdown",
    "exact",
    "get_reward",
    "gym",
    "math",
    "option",
    "register_reward",
    "score",
    "shape",
    "start_rewards",
    "sudoku",
]
