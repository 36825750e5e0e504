"""What a body may ask, and how everything else is refused."""

import dataclasses

import pytest

from tracerl_jax.rollout.engine import SamplingOptions
from tracerl_jax.serve.errors import ApiError
from tracerl_jax.serve.options import ServeConfig
from tracerl_jax.serve.protocol import parse_call, parse_json

CONFIG = ServeConfig("tiny", (4, 8), 64, SamplingOptions(max_tokens=16, threshold=0.8), max_samples=8, slots=8)


@pytest.fixture
def parse(tokenizer, engine):
    def parse(kind, **body):
        content = {"messages": [{"role": "user", "content": "hi"}]} if kind == "chat" else {"prompt": "hi"}
        return parse_call(kind, content | body, tokenizer, CONFIG, engine.check)

    return parse


def test_names_of_the_options(parse):
    options = parse(
        "chat", remasking_strategy="low_confidence_static", dynamic_threshold=0.5, max_completion_tokens=7, top_k=3,
        entropy_bound=0.1, block_size=8, denoising_steps=2, temperature=0.5, top_p=0.9, seed=-1, ignore_eos=True,
    ).options[0]  # fmt: skip
    assert options == SamplingOptions(
        "low_confidence_static", 0.5, 0.1, 2, 8, 7, 0.5, 3, 0.9, seed=2**32 - 1, ignore_eos=True
    )


def test_what_is_not_said_comes_from_the_server_and_null_says_nothing(parse):
    options = parse("completions", temperature=None, stop=None, tools=None, logit_bias=None).options[0]
    assert (options.max_tokens, options.threshold, options.temperature) == (16, 0.8, 1.0)
    assert parse("completions", prompt="x" * 60).options[0].max_tokens == 4  # what is left


def test_completions_of_full_attention_are_whole_blocks_where_nothing_is_said(tokenizer, engine):
    config = dataclasses.replace(CONFIG, whole_blocks=4)

    def tokens(**body):
        return parse_call("completions", body, tokenizer, config, engine.check).options[0].max_tokens

    assert (tokens(prompt="hi"), tokens(prompt="x" * 51), tokens(prompt="x" * 51, block_size=8)) == (16, 12, 8)
    assert tokens(prompt="hi", max_tokens=7) == 7  # the engine's to refuse


def test_messages_in_every_form_become_the_template(parse, tokenizer):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "s"}, {"role": "user", "content": parts, "name": "me"}]
    text = tokenizer.decode(parse("chat", messages=messages).prompts[0])
    assert text == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant"


@pytest.mark.parametrize(("prompt", "count"), [("ab", 1), ([1, 2], 1), (["ab", "c"], 2), ([[1], [2, 3]], 2)])
def test_prompts_in_every_form(parse, prompt, count):
    call = parse("completions", prompt=prompt, n=2)
    assert [request.sample_index for request in call.requests()] == [0, 1] * count


def test_fields_that_cannot_change_the_answer_are_ignored(parse):
    parse("chat", user="me", metadata={"a": 1}, store=True, presence_penalty=0, response_format={"type": "text"})


SYSTEM_LATE = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
REFUSED = [
    ("chat", {"temprature": 1}, "temprature", "did you mean temperature"),
    ("chat", {"tools": [{"type": "function"}]}, "tools", "not supported"),
    ("chat", {"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ("chat", {"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
    ("chat", {"prompt": "x"}, "prompt", "unknown field"),
    ("chat", {"messages": []}, "messages", "at least one"),
    ("chat", {"messages": ["hi"]}, "messages", "messages[0] must be an object"),
    ("chat", {"messages": [{"role": "tool", "content": "x"}]}, "messages", "role must be one of"),
    ("chat", {"messages": [{"role": "user"}]}, "messages", "content must be"),
    ("chat", {"messages": SYSTEM_LATE}, "messages", "system first"),
    ("chat", {"messages": IMAGE}, "messages", "parts of type text"),
    ("chat", {"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "surrogate"),
    ("chat", {"top_logprobs": 2, "logprobs": True}, "top_logprobs", "must be 0"),
    ("chat", {"logprobs": 1}, "logprobs", "true or false"),
    ("completions", {"logprobs": 5}, "logprobs", "only the chosen"),
    ("completions", {"echo": True}, "echo", "not supported"),
    ("completions", {"best_of": 3}, "best_of", "not supported"),
    ("completions", {"prompt": ""}, "prompt", "empty"),
    ("completions", {"prompt": []}, "prompt", "not empty"),
    ("completions", {"prompt": [1, -2]}, "prompt", "list of token ids"),
    ("completions", {"prompt": [[1], "a", 3]}, "prompt", "list of token ids"),
    ("completions", {"prompt": [999]}, None, "from 0 to 259"),
    ("completions", {"prompt": "a<|MASK|>"}, None, "mask id 259"),
    ("completions", {"prompt": "x" * 64}, "prompt", "64 tokens; the limit is 63"),
    ("completions", {"prompt": ["a"] * 9}, "prompt", "more than the 8"),
    ("completions", {"max_tokens": 63}, "max_tokens", "the limit is 62"),
    ("completions", {"max_tokens": 0}, "max_tokens", "max_tokens is 0"),
    ("chat", {"max_completion_tokens": "many"}, "max_completion_tokens", "max_completion_tokens is 'many'"),
    ("chat", {"max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens", "different things"),
    ("completions", {"remasking_strategy": "best"}, "remasking_strategy", "remasking_strategy is 'best'"),
    ("completions", {"dynamic_threshold": 2}, "dynamic_threshold", "from 0 to 1"),
    ("completions", {"block_size": 5}, "block_size", "this server has 4, 8"),
    ("completions", {"seed": "x"}, "seed", "seed is 'x'"),
    ("completions", {"n": 9}, "n", "at most 8"),
    ("completions", {"n": 0}, "n", "at least 1"),
    ("completions", {"n": True}, "n", "an integer"),
    ("completions", {"stop": [""]}, "stop", "of 1 to"),
    ("completions", {"stop": ["a"] * 17}, "stop", "at most 16"),
    ("completions", {"stream": "yes"}, "stream", "true or false"),
    ("completions", {"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ("completions", {"stream": True, "stream_options": {"x": 1}}, "stream_options", "unknown field 'x'"),
    ("completions", {"stop_ids": list(range(17))}, "stop_ids", "more than 16"),
    ("completions", {"stop_ids": [1 << 40]}, None, "stop_ids must be integers"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "body", "param", "message"), REFUSED)
def test_refused_with_the_field_and_the_reason(parse, kind, body, param, message):
    with pytest.raises(ApiError) as caught:
        parse(kind, **body)
    assert caught.value.status == 400
    assert message in caught.value.message
    assert caught.value.param == param


def test_another_model_is_not_found(parse):
    with pytest.raises(ApiError) as caught:
        parse("chat", model="gpt-4")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


BODIES = [b"", b"{", b"[]", b"null", b'{"a": NaN}', b'"\xff"', b"[" * 100_000, b'{"n": ' + b"1" * 5000 + b"}"]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_bodies_that_are_no_object(body):
    with pytest.raises(ApiError) as caught:
        parse_json(body)
    assert caught.value.status == 400
