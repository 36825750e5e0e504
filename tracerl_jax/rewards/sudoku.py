"""The reward `sudoku`: 1 for a full grid that keeps to the rules and to the given cells, else 0."""

import re
from collections.abc import Mapping, Sequence

from tracerl_jax.rewards.closing import closing_text
from tracerl_jax.rewards.registry import Verdict, register_reward

SIZES = {16: 4, 81: 9}  # cells -> rows


def check(row: Mapping[str, object]) -> str:
    puzzle = row.get("puzzle")
    if isinstance(puzzle, str) and len(puzzle) in SIZES and puzzle.isascii() and puzzle.isdigit():
        return ""
    return "field 'puzzle' must be a text of 16 or 81 digits, 0 for an empty cell"


@register_reward("sudoku", check=check)
def sudoku(
    prompts: Sequence[str], completions: Sequence[str], *, puzzle: Sequence[object] = (), **columns
) -> list[Verdict]:
    """See the module. No verdict without a usable `puzzle`."""
    puzzles = puzzle or [None] * len(completions)
    return [grade(text, given) for text, given in zip(completions, puzzles, strict=True)]


def grade(completion: str, puzzle: object) -> Verdict:
    problem = check({"puzzle": puzzle})
    if problem:
        return Verdict(None, problem)
    grid = re.sub(r"[^0-9]", "", closing_text(completion))
    if len(grid) != len(puzzle):
        return Verdict(0.0, f"{len(grid)} digits instead of {len(puzzle)}")
    if any(given not in ("0", cell) for given, cell in zip(puzzle, grid, strict=True)):
        return Verdict(0.0, "a given cell was changed")
    broken = [name for name, group in _groups(grid, SIZES[len(puzzle)]) if len(set(group)) < len(group) or "0" in group]
    largest = str(SIZES[len(puzzle)])
    if broken or max(grid) > largest:
        return Verdict(0.0, f"{broken[0]} breaks the rules" if broken else f"a digit above {largest}")
    return Verdict(1.0, "solved")


def _groups(grid: str, size: int) -> list[tuple[str, list[str]]]:
    """Rows, columns and boxes, with what they are called."""
    box = int(size**0.5)
    cells = [(i // size, i % size, digit) for i, digit in enumerate(grid)]
    return [
        *((f"row {i + 1}", [d for r, _, d in cells if r == i]) for i in range(size)),
        *((f"column {i + 1}", [d for _, c, d in cells if c == i]) for i in range(size)),
        *((f"box {i + 1}", [d for r, c, d in cells if r // box * box + c // box == i]) for i in range(size)),
    ]
