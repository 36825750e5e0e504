"""Templates, the score in a judge's answer, and the score of several votes."""

import pytest

from tracerl_jax.config_rewards import JudgeSection
from tracerl_jax.rewards.judge_text import combine_votes, fill, missing_fields, read_score


def test_fields_are_filled_once_and_other_braces_stay():
    template = 'Q {question} A {completion} {completion} as {"score": 1}, {}, {not a field}'
    fields = {"question": "{completion}?", "completion": "{question}"}
    assert fill(template, fields) == 'Q {completion}? A {question} {question} as {"score": 1}, {}, {not a field}'
    assert missing_fields("{a} {b} {c} {d}", {"a": "", "b": None, "c": 0}) == ["b", "d"]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("yes", 1.0),
        ("It is wrong, so no way.\n\n**No.**  \n", 0.0),
        ("<think>no no no</think>Yes", 1.0),
        ("The answer is right: yes", 1.0),
        ("yes\nBecause it adds up.", None),  # the last line says nothing
        ("yes or no", None),
        ("notes", None),
        ("", None),
        ("<think>yes", 1.0),
    ],
)
def test_yes_and_no(answer, score):
    assert read_score(answer, JudgeSection()) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Good, but short.\nScore: 7", 7.0),
        ("0.5", 0.5),
        ("-0", 0.0),
        ("8/10", None),  # which one?
        ("11", None),
        ("-1", None),
        ("seven", None),
        ("1e3", None),
        ("v2", None),
        ("7.", 7.0),
    ],
)
def test_numbers(answer, score):
    assert read_score(answer, JudgeSection(read="number", maximum=10)) == score


def test_a_pattern_finds_the_score():
    section = JudgeSection(read="number", pattern=r"\[\[(.*?)\]\]", maximum=10)
    assert read_score("first [[3]], no: [[4.5]] of 10", section) == 4.5
    assert read_score("[[3]] [[?]]", section) is None
    assert read_score("3", section) is None


@pytest.mark.parametrize(
    ("votes", "mean", "majority"),
    [
        ([1.0], 1.0, 1.0),
        ([None], None, None),
        ([1.0, 0.0, 1.0], 2 / 3, 1.0),
        ([1.0, 0.0], 0.5, None),
        ([1.0, None, None], None, None),
        ([1.0, None], None, None),
        ([0.0, None, 0.0], 0.0, 0.0),
        ([1.0, 2.0, 3.0], 2.0, None),
    ],
)
def test_votes(votes, mean, majority):
    assert combine_votes(votes, "mean") == mean
    assert combine_votes(votes, "majority") == majority
