"""Scores and their standard errors against enumeration, resampling and hand-made votes."""

import itertools
import math

import numpy as np
import pytest

from tracerl_jax.evals.statistics import Score, group_answers, majority_value, mean_score, pass_at, scores
from tracerl_jax.rewards import get_answers


def equal(pairs):
    return [one == other for one, other in pairs]


@pytest.mark.parametrize("judged, right", [(1, 0), (1, 1), (5, 0), (5, 2), (5, 5), (6, 1)])
def test_pass_at_is_the_share_of_subsets_with_a_right_answer(judged, right):
    answers = [True] * right + [False] * (judged - right)
    for j in range(1, judged + 1):
        subsets = list(itertools.combinations(answers, j))
        assert pass_at(j, right, judged) == pytest.approx(np.mean([any(subset) for subset in subsets]))
    assert math.isnan(pass_at(judged + 1, right, judged))


def test_standard_error_is_that_of_drawing_problems_again():
    rng = np.random.default_rng(0)
    chance = rng.beta(1, 1, 60)
    verdicts = rng.random((60, 4)) < chance[:, None]  # answers to a problem are alike: 240 answers are no 240 draws
    score = scores(verdicts.tolist(), 4, [[None] * 4] * 60, None)["avg@4"]
    again = [verdicts[rng.integers(60, size=60)].mean() for _ in range(4000)]
    assert score.value == pytest.approx(verdicts.mean())
    assert score.stderr == pytest.approx(np.std(again), rel=0.05)
    assert score.stderr > 1.4 * math.sqrt(score.value * (1 - score.value) / 240)  # as if they were


def test_scores():
    verdicts = [[True, False, False, False], [True, True, True, False], [None, None, True, False], [None] * 4]
    answers = [["1", "2", "3", "2"], ["4", "4", "4", "5"], ["6", "6", "7", "8"], ["9"] * 4]
    found = scores(verdicts, 4, answers, equal)
    assert list(found) == ["avg@4", "pass@2", "pass@4", "maj@4"]
    assert found["avg@4"] == mean_score([0.25, 0.75, 0.5])
    assert found["pass@2"] == mean_score([1 - 3 / 6, 1.0, 1.0])
    assert found["pass@4"] == mean_score([1.0, 1.0])  # two judged answers tell nothing about four
    assert found["maj@4"] == mean_score([0.0, 1.0])  # no verdict for the majority of the third problem
    assert "maj@4" not in scores(verdicts, 4, answers, None)
    assert list(scores([[True], [False]], 1, [["1"], ["2"]], equal)) == ["avg@1"]
    assert list(scores([[True] * 6], 6, [["1"] * 6], None)) == ["avg@6", "pass@2", "pass@4", "pass@6"]


def test_unknown_scores():
    assert scores([], 1, [], equal)["avg@1"].problems == 0
    unknown, one = mean_score([math.nan, math.nan]), mean_score([0.5, math.nan])
    assert math.isnan(unknown.value) and math.isnan(unknown.stderr) and unknown.problems == 0
    assert (one.value, one.problems) == (0.5, 1) and math.isnan(one.stderr)
    assert mean_score([1, 0, 1, 0]) == Score(0.5, pytest.approx(math.sqrt(1 / 12)), 4)


def test_a_vote_is_for_an_answer_however_it_is_written():
    answers = [["0.5", None, "1/2", "2", r"\frac{1}{2}", "2.0"], [], [None], ["3", "4"]]
    groups = group_answers(answers, get_answers("math").same)
    assert groups == [[[0, 2, 4], [3, 5]], [], [], [[0], [1]]]


def test_pairs_are_asked_for_many_problems_at_once():
    calls = []

    def same(pairs):
        calls.append(list(pairs))
        return equal(pairs)

    group_answers([["1", "2", "3", "1"], ["4", "5"]], same)
    assert calls == [[("1", "2"), ("4", "5")], [("1", "3"), ("2", "3")]]


@pytest.mark.parametrize(
    "groups, verdicts, value",
    [
        ([[0, 2], [1]], [True, False, True], 1.0),
        ([[0], [1]], [True, False], 0.5),  # a tie: either may be drawn
        ([[0, 1], [2]], [None, True, False], 1.0),  # one of the group was judged
        ([[1]], [False, True, False], 1.0),  # the others said nothing
        ([], [False, False], 0.0),
    ],
)
def test_majority(groups, verdicts, value):
    assert majority_value(groups, verdicts) == value


def test_a_majority_without_verdict_has_no_value():
    assert math.isnan(majority_value([[0, 1], [2]], [None, None, True]))
    assert math.isnan(majority_value([], [None]))
