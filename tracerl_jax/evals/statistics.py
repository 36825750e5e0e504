"""Scores of an evaluation, with standard errors: k answers to each of n problems, each right, wrong or without verdict.

Every score is a mean over problems of one value v per problem,

    avg@k    share of right ones among its judged answers
    pass@j   1 - C(m - c, j) / C(m, j) for m judged answers, c of them right: the unbiased estimate of the chance that
             one of j answers is right (Chen et al. 2021, arXiv 2107.03374)
    maj@k    1 when the majority's answer is right, else 0; the mean over the answers in front when several tie

and its standard error is sqrt(sum (v - mean)^2 / (n (n - 1))): problems are independent draws, the k answers to one
problem are not. It is the error clustered by problem (Miller 2024, arXiv 2411.00640) with n - 1 instead of n.
Problems without a value (no verdict, fewer than j judged answers) are left out and not counted.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Verdict = bool | None  # None: the reward had no verdict
Same = Callable[[Sequence[tuple[str, str]]], Sequence[bool]]


@dataclass(frozen=True)
class Score:
    value: float  # NaN when no problem has one
    stderr: float  # NaN with fewer than two problems
    problems: int  # that have a value


def mean_score(values: Sequence[float]) -> Score:
    """Mean and standard error over problems; NaN is no value."""
    known = np.asarray(values, float)
    known = known[~np.isnan(known)]
    n = len(known)
    return Score(
        value=float(known.mean()) if n else math.nan,
        stderr=float(known.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan,
        problems=n,
    )


def scores(
    verdicts: Sequence[Sequence[Verdict]], k: int, answers: Sequence[Sequence[str | None]], same: Same | None
) -> dict[str, Score]:
    """avg@k, and for k > 1 pass@2, pass@4, .., pass@k and, with `same`, maj@k.

    `verdicts` and `answers` (None: no answer was found) hold k entries per problem; `same` tells whether two answers
    are equivalent, for a batch of pairs.
    """
    judged = [[verdict for verdict in problem if verdict is not None] for problem in verdicts]
    found = {f"avg@{k}": mean_score([np.mean(problem) if problem else math.nan for problem in judged])}
    powers = [2**i for i in range(1, k.bit_length()) if 2**i < k]
    for j in [*powers, k] if k > 1 else []:
        found[f"pass@{j}"] = mean_score([pass_at(j, sum(problem), len(problem)) for problem in judged])
    if k > 1 and same is not None:
        groups = group_answers(answers, same)
        found[f"maj@{k}"] = mean_score(list(map(majority_value, groups, verdicts)))
    return found


def pass_at(j: int, right: int, judged: int) -> float:
    """The chance that one of j of the judged answers, drawn without replacement, is right; NaN for j > judged."""
    if judged < j:
        return math.nan
    return 1 - math.comb(judged - right, j) / math.comb(judged, j)


def group_answers(answers: Sequence[Sequence[str | None]], same: Same) -> list[list[list[int]]]:
    """Per problem the indices of equivalent answers, in order of first appearance; None is in no group.

    An answer joins the first group whose first answer it equals, so the result is defined also where equivalence is not
    transitive. `same` is asked for many pairs at once: the next different answer of all problems.
    """
    different = [list(dict.fromkeys(a for a in problem if a is not None)) for problem in answers]
    groups: list[list[list[str]]] = [[] for _ in answers]
    for turn in range(max(map(len, different), default=0)):
        asked = [p for p, texts in enumerate(different) if turn < len(texts)]
        pairs = [(group[0], different[p][turn]) for p in asked for group in groups[p]]
        replies = iter(same(pairs) if pairs else ())
        for p in asked:
            text, equal = different[p][turn], [next(replies) for _ in groups[p]]
            if any(equal):
                groups[p][equal.index(True)].append(text)
            else:
                groups[p].append([text])
    return [
        [[i for i, answer in enumerate(problem) if answer in group] for group in found]
        for problem, found in zip(answers, groups, strict=True)
    ]


def majority_value(groups: Sequence[Sequence[int]], verdicts: Sequence[Verdict]) -> float:
    """Whether the largest of the groups is right (the mean when several are); 0 when no answer was found, NaN when that
    is not known. A group is right when its first judged answer is."""
    if all(verdict is None for verdict in verdicts):
        return math.nan
    most = max(map(len, groups), default=0)
    values = []
    for group in groups:
        if len(group) == most:
            judged = [verdicts[i] for i in group if verdicts[i] is not None]
            values.append(float(judged[0]) if judged else math.nan)
    return float(np.mean(values)) if values else 0.0
