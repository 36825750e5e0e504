"""The rewards `code` and `code_share`: judged cases, real tasks, programs that would judge themselves, rows."""

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


STYLES = [("humaneval", "continuation"), ("humaneval", "whole program"), ("humaneval", "open block"), ("mbpp", "block")]


@pytest.mark.parametrize("task, style", STYLES)
def test_reference_solutions_pass(task, style):
    assert failing(rows_of(f"{task}_20.jsonl"), style) == {}


def test_wrong_solutions_fail():
    rows = rows_of("humaneval_20.jsonl")
    graded = code.grade(["    return None" for _ in rows], rows)
    assert [row["task_id"] for row, result in zip(rows, graded, strict=True) if all(result.passed)] == []


@pytest.mark.slow
@pytest.mark.parametrize("task, style", STYLES)
def test_all_reference_solutions_pass(task, style):
    """Of a whole data set: TEST_HUMANEVAL, TEST_MBPP name JSONL files with the fields of humaneval_20 and mbpp_20."""
    variable = f"TEST_{task.upper()}"
    if variable not in os.environ:
        pytest.skip(f"{variable} does not name a file")
    assert failing(rows_of(os.environ[variable]), style) == {}


def failing(rows: list[dict], style: str) -> dict[object, str]:
    """Reference solutions that fail, and why, by the task's number."""
    graded = code.grade(
        [answer(row, style) for row in rows], [ours(row) if style == "open block" else row for row in rows]
    )
    return {row["task_id"]: one.detail for row, one in zip(rows, graded, strict=True) if not all(one.passed)}


def answer(row: dict, style: str) -> str:
    if style == "block":
        return f"Here it is:\n{FENCE}python\n{row['code']}\n{FENCE}\nDone."
    if style == "whole program":
        return f"{FENCE}python\n{row['prompt']}{row['canonical_solution']}\n{FENCE}"
    return row["canonical_solution"]


def ours(row: dict) -> dict:
    """A row of HumanEval in the format of dLLM-RL: the prefix opens a block, one test that calls its own check."""
    return {
        "question": "Complete this code.", "prefix": f"Here it is:\n{FENCE}python\n{row['prompt']}",
        "test_time_limit": 2, "test_method": "function", "test_list": [f"{row['test']}\n\ncheck({row['entry_point']})"],
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


@pytest.mark.parametrize("test", """
assert f(1) == 2
assert 2 == f(1)
assert f(1) in [2, 3]
assert not f(1) != 2
assert f(1) < 3
assert abs(f(1) - 3.14) < 1e-6
assert __import__("math").isclose(f(1), 3.14)
assert f(1) == [1, 2]
assert isinstance(f(1), int)
assert [f(1)] == [2]
assert {"a": f(1)} == {"a": 2}
""".split("\n")[1:-1])  # fmt: skip
def test_object_that_agrees_to_everything_gets_nothing(test):
    (graded,) = code.grade([ALWAYS], [{"test_list": [test], "test_time_limit": 0.5}])
    assert graded.passed == (False,)


def pairs(text: str) -> list[tuple[str, str]]:
    """(program, test), which a line of `--` parts."""
    return [tuple(part.strip() for part in pair.split("\n--\n")) for pair in text.split("\n====\n")]


@pytest.mark.parametrize("program, test", pairs("""
def f(x): return 7
abs = len = lambda *a: 0
--
assert abs(f(1) - 3.14) < 1e-6
====
def f(x): return 7
def check(f): pass
--
def check(g):
    assert g(1) == 2
check(f)
====
def f(x): return 7
import math
math.isclose = lambda *a: True
--
assert math.isclose(f(1), 3.14)
====
def f(x): return 7
class math:
    isclose = lambda *a: True
--
assert math.isclose(f(1), 3.14)
====
def f(x): return 7
AssertionError = isinstance = sorted = lambda *a: True
--
assert isinstance(f(1), str)
====
def f(x): raise AssertionError
--
try:
    f(1)
except ValueError:
    pass
====
import os
def f(x): os._exit(0)
--
try:
    f(1)
except BaseException:
    pass
====
def f(x):
    while True: pass
--
try:
    f(1)
except BaseException:
    pass
====
def f(g):
    g.__globals__["wanted"] = 7
    return 7
--
wanted = 2
assert f(lambda: 1) == wanted
====
def f(g):
    g.__self__.clear()
    return []
--
wanted = [2]
assert f(wanted.append) == wanted
"""))  # fmt: skip
def test_program_does_not_decide_about_its_reward(program, test):
    (graded,) = code.grade([program], [{"test_list": [test], "test_time_limit": 0.5}])
    assert graded.passed == (False,)


def test_helpers_of_the_problem_are_not_the_programs():
    """HumanEval/32 checks with `poly`, which its prompt defines: a program cannot define it away."""
    (row,) = [row for row in rows_of("humaneval_20.jsonl") if row["entry_point"] == "find_zero"]
    cheat = f"{FENCE}python\ndef poly(xs, x): return 0.0\ndef find_zero(xs): return 0.0\n{FENCE}"
    (graded,) = code.grade([cheat], [row])
    assert graded.passed == (False,)


@pytest.mark.parametrize("program, test", pairs("""
class Stack:
    def __init__(self): self.a = []
    def push(self, x): self.a.append(x)
    def __len__(self): return len(self.a)
--
s = Stack(); s.push(1); s.push(2)
assert len(s) == 2 and s.a == [1, 2]
====
class V:
    def __init__(self, x): self.x = x
    def __add__(self, o): return V(self.x + o.x)
    def __eq__(self, o): return self.x == o.x
--
assert V(1) + V(2) == V(3) and V(1) != V(2)
====
from dataclasses import dataclass
@dataclass
class P:
    x: int
--
assert P(1) == P(1) and P(2).x == 2
====
def f(a): a.sort(); a.append(9)
--
a = [3, 1]
f(a)
assert a == [1, 3, 9]
====
def f(n):
    for i in range(n): yield i
--
assert list(f(3)) == [0, 1, 2] and next(f(1)) == 0 and 2 in f(3)
====
def f(g, xs): return [g(x) for x in xs]
--
assert f(lambda x: x * 2, (1, 2)) == [2, 4]
====
def f(n): return lambda x: x + n
--
assert f(2)(3) == 5
====
def f(): raise ValueError("no")
--
try:
    f()
    assert False
except ValueError as e:
    assert str(e) == "no"
====
class Odd(KeyError): pass
def f(): raise Odd("x")
--
try:
    f()
    assert False
except KeyError:
    pass
====
def sum(a, b): return a - b
--
assert sum(10, 15) == -5
====
import numpy as np
def f(): return np.float64(1.5), np.int64(2), np.bool_(True)
--
assert f() == (1.5, 2, True)
====
def f(n): return 1 if n == 0 else 1 + f(n - 1)
--
assert f(980) == 981
====
def f(x): return x
--
for x in (2**200, -1.5, float("inf"), 1j, b"a\\xff", {1: (2,)}, {(1, 2)}, None, "a\\ud800", range(3)):
    assert f(x) == x and type(f(x)) is type(x)
====
def f(x): return x
--
from collections import Counter, OrderedDict, deque
from datetime import date, timedelta
from decimal import Decimal
from fractions import Fraction
dates = date(2024, 2, 29), timedelta(1, 2)
for x in (*dates, Decimal("0.1"), Fraction(1, 3), Counter("aab"), OrderedDict(a=1), deque([1])):
    assert f(x) == x and type(f(x)) is type(x)
"""))  # fmt: skip
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
        {"code": 1.0, "code_share": 0.0}, ["p"] * 3,
        ["def f(x): return x + 1", "def f(x): return 0", "def f(x): return x + 1"],
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
    rows = [*rows_of("humaneval_20.jsonl"), *rows_of("mbpp_20.jsonl"), *CASES]
    assert {check_row("code", row) for row in rows} == {""}


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
