"""Finding and comparing answers.

math_pairs.jsonl holds pairs judged by hand; "beyond" marks those that the rules of rewards/math.py cannot decide.
"""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracerl_jax.data.jsonl import read_jsonl
from tracerl_jax.rewards import get_reward
from tracerl_jax.rewards.math import MAX_ANSWER, equivalent, extract_answer

PAIRS = [row for _, row in read_jsonl(Path(__file__).with_name("math_pairs.jsonl"))]


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=str(i), marks=[pytest.mark.xfail(strict=True)] if "beyond" in row else [])
        for i, row in enumerate(PAIRS)
    ],
)
def test_verdict_of_a_careful_reader(row):
    assert equivalent(row["prediction"], row["gold"]) is row["equivalent"]


@pytest.mark.parametrize("row", [row for row in PAIRS if not row["equivalent"]], ids=lambda row: row["prediction"][:20])
def test_never_accepts_a_different_answer_either_way_round(row):
    assert not equivalent(row["gold"], row["prediction"])


@settings(deadline=None)
@given(st.integers(-10**30, 10**30), st.integers(1, 10**6), st.integers(1, 50), st.integers(-3, 3))
def test_fractions_are_exact(numerator, denominator, factor, change):
    gold = f"\\frac{{{numerator}}}{{{denominator}}}"
    assert equivalent(f"{numerator * factor + change}/{denominator * factor}", gold) is (change == 0)


@settings(deadline=None)
@given(st.integers(0, 10**15))
def test_thousands_separators(value):
    grouped = f"{value:,}"
    for text in (grouped, f"\\${grouped}", grouped.replace(",", "{,}"), f"{grouped}.00", f"{value} \\text{{ cm}}"):
        assert equivalent(text, str(value))
        assert not equivalent(text, str(value + 1))


@settings(deadline=None)
@given(st.text(alphabet="0123456789+-*/^_.,;:()[]{}\\ $%fracboxedtimesqrt=|<>", max_size=80))
def test_never_raises_and_is_reflexive(text):
    assert equivalent(text, text) in (True, None)
    assert equivalent(text, "7") in (True, False)
    extract_answer(text)


@pytest.mark.parametrize(
    "text, answer",
    [
        ("so \\boxed{5}", "5"),
        ("\\boxed{1} no, \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed {7}", "7"),
        ("\\boxed{\\boxed{7}}", "7"),
        ("\\boxed{3} and then { \\boxed{4} }", "4"),
        ("\\boxed{3} cut off \\boxed{\\frac{1}{", "3"),
        ("{ never closed \\boxed{8}", "8"),
        ("\\boxed{}", ""),
        ("The answer is 5. #### 1,234", "1,234"),
        ("first the answer is 4, no.\nThe answer is 3.5. Done", "3.5"),
        ("**Answer:** none", "none"),
        ("Answer: $\\frac{1}{2}$", "$\\frac{1}{2}$"),
        ("no idea", None),
        ("", None),
    ],
)
def test_extraction(text, answer):
    assert extract_answer(text) == answer


def test_reward():
    texts = ["\\boxed{18}", "\\boxed{19}", "18", "", "\\boxed{\\frac{36}{2}}"]
    math = get_reward("math")
    assert math([""] * 5, texts, ground_truth_answer=["18"] * 5) == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert math([""] * 2, texts[:2], ground_truth_answer=[18, 18.5]) == [1.0, 0.0]


@pytest.mark.parametrize("gold", [None, "", "  ", True, ["18"], {"a": 1}, "9" * (MAX_ANSWER + 1)])
def test_no_verdict_without_a_usable_reference(gold):
    assert get_reward("math")(["p"], ["\\boxed{18}"], ground_truth_answer=[gold]) == [None]
    assert get_reward("math")(["p"], ["\\boxed{18}"], question=["q"]) == [None]


HOSTILE = [
    "\\boxed{9**9**9**9}",
    "\\boxed{9^{9^{9^{9}}}}",
    "\\boxed{1e999999999}",
    "\\boxed{10^{999999999}}",
    "\\boxed{" + "9" * 100_000 + "}",
    "\\boxed{" * 14_000,
    "\\boxed{" * 7_000 + "}" * 7_000,
    "\\boxed" + " " * 100_000,
    "{" * 100_000,
    "}" * 100_000,
    "\\" * 100_001,
    "answer is " * 10_000,
    "answer:" + "\t" * 100_000,
    "####" * 25_000,
    "\\boxed{" + "(" * 990 + "}",
    "\\boxed{" + "((" * 200 + "1" + "))" * 200 + "}",
    "\\boxed{" + "1,111" * 190 + "}",
    "\\boxed{" + "(1,2)," * 160 + "3}",
    "\\boxed{1" + " " * 900 + "x}",
    "\\boxed{1 " + "a " * 400 + "7}",
    "\\boxed{" + "..\\\\" * 240 + "x}",
    "\\boxed{\\frac{1}{0}}",
    "\\boxed{__import__('os').getcwd()}",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:20])
@pytest.mark.parametrize("gold", ["7", "(1,2)", "\\{1,2\\}"])
def test_hostile_completions_are_wrong_quickly(text, gold):
    start = time.process_time()
    assert get_reward("math")(["p"], [text], ground_truth_answer=[gold]) == [0.0]
    assert time.process_time() - start < 1.0
