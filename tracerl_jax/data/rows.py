"""Rows of a source, checked and completed: what tasks, supervised training and commands read."""

import itertools
import os
from collections.abc import Callable, Sequence

from tracerl_jax.data.jsonl import read_jsonl
from tracerl_jax.errors import DataError

SOURCE = "_source"  # column: where the row comes from, for messages
KIND = "_kind"  # column: which text of a template goes around the question, see data/templates.py


def load_rows(
    path: str | os.PathLike,
    *,
    one_of: Sequence[str] = (),
    on_bad_row: str = "fail",
    limit: int | None = None,
    check: Callable[[dict], str] = lambda row: "",
) -> list[dict]:
    """Rows of a source (data/sources.py), with `question` and `_source` set; at most the first `limit`.

    Bad rows are those of `read_jsonl`, rows without a text in `question` or `prompt` (unless they are token ids, as
    `tracerl generate` writes them), rows without any of the fields `one_of`, and those of which `check` says what is
    wrong. Raises `DataError` for them (or skips them), and when no row is left.
    """

    def problem(row: dict) -> str:
        question = row.get("question", row.get("prompt"))
        if not (isinstance(question, str) and question.strip()) and row.get("prompt_ids") is None:
            return "no text in field 'question' (or 'prompt')"
        if one_of and all(row.get(field) is None for field in one_of):
            return f"missing field {' or '.join(map(repr, one_of))} (it has {', '.join(row)})"
        return check(row)

    lines = itertools.islice(read_jsonl(path, on_bad_row=on_bad_row, check=problem), limit)
    rows = [{"question": row.get("prompt"), **row, SOURCE: f"{path}:{line}"} for line, row in lines]
    if not rows:
        example = '{"question": "1+1=", "ground_truth_answer": "2"}'
        raise DataError(f"{path}: holds no usable row; each line must be a JSON object such as {example}")
    return rows
