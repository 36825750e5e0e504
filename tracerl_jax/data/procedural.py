"""Tasks that make their own rows: how many, from which seed, and never the same question in both splits."""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tracerl_jax.errors import ConfigError

Split = Literal["train", "test"]

HELD_OUT_SHARE = 5  # one question in five belongs to the test split
MAX_DRAWS = 10_000  # draws in a row without a new question: the split is exhausted


@dataclass(frozen=True)
class Counts:
    """Options of every procedural task; a task adds its own, and `rows`."""

    train_count: int = 20_000
    test_count: int = 500
    seed: int = 0

    def __post_init__(self):
        if min(self.train_count, self.test_count) < 1:
            raise ConfigError(
                f"options need train_count and test_count >= 1, got {self.train_count} and {self.test_count}"
            )
        parent = getattr(super(), "__post_init__", None)
        if parent:
            parent()

    def rows(self, split: Split, count: int) -> list[dict]:
        """`count` rows, a function of the options and the arguments only."""
        raise NotImplementedError


def distinct_rows(
    draw: Callable[[random.Random], dict], seed: int, count: int, split: Split, *, name: str, remedy: str
) -> list[dict]:
    """`count` rows with different questions, a function of the arguments only.

    The splits are disjoint for any seeds and difficulties: a hash of the question decides which one it belongs to.
    Raises `ConfigError`, beginning with `name` and ending in `remedy`, when the split has fewer than `count` questions.
    """
    source = random.Random(seed)
    rows: dict[str, dict] = {}
    misses = 0
    while len(rows) < count:
        row = draw(source)
        question = row["question"]
        if question in rows or split_of(question) != split:
            misses += 1
            if misses == MAX_DRAWS:
                raise ConfigError(
                    f"{name} has only about {len(rows)} {split} questions of this difficulty, {count} were asked for; "
                    f"use fewer or {remedy}"
                )
            continue
        misses = 0
        rows[question] = row
    return list(rows.values())


def split_of(question: str) -> Split:
    return "test" if zlib.crc32(question.encode()) % HELD_OUT_SHARE == 0 else "train"
