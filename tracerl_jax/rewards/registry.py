"""Rewards by name, and their weighted sum over a batch of completions.

A reward function takes texts and the fields of the problems' rows, and gives one number per completion, or None where
it has no verdict (no usable reference answer, judge out of order):

    @register_reward("short")
    def short(prompts, completions, **columns):
        return [1.0 if len(text) < 100 else 0.0 for text in completions]

No verdict is not a wrong answer: such samples are masked out of the update and counted, never given zero.
"""

import difflib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tracerl_jax.errors import ConfigError

logger = logging.getLogger(__name__)

RewardFunction = Callable[..., Sequence[float | None]]

_REWARDS: dict[str, RewardFunction] = {}
_STARTS: dict[str, Callable[[], None]] = {}


def register_reward(
    name: str, *, start: Callable[[], None] | None = None
) -> Callable[[RewardFunction], RewardFunction]:
    """Decorator that makes a reward function known under `name`. Raises `ConfigError` when the name is taken.

    `start` is called by `start_rewards`: it gets ready what the function needs, and raises `ConfigError` when it cannot.
    """

    def register(function: RewardFunction) -> RewardFunction:
        if _REWARDS.setdefault(name, function) is not function:
            raise ConfigError(f"reward {name!r} is already registered; choose another name")
        if start is not None:
            _STARTS[name] = start
        return function

    return register


def get_reward(name: str) -> RewardFunction:
    """Raises `ConfigError` for an unknown name."""
    if name not in _REWARDS:
        close = difflib.get_close_matches(name, _REWARDS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"unknown reward {name!r}; {hint}registered: {', '.join(sorted(_REWARDS))}")
    return _REWARDS[name]


def start_rewards(names: Iterable[str]) -> None:
    """Gets these rewards ready (worker processes, self-tests). Raises `ConfigError` for one that cannot work here."""
    for name in names:
        get_reward(name)
        if name in _STARTS:
            _STARTS[name]()


@dataclass(frozen=True)
class RewardResult:
    total: np.ndarray  # [n] f64, weighted sum; NaN = no verdict
    by_name: dict[str, np.ndarray]  # [n] f64 each, before weighting; NaN = no verdict
    errors: dict[str, int]  # samples for which the function raised (they have no verdict), by reward name

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
    zero. A function that raises, or returns something else than numbers and None, is called again sample by sample;
    only the samples that fail alone lose their verdict.
    """
    if not len(prompts) == len(completions) == len(columns):
        raise ValueError(f"{len(prompts)} prompts, {len(completions)} completions, {len(columns)} rows")
    names = {name for row in columns for name in row} - {"prompts", "completions"}
    stacked = {name: [row.get(name) for row in columns] for name in sorted(names)}
    total = np.zeros(len(prompts))
    by_name, errors = {}, {}
    for name, weight in rewards.items():
        by_name[name], errors[name] = _call(name, prompts, completions, stacked)
        if weight != 0:
            total += weight * by_name[name]
    return RewardResult(total, by_name, errors)


def _call(name: str, prompts: Sequence[str], completions: Sequence[str], columns: dict) -> tuple[np.ndarray, int]:
    """(values [n], number of samples that raised)."""
    function = get_reward(name)
    try:
        return _checked(function(prompts, completions, **columns), len(prompts)), 0
    except Exception:  # a reward is user code: whatever it raises must not end a run
        values = np.full(len(prompts), np.nan)
        first, count = None, 0
    for i in range(len(prompts)):
        one = {key: [column[i]] for key, column in columns.items()}
        try:
            values[i] = _checked(function([prompts[i]], [completions[i]], **one), 1)[0]
        except Exception as error:
            first, count = first or error, count + 1
    logger.warning("reward %s raised on %d of %d samples (no verdict for them): %r", name, count, len(prompts), first)
    return values, count


def _checked(values: Sequence[float | None], count: int) -> np.ndarray:
    array = np.array([math.nan if value is None else float(value) for value in values])
    if array.shape != (count,):
        raise ValueError(f"returned {len(array)} values for {count} samples")
    return np.where(np.isfinite(array), array, math.nan)
