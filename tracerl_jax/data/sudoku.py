"""Sudoku of 4x4 or 9x9 cells. The reward `sudoku` accepts every grid that keeps to the rules and the given cells."""

import random
from dataclasses import dataclass

from tracerl_jax.data.procedural import Counts, Split, distinct_rows
from tracerl_jax.errors import ConfigError


@dataclass(frozen=True)
class SudokuOptions(Counts):
    """Grids of `size` x `size` cells (4 or 9) of which `min_blanks`..`max_blanks` are to be filled in."""

    size: int = 4
    min_blanks: int = 6
    max_blanks: int = 8

    def __post_init__(self):
        super().__post_init__()
        if self.size not in (4, 9):
            raise ConfigError(f"sudoku needs size 4 or 9, got {self.size}")
        if not 1 <= self.min_blanks <= self.max_blanks <= self.size**2:
            raise ConfigError(
                f"sudoku needs 1 <= min_blanks <= max_blanks <= {self.size**2}, got {self.min_blanks} and "
                f"{self.max_blanks}"
            )

    def rows(self, split: Split, count: int) -> list[dict]:
        """Rows `{question, puzzle, ground_truth_answer, response}`; a grid is a text of digits, row by row, 0 blank."""
        return distinct_rows(
            self._draw, self.seed, count, split, name="sudoku", remedy=f"raise max_blanks ({self})"
        )

    def _draw(self, source: random.Random) -> dict:
        solution = _solved_grid(source, self.size)
        blanks = set(source.sample(range(self.size**2), source.randint(self.min_blanks, self.max_blanks)))
        puzzle = "".join("0" if i in blanks else digit for i, digit in enumerate(solution))
        question = (
            f"Solve this {self.size}x{self.size} sudoku; 0 is an empty cell:\n{_lines(puzzle, self.size)}\n"
            f"Every row, column and box must hold each of 1 to {self.size} once. Write the solved grid in the same "
            "form between <answer> and </answer>."
        )
        response = f"<answer>\n{_lines(solution, self.size)}\n</answer>"
        return {"question": question, "puzzle": puzzle, "ground_truth_answer": solution, "response": response}


def _solved_grid(source: random.Random, size: int) -> str:
    """The cyclic grid with digits, rows (inside bands and whole bands) and columns in random order."""
    box = int(size**0.5)

    def order() -> list[int]:
        bands = source.sample(range(box), box)
        return [band * box + i for band in bands for i in source.sample(range(box), box)]

    digits, rows, columns = source.sample(range(1, size + 1), size), order(), order()
    return "".join(str(digits[(row % box * box + row // box + column) % size]) for row in rows for column in columns)


def _lines(grid: str, size: int) -> str:
    return "\n".join(grid[i : i + size] for i in range(0, len(grid), size))
