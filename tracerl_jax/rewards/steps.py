"""The steps of a completion: where they end in its text, in its tokens, and when they were denoised."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from tracerl_jax.config_rewards import ProcessSection


def step_ends(text: str, token_ends: Sequence[int], section: ProcessSection) -> list[int]:
    """Ends of the steps of a text, in characters, ascending; the last is its length.

    token_ends: [r] ends of the tokens in the text, for `section.tokens`. White space alone is no step, it belongs to
    the one before. A text without a character has one step, which ends at 0.
    """
    if section.tokens is not None:
        ends = [int(end) for end in token_ends[section.tokens - 1 :: section.tokens]]
    elif section.split:
        ends = [match.end() for match in re.finditer(section.split, text)]
    else:
        ends = []
    kept = []
    for end in [*ends, len(text)]:
        begin = kept[-1] if kept else 0
        if text[begin:end].strip() and (end == len(text) or text[end:].strip()):
            kept.append(end)
    if not kept or kept[-1] < len(text):
        kept.append(len(text))
    if len(kept) > section.max_steps:
        kept = [kept[len(kept) * k // section.max_steps - 1] for k in range(1, section.max_steps + 1)]
    return kept


def tokens_of_steps(steps: Iterable[tuple[int, float]], token_ends: Sequence[int]) -> tuple[tuple[int, float], ...]:
    """(end in characters, reward) to (end in tokens, reward): up to the first token with which the step is complete.

    token_ends: [r] ends of the tokens in the text; r > 0. A step that ends with the text ends with the last token,
    control tokens behind the text included.
    """
    count = len(token_ends)
    return tuple(
        (count if end >= token_ends[-1] else int(np.searchsorted(token_ends, end)) + 1, reward) for end, reward in steps
    )


def rewards_of_tokens(step_map: np.ndarray, steps: Iterable[tuple[int, float]]) -> np.ndarray:
    """Rewards of steps on the trace: [r] float64, for `rl.advantages.trace_gae`.

    The reward of a step counts at the denoise step by which all tokens up to its end are revealed, and lies on every
    token of that denoise step, so that their mean is the reward. Rewards that meet there add up.

        tokens      a b c | d e f g          steps end behind c and g
        step_map    1 3 2   2 4 5 5          complete at 3 and at 5
        rewards     0 x 0   0 0 y y

    step_map: [r] int, as in a trace; steps: (end in tokens, 1 to r; reward).
    """
    complete = np.maximum.accumulate(step_map)
    rewards = np.zeros(len(step_map))
    for end, reward in steps:
        rewards[step_map == complete[end - 1]] += reward
    return rewards
