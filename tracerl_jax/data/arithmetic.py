"""Procedural arithmetic with worked solutions: the quick start's task, unlimited and verifiable.

    question  7+8-5+3=
    response  15;10#13        the running totals, the last one, which is the answer, behind the marker `#`
    response  5;0#3           the same with modulus=10
"""

import random
from dataclasses import dataclass
from functools import partial

from tracerl_jax.data.procedural import Counts, Split, distinct_rows
from tracerl_jax.errors import ConfigError

CHARACTERS = "0123456789+-=;#"


@dataclass(frozen=True)
class Difficulty:
    """Problems have `min_operands`..`max_operands` operands between 1 and 10**digits - 1.

    `subtraction=0` leaves only `+`. With a `modulus` all totals are taken modulo it; without one (0) they never become
    negative. `shortcuts` is how many of a hundred worked solutions leave out the last operand: who imitates them does
    the same, who is rewarded for the true answer can do better. The true answer is always right.
    """

    min_operands: int = 3
    max_operands: int = 3
    digits: int = 2
    subtraction: int = 1
    modulus: int = 0
    shortcuts: int = 0

    def __post_init__(self):
        if not 2 <= self.min_operands <= self.max_operands:
            raise ConfigError(
                f"arithmetic needs 2 <= min_operands <= max_operands, got {self.min_operands} and {self.max_operands}"
            )
        if self.digits < 1:
            raise ConfigError(f"arithmetic needs digits >= 1, got {self.digits}")
        if self.modulus < 0 or self.modulus == 1:
            raise ConfigError(f"arithmetic needs modulus 0 (none) or at least 2, got {self.modulus}")
        if not 0 <= self.shortcuts <= 100:
            raise ConfigError(f"arithmetic needs 0 <= shortcuts <= 100 (per cent), got {self.shortcuts}")


@dataclass(frozen=True)
class ArithmeticOptions(Counts, Difficulty):
    """`options` of the task arithmetic."""

    def rows(self, split: Split, count: int) -> list[dict]:
        return make_problems(self.seed, count, split, self)


def make_problems(seed: int, count: int, split: Split, difficulty: Difficulty) -> list[dict]:
    """`count` different rows `{question, ground_truth_answer, response}`, see `distinct_rows`."""
    return distinct_rows(
        partial(_draw_problem, difficulty=difficulty), seed, count, split,
        name="arithmetic", remedy=f"raise digits or max_operands ({difficulty})",
    )  # fmt: skip


def _draw_problem(draw: random.Random, difficulty: Difficulty) -> dict:
    largest, modulus = 10**difficulty.digits - 1, difficulty.modulus
    total = draw.randint(1, largest)
    question = str(total)
    totals = []
    for _ in range(draw.randint(difficulty.min_operands, difficulty.max_operands) - 1):
        minus = bool(difficulty.subtraction) and (modulus > 0 or total > 0) and draw.random() < 0.5
        operand = draw.randint(1, min(largest, total) if minus and not modulus else largest)
        change = -operand if minus else operand
        question += f"{change:+d}"
        total = (total + change) % modulus if modulus else total + change
        totals.append(str(total))
    cut = len(totals) > 1 and draw.random() * 100 < difficulty.shortcuts
    written = totals[:-1] if cut else totals
    return {
        "question": f"{question}=",
        "ground_truth_answer": str(total),
        "response": ";".join(written[:-1]) + "#" + written[-1],
    }
