"""Questions that are put together from parts: options with letters, numbers and a target."""

import string
from collections.abc import Sequence


def option_row(question: str, choices: Sequence[str], answer: int) -> dict:
    """A multiple-choice question; `answer` is the position of the right choice."""
    letters = string.ascii_uppercase[: len(choices)]
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
    return {
        "question": "\n".join([question, *lines]), "ground_truth_answer": letters[answer], "choices": list(choices)
    }  # fmt: skip


def countdown_row(numbers: Sequence[int], target: int) -> dict:
    """Reach the target with every number once. The reward `countdown` reads `numbers` and `target`."""
    shown = ", ".join(map(str, numbers))
    question = (
        f"Use the numbers {shown}, each exactly once, and the operations +, -, *, / to make an expression that equals "
        f"{target}. Think step by step and put the expression in \\boxed{{}}."
    )
    return {
        "question": question, "ground_truth_answer": str(target), "numbers": list(numbers), "target": target
    }  # fmt: skip
