"""The rewards `code` and `code_share`: judged cases, real tasks, programs that would decide about their own reward, rows."""

import json
import os
from pathlib import Path

import pytest

from tracerl_jax.config import RewardSection
from tracerl_jax.errors import ConfigError
from tracerl_jax.rewards import check_row, code, score, settings
from tracerl_jax.rewards.programs import extract_program

HERE = Path(__file__).parent
FENCE = "```"
SECTION = {"sandbox": "best_effort", "workers": 2, "code_wall_seconds": 1.0}


def rows_of(file: str | Path) -> list[dict]:
    return [json.loads(line) for line in (HERE / file).read_text().splitlines()]


CASES = rows_of("code_cases.jsonl")  # programs, and which tests a correct judge sees pass
# Where we judge otherwise, and why.
DISAGREEMENTS = {
    27: "an object that says it equals everything is believed only with reward.own_equality",
}


@pytest.fixture(scope="module", autouse=True)
def sandbox():
    """As good as this machine allows."""
    before = settings.current()
    settings.configure(RewardSection(**SECTION))
    try:
        code.start()
    except ConfigError as error:
        pytest.skip(str(error))
    yield code._sandbox
    settings.configure(before)


@pytest.fixture(scope="module")
def graded_cases(sandbox):
    rows = [{**case, "test_time_limit": 0.7} for case in CASES]  # of 2: enough, and loops end sooner
    return dict(zip([case["id"] for case in CASES], code.grade([case["code"] for case in CASES], rows), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['id']}-{case['category']}")
def test_judged_case(graded_cases, sandbox, case):
    if case["expect_blocked"] and not {"mount", "network", "seccomp"} <= {*sandbox.held}:
        pytest.skip(f"the machine cannot isolate: {sandbox.description}")
    graded = graded_cases[case["id"]]
    assert (list(graded.passed) != case["expected"]) == (case["id"] in DISAGREEMENTS), graded.detail


# ---- real tasks ----


@pytest.mark.parametrize("task, style", [
    ("humaneval_20", "continuation"), ("humaneval_20", "whole program"), ("humaneval_20", "open block"), ("mbpp_20", "block"),
])  # fmt: skip
def test_reference_solutions_pass(task, style):
    rows = rows_of(f"{task}.jsonl")
    graded = code.grade([answer(row, style) for row in rows], [ours(row) if style == "open block" else row for row in rows])
    assert {row["task_id"]: result.detail for row, result in zip(rows, graded, strict=True) if not all(result.passed)} == {}


def test_wrong_solutions_fail():
    rows = rows_of("humaneval_20.jsonl")
    graded = code.grade(["    return None" for _ in rows], rows)
    assert [row["task_id"] for row, result in zip(rows, graded, strict=True) if all(result.passed)] == []


@pytest.mark.slow
@pytest.mark.parametrize("variable, style, broken", [
    ("TEST_HUMANEVAL", "continuation", set()), ("TEST_HUMANEVAL", "open block", set()), ("TEST_MBPP", "block", set()),
])  # fmt: skip
def test_all_reference_solutions_pass(variable, style, broken):
    """Of a whole data set: the variable names a JSONL file with the fields of humaneval_20.jsonl or mbpp_20.jsonl."""
    if variable not in os.environ:
        pytest.skip(f"{variable} does not name a file")
    rows = rows_of(os.environ[variable])
    graded = code.grade([answer(row, style) for row in rows], [ours(row) if style == "open block" else row for row in rows])
    assert {row["task_id"]: result.detail for row, result in zip(rows, graded, strict=True) if not all(result.passed)} == {}


def answer(row: dict, style: str) -> str:
    if style == "block":
        return f"Here it is:\n{FENCE}python\n{row['code']}\n{FENCE}\nDone."
    if style == "whole program":
        return f"{FENCE}python\n{row['prompt']}{row['canonical_solution']}\n{FENCE}"
    return row["canonical_solution"]


def ours(row: dict) -> dict:
    """A row of HumanEval in the format of dLLM-RL: the prefix opens a block, one test that calls its own check."""
    return {
        "question": "Complete this code.", "prefix": f"Here it is:\n{FENCE}python\n{row['prompt']}", "test_time_limit": 2,
        "test_method": "function", "test_list": [f"{row['test']}\n\ncheck({row['entry_point']})"],
    }  # fmt: skip


# ---- who decides ----

ALWAYS = """
class Always:
    def __getattr__(self, name): return self
    def __call__(self, *args): return self
for name in "eq ne lt le gt ge add sub mul truediv radd rsub rmul contains".split():
    setattr(Always, f"__{name}__", lambda self, *args: self)
for name, value in {"bool": True, "abs": 0.0, "float": 0.0, "int": 0, "len": 1, "hash": 0}.items():
    setattr(Always, f"__{name}__", lambda self, value=value: value)
def f(x): return Always()
"""


@pytest.mark.parametrize("program, test", [
    (ALWAYS, "assert f(1) == 2"),
    (ALWAYS, "assert 2 == f(1)"),
    (ALWAYS, "assert f(1) in [2, 3]"),
    (ALWAYS, "assert not f(1) != 2"),
    (ALWAYS, "assert f(1) < 3"),
    (ALWAYS, "assert abs(f(1) - 3.14) < 1e-6"),
    (ALWAYS, "import math\nassert math.isclose(f(1), 3.14)"),
    (ALWAYS, "assert f(1) == [1, 2]"),
    (ALWAYS, "assert isinstance(f(1), int)"),
    (ALWAYS + "def f(x): return [Always()]", "assert f(1) == [2]"),
    (ALWAYS + "def f(x): return {'a': Always()}", "assert f(1) == {'a': 2}"),
    ("def f(x): return 7\nabs = len = lambda *a: 0", "assert abs(f(1) - 3.14) < 1e-6"),
    ("def f(x): return 7\ndef check(f): pass", "def check(g):\n    assert g(1) == 2\ncheck(f)"),
    ("def f(x): return 7\nimport math\nmath.isclose = lambda *a: True", "assert math.isclose(f(1), 3.14)"),
    ("def f(x): return 7\nclass math:\n    isclose = lambda *a: True", "assert math.isclose(f(1), 3.14)"),
    ("def f(x): return 7\nAssertionError = isinstance = sorted = lambda *a: True", "assert isinstance(f(1), str)"),
    ("def f(x): raise AssertionError", "try:\n    f(1)\nexcept ValueError:\n    pass"),
    ("import os\ndef f(x): os._exit(0)", "try:\n    f(1)\nexcept BaseException:\n    pass"),
    ("def f(x):\n    while True: pass", "try:\n    f(1)\nexcept BaseException:\n    pass"),
    ("def f(g):\n    g.__globals__['wanted'] = 7\n    return 7", "wanted = 2\nassert f(lambda: 1) == wanted"),
    ("def f(g):\n    g.__self__.clear()\n    return []", "wanted = [2]\nassert f(wanted.append) == wanted"),
])  # fmt: skip
def test_program_does_not_decide_about_its_reward(program, test):
    (graded,) = code.grade([program], [{"test_list": [test], "test_time_limit": 0.5}])
    assert graded.passed == (False,)


def test_helpers_of_the_problem_are_not_the_programs():
    """HumanEval/32 checks with `poly`, which its prompt defines: a program cannot define it away."""
    (row,) = [row for row in rows_of("humaneval_20.jsonl") if row["entry_point"] == "find_zero"]
    cheat = f"{FENCE}python\ndef poly(xs, x): return 0.0\ndef find_zero(xs): return 0.0\n{FENCE}"
    (graded,) = code.grade([cheat], [row])
    assert graded.passed == (False,)


@pytest.mark.parametrize("program, test", [
    ("class Stack:\n    def __init__(self): self.a = []\n    def push(self, x): self.a.append(x)\n    def __len__(self): return len(self.a)",
     "s = Stack(); s.push(1); s.push(2)\nassert len(s) == 2 and s.a == [1, 2]"),
    ("class V:\n    def __init__(self, x): self.x = x\n    def __add__(self, o): return V(self.x + o.x)\n    def __eq__(self, o): return self.x == o.x",
     "assert V(1) + V(2) == V(3) and V(1) != V(2)"),
    ("def f(a): a.sort(); a.append(9)", "a = [3, 1]\nf(a)\nassert a == [1, 3, 9]"),
    ("def f(n):\n    for i in range(n): yield i", "assert list(f(3)) == [0, 1, 2] and next(f(1)) == 0 and 2 in f(3)"),
    ("def f(g, xs): return [g(x) for x in xs]", "assert f(lambda x: x * 2, (1, 2)) == [2, 4]"),
    ("def f(n): return lambda x: x + n", "assert f(2)(3) == 5"),
    ("def f(): raise ValueError('no')", "try:\n    f()\n    assert False\nexcept ValueError as e:\n    assert str(e) == 'no'"),
    ("class Odd(KeyError): pass\ndef f(): raise Odd('x')", "try:\n    f()\n    assert False\nexcept KeyError:\n    pass"),
    ("def sum(a, b): return a - b", "assert sum(10, 15) == -5"),
    ("import numpy as np\ndef f(): return np.float64(1.5), np.int64(2), np.bool_(True)", "assert f() == (1.5, 2, True)"),
    ("def f(x): return x", "for x in (2**200, -1.5, float('inf'), 1j, b'a\\xff', {1: (2,)}, {(1, 2)}, None, 'a\\ud800', range(3)):\n    assert f(x) == x and type(f(x)) is type(x)"),
    ("def f(x): return x", "import datetime, decimal, fractions, collections\nfor x in (datetime.date(2024, 2, 29), datetime.timedelta(1, 2, 3), decimal.Decimal('0.1'), fractions.Fraction(1, 3), collections.Counter('aab'), collections.deque([1])):\n    assert f(x) == x and type(f(x)) is type(x)"),
    ("def f(n): return 1 if n == 0 else 1 + f(n - 1)", "assert f(980) == 981"),
    ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int", "assert P(1) == P(1) and P(2).x == 2"),
])  # fmt: skip
def test_honest_program_passes(program, test):
    (graded,) = code.grade([program], [{"test_list": [test]}])
    assert graded.passed == (True,), graded.detail


def test_own_equality_believes_objects_of_the_program():
    settings.configure(RewardSection(**SECTION, own_equality=True))
    try:
        (case,) = [case for case in CASES if case["id"] == 27]
        (graded,) = code.grade([case["code"]], [case])
        assert list(graded.passed) == case["expected"] == [True]
    finally:
        settings.configure(RewardSection(**SECTION))


# ---- rewards, rows, completions ----


def test_rewards_by_name():
    row = {"test_list": ["assert f(1) == 2", "assert f(2) == 3", "assert f(5) == 0"], "test_time_limit": 0.5}
    result = score(
        {"code": 1.0, "code_share": 0.0}, ["p"] * 3, ["def f(x): return x + 1", "def f(x): return 0", "def f(x): return x + 1"],
        [row, row, {**row, "test_list": row["test_list"][:2]}],
    )  # fmt: skip
    assert [*result.total] == [0, 0, 1]
    assert [*result.by_name["code_share"]] == pytest.approx([2 / 3, 1 / 3, 1])
    assert result.details["code"][0] == "2 of 3 tests passed; test 3: the test raised AssertionError"


@pytest.mark.parametrize("row, problem", [
    ({}, "no tests: a function task needs test_list"),
    ({"test_list": "assert f(1)"}, "test_list must be a list of texts"),
    ({"test_list": [1]}, "test_list must be a list of texts"),
    ({"test_list": []}, "test_list is empty"),
    ({"test_list": ["assert f("]}, "test 1 of test_list is no Python"),
    ({"test_list": ["f(1)"], "test_time_limit": 0}, "test_time_limit is 0, must be a number of seconds above 0"),
    ({"test_list": ["f(1)"], "test_time_limit": "1"}, "test_time_limit is '1'"),
    ({"test_list": ["f(1)"], "test_method": "unit"}, "test_method is 'unit', must be 'function' or 'stdio'"),
    ({"test_list": ["f(1)"], "prefix": 3}, "prefix is a int, must be a text"),
    ({"test_method": "stdio"}, "test_input has 0 texts and test_output 0"),
    ({"test_input": ["1", "2"], "test_output": ["1"]}, "test_input has 2 texts and test_output 1"),
])  # fmt: skip
def test_unusable_row_gives_no_verdict(row, problem):
    assert problem in check_row("code", row)
    result = score({"code": 1.0}, ["p"], ["def f(x): return x"], [row])
    assert result.no_verdict == 1 and problem in result.details["code"][0] and result.errors == {"code": 0}


def test_usable_rows():
    assert [check_row("code", row) for row in (*rows_of("humaneval_20.jsonl"), *rows_of("mbpp_20.jsonl"), *CASES)] == [""] * 105


@pytest.mark.parametrize("completion, prefix, program", [
    ("x = 1", "", "x = 1"),
    ("", "", ""),
    (f"So:\n{FENCE}python\nx = 1\n{FENCE}\nand\n{FENCE}python\nx = 2\n{FENCE}\nend", "", "x = 2\n"),
    (f"So:\n{FENCE}python\nx = 1", "", "x = 1"),
    (f"So:\n{FENCE}py\nx = 1\n{FENCE}", "", "x = 1\n"),
    (f"So:\n{FENCE}\nx = 1\n{FENCE}\nend", "", "x = 1\n"),
    (f"{FENCE}python\n  x = 1\n  y = 2\n{FENCE}", "", "x = 1\ny = 2\n"),
    (f"    return 1\n{FENCE}\nDone", f"Here:\n{FENCE}python\ndef f():\n", "def f():\n    return 1\n"),
    ("    return 1\n", "def f():\n", "def f():\n    return 1\n"),
    (f"{FENCE}python\ndef f(): return a\n{FENCE}", f"{FENCE}python\nimport re\na = 1\ndef f():\n    'doc'\n",
     "import re\na = 1\ndef f(): return a\n"),
    (f"{FENCE}python\ndef f(): return a\n{FENCE}", "def f(key, i,\n", "\ndef f(): return a\n"),
])  # fmt: skip
def test_program_of_a_completion(completion, prefix, program):
    assert extract_program(completion, prefix) == program
