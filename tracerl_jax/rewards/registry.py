"""Rewards by name, and their weighted sum over a batch of completions.

A reward function takes texts and the fields of the problems' rows, and gives one number per completion, or None where
it has no verdict (no usable reference answer, judge out of order):

    @register_reward("short")
    def short(prompts, completions, **columns):
        return [1.0 if len(text) < 100 else 0.0 for text in completions]

It may give a `Verdict` instead of a number, which also says how it was decided. No verdict is not a wrong answer: such
samples are masked out of the update and counted, never given zero.

A reward of steps says what each part of a completion is worth. It is told where the steps end, or decides itself:

    @register_reward("short_steps", steps=True)
    def short_steps(prompts, completions, *, step_ends, **columns):
        return [step_verdict((end, float(end < 100)) for end in ends) for ends in step_ends]
"""

import difflib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tracerl_jax.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    reward: float | None  # None: no verdict
    detail: str = ""  # how it was decided, for people
    steps: tuple[tuple[int, float], ...] = ()  # of a reward of steps: (end in characters of the completion, reward)


def step_verdict(steps: Iterable[tuple[int, float | None]], detail: str = "") -> Verdict:
    """Of the rewards of a completion's steps, given with their ends: together their sum, None when one has none."""
    steps = tuple(steps)
    if any(reward is None for _, reward in steps):
        return Verdict(None, detail)
    return Verdict(float(sum(reward for _, reward in steps)), detail, steps)


class _Failed(Verdict):
    """No verdict, because the reward function misbehaved; `detail` says how."""


RewardFunction = Callable[..., Sequence[float | Verdict | None]]


@dataclass(frozen=True)
class Answers:
    """How a reward reads the final answer of a completion, for whoever compares completions with each other."""

    extract: Callable[[str], str | None]  # of the text; None: it has no answer
    same: Callable[[Sequence[tuple[str, str]]], Sequence[bool]]  # for pairs of answers: are they equivalent?


@dataclass(frozen=True)
class _Registered:
    function: RewardFunction
    start: Callable[[], None] | None
    check: Callable[[Mapping[str, object]], str] | None
    answers: Answers | None
    steps: bool


_REWARDS: dict[str, _Registered] = {}


def register_reward(
    name: str,
    *,
    start: Callable[[], None] | None = None,
    check: Callable[[Mapping[str, object]], str] | None = None,
    answers: Answers | None = None,
    steps: bool = False,
) -> Callable[[RewardFunction], RewardFunction]:
    """Decorator that makes a reward function known under `name`. Raises `ConfigError` when the name is taken.

    `start` is called by `start_rewards`: it gets ready what the function needs, or raises `ConfigError`.
    `check` says what is wrong with a problem's row ("" for nothing), see `check_row`.
    `answers` make majority votes possible (maj@k of an evaluation).
    `steps`: it gives every completion a `step_verdict`, and takes the keyword `step_ends`: for each completion the ends
    of its steps, in characters.
    """

    def register(function: RewardFunction) -> RewardFunction:
        if _REWARDS.setdefault(name, _Registered(function, start, check, answers, steps)).function is not function:
            raise ConfigError(f"reward {name!r} is already registered; choose another name")
        return function

    return register


def _registered(name: str) -> _Registered:
    """Raises `ConfigError` for an unknown name."""
    if name not in _REWARDS:
        close = difflib.get_close_matches(name, _REWARDS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"unknown reward {name!r}; {hint}registered: {', '.join(sorted(_REWARDS))}")
    return _REWARDS[name]


def get_reward(name: str) -> RewardFunction:
    """Raises `ConfigError` for an unknown name."""
    return _registered(name).function


def get_answers(name: str) -> Answers | None:
    """How the reward `name` reads answers; None where it has no notion of an answer."""
    return _registered(name).answers


def start_rewards(names: Iterable[str]) -> None:
    """Gets these rewards ready (worker processes, self-tests). Raises `ConfigError` for one that cannot work here."""
    for name in names:
        start = _registered(name).start
        if start is not None:
            start()


def rewards_of_steps(names: Iterable[str]) -> list[str]:
    """Those of these rewards that judge the steps of a completion."""
    return [name for name in names if _registered(name).steps]


def check_row(name: str, row: Mapping[str, object]) -> str:
    """What keeps reward `name` from judging answers to the problem of this row; "" when nothing does."""
    check = _registered(name).check
    return check(row) if check is not None else ""


@dataclass(frozen=True)
class RewardResult:
    total: np.ndarray  # [n] f64, weighted sum; NaN = no verdict
    by_name: dict[str, np.ndarray]  # [n] f64 each, before weighting; NaN = no verdict
    details: dict[str, list[str]]  # [n] each: how it was decided, "" where the function does not say
    errors: dict[str, int]  # samples for which the function failed (they have no verdict), by reward name
    whole: np.ndarray  # [n] f64, the part of the total that is not of steps
    steps: list[tuple[tuple[int, float], ...]]  # [n] (end in characters, weighted reward), empty without verdict

    @property
    def no_verdict(self) -> int:
        return int(np.isnan(self.total).sum())


def score(
    rewards: Mapping[str, float],
    prompts: Sequence[str],
    completions: Sequence[str | None],
    columns: Sequence[Mapping[str, object]],
    step_ends: Sequence[Sequence[int]] | None = None,
) -> RewardResult:
    """Scores n completions with `rewards` (name -> weight); entry i of every argument belongs to sample i.

    `columns[i]` is the row of sample i's problem. A function receives every field that occurs, as a keyword with one
    value per sample (None where a row lacks it). A component without verdict makes the total NaN unless its weight is
    zero. A function that raises, or does not return one number, `Verdict` or None per sample, is called again sample by
    sample; only the samples that fail alone lose their verdict, and so do those with an infinite reward or NaN. A
    completion that is None, which has no text, gets no verdict and is shown to no function.
    `step_ends` are for rewards of steps: ascending, in characters; by default a completion is one step.
    """
    if not len(prompts) == len(completions) == len(columns):
        raise ValueError(f"{len(prompts)} prompts, {len(completions)} completions, {len(columns)} rows")
    names = {name for row in columns for name in row} - {"prompts", "completions", "step_ends"}
    stacked = {name: [row.get(name) for row in columns] for name in sorted(names)}
    total, whole = np.zeros(len(prompts)), np.zeros(len(prompts))
    by_name, details, errors = {}, {}, {}
    steps: list[dict[int, float]] = [{} for _ in prompts]
    for name, weight in rewards.items():
        if _registered(name).steps:
            ends = [(len(text or ""),) for text in completions] if step_ends is None else step_ends
            verdicts = _call(name, prompts, completions, {**stacked, "step_ends": ends})
        else:
            verdicts = _call(name, prompts, completions, stacked)
        by_name[name] = np.array([math.nan if v.reward is None else v.reward for v in verdicts])
        details[name] = [v.detail for v in verdicts]
        errors[name] = sum(isinstance(v, _Failed) for v in verdicts)
        if weight != 0:
            total += weight * by_name[name]
            if not _registered(name).steps:
                whole += weight * by_name[name]
            for of_sample, verdict in zip(steps, verdicts, strict=True):
                for end, reward in verdict.steps:
                    of_sample[end] = of_sample.get(end, 0.0) + weight * reward
    known = [() if math.isnan(total[i]) else tuple(sorted(of_sample.items())) for i, of_sample in enumerate(steps)]
    return RewardResult(total, by_name, details, errors, whole, known)


def _call(name: str, prompts: Sequence[str], completions: Sequence[str | None], columns: dict) -> list[Verdict]:
    known = [i for i, text in enumerate(completions) if text is not None]
    if len(known) < len(completions):
        parts = [[column[i] for i in known] for column in (prompts, completions, *columns.values())]
        verdicts = dict(zip(known, _call(name, *parts[:2], dict(zip(columns, parts[2:], strict=True))), strict=True))
        return [verdicts.get(i, _Failed(None, "has no text to judge")) for i in range(len(completions))]
    function = get_reward(name)
    try:
        verdicts = _verdicts(name, function(prompts, completions, **columns), completions)
    except Exception:  # a reward is user code: whatever it raises must not end a run
        verdicts = [
            _call_alone(name, prompts[i], completions[i], {key: [column[i]] for key, column in columns.items()})
            for i in range(len(prompts))
        ]
    failed = [verdict.detail for verdict in verdicts if isinstance(verdict, _Failed)]
    if failed:
        logger.warning(
            "reward %s failed on %d of %d samples (no verdict for them): it %s",
            name, len(failed), len(prompts), failed[0],
        )  # fmt: skip
    return verdicts


def _call_alone(name: str, prompt: str, completion: str, columns: dict) -> Verdict:
    try:
        return _verdicts(name, get_reward(name)([prompt], [completion], **columns), [completion])[0]
    except Exception as error:
        return _Failed(None, f"raised {error!r}")


def _verdicts(name: str, values: Sequence[float | Verdict | None], completions: Sequence[str]) -> list[Verdict]:
    verdicts = [_verdict(value) for value in values]
    if len(verdicts) != len(completions):
        raise ValueError(f"returned {len(verdicts)} values for {len(completions)} samples")
    return [_with_fit_steps(name, *pair) for pair in zip(verdicts, completions, strict=True)]


def _verdict(value: float | Verdict | None) -> Verdict:
    verdict = value if isinstance(value, Verdict) else Verdict(value)
    if verdict.steps:
        verdict = step_verdict(verdict.steps, verdict.detail)  # the sum is ours to say
    if verdict.reward is None:
        return verdict
    reward = float(verdict.reward)
    return replace(verdict, reward=reward) if math.isfinite(reward) else _Failed(None, f"returned {reward}")


def _with_fit_steps(name: str, verdict: Verdict, completion: str) -> Verdict:
    """The verdict, or a failure when it has not the steps that a reward of this name must give."""
    if verdict.reward is None:
        return verdict
    ends = [end for end, _ in verdict.steps]
    if not _registered(name).steps:
        return _Failed(None, "returned steps, but is not registered with steps=True") if ends else verdict
    ascending = all(a < b for a, b in zip([-1, *ends], ends, strict=False)) and ends and ends[-1] <= len(completion)
    if not ascending:
        return _Failed(None, f"returned the step ends {ends[:8]}; they must ascend within {len(completion)} characters")
    return verdict
