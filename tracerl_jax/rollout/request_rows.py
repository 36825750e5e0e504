"""Rows of a prompts file, and prompts as text, to requests."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

from tracerl_jax.data.jsonl import BadRows, read_jsonl
from tracerl_jax.errors import DataError, UserError
from tracerl_jax.interop.tokenizer import render_chat
from tracerl_jax.rollout.engine import Engine
from tracerl_jax.rollout.options import Request, SamplingOptions

OPTIONS = tuple(field.name for field in dataclasses.fields(SamplingOptions))
# What other programs call our decoding fields.
OTHER_NAMES = {
    "remasking_strategy": "strategy", "dynamic_threshold": "threshold", "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens", "steps_per_block": "denoising_steps", "temp": "temperature",
}  # fmt: skip
ALIKE = 0.8  # difflib's measure above which a column is taken for a misspelt field


class RequestRow(NamedTuple):
    columns: dict[str, Any]  # as they were read, and `line`
    request: Request  # of the first sample


def options_of(values: Mapping[str, Any]) -> SamplingOptions:
    """The decoding fields among `values` that are not None; the others have their defaults. Raises ConfigError."""
    return SamplingOptions(**{name: values[name] for name in OPTIONS if values.get(name) is not None})


def read_requests(
    path: str, defaults: SamplingOptions, engine: Engine, tokenizer, *, raw: bool = False, on_bad_row: str = "fail"
) -> list[RequestRow]:
    """The rows of a JSONL file, each with `prompt` or `prompt_ids` and any decoding fields, which override `defaults`.

    Raises DataError naming file and line for a row that is none: no prompt, a field that looks like a misspelt
    decoding field, or a request that the engine would refuse; and where `defaults` are what it would refuse, an error
    that says so. Other columns are kept.
    """
    bad, found = BadRows(on_bad_row), []
    wrong_defaults = _wrong(engine, defaults)
    for line, row in read_jsonl(path, on_bad_row=on_bad_row):
        try:
            _refuse_misspelt(row)
            options = options_of({**dataclasses.asdict(defaults), **{k: v for k, v in row.items() if v is not None}})
            request = Request(_prompt_ids(row, tokenizer, raw), options)
            engine.check(request, "the row")
        except UserError as error:
            if wrong_defaults and not row.keys() & set(OPTIONS):
                raise wrong_defaults from error  # of every such row
            bad.add(f"{path}:{line}: {error}", "correct the row")
            continue
        found.append(RequestRow({**row, "line": line}, request))
    bad.report(len(found))
    if not found:
        raise DataError(f'{path}: holds no usable row; write rows such as {{"prompt": "What is 2+2?"}}')
    return found


def _wrong(engine: Engine, defaults: SamplingOptions) -> UserError | None:
    """What the engine has against `defaults`, whatever the prompt."""
    try:
        engine.check(Request([int(engine.model.config.mask_token_id == 0)], defaults), "the decoding flags")
    except UserError as error:
        return error
    return None


def encode_prompt(text: str, tokenizer, *, raw: bool = False) -> list[int]:
    """Ids of a user message in the tokenizer's chat template, or of the text as it is when `raw`. Raises DataError."""
    if not raw:
        if not tokenizer.chat_template:
            raise DataError("the prompt needs a chat template, which the tokenizer does not have; use --raw")
        text = render_chat(tokenizer, [{"role": "user", "content": text}])
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _refuse_misspelt(row: Mapping[str, Any]) -> None:
    for name in row:
        key = name.lower().replace("-", "_")
        if name in OPTIONS:
            continue
        meant = OTHER_NAMES.get(key) or next(iter(difflib.get_close_matches(key, OPTIONS, n=1, cutoff=ALIKE)), None)
        if meant:
            raise DataError(f"unknown field {name!r}; did you mean {meant!r}? (rename the column if it is none)")


def _prompt_ids(row: Mapping[str, Any], tokenizer, raw: bool) -> list[int]:
    ids = row.get("prompt_ids")
    if ids is not None:
        if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
            raise DataError("field 'prompt_ids' must be a list of integers")
        return ids
    text = row.get("prompt")
    if not isinstance(text, str):
        raise DataError(f"field 'prompt' (text) or 'prompt_ids' is needed; the row has {', '.join(row) or 'no fields'}")
    if tokenizer is None:
        raise DataError("field 'prompt' is text but the model folder has no tokenizer; give 'prompt_ids'")
    return encode_prompt(text, tokenizer, raw=raw)
