"""The server as OpenAI's client package sees it."""

import asyncio

import httpx
import numpy as np
import openai
import pytest

from tracerl_jax.interop.tokenizer import decode
from tracerl_jax.rollout.engine import Request, SamplingOptions

MESSAGES = [{"role": "user", "content": "What is 2+2?"}]


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client


def trace_of(engine, tokenizer, text, **options):
    request = Request(tokenizer(text, add_special_tokens=False)["input_ids"], SamplingOptions(**options))
    (trace,) = engine.generate([request])
    return trace


def test_chat_is_what_the_engine_decodes_from_the_template(engine, tokenizer, start):
    text = f"<|im_start|>user\n{MESSAGES[0]['content']}<|im_end|>\n<|im_start|>assistant"
    trace = trace_of(engine, tokenizer, text, max_tokens=20, seed=5)
    extra = {"return_step_map": True}
    with start().client() as client:
        got = client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=20, seed=5, logprobs=True, extra_body=extra
        )
    choice = got.choices[0]
    assert choice.message.role == "assistant" and choice.message.content == decode(tokenizer, trace.ids)
    assert (choice.finish_reason, got.model) == (trace.stop_reason, "tiny")
    assert (choice.token_ids, choice.step_map) == (trace.ids.tolist(), trace.step_map.tolist())
    np.testing.assert_allclose([token.logprob for token in choice.logprobs.content], trace.logprobs, atol=1e-5)
    assert got.usage.prompt_tokens == len(trace.prompt_ids) and got.usage.completion_tokens == len(trace.ids)
    assert got.usage.total_tokens == len(trace.prompt_ids) + len(trace.ids)


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_a_stream_says_what_the_whole_answer_says(client, kind):
    asked = {"model": "tiny", "max_tokens": 40, "seed": 11, "n": 2, "extra_body": {"return_step_map": True}}
    if kind == "chat":
        create, asked = client.chat.completions.create, asked | {"messages": MESSAGES, "logprobs": True}
    else:
        create, asked = client.completions.create, asked | {"prompt": "2+2=", "logprobs": 1}
    whole = create(**asked)
    chunks = list(create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.seed for chunk in chunks} == {11}
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        grown = [part for part in parts if hasattr(part, "step_map")]
        assert len(grown) > 2  # it came by blocks
        assert [step for part in grown for step in part.step_map] == choice.step_map
        assert [i for part in grown for i in part.token_ids] == choice.token_ids
        assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1].finish_reason == choice.finish_reason
        if kind == "chat":
            assert parts[0].delta.role == "assistant"
            assert "".join(part.delta.content or "" for part in parts) == choice.message.content
            tokens = [token.token for part in grown for token in part.logprobs.content]
            assert tokens == [token.token for token in choice.logprobs.content]
        else:
            assert "".join(part.text for part in parts) == choice.text
            offsets = [offset for part in grown for offset in part.logprobs.text_offset]
            assert offsets == sorted(offsets) and len(offsets) == len(choice.token_ids)


def test_blocks_lie_on_the_absolute_grid(client):
    stream = client.completions.create(
        model="tiny", prompt="abcde", max_tokens=40, stream=True, extra_body={"return_step_map": True, "block_size": 8}
    )
    grown = [chunk.choices[0] for chunk in stream]
    assert grown[0].position == 5 and {part.block_size for part in grown} == {8}
    assert [part.position % 8 for part in grown[1:]] == [0] * (len(grown) - 1)


def test_samples_and_prompts_in_order(client):
    got = client.completions.create(model="tiny", prompt=["ab", "cd"], n=2, seed=1, max_tokens=12)
    one = client.completions.create(model="tiny", prompt="cd", n=2, seed=1, max_tokens=12)
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in got.choices[2:]] == [choice.text for choice in one.choices]
    assert len({choice.text for choice in got.choices}) == 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_over_a_block_boundary(client, server, stream):
    asked = {"model": "tiny", "prompt": "q", "seed": 3, "max_tokens": 64}
    text = client.completions.create(**asked).choices[0].text
    stop = text[9:15]
    got = client.completions.create(**asked, stop=[stop], stream=stream)
    got = list(got) if stream else [got]
    assert "".join(part.choices[0].text for part in got) == text[: text.index(stop)]
    assert got[-1].choices[0].finish_reason == "stop"
    server.wait_until_empty()


def test_a_seed_gives_the_same_text_alone_and_among_others_and_none_gives_another(server):
    async def ask(client, **options):
        got = await client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=24, **options)
        return got.choices[0].message.content

    async def main():
        async with server.async_client() as client:
            alone = await ask(client, seed=7)
            among = await asyncio.gather(ask(client, seed=7), *(ask(client, temperature=0.5) for _ in range(20)))
            return alone, among

    alone, (again, *others) = asyncio.run(main())
    assert alone == again
    assert len(set(others)) == 20


def test_the_seed_of_the_answer_repeats_it(client):
    first = client.chat.completions.create(model="tiny", messages=MESSAGES)
    second = client.chat.completions.create(model="tiny", messages=MESSAGES, seed=first.seed)
    assert first.choices[0].message.content == second.choices[0].message.content


def test_models_health_and_metrics(client, server):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == 256
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    health = httpx.get(f"{server.url}/health")
    assert (health.status_code, health.json()) == (200, {"status": "ok", "model": "tiny"})

    def read() -> dict[str, float]:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    server.wait_until_empty()
    before = read()
    got = client.completions.create(model="tiny", prompt="abc", max_tokens=10)
    server.wait_until_empty()
    after = read()
    served = 'tracerl_requests_total{endpoint="completions",status="200"}'
    assert after[served] == before.get(served, 0) + 1
    assert after["tracerl_prompt_tokens_total"] == before["tracerl_prompt_tokens_total"] + 3
    sent = after["tracerl_completion_tokens_total"] - before["tracerl_completion_tokens_total"]
    assert sent == got.usage.completion_tokens
    assert (after["tracerl_samples_running"], after["tracerl_samples_waiting"], after["tracerl_slots"]) == (0, 0, 8)


def test_the_api_key(start):
    server = start(api_key="secret")
    with server.client() as client:
        client.completions.create(model="tiny", prompt="abc", max_tokens=4)
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
        for path in ("/v1/models", "/metrics"):
            assert httpx.get(f"{server.url}{path}", headers=headers).status_code == 401
        refused = server.post("/v1/completions", json={"prompt": "abc"}, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert "secret" not in httpx.get(f"{server.url}/").text
