"""Rewards by name, and their weighted sum over a batch of completions.

A reward function takes texts and the fields of the problems' rows, and gives one number per completion, or None where
it has no verdict (no usable reference answer, judge out of order):

    @register_reward("short")
    def short(prompts, completions, **columns):
        return [1.0 if len(text) < 100 else 0.0 for text in completions]

It may give a `Verdict` instead of a number, which also says how it was decided. No verdict is not a wrong answer: such
samples are masked out of the update and counted, never given zero.
"""

import difflib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tracerl_jax.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    reward: float | None  # None: no verdict
    detail: str = ""  # how it was decided, for people


class _Failed(Verdict):
    """No verdict, because the reward function misbehaved; `detail` says how."""


RewardFunction = Callable[..., Sequence[float | Verdict | None]]


@dataclass(frozen=True)
class Answers:
    """How a reward reads the final answer of a completion, for whoever compares completions with each other."""

    extract: Callable[[str], str | None]  # of the text; None: it has no answer
    same: Callable[[Sequence[tuple[str, str]]], Sequence[bool]]  # for pairs of answers: are they equivalent?


_REWARDS: dict[str, RewardFunction] = {}
_ANSWERS: dict[str, Answers] = {}
_STARTS: dict[str, Callable[[], None]] = {}
_CHECKS: dict[str, Callable[[Mapping[str, object]], str]] = {}


def register_reward(
    name: str,
    *,
    start: Callable[[], None] | None = None,
    check: Callable[[Mapping[str, object]], str] | None = None,
    answers: Answers | None = None,
) -> Callable[[RewardFunction], RewardFunction]:
    """Decorator that makes a reward function known under `name`. Raises `ConfigError` when the name is taken.

    `start` is called by `start_rewards`: it gets ready what the function needs, or raises `ConfigError`.
    `check` says what is wrong with a problem's row ("" for nothing), see `check_row`.
    `answers` make majority votes possible (maj@k of an evaluation).
    """

    def register(function: RewardFunction) -> RewardFunction:
        if _REWARDS.setdefault(name, function) is not function:
            raise ConfigError(f"reward {name!r} is already registered; choose another name")
        if start is not None:
            _STARTS[name] = start
        if check is not None:
            _CHECKS[name] = check
        if answers is not None:
            _ANSWERS[name] = answers
        return function

    return register


def get_reward(name: str) -> RewardFunction:
    """Raises `ConfigError` for an unknown name."""
    if name not in _REWARDS:
        close = difflib.get_close_matches(name, _REWARDS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"unknown reward {name!r}; {hint}registered: {', '.join(sorted(_REWARDS))}")
    return _REWARDS[name]


def get_answers(name: str) -> Answers | None:
    """How the reward `name` reads answers; None where it has no notion of an answer."""
    return _ANSWERS.get(name)


def start_rewards(names: Iterable[str]) -> None:
    """Gets these rewards ready (worker processes, self-tests). Raises `ConfigError` for one that cannot work here."""
    for name in names:
        get_reward(name)
        if name in _STARTS:
            _STARTS[name]()


def check_row(name: str, row: Mapping[str, object]) -> str:
    """What keeps reward `name` from judging answers to the problem of this row; "" when nothing does."""
    get_reward(name)
    return _CHECKS[name](row) if name in _CHECKS else ""


@dataclass(frozen=True)
class RewardResult:
    total: np.ndarray  # [n] f64, weighted sum; NaN = no verdict
    by_name: dict[str, np.ndarray]  # [n] f64 each, before weighting; NaN = no verdict
    details: dict[str, list[str]]  # [n] each: how it was decided, "" where the function does not say
    errors: dict[str, int]  # samples for which the function failed (they have no verdict), by reward name

    @property
    def no_verdict(self) -> int:
        return int(np.isnan(self.total).sum())


def score(
    rewards: Mapping[str, float],
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Sequence[Mapping[str, object]],
) -> RewardResult:
    """Scores n completions with `rewards` (name -> weight); entry i of every argument belongs to sample i.

    `columns[i]` is the row of sample i's problem. A function receives every field that occurs, as a keyword with one
    value per sample (None where a row lacks it). A component without verdict makes the total NaN unless its weight is
    zero. A function that raises, or does not return one number, `Verdict` or None per sample, is called again sample by
    sample; only the samples that fail alone lose their verdict, and so do those with an infinite reward or NaN.
    """
    if not len(prompts) == len(completions) == len(columns):
        raise ValueError(f"{len(prompts)} prompts, {len(completions)} completions, {len(columns)} rows")
    names = {name for row in columns for name in row} - {"prompts", "completions"}
    stacked = {name: [row.get(name) for row in columns] for name in sorted(names)}
    total = np.zeros(len(prompts))
    by_name, details, errors = {}, {}, {}
    for name, weight in rewards.items():
        verdicts = _call(name, prompts, completions, stacked)
        by_name[name] = np.array([math.nan if v.reward is None else v.reward for v in verdicts])
        details[name] = [v.detail for v in verdicts]
        errors[name] = sum(isinstance(v, _Failed) for v in verdicts)
        if weight != 0:
            total += weight * by_name[name]
    return RewardResult(total, by_name, details, errors)


def _call(name: str, prompts: Sequence[str], completions: Sequence[str], columns: dict) -> list[Verdict]:
    function = get_reward(name)
    try:
        verdicts = _verdicts(function(prompts, completions, **columns), len(prompts))
    except Exception:  # a reward is user code: whatever it raises must not end a run
        verdicts = [
            _call_alone(function, prompts[i], completions[i], {key: [column[i]] for key, column in columns.items()})
            for i in range(len(prompts))
        ]
    failed = [verdict.detail for verdict in verdicts if isinstance(verdict, _Failed)]
    if failed:
        logger.warning(
            "reward %s failed on %d of %d samples (no verdict for them): it %s",
            name, len(failed), len(prompts), failed[0],
        )  # fmt: skip
    return verdicts


def _call_alone(function: RewardFunction, prompt: str, completion: str, columns: dict) -> Verdict:
    try:
        return _verdicts(function([prompt], [completion], **columns), 1)[0]
    except Exception as error:
        return _Failed(None, f"raised {error!r}")


def _verdicts(values: Sequence[float | Verdict | None], count: int) -> list[Verdict]:
    verdicts = [_verdict(value) for value in values]
    if len(verdicts) != count:
        raise ValueError(f"returned {len(verdicts)} values for {count} samples")
    return verdicts


def _verdict(value: float | Verdict | None) -> Verdict:
    verdict = value if isinstance(value, Verdict) else Verdict(value)
    if verdict.reward is None:
        return verdict
    reward = float(verdict.reward)
    return Verdict(reward, verdict.detail) if math.isfinite(reward) else _Failed(None, f"returned {reward}")
