"""From the JSON of a request to what the engine is asked: pure functions, every refusal an ApiError with status 400.

A field is read, ignored because it cannot change the answer, accepted at the value that asks for nothing, or refused.
Fields that are not listed here are refused too, as OpenAI's servers do: a misspelt one would be missed silently.
"""

import dataclasses
import difflib
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tracerl_jax.errors import UserError
from tracerl_jax.interop.tokenizer import render_chat
from tracerl_jax.rollout.options import Request, SamplingOptions
from tracerl_jax.rollout.request_rows import OTHER_NAMES
from tracerl_jax.serve.errors import ApiError, bad_request
from tracerl_jax.serve.options import ServeConfig

# A client's name -> the field of SamplingOptions. The options' own names are known as well.
ALIASES = {name: OTHER_NAMES[name] for name in ("remasking_strategy", "dynamic_threshold", "max_completion_tokens")}
OPTIONS = {field.name: field.name for field in dataclasses.fields(SamplingOptions)} | ALIASES
OWN = ("model", "stream", "stream_options", "n", "stop", "logprobs", "return_step_map")
KINDS = {"chat": ("messages", "top_logprobs"), "completions": ("prompt",)}
# Who asks, and how the answer is kept or billed.
IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
)  # fmt: skip
# Would change the answer in ways that are not there; these values do not. None is always accepted.
NEUTRAL = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "echo": (False,), "suffix": ("",),
    "best_of": (1,), "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False),
    "functions": ([],), "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "audio": (), "prediction": (), "reasoning_effort": (), "verbosity": (),
    "web_search_options": (),
}  # fmt: skip

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MAX_STOPS, MAX_STOP_CHARACTERS, MAX_STOP_IDS = 16, 256, 16


@dataclass(frozen=True)
class Call:
    """One HTTP request, understood."""

    kind: str  # a key of KINDS
    prompts: tuple[tuple[int, ...], ...]
    n: int
    options: tuple[SamplingOptions, ...]  # of every prompt
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    logprobs: bool
    return_step_map: bool

    def requests(self) -> list[Request]:
        """The samples in the order of their `index`: all of the first prompt, then of the next."""
        return [
            Request(prompt, options, sample)
            for prompt, options in zip(self.prompts, self.options, strict=True)
            for sample in range(self.n)
        ]


def parse_json(body: bytes) -> dict:
    """The object that a body holds."""

    def refuse(constant: str):
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError:
        raise bad_request("the body is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad_request("the body must be a JSON object")
    return value


def parse_call(
    kind: str, body: Mapping, tokenizer, config: ServeConfig, check: Callable[[Request, str], None]
) -> Call:
    """What a body asks. `check` is the engine's.

    Raises ApiError 400, or 404 for a model that is not served.
    """
    body = {name: value for name, value in body.items() if value is not None}
    _refuse_others(kind, body)
    model = _field(body, "model", str, config.model_name)
    if model != config.model_name:
        raise ApiError(
            404, f"the model {model!r} does not exist; this server has {config.model_name!r}", param="model",
            code="model_not_found",
        )  # fmt: skip
    stream = _field(body, "stream", bool, False)
    n = _field(body, "n", int, 1)
    prompts = (_chat_prompt if kind == "chat" else _completion_prompts)(body, tokenizer, config)
    if n < 1 or n * len(prompts) > config.max_samples:
        raise bad_request(
            f"n is {n} for {len(prompts)} prompts; it must be at least 1 and together at most {config.max_samples}", "n"
        )
    call = Call(
        kind, prompts, n, tuple(_options(body, prompt, config) for prompt in prompts), _stops(body), stream,
        _include_usage(body, stream), _logprobs(kind, body), _field(body, "return_step_map", bool, False),
    )  # fmt: skip
    for prompt, options in zip(call.prompts, call.options, strict=True):
        try:
            check(Request(prompt, options), "the request")
        except UserError as error:
            raise bad_request(str(error)) from None
    return call


def _refuse_others(kind: str, body: Mapping) -> None:
    known = (*OPTIONS, *OWN, *KINDS[kind])
    for name, value in body.items():
        if name in known or name in IGNORED:
            continue
        if name in NEUTRAL:
            if value not in NEUTRAL[name]:
                raise bad_request(f"{name} is not supported by this server; leave it out", name, "unsupported_field")
            continue
        close = difflib.get_close_matches(name, known, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise bad_request(f"unknown field {name!r}{meant}", name, "unknown_field")


def _field(body: Mapping, name: str, kind: type, default):
    value = body.get(name, default)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {str: "a text", bool: "true or false", int: "an integer", list: "a list", dict: "an object"}
        raise bad_request(f"{name} must be {names[kind]}", name)
    return value


# Prompts


def _chat_prompt(body: Mapping, tokenizer, config: ServeConfig) -> tuple[tuple[int, ...], ...]:
    messages = _field(body, "messages", list, None)
    if not messages:
        raise bad_request("messages must hold at least one message", "messages")
    if not tokenizer.chat_template:
        raise bad_request("the model has no chat template; use /v1/completions", "messages")
    rendered = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    try:
        text = render_chat(tokenizer, rendered)
    except Exception as error:  # a template may raise whatever it likes, on roles that do not alternate say
        raise bad_request(f"the model's chat template refuses the messages: {error}", "messages") from None
    return (_encode(tokenizer, text, "messages", config),)


def _message(message: object, where: str) -> dict:
    if not isinstance(message, dict):
        raise bad_request(f"{where} must be an object with role and content", "messages")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise bad_request(f"{where}: the role must be one of {', '.join(ROLES)}", "messages")
    odd = [name for name, value in message.items() if value and name not in ("role", "content", "name", "refusal")]
    if odd:
        raise bad_request(f"{where}: {odd[0]} is not supported by this server", "messages", "unsupported_field")
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        whole = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
        content = "".join(texts) if whole else None
    if not isinstance(content, str):
        raise bad_request(f"{where}: content must be a text, or a list of parts of type text", "messages")
    return {"role": ROLES[role], "content": content}


def _completion_prompts(body: Mapping, tokenizer, config: ServeConfig) -> tuple[tuple[int, ...], ...]:
    """A text, token ids, or a list of either."""
    prompt = body.get("prompt")
    if isinstance(prompt, str) or _are_ids(prompt):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt or not all(isinstance(p, str) or _are_ids(p) for p in prompt):
        raise bad_request("prompt must be a text, a list of token ids, or a list of one of these; not empty", "prompt")
    if len(prompt) > config.max_samples:  # before they are tokenized
        raise bad_request(f"{len(prompt)} prompts are more than the {config.max_samples} allowed", "prompt")
    return tuple(
        _encode(tokenizer, p, "prompt", config) if isinstance(p, str) else _within(p, "prompt", config) for p in prompt
    )


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int and 0 <= i < 2**31 for i in value)


def _encode(tokenizer, text: str, param: str, config: ServeConfig) -> tuple[int, ...]:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise bad_request(f"{param} holds half of a surrogate pair, which is no character", param) from None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise bad_request(f"{param} is empty", param)
    return _within(ids, param, config)


def _within(ids: list[int], param: str, config: ServeConfig) -> tuple[int, ...]:
    limit = config.max_length - 1
    if config.max_prompt_tokens is not None:
        limit = min(limit, config.max_prompt_tokens)
    if len(ids) > limit:
        raise bad_request(
            f"{param} has {len(ids)} tokens; the limit is {limit}", param, "context_length_exceeded"
        )
    return tuple(ids)


# Options


def _options(body: Mapping, prompt: tuple[int, ...], config: ServeConfig) -> SamplingOptions:
    asked: dict[str, str] = {}  # field of SamplingOptions -> the client's name for it
    for name in body:
        field = OPTIONS.get(name)
        if field in asked and body[asked[field]] != body[name]:
            raise bad_request(f"{asked[field]} and {name} say different things; leave one out", name)
        if field:
            asked[field] = name
    values = {field: body[name] for field, name in asked.items()}
    room = config.max_length - len(prompt)
    if config.max_completion_tokens is not None:
        room = min(room, config.max_completion_tokens)
    values.setdefault("max_tokens", _default_max_tokens(values.get("block_size"), config, room))
    # OpenAI's seeds are signed and of 64 bits. Without one, every request is a new draw.
    seed = values.get("seed", secrets.randbits(32))
    values["seed"] = seed % 2**32 if type(seed) is int else seed
    if isinstance(values.get("stop_ids"), list) and len(values["stop_ids"]) > MAX_STOP_IDS:
        raise bad_request(f"stop_ids holds more than {MAX_STOP_IDS} ids", "stop_ids")
    try:
        options = dataclasses.replace(config.defaults, **values)
    except UserError as error:
        field, _, rest = str(error).partition(" ")
        name = asked.get(field, field)
        raise bad_request(f"{name} {rest}", name) from None
    if options.max_tokens > room:
        name = asked.get("max_tokens", "max_tokens")
        raise bad_request(
            f"{name} is {options.max_tokens} but after a prompt of {len(prompt)} tokens the limit is {room}", name,
            "context_length_exceeded",
        )  # fmt: skip
    if options.block_size is not None and options.block_size not in config.block_sizes:
        allowed = ", ".join(map(str, config.block_sizes))
        raise bad_request(f"block_size is {options.block_size}; this server has {allowed}", "block_size")
    return options


def _default_max_tokens(block_size: object, config: ServeConfig, room: int) -> int:
    limit = min(config.defaults.max_tokens, room)
    if config.whole_blocks is None:
        return limit
    B = block_size if block_size in config.block_sizes else config.defaults.block_size or config.whole_blocks
    return max(limit - limit % B, B)


def _stops(body: Mapping) -> tuple[str, ...]:
    stop = body.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(
        isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARACTERS for s in stops
    ):
        raise bad_request(
            f"stop must be a text or a list of at most {MAX_STOPS}, of 1 to {MAX_STOP_CHARACTERS} characters", "stop"
        )
    return tuple(stops)


def _include_usage(body: Mapping, stream: bool) -> bool:
    options = _field(body, "stream_options", dict, {})
    if options and not stream:
        raise bad_request("stream_options needs stream: true", "stream_options")
    if odd := set(options) - {"include_usage", "include_obfuscation"}:
        raise bad_request(f"stream_options: unknown field {min(odd)!r}", "stream_options", "unknown_field")
    return _field(options, "include_usage", bool, False)


def _logprobs(kind: str, body: Mapping) -> bool:
    """Whether log-probs of the chosen tokens are wanted; those of alternatives are not recorded."""
    value, top = body.get("logprobs", False), body.get("top_logprobs", 0)
    if top != 0:
        raise bad_request("top_logprobs must be 0: only the chosen tokens have log-probs", "top_logprobs")
    if isinstance(value, bool):
        return value
    if kind == "completions" and value in (0, 1):
        return True
    raise bad_request(
        "logprobs must be true or false" + (", 0 or 1" if kind == "completions" else "")
        + ": only the chosen tokens have log-probs", "logprobs",
    )  # fmt: skip
