"""From rows to token ids: prompts for decoding, prompt and response for supervised training (data/templates.py)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from tracerl_jax.data.jsonl import BadRows
from tracerl_jax.data.rows import SOURCE
from tracerl_jax.data.templates import get_template, kind_of, render_prompt
from tracerl_jax.errors import ConfigError, DataError
from tracerl_jax.interop.tokenizer import mask_token_id


@dataclass(frozen=True, eq=False)
class Problem:
    """A row ready for decoding. Rows are kept or dropped whole."""

    index: int  # position among the task's rows
    prompt_text: str
    prompt_ids: np.ndarray  # [p] int32
    columns: dict  # the row, for rewards
    prefix: str = ""  # end of the prompt that rewards see as the beginning of the response


@dataclass(frozen=True, eq=False)
class Example:
    """A row ready for supervised training."""

    index: int  # position among the rows
    prompt_ids: np.ndarray  # [p] int32
    response_ids: np.ndarray  # [r] int32, EOS included: it is trained
    step_map: np.ndarray | None  # [r] int32, 1-based decoding order, where the row has one
    source: str = "row"  # where the row comes from, for messages


class _Unusable(Exception):
    """A row that cannot be used: (what is wrong, remedy)."""


def encode_prompts(
    rows: Sequence[dict], tokenizer, template: str, max_prompt_tokens: int, on_bad_row: str = "fail",
    prefix: str | None = None,
) -> list[Problem]:  # fmt: skip
    """Prompts of all rows. No special tokens are added to what the template says.

    `prefix` is what every response is made to begin with; None: the row's own `prefix` for a function to complete (none
    where the template begins with thinking).
    A prompt that is empty, longer than `max_prompt_tokens` or contains the mask token is a bad row: `DataError`, or
    skipped and counted. Raises `DataError` when no row is left.
    """
    mask_id = mask_token_id(tokenizer)

    def encode(index: int, row: dict) -> Problem:
        begin = _prefix(row, template, prefix)
        text = render_prompt(_text(row, "question"), tokenizer, template, kind_of(row), begin)
        ids = _tokenize(tokenizer, text)
        _check_prompt(ids, mask_id, max_prompt_tokens)
        return Problem(index, text, np.array(ids, np.int32), row, begin)

    return _encode_rows(rows, encode, on_bad_row)


def encode_sft(
    rows: Sequence[dict],
    tokenizer,
    template: str,
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
    on_bad_row: str = "fail",
    prefix: str | None = None,
) -> list[Example]:
    """Prompt and response ids of all rows, the tokenizer's EOS appended to the response.

    Prompt and response are tokenized apart, so that the border is where decoding has it. A row with `prompt_ids` and
    `ids` (what `tracerl generate` writes) is taken as it is: not tokenized again, nothing appended. A `step_map` must
    have one entry per response token; the appended EOS comes one step after the last. A response that begins with the
    prefix of `encode_prompts` is cut there; before another one the prompt has no prefix.
    Bad rows are those of `encode_prompts`, and rows without response, with one of more than `max_response_tokens` (EOS
    included), or with an unusable step map: `DataError`, or skipped and counted. Raises `DataError` when none is left.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no EOS token, which supervised training appends to every response")
    mask_id = mask_token_id(tokenizer)

    def encode(index: int, row: dict) -> Example:
        prompt, response = _prompt_and_response(row, tokenizer, template, prefix)
        _check_prompt(prompt, mask_id, max_prompt_tokens)
        steps = row.get("step_map")
        if steps is not None and (not _is_ints(steps, 1) or len(steps) != len(response)):
            raise _Unusable(f"field 'step_map' must hold {len(response)} positive integers, one a token", "correct it")
        if row.get("ids") is None:
            response = [*response, tokenizer.eos_token_id]
            steps = None if steps is None else [*steps, max(steps, default=0) + 1]
        if len(response) > max_response_tokens:
            raise _Unusable(
                f"the response has {len(response)} tokens with EOS, the limit is {max_response_tokens}",
                "shorten it or raise the limit",
            )
        if mask_id in response:
            raise _Unusable("the response contains the mask token", "remove it")
        steps = None if steps is None else np.array(steps, np.int32)
        return Example(index, np.array(prompt, np.int32), np.array(response, np.int32), steps, _source(row, index))

    return _encode_rows(rows, encode, on_bad_row)


Encoded = TypeVar("Encoded")


def _encode_rows(rows: Sequence[dict], encode: Callable[[int, dict], Encoded], on_bad_row: str) -> list[Encoded]:
    bad = BadRows(on_bad_row)
    kept = []
    for index, row in enumerate(rows):
        try:
            kept.append(encode(index, row))
        except _Unusable as unusable:
            reason, remedy = unusable.args
            bad.add(f"{_source(row, index)}: {reason}", remedy)
    bad.report(len(kept))
    if not kept:
        raise DataError(f"none of the {len(rows)} rows can be used: {'; '.join(bad.reasons[:1]) or 'there are none'}")
    return kept


def _source(row: dict, index: int) -> str:
    return row.get(SOURCE) or f"row {index + 1}"


def _prefix(row: dict, template: str, prefix: str | None) -> str:
    if prefix is not None:
        return prefix
    if kind_of(row) != "function" or get_template(template).thinking or row.get("prefix") is None:
        return ""
    return _text(row, "prefix")


def _prompt_and_response(
    row: dict, tokenizer, template: str, prefix: str | None
) -> tuple[list[int], list[int]]:
    if row.get("ids") is None:
        response, begin = _text(row, "response"), _prefix(row, template, prefix)
        begin = begin if response.startswith(begin) else ""
        prompt = render_prompt(_text(row, "question"), tokenizer, template, kind_of(row), begin)
        return _tokenize(tokenizer, prompt), _tokenize(tokenizer, response.removeprefix(begin))
    for name in ("prompt_ids", "ids"):
        if not _is_ints(row.get(name), 0) or not row[name] or max(row[name]) >= len(tokenizer):
            raise _Unusable(f"field {name!r} must be a list of token ids below {len(tokenizer)}", "correct it")
    return row["prompt_ids"], row["ids"]


def _text(row: dict, name: str) -> str:
    if not isinstance(row.get(name), str):
        raise _Unusable(f"no text in field {name!r}", "add it")
    return row[name]


def _is_ints(values: object, minimum: int) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= minimum for value in values)


def _tokenize(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _check_prompt(ids: Sequence[int], mask_id: int | None, limit: int) -> None:
    if not ids:
        raise _Unusable("the prompt is empty", "correct the row")
    if len(ids) > limit:
        raise _Unusable(f"the prompt has {len(ids)} tokens, the limit is {limit}", "shorten it or raise the limit")
    if mask_id in ids:
        raise _Unusable("the prompt contains the mask token", "remove it")
