"""The countdown game: reach a target with all of some numbers and + - * /. The reward `countdown` checks answers."""

import random
from dataclasses import dataclass

from tracerl_jax.data.procedural import Counts, Split, distinct_rows
from tracerl_jax.data.questions import countdown_row
from tracerl_jax.errors import ConfigError


@dataclass(frozen=True)
class CountdownOptions(Counts):
    """`min_numbers`..`max_numbers` numbers between 1 and `largest`; the target lies between 10 and `largest_target`."""

    min_numbers: int = 3
    max_numbers: int = 4
    largest: int = 99
    largest_target: int = 100

    def __post_init__(self):
        super().__post_init__()
        if not 2 <= self.min_numbers <= self.max_numbers <= 8:
            raise ConfigError(
                f"countdown needs 2 <= min_numbers <= max_numbers <= 8, got {self.min_numbers} and {self.max_numbers}"
            )
        if self.largest < 5 or self.largest_target < 10:
            raise ConfigError(
                f"countdown needs largest >= 5 and largest_target >= 10, got {self.largest} and {self.largest_target}"
            )

    def rows(self, split: Split, count: int) -> list[dict]:
        """Rows of `countdown_row` with a `response` that is right."""
        return distinct_rows(
            self._draw, self.seed, count, split, name="countdown", remedy=f"raise largest or max_numbers ({self})"
        )

    def _draw(self, source: random.Random) -> dict:
        while True:
            count = source.randint(self.min_numbers, self.max_numbers)
            numbers = [source.randint(1, self.largest) for _ in range(count)]
            target, expression = _combine(source, [(number, str(number)) for number in numbers])
            if 10 <= target <= self.largest_target:
                return {**countdown_row(numbers, target), "response": f"\\boxed{{{expression}}}"}


def _combine(source: random.Random, parts: list[tuple[int, str]]) -> tuple[int, str]:
    """A positive whole number made of all parts, and how."""
    while len(parts) > 1:
        source.shuffle(parts)
        (a, left), (b, right), *rest = parts
        choices = [(a + b, "+"), (a * b, "*")]
        if a > b:
            choices.append((a - b, "-"))
        if a % b == 0:
            choices.append((a // b, "/"))
        value, sign = source.choice(choices)
        parts = [(value, f"({left}{sign}{right})"), *rest]
    value, expression = parts[0]
    return value, expression.removeprefix("(").removesuffix(")")
