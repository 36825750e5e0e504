r"""The reward `math`: finding answers and comparing them.

answer_pairs.jsonl holds pairs of an answer and a reference judged by hand, "ambiguous" where the judgement depends on
convention or on the question.
"""

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracerl_jax.config import RewardSection
from tracerl_jax.data.jsonl import read_jsonl
from tracerl_jax.errors import ConfigError
from tracerl_jax.rewards import check_row, get_reward, score, settings, start_rewards
from tracerl_jax.rewards.answers import MAX_ANSWER, compare
from tracerl_jax.rewards.extract import FINAL_ANSWER_PATTERNS, extract_answer

math = importlib.import_module("tracerl_jax.rewards.math")

PAIRS = [row for _, row in read_jsonl(Path(__file__).with_name("answer_pairs.jsonl"))]
PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"

# The pairs judged otherwise, all of them ambiguous; docs/rewards.md says why.
MISSES = {91, 121, 122, 145, 147, 223}


@pytest.fixture
def configure():
    """Sets reward settings for one test."""
    before = settings.current()
    yield lambda **values: settings.configure(RewardSection(**values))
    settings.configure(before)


@pytest.fixture(scope="module", autouse=True)
def pool():
    before = settings.current()
    settings.configure(RewardSection(workers=2, math_cpu_seconds=1.0))
    yield
    settings.configure(before)
    math.stop()


def rewards(answers, golds):
    return [verdict.reward for verdict in math.grade_answers(answers, golds)]


# ---- agreement ----


@pytest.fixture(scope="module")
def verdicts():
    return math.grade_answers([row["prediction"] for row in PAIRS], [row["gold"] for row in PAIRS])


def test_agreement_with_careful_readers(verdicts):
    missed = [row for row, verdict in zip(PAIRS, verdicts, strict=True) if verdict.reward != row["equivalent"]]
    assert len(PAIRS) == 338 and sum(not row["ambiguous"] for row in PAIRS) == 315
    assert sum(not row["ambiguous"] for row in missed) <= 3  # 99 %
    assert {row["id"] for row in missed} == MISSES


def test_every_miss_is_explained():
    page = PAGE.read_text()
    for row in PAIRS:
        if row["id"] in MISSES:
            assert f"| `{row['prediction']}` | `{row['gold']}` |" in page


def test_every_verdict_says_how_it_was_decided(verdicts):
    how = Counter(next((h for h in ("by rules", "by algebra", "empty answer") if h in v.detail), "?") for v in verdicts)
    assert how["?"] == 0 and how["by rules"] > how["by algebra"] > 50


def test_no_different_answer_is_accepted_the_other_way_round():
    different = [row for row in PAIRS if not (row["equivalent"] or row["ambiguous"]) and row["category"] != "special"]
    assert 1.0 not in rewards([row["gold"] for row in different], [row["prediction"] for row in different])


FURTHER = [  # gold, answer, whether they are the same
    ("x^2y^2z^2", "(xyz)^2", 1.0),
    ("\\frac{1}{1+x}", "\\frac{1-x}{1-x^2}", 1.0),
    ("\\sin(2x)", "2\\sin x\\cos x", 1.0),
    ("\\frac{\\pi}{4}", "pi/4", 1.0),
    ("2x^{10}", "2*x**10", 1.0),
    ("2\\sqrt{3}", "2√3", 1.0),
    ("a + b + c", "c + b + a", 1.0),
    ("\\emptyset", "(0,1)\\cap(2,3)", 1.0),
    ("(-\\infty,-1)\\cup(1,\\infty)", "x<-1 or x>1", 1.0),
    ("x<-1\\text{ or }x>1", "(-\\infty,-1)\\cup(1,\\infty)", 1.0),
    ("(-\\infty,-1)\\cup(1,\\infty)", "x<-1 or x>2", 0.0),
    ("2007 + \\frac\\pi 2", "2007+\\frac{\\pi}{2}", 1.0),
    ("\\frac{7}{5} + \\frac{1}{5} i.", "\\frac{7+i}{5}", 1.0),
    ("\\$2\\pi", "2\\pi", 1.0),
    ("12\\pi", "12\\pi\\text{ square units}", 1.0),
    ("2\\sqrt{3} \\text{ m}", "\\sqrt{12}\\text{ cm}", 0.0),
    ("(3+\\sqrt{5},-1)", "(3,-1)", 0.0),
    ("(3,1)", "\\emptyset", 0.0),
    ("\\emptyset", "(3,1)", 0.0),
    ("(3+\\sqrt{4},-\\sqrt{1})", "(5,-1)", 1.0),
    ("(\\frac{1}{6},\\frac{1}{6})", "(\\frac{1}{\\sqrt{2}},\\frac{1}{\\sqrt{2}})", 0.0),
    ("(-\\sqrt{8},\\sqrt{8}]", "(-2\\sqrt{2},2\\sqrt{2}]", 1.0),
    ("111", "111, \\! 111, \\! 111", 0.0),
    ("111111111", "111, \\! 111, \\! 111", 1.0),
    ("17\\text{ meters}", "17\\%", 0.0),
    ("73^\\circ", "73\\%", 0.0),
    ("7, -2, \\text{ and } -5", "-5,-2,\\sqrt{49}", 1.0),
    ("3", "3t", 0.0),
    ("5", "5c", 0.0),
    ("2", "2ab", 0.0),
    ("\\text{dog}", "\\text{god}", 0.0),
    ("\\text{Tuesday}", "\\text{Wednesday}", 0.0),
    ("k", "k\\text{ odd}", 0.0),
    ("\\sqrt{2}", "1.414213562373", 0.0),
    ("\\frac{1}{2}", "__import__('os').getcwd()", 0.0),
]


def test_further_pairs():
    golds, answers, expected = zip(*FURTHER, strict=True)
    assert list(zip(golds, answers, rewards(answers, golds), strict=True)) == FURTHER


@given(st.integers(-10**30, 10**30), st.integers(1, 10**6), st.integers(1, 50), st.integers(-3, 3))
def test_fractions_are_exact(numerator, denominator, factor, change):
    gold = f"\\frac{{{numerator}}}{{{denominator}}}"
    assert compare(f"{numerator * factor + change}/{denominator * factor}", gold) is (change == 0)


@given(st.integers(0, 10**15))
def test_thousands_separators(value):
    grouped = f"{value:,}"
    for text in (grouped, f"\\${grouped}", grouped.replace(",", "{,}"), f"{grouped}.00", f"{value} \\text{{ cm}}"):
        assert compare(text, str(value)) is True
        assert compare(text, str(value + 1)) is False


@given(st.text(alphabet="0123456789+-*/^_.,;:()[]{}\\ $%fracboxedtimesqrt=|<>", max_size=80))
def test_rules_never_raise_and_are_reflexive(text):
    assert compare(text, text) is bool(text.strip())
    compare(text, "7")
    extract_answer(text)


# ---- extraction ----


@pytest.mark.parametrize(
    "text, answer",
    [
        ("so \\boxed{5}", "5"),
        ("\\boxed{1} no, \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed {7}", "7"),
        ("\\fbox{7}", "7"),
        ("\\boxed{\\boxed{7}}", "7"),
        ("\\boxed{3} and then { \\boxed{4} }", "4"),
        ("\\boxed{3} cut off \\boxed{\\frac{1}{", "3"),
        ("{ never closed \\boxed{8}", "8"),
        ("\\boxed{}", ""),
        ("\\boxed{6} though the answer is 7", "6"),
        ("The answer is 5. #### 1,234", "1,234"),
        ("first the answer is 4, no.\nThe answer is 3.5. Done", "3.5"),
        ("**Answer:** none", "none"),
        ("**Answer**: 5", "5"),
        ("**Answer: 5**", "5"),
        ("The final answer is **5**.", "5"),
        ("The answer is: 5", "5"),
        ("The answer is:\n7", "7"),
        ("**Final Answer:**\n7", "7"),
        ("Answer = 7", "7"),
        ("Final Answer: The final answer is $5$. I hope it is correct.", "$5$"),
        ("Answer: $\\frac{1}{2}$", "$\\frac{1}{2}$"),
        ("no idea", None),
        ("", None),
    ],
)
def test_extraction(text, answer):
    assert extract_answer(text) == answer


def test_patterns_are_configurable(configure):
    texts = ["<result>5</result> or <result>7</result>", "The answer is 7", "\\boxed{7}"]

    def values():
        return [verdict.reward for verdict in get_reward("math")(["p"] * 3, texts, ground_truth_answer=["7"] * 3)]

    assert values() == [0.0, 1.0, 1.0]
    configure(answer_patterns=(r"<result>(.*?)</result>",))
    assert values() == [1.0, 0.0, 1.0]
    configure(answer_patterns=(*FINAL_ANSWER_PATTERNS, r"<result>(.*?)</result>"))
    assert values() == [1.0, 1.0, 1.0]


def test_bare_answers_are_a_matter_of_configuration(configure):
    texts = ["18", "so\n18", "The answer is 18", ""]
    golds = ["18"] * 4

    def values():
        return [verdict.reward for verdict in get_reward("math")(["p"] * 4, texts, ground_truth_answer=golds)]

    assert values() == [0.0, 0.0, 1.0, 0.0]
    configure(bare_answers=True)
    assert values() == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "pattern, message", [("(", "is no regular expression"), ("a", "exactly one group"), ("(a)(b)", "exactly one group")]
)
def test_bad_patterns_stop_the_start(configure, pattern, message):
    configure(answer_patterns=(pattern,))
    with pytest.raises(ConfigError, match=message):
        start_rewards(["math"])


# ---- verdicts ----


def test_reward():
    texts = ["\\boxed{18}", "\\boxed{19}", "18", "", "\\boxed{\\frac{36}{2}}", "\\boxed{6\\sqrt{9}}", "\\boxed{ }"]
    result = score({"math": 1.0}, ["p"] * 7, texts, [{"ground_truth_answer": "18"}] * 7)
    assert result.total.tolist() == [1, 0, 0, 0, 1, 1, 0]
    assert result.details["math"] == [
        "18 is 18 (by rules)",
        "19 is not 18 (by rules)",
        "no answer found",
        "no answer found",
        "\\frac{36}{2} is 18 (by rules)",
        "6\\sqrt{9} is 18 (by algebra)",
        "empty answer",
    ]
    assert rewards(["18"] * 2, [18, 18.5]) == [1.0, 0.0]


UNUSABLE = [None, "", "  ", True, ["18"], {"a": 1}, "9" * (MAX_ANSWER + 1)]


@pytest.mark.parametrize("gold", UNUSABLE, ids=lambda gold: repr(gold)[:20])
def test_no_verdict_without_a_usable_reference(gold):
    assert rewards(["18"], [gold]) == [None]
    assert "ground_truth_answer" in check_row("math", {"question": "q", "ground_truth_answer": gold})


def test_no_verdict_when_the_column_is_missing():
    assert [verdict.reward for verdict in get_reward("math")(["p"], ["\\boxed{18}"], question=["q"])] == [None]
    assert check_row("math", {"question": "q"}) == "missing field 'ground_truth_answer' (it has question)"
    assert check_row("math", {"ground_truth_answer": 18}) == ""


def test_no_verdict_when_the_reference_cannot_be_read():
    golds = ["\\frac{1}{", "???", "9^{9^{9^{9}}}"]
    assert rewards(["\\sqrt{2}"] * 3, golds) == [None] * 3
    assert rewards(golds, golds) == [1.0] * 3


# ---- hostile answers ----

HOSTILE = [
    "\\boxed{9**9**9**9}",
    "\\boxed{1e999999999}",
    "\\boxed{" + "9" * 100_000 + "}",
    "\\boxed{" * 14_000,
    "\\boxed{" * 7_000 + "}" * 7_000,
    "\\boxed" + " " * 100_000,
    "{" * 100_000,
    "}" * 100_000,
    "\\" * 100_001,
    "answer is " * 10_000,
    "answer:" + "\t" * 100_000,
    "answer" + "*" * 100_000,
    "####" * 25_000,
    "\\boxed{" + "(" * 990 + "}",
    "\\boxed{" + "1,111" * 190 + "}",
    "\\boxed{" + "(1,2)," * 160 + "3}",
    "\\boxed{1" + " " * 900 + "x}",
    "\\boxed{1 " + "a " * 400 + "7}",
    "\\boxed{" + "..\\\\" * 240 + "x}",
    "\\boxed{\\frac{1}{0}}",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:20])
def test_finding_and_reading_an_answer_takes_linear_time(text):
    """The clock is generous: what is not linear takes minutes."""
    start = time.process_time()
    answer = extract_answer(text)
    for gold in ("7", "(1,2)", "\\{1,2\\}"):
        assert answer is None or compare(answer, gold) in (False, None)
    assert time.process_time() - start < 10


ADVERSARIAL = [
    "9^{9^{9^{9}}}",
    "10^{999999999}",
    "((9!)!)!",
    "99999999999999999999!",
    "(x+y+z+w)^{200}",
    "\\sum_{n=1}^{10^9} \\frac{1}{n}",
    "\\int e^{x^x} \\sin(x)/\\log(x) dx",
    "(" * 60 + "1" + ")" * 60,
    "|x|" * 40,
    "9" * 100_000,
]


def mixture(count: int, adversarial: list[str]):
    """(answers, golds, rewards): fractions of roots for algebra, right and wrong, and the adversarial in between."""
    answers, golds, expected = [], [], []
    for number in range(count):
        right = number % 3 > 0
        golds.append(f"\\frac{{{number + 1}\\sqrt{{2}}}}{{2}}")
        answers.append(f"\\frac{{{number + (1 if right else 2)}}}{{\\sqrt{{2}}}}")
        expected.append(float(right))
    for number, text in enumerate(adversarial):
        place = (number + 1) * count // (len(adversarial) + 1)
        answers[place], expected[place] = text, 0.0
    return answers, golds, expected


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_verdicts_do_not_depend_on_the_number_of_workers(configure, workers):
    configure(workers=workers, math_cpu_seconds=1.0)
    answers, golds, expected = mixture(24, [ADVERSARIAL[0], ADVERSARIAL[9]])
    assert rewards(answers, golds) == expected


def test_workers_killed_amid_their_work_lose_nothing():
    answers, golds, expected = mixture(60, [])
    before = math.start().pids()
    killer = threading.Timer(0.2, lambda: [os.kill(pid, signal.SIGKILL) for pid in before])
    killer.start()
    assert rewards(answers, golds) == expected
    killer.join()
    assert rewards(answers[:2], golds[:2]) == expected[:2]
    assert not set(before) & set(math.start().pids())


@pytest.mark.slow
def test_a_batch_of_1024_with_adversarial_answers_on_a_loaded_machine(configure):
    answers, golds, expected = mixture(1024, ADVERSARIAL)
    start = time.perf_counter()
    assert rewards(answers, golds) == expected
    print(f"\n1,024 answers: {time.perf_counter() - start:.1f} s with {len(math.start().pids())} workers")
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * os.cpu_count())]
    try:
        for workers in (1, 4):
            configure(workers=workers)
            assert rewards(answers, golds) == expected
    finally:
        for process in busy:
            process.kill()
            process.wait()


# ---- the backend and the workers ----


@pytest.fixture
def fake_backend(tmp_path, monkeypatch):
    """Puts a math_verify of one's own before the installed one."""

    def install(text):
        math.stop()
        (tmp_path / "math_verify.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    math.stop()


FAKE = "class LatexExtractionConfig:\n    def __init__(self, **_): pass\ndef parse(*_, **__): return [{}]\n"


@pytest.mark.parametrize(
    "backend, message",
    [
        ("raise ImportError('antlr4 has gone')", "math-verify does not work here .*antlr4 has gone.*pip install"),
        (FAKE.format(1) + "def verify(*_, **__): return True", "math-verify misjudges .*antlr4.*pip install"),
        (FAKE.format("'x'") + "def verify(*_, **__): return True", "math-verify misjudges .*antlr4.*pip install"),
    ],
)
def test_a_broken_backend_stops_the_start(fake_backend, backend, message):
    fake_backend(backend)
    with pytest.raises(ConfigError, match=message):
        start_rewards(["math"])


def test_rules_alone_start_no_worker(fake_backend):
    fake_backend("raise ImportError('never imported')")
    answers, golds = ["18", "\\frac12", "(1,2)", "4", None], ["18", "0.5", "(1, 2)", "5", "6"]
    assert rewards(answers, golds) == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_exact_match_needs_neither_workers_nor_algebra():
    code = (
        "import sys, tracerl_jax.rewards as r\n"
        "r.start_rewards(['exact_match'])\n"
        "assert r.score({'exact_match': 1.0}, ['p'], ['#1'], [{'ground_truth_answer': '1'}]).total[0] == 1\n"
        "assert r.math._pool is None and not {'sympy', 'math_verify'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0
