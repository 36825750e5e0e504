"""The registry, the weighted sum, and what happens when a reward has no verdict or raises."""

import logging

import numpy as np
import pytest

from tracerl_jax.errors import ConfigError
from tracerl_jax.rewards import Verdict, check_row, get_reward, score


def test_unknown_and_taken_names(define):
    with pytest.raises(ConfigError, match=r"unknown reward 'maths'; did you mean 'math'\?"):
        get_reward("maths")
    with pytest.raises(ConfigError, match=r"unknown reward 'zzz'; registered: .*exact_match, .*math"):
        score({"zzz": 1.0}, ["p"], ["c"], [{}])
    with pytest.raises(ConfigError, match="already registered"):
        define("exact_match", lambda prompts, completions, **columns: [])


def test_weighted_sum_and_columns(define):
    seen = {}

    def length(prompts, completions, **columns):
        seen.update(columns)
        return [len(text) for text in completions]

    define("length", length)
    result = score(
        {"length": 0.5, "exact_match": 2.0},
        ["p", "q"],
        ["1#22", "333"],
        [{"ground_truth_answer": "22", "level": 3}, {"ground_truth_answer": "4"}],
    )
    assert seen == {"ground_truth_answer": ["22", "4"], "level": [3, None]}
    np.testing.assert_array_equal(result.total, [0.5 * 4 + 2.0, 0.5 * 3])
    np.testing.assert_array_equal(result.by_name["exact_match"], [1, 0])
    assert result.no_verdict == 0 and result.errors == {"length": 0, "exact_match": 0}


def test_no_verdict_is_not_zero(define):
    define("odd", lambda prompts, completions, **columns: [1.0, None, float("nan"), float("inf")])
    arguments = [list("pppp"), list("1234"), [{"ground_truth_answer": text} for text in "1234"]]
    result = score({"odd": 0.5, "exact_match": 1.0}, *arguments)
    np.testing.assert_array_equal(result.total, [1.5, np.nan, np.nan, np.nan])
    assert result.no_verdict == 3 and result.errors == {"odd": 2, "exact_match": 0}
    assert result.details["odd"] == ["", "", "returned nan", "returned inf"]
    unweighted = score({"odd": 0.0, "exact_match": 1.0}, *arguments)
    np.testing.assert_array_equal(unweighted.total, [1, 1, 1, 1])
    np.testing.assert_array_equal(unweighted.by_name["odd"], [1, np.nan, np.nan, np.nan])


def test_verdicts_say_how_they_were_decided(define):
    answers = [Verdict(1, "as expected"), Verdict(None, "no reference"), 0.5, Verdict(float("nan"), "?")]
    define("wordy", lambda prompts, completions, **columns: answers)
    result = score({"wordy": 2.0}, list("pppp"), list("1234"), [{}] * 4)
    np.testing.assert_array_equal(result.total, [2, np.nan, 1, np.nan])
    assert result.details == {"wordy": ["as expected", "no reference", "", "returned nan"]}
    assert result.errors == {"wordy": 1}


def test_rows_are_checked_by_the_reward(define):
    define("picky", lambda *_, **__: [], check=lambda row: "" if "level" in row else "missing field 'level'")
    assert check_row("picky", {"level": 1}) == ""
    assert check_row("picky", {}) == "missing field 'level'"
    assert check_row("ascii_share", {}) == ""
    with pytest.raises(ConfigError, match="unknown reward"):
        check_row("pickyy", {})


def test_a_raising_reward_loses_only_its_samples(define, caplog):
    def fragile(prompts, completions, *, ground_truth_answer, **columns):
        return [float(int(text) == int(gold)) for text, gold in zip(completions, ground_truth_answer, strict=True)]

    define("fragile", fragile)
    rows = [{"ground_truth_answer": gold} for gold in ("1", "2", "x", "4")]
    with caplog.at_level(logging.WARNING):
        result = score({"fragile": 1.0}, ["p"] * 4, ["1", "3", "3", "four"], rows)
    np.testing.assert_array_equal(result.total, [1, 0, np.nan, np.nan])
    assert result.errors == {"fragile": 2}
    assert [record.message for record in caplog.records] == [
        'reward fragile failed on 2 of 4 samples (no verdict for them): it raised '
        """ValueError("invalid literal for int() with base 10: 'x'")"""
    ]


@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0, 3.0], "ab", None, 3.0, [[1.0], [2.0]]])
def test_a_malformed_result_is_an_error_not_a_score(define, values):
    define("malformed", lambda prompts, completions, **columns: values if len(prompts) == 2 else "?")
    result = score({"malformed": 1.0}, ["p", "q"], ["1", "2"], [{}, {}])
    assert np.isnan(result.total).all() and result.errors == {"malformed": 2}
    assert all("raised" in detail for detail in result.details["malformed"])


def test_interrupt_is_not_swallowed(define):
    def interrupted(prompts, completions, **columns):
        raise KeyboardInterrupt

    define("interrupted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score({"interrupted": 1.0}, ["p"], ["c"], [{}])


@pytest.mark.parametrize(
    "text, gold, value",
    [
        ("37+58=95;95-19=76#76", "76", 1.0),
        ("37+58=95;95-19=76#75", "76", 0.0),
        ("the sum\n#### 76 \n", "76", 1.0),
        ("76", 76, 1.0),
        ("76#", "76", 0.0),
        ("#7 6", "7  6", 1.0),
        ("", "76", 0.0),
        ("76", None, None),
    ],
)
def test_exact_match(text, gold, value):
    assert get_reward("exact_match")(["p"], [text], ground_truth_answer=[gold]) == [value]
    assert get_reward("exact_match")(["p"], [text]) == [None]


def test_ascii_share_varies_on_any_text():
    assert score({"ascii_share": 1.0}, ["", "", ""], ["aé1ü", "", "77"], [{}, {}, {}]).total.tolist() == [0.5, 0.0, 1.0]
