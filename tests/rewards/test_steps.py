"""Steps of a completion: where they end, and where their rewards lie on the trace."""

import logging
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracerl_jax.config_rewards import ProcessSection
from tracerl_jax.data.char_tokenizer import build_char_tokenizer
from tracerl_jax.errors import ConfigError
from tracerl_jax.interop.tokenizer import decode
from tracerl_jax.report.samples import decode_pieces
from tracerl_jax.rewards import Verdict, rewards_of_steps, score, step_verdict
from tracerl_jax.rewards.steps import rewards_of_tokens, step_ends, tokens_of_steps

LINES = ProcessSection(split=r"\n")


@pytest.mark.parametrize(
    ("text", "section", "steps"),
    [
        ("one\n\ntwo\n \n\nthree", ProcessSection(), ["one\n\n", "two\n \n\n", "three"]),
        ("one\ntwo\n", LINES, ["one\n", "two\n"]),
        ("\n\none\n\n\n", LINES, ["\n\none\n\n\n"]),
        ("one", ProcessSection(), ["one"]),
        ("", ProcessSection(), [""]),
        (" \n ", LINES, [" \n "]),
        ("one\n\ntwo", ProcessSection(split=""), ["one\n\ntwo"]),
        ("a\nb\nc\nd\ne", ProcessSection(split=r"\n", max_steps=2), ["a\nb\n", "c\nd\ne"]),
        ("a\nb\nc", ProcessSection(split=r"\n", max_steps=1), ["a\nb\nc"]),
        ("abcdefg", ProcessSection(tokens=3), ["abc", "def", "g"]),
        ("abcdef", ProcessSection(tokens=3), ["abc", "def"]),
    ],
)
def test_steps_of_a_text(text, section, steps):
    ends = step_ends(text, range(1, len(text) + 1), section)  # a token is a character
    assert [text[a:b] for a, b in zip([0, *ends], ends, strict=False)] == steps


@given(st.text("ab \n", max_size=40), st.integers(1, 5))
def test_steps_are_the_whole_text_and_none_is_white_space(text, most):
    ends = step_ends(text, range(1, len(text) + 1), ProcessSection(split=r"\n", max_steps=most))
    assert ends == sorted(set(ends)) and ends[-1] == len(text) and len(ends) <= most
    parts = [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    assert not text.strip() or all(part.strip() for part in parts)


def test_tokens_with_which_a_step_is_complete():
    #  text "ab" "" "c" "def" "" of five tokens, the last a control token
    ends = np.cumsum([2, 0, 1, 3, 0])
    steps = tokens_of_steps([(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4), (6, 0.6)], ends)
    assert steps == ((1, 0.1), (1, 0.2), (3, 0.3), (4, 0.4), (5, 0.6))
    assert tokens_of_steps([(0, 1.0)], np.array([0, 0])) == ((2, 1.0),)


def test_the_ends_of_tokens_in_the_text_of_a_tokenizer(tmp_path):
    tokenizer = build_char_tokenizer(tmp_path)
    ids = [*tokenizer("1+1\n=2".replace("\n", ";")).input_ids, tokenizer.eos_token_id]
    pieces = decode_pieces(tokenizer, ids, decode)
    assert pieces == [*"1+1;=2", ""] and "".join(pieces) == decode(tokenizer, ids)


#         tokens a  b  c |d  e  f  g
STEPS = np.array([1, 3, 2, 2, 4, 5, 5])


@pytest.mark.parametrize(
    ("steps", "rewards"),
    [
        ([(3, 1.0), (7, -2.0)], [0, 1, 0, 0, 0, -2, -2]),  # c is there at 2, but b only at 3
        ([(1, 1.0), (4, 2.0)], [1, 2, 0, 0, 0, 0, 0]),
        ([(6, 1.0), (7, 2.0)], [0, 0, 0, 0, 0, 3, 3]),  # complete at the same time
        ([], [0] * 7),
    ],
)
def test_rewards_on_the_trace(steps, rewards):
    np.testing.assert_array_equal(rewards_of_tokens(STEPS, steps), rewards)


def reference_rewards(step_map, ends, rewards, block_size):
    """The published rule: a chunk's reward lies on the tokens of the highest step among the last `block_size` tokens
    before its end, that of the last chunk on all tokens of the trace's last step."""
    out = np.zeros(len(step_map))
    for end, reward in zip(ends[:-1], rewards[:-1], strict=True):
        window = range(max(0, end - block_size), end)
        for i in window:
            if step_map[i] == max(step_map[j] for j in window):
                out[i] += reward
    out[step_map == step_map.max()] += rewards[-1]
    return out


@given(st.data())
def test_rewards_count_at_the_denoise_steps_of_the_published_rule(data):
    """Blocks are denoised one after the other. Ours lie on every token of that step, so that the step's mean is the
    reward itself; the published ones on those before the end only, so its mean is a part of it."""
    B = 4
    blocks, steps, done = data.draw(st.integers(1, 4)), [], 0
    for _ in range(blocks):
        block = data.draw(st.lists(st.integers(1, B), min_size=B, max_size=B))
        block = np.unique(block, return_inverse=True)[1] + done + 1
        steps, done = [*steps, *block], block.max()
    steps = np.array(steps)
    inner = data.draw(st.sets(st.integers(1, len(steps) - 1), max_size=3))
    ends = [*sorted(inner), len(steps)]
    rewards = data.draw(st.lists(st.integers(1, 9), min_size=len(ends), max_size=len(ends)))
    theirs = reference_rewards(steps, ends, rewards, B)
    ours = rewards_of_tokens(steps, zip(ends, rewards, strict=True))
    assert set(steps[theirs != 0]) == set(steps[ours != 0])
    means = [ours[steps == step].mean() for step in np.unique(steps)]
    assert sum(means) == pytest.approx(sum(rewards))


# What a reward of steps may give


def test_weighted_sum_of_rewards_of_steps_and_of_the_whole(define):
    define("ends", lambda p, completions, *, step_ends, **c: [step_verdict(zip(e, e)) for e in step_ends], steps=True)  # noqa: B905
    define("own", lambda p, completions, **c: [Verdict(99, "why", ((2, 1.0), (3, 2.0)))] * len(completions), steps=True)
    define("whole", lambda p, completions, **c: [7.0] * len(completions))
    assert rewards_of_steps(["whole", "own", "ends"]) == ["own", "ends"]
    rewards = {"ends": 1.0, "own": 0.5, "whole": 2.0}
    result = score(rewards, ["p"] * 2, ["abcd", "efgh"], [{"step_ends": 1}] * 2, [[1, 2, 4], [4]])
    np.testing.assert_array_equal(result.by_name["own"], [3, 3])  # the sum of its steps, whatever it says
    np.testing.assert_array_equal(result.total, [7 + 1.5 + 14, 4 + 1.5 + 14])
    np.testing.assert_array_equal(result.whole, [14, 14])
    assert result.steps == [((1, 1.0), (2, 2.5), (3, 1.0), (4, 4.0)), ((2, 0.5), (3, 1.0), (4, 4.0))]
    assert score({"whole": 1.0}, ["p"], ["abcd"], [{}]).steps == [()]
    assert score({"own": 0.0, "whole": 1.0}, ["p"], ["abcd"], [{}]).steps == [()]


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (((1, 1.0), (1, 2.0)), r"step ends \[1, 1\]"),
        (((2, 1.0), (1, 2.0)), "must ascend"),
        (((5, 1.0),), "within 4 characters"),
        (((-1, 1.0),), "must ascend"),
        ((), "must ascend"),
        (((1, float("nan")),), "returned nan"),
        ("ab", "raised"),
    ],
)
def test_steps_that_make_no_sense_are_no_verdict(define, steps, said):
    define("odd", lambda p, completions, **c: [Verdict(1.0, "", steps)] * len(completions), steps=True)
    result = score({"odd": 1.0}, ["p"], ["abcd"], [{}])
    assert np.isnan(result.total).all() and result.errors == {"odd": 1} and result.steps == [()]
    assert re.search(said, result.details["odd"][0])


def test_a_step_without_verdict_takes_that_of_its_completion(define):
    values = iter([[1.0, None], [1.0, 0.0]])
    define(
        "partly", steps=True,
        function=lambda p, completions, **c: [step_verdict(enumerate(next(values), 1)) for _ in completions],
    )  # fmt: skip
    result = score({"partly": 1.0}, ["p"] * 2, ["ab", "cd"], [{}] * 2)
    np.testing.assert_array_equal(result.total, [np.nan, 1])
    assert result.steps == [(), ((1, 1.0), (2, 0.0))] and result.errors == {"partly": 0}


def test_steps_from_a_reward_that_is_not_registered_for_them(define, caplog):
    define("sneaky", lambda p, completions, **c: [step_verdict([(1, 1.0)])])
    with caplog.at_level(logging.WARNING):
        assert np.isnan(score({"sneaky": 1.0}, ["p"], ["ab"], [{}]).total).all()
    assert "register" in caplog.text


@pytest.mark.parametrize("keys", [{"split": "("}, {"tokens": 0}, {"max_steps": 0}])
def test_settings_that_cannot_work_name_their_key(keys):
    with pytest.raises(ConfigError, match=rf"reward\.process\.{next(iter(keys))}"):
        ProcessSection(**keys)
