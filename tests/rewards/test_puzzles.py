"""The rewards countdown, sudoku and option: right and wrong answers, ways to write them, and rows they cannot judge."""

import numpy as np
import pytest

from tracerl_jax.rewards import check_row, score


def judge(reward, completion, **row):
    result = score({reward: 1.0}, ["prompt"], [completion], [row])
    return result.total[0], result.details[reward][0]


@pytest.mark.parametrize(
    "completion, right",
    [
        ("so \\boxed{(44+19)+35}", True),
        ("\\boxed{1} no, \\boxed{44 + 19 + 35 = 98}", True),
        ("<answer>35+(44+19)</answer>", True),
        ("Answer: 44+19+35", True),
        ("44+19+35", True),
        ("\\boxed{$44 + 19 + 35$}", True),
        ("\\boxed{\\left(44+19\\right)+35}", True),
        ("\\boxed{-(-44)+19+35}", True),
        ("\\boxed{44+19-35}", False),
        ("\\boxed{98}", False),
        ("\\boxed{44+19+35+0}", False),
        ("\\boxed{44+19+19+35-19}", False),
        ("\\boxed{44.0+19+35}", False),
        ("\\boxed{}", False),
        ("", False),
        ("\\boxed{__import__('os').getpid()}", False),
        ("\\boxed{44+19+35 if 1 else 0}", False),
        ("\\boxed{44+19+True*35}", False),
        ("\\boxed{9**9**9**9}", False),
        ("\\boxed{44/(19-19)+35}", False),
        ("\\boxed{" + "(" * 140 + "44" + ")" * 140 + "}", False),
        ("\\boxed{" + "1+" * 100_000 + "1}", False),
        ("\\boxed{44+19+35\0}", False),
    ],
)
def test_countdown(completion, right):
    value, detail = judge("countdown", completion, numbers=[44, 19, 35], target=98)
    assert value == float(right) and detail


@pytest.mark.parametrize(
    "expression", ["8 \\div 2 \\times 3", "8 ÷ 2 × 3", "8/2*3", "\\frac{8}{2} \\cdot 3", "[8/2]·3"]
)
def test_countdown_signs(expression):
    assert judge("countdown", f"\\boxed{{{expression}}}", numbers=[8, 2, 3], target=12)[0] == 1


def test_countdown_is_exact():
    assert judge("countdown", "\\boxed{7*1/3*3}", numbers=[7, 1, 3, 3], target=7)[0] == 1
    assert judge("countdown", "\\boxed{10/3}", numbers=[10, 3], target=3)[0] == 0


@pytest.mark.parametrize(
    "puzzle, completion, right",
    [
        ("1230041020430321", "<answer>\n1234\n3412\n2143\n4321\n</answer>", True),
        ("0" * 16, "1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 1", True),  # any grid that keeps to the rules
        ("0" * 16, "\\boxed{1234|3412|2143|4321}", True),
        ("2" + "0" * 15, "<answer>1234 3412 2143 4321</answer>", False),
        ("0" * 16, "<answer>1234 3412 2143 4312</answer>", False),
        ("0" * 16, "<answer>1234 2341 3412 4123</answer>", False),  # rows and columns, but no boxes
        ("0" * 16, "<answer>5234 3452 2543 4325</answer>", False),
        ("0" * 16, "<answer>0000 0000 0000 0000</answer>", False),
        ("0" * 16, "<answer>1234</answer>", False),
        ("0" * 16, "the grid 1234 3412 2143 4321 has 4 rows", False),
        ("0" * 16, "", False),
        ("0" * 16, "<answer>１234 3412 2143 4321</answer>", False),
    ],
)
def test_sudoku(puzzle, completion, right):
    value, detail = judge("sudoku", completion, puzzle=puzzle)
    assert value == float(right) and detail


@pytest.mark.parametrize(
    "completion, right",
    [
        ("The answer is B because it is hot.", True),
        ("\\boxed{B}", True),
        ("\\boxed{b}", True),
        ("\\boxed{\\text{(B)}}", True),
        ("\\boxed{\\textbf{B}}", True),
        ("\\boxed{B. yes}", True),
        ("\\boxed{yes}", True),
        ("<answer>option B</answer>", True),
        ("The answer is (B).", True),
        ("**B**", True),
        ("\\boxed{A}", False),
        ("\\boxed{B and A}", False),
        ("\\boxed{no}", False),
        ("B is tempting, A is true", False),
        ("", False),
    ],
)
def test_option(completion, right):
    value, detail = judge("option", completion, ground_truth_answer="B", choices=["no", "yes"])
    assert value == float(right) and detail


@pytest.mark.parametrize(
    "reward, row, problem",
    [
        ("countdown", {"target": 3}, "field 'numbers' must be a list of integers"),
        ("countdown", {"numbers": [1, "2"], "target": 3}, "field 'numbers' must be a list of integers"),
        ("countdown", {"numbers": [], "target": 3}, "field 'numbers' must be a list of integers"),
        ("countdown", {"numbers": [1, 2], "target": "3"}, "field 'target' must be an integer"),
        ("sudoku", {}, "field 'puzzle' must be a text of 16 or 81 digits"),
        ("sudoku", {"puzzle": "1" * 15}, "field 'puzzle' must be a text of 16 or 81 digits"),
        ("option", {}, "field 'ground_truth_answer' must be the letter of an option, it is None"),
        ("option", {"ground_truth_answer": 2}, "must be the letter of an option, it is 2"),
        ("reasoning_gym", {"generator": "x"}, "fields 'generator' and 'entry' must be those of a row"),
    ],
)
def test_rows_that_cannot_be_judged_give_no_verdict(reward, row, problem):
    assert problem in check_row(reward, row)
    value, detail = judge(reward, "\\boxed{B}", **row)
    assert np.isnan(value) and problem in detail
