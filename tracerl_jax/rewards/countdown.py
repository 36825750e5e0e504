"""The reward `countdown`: 1 for an expression that uses every number once and equals the target, else 0."""

import ast
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

from tracerl_jax.rewards.closing import closing_text
from tracerl_jax.rewards.registry import Verdict, register_reward

MAX_LENGTH = 300  # characters of an expression; Python's parser and the stack get along with these
_SIGNS = {
    "\\times": "*", "\\cdot": "*", "×": "*", "·": "*", "\\div": "/", "÷": "/", "−": "-", "\\left": "", "\\right": "",
    "$": "", "\\,": "", "\\!": "", "[": "(", "]": ")",
}  # fmt: skip
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")


def check(row: Mapping[str, object]) -> str:
    numbers, target = row.get("numbers"), row.get("target")
    if not isinstance(numbers, list) or not numbers or not all(type(number) is int for number in numbers):
        return "field 'numbers' must be a list of integers"
    return "" if type(target) is int else "field 'target' must be an integer"


@register_reward("countdown", check=check)
def countdown(
    prompts: Sequence[str], completions: Sequence[str], *, numbers: Sequence[object] = (),
    target: Sequence[object] = (), **columns,
) -> list[Verdict]:  # fmt: skip
    """See the module. No verdict without usable `numbers` and `target`."""
    nothing = [None] * len(completions)
    return [
        grade(text, given, wanted)
        for text, given, wanted in zip(completions, numbers or nothing, target or nothing, strict=True)
    ]


def grade(completion: str, numbers: object, target: object) -> Verdict:
    problem = check({"numbers": numbers, "target": target})
    if problem:
        return Verdict(None, problem)
    expression = _plain(closing_text(completion))
    try:
        value, used = _evaluate(expression)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError) as error:
        return Verdict(0.0, f"no expression: {error}"[:200])
    if sorted(used) != sorted(numbers):
        return Verdict(0.0, f"uses {sorted(used)} instead of {sorted(numbers)}")
    return Verdict(float(value == target), f"{expression} = {value}")


def _plain(text: str) -> str:
    """The expression as Python writes it, without what follows an equals sign."""
    if len(text) > MAX_LENGTH:
        return text
    text = _FRACTION.sub(r"((\1)/(\2))", text)
    for sign, plain in _SIGNS.items():
        text = text.replace(sign, plain)
    return text.partition("=")[0].strip()


def _evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """(value, the numbers in it). Never evaluates anything but + - * / of whole numbers."""
    if len(expression) > MAX_LENGTH:
        raise ValueError(f"{len(expression)} characters, more than {MAX_LENGTH}")
    used: list[int] = []

    def value(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int() as number) if not isinstance(number, bool):
                used.append(number)
                return Fraction(number)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return value(left) - value(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return value(left) * value(right)
            case ast.BinOp(left=left, op=ast.Div(), right=right):
                return value(left) / value(right)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
        raise ValueError(f"{type(node).__name__} is not allowed")

    return value(ast.parse(expression, mode="eval").body), used
