"""Text for a judge and from it: templates, the score in an answer, the score of several votes."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tracerl_jax.config_rewards import JudgeSection

_FIELD = re.compile(r"\{([A-Za-z_]\w*)\}")
_YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.])([-+]?\d+(?:\.\d+)?)(?![\w]|\.\d)")


@dataclass(frozen=True)
class Answer:
    text: str
    cut: bool = False  # at the token limit


@dataclass(frozen=True)
class Failure:
    """Why there is no answer, or no score in it."""

    reason: str


def missing_fields(template: str, fields: Mapping[str, object]) -> list[str]:
    """Names in braces of a template that `fields` has no value for."""
    return sorted({name for name in _FIELD.findall(template) if fields.get(name) is None})


def fill(template: str, fields: Mapping[str, object]) -> str:
    """The template with every {name} replaced once; other braces stay, also those of the values."""
    return _FIELD.sub(lambda match: str(fields[match[1]]), template)


def read_score(answer: str, section: JudgeSection) -> float | None:
    """The score an answer gives; None when it gives none, or two.

    Looked at is what follows the last `</think>`: the group of the last match of `section.pattern`, or without a
    pattern the last line that is not empty. That must hold exactly one "yes" or "no" (1, 0), or exactly one number
    from `section.minimum` to `section.maximum`.
    """
    text = answer.rpartition("</think>")[2]
    if section.pattern:
        matches = re.findall(section.pattern, text)
        text = matches[-1] if matches else ""
    else:
        text = text.strip().rpartition("\n")[2]
    found = (_YES_NO if section.read == "yes_no" else _NUMBER).findall(text)
    if len(found) != 1:
        return None
    if section.read == "yes_no":
        return float(found[0].lower() == "yes")
    return float(found[0]) if section.minimum <= float(found[0]) <= section.maximum else None


def combine_votes(scores: Sequence[float | None], how: str) -> float | None:
    """The score of a question asked several times; a vote of None is one without score.

    None unless more than half of the votes have a score. mean: of those. majority: what more than half of those say,
    None when there is no such score.
    """
    known = [score for score in scores if score is not None]
    if 2 * len(known) <= len(scores):
        return None
    if how == "mean":
        return sum(known) / len(known)
    score, count = Counter(known).most_common(1)[0]
    return score if 2 * count > len(known) else None
