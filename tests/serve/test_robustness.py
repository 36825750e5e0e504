"""What clients do wrong and what breaks: nothing hangs, leaks a slot or page, or disturbs another request."""

import asyncio
import dataclasses
import socket
import threading
import time

import httpx
import numpy as np
import openai
import pytest

LONG = {"prompt": "abc", "max_tokens": 200, "ignore_eos": True}


def texts_of(server, prompts, **options):
    """Of these prompts asked one after the other."""
    with server.client() as client:
        return [client.completions.create(model="tiny", prompt=p, **options).choices[0].text for p in prompts]


# Bad requests


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b'{"prompt": "\xff"}', {}, 400),
        (b'{"prompt": "a"}', {"Content-Type": "text/plain"}, 415),
        (b'{"prompt": "a"}', {"Content-Type": ""}, 415),
        (b'{"prompt": "' + b"a" * 5000 + b'"}', {}, 413),
        (b'{"prompt": "a", "model": "gpt-4"}', {}, 404),
        (b'{"prompt": "a", "top_p": 0}', {}, 400),
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_bad_request_is_answered_in_the_form_of_the_api(start, content, headers, status, chunked):
    server = start(max_body_bytes=4000)
    body = (content[i : i + 1000] for i in range(0, len(content), 1000)) if chunked else content
    got = server.post("/v1/completions", content=body, headers={"Content-Type": "application/json"} | headers)
    assert got.status_code == status
    assert set(got.json()["error"]) == {"message", "type", "param", "code"} and got.json()["error"]["message"]
    assert server.server.loop.held == 0


def test_another_method_or_path(server):
    got = httpx.get(f"{server.url}/v1/completions")
    assert (got.status_code, got.headers["allow"]) == (405, "POST")
    assert got.json()["error"]["type"] == "invalid_request_error"
    assert server.post("/v1/embeddings", json={}).status_code == 404


def test_a_body_that_never_ends_is_given_up(start):
    server = start(body_seconds=0.3)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port), timeout=30) as connection:
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


# Load


def test_two_hundred_at_once_get_what_they_get_alone(start):
    server = start(max_queue=500)
    prompts = [f"{'q' * (i % 30)}{i}" for i in range(200)]

    async def ask(client, i):
        options = {"model": "tiny", "prompt": prompts[i], "seed": i, "max_tokens": 4 + i % 20}
        if i % 2:
            return (await client.completions.create(**options)).choices[0].text
        stream = await client.completions.create(**options, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def main():
        async with server.async_client() as client:
            return await asyncio.gather(*(ask(client, i) for i in range(200)))

    texts = asyncio.run(main())
    for i in range(0, 200, 23):
        assert texts_of(server, [prompts[i]], seed=i, max_tokens=4 + i % 20) == [texts[i]]
    server.wait_until_empty()


def test_a_full_queue_says_when_to_come_back(start, slow):
    server = start(max_queue=2, max_samples=2, engine=slow)

    async def main():
        async with httpx.AsyncClient(timeout=120) as client:
            asked = [
                asyncio.create_task(client.post(f"{server.url}/v1/completions", json=LONG)) for _ in range(30)
            ]
            while sum(task.done() for task in asked) < 20:
                await asyncio.sleep(0.01)
            slow.gate.set()
            return await asyncio.gather(*asked)

    slow.gate.clear()
    answers = asyncio.run(main())
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) == 20 and {answer.status_code for answer in answers} == {200, 429}
    assert refused[0].headers["retry-after"] == "1" and refused[0].json()["error"]["code"] == "queue_full"
    server.wait_until_empty()
    assert server.post("/v1/completions", json=LONG).status_code == 200


class Slow:
    """An engine whose steps take longer, or that wait or fail on demand."""

    def __init__(self, engine, seconds):
        self._engine, self._seconds = engine, seconds
        self.fail = 0  # so many of the next steps
        self.broken = False  # whether the model's numbers are NaN
        self.gate = threading.Event()
        self.gate.set()

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def step(self):
        self.gate.wait(60)
        time.sleep(self._seconds)
        if self.fail:
            self.fail -= 1
            self._engine.params, params = "broken", self._engine.params  # so that its own clean-up runs
            try:
                return self._engine.step()
            finally:
                self._engine.params = params
        traces = self._engine.step()
        if self.broken:
            traces = {n: dataclasses.replace(t, logprobs=t.logprobs + np.nan) for n, t in traces.items()}
        return traces


@pytest.fixture
def slow(engine):
    return Slow(engine, 0.01)


# Clients that leave


def test_clients_that_leave_in_a_stream_in_a_queue_and_in_a_whole_answer(start, slow):
    server = start(engine=slow)
    want = texts_of(server, ["hello"], seed=1, max_tokens=60)

    async def leave(client, i):
        body = LONG | {"stream": i % 2 == 0, "n": 1 + i % 3}
        async with client.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            async for _ in response.aiter_bytes():
                return

    async def impatient(client, i):
        try:
            await asyncio.wait_for(leave(client, i), 0.05 + 0.02 * i)
        except TimeoutError:
            pass

    async def main():
        async with httpx.AsyncClient(timeout=120) as client, server.async_client() as other:
            leaving = [asyncio.create_task(impatient(client, i)) for i in range(24)]
            stays = await other.completions.create(model="tiny", prompt="hello", seed=1, max_tokens=60)
            await asyncio.gather(*leaving)
            return stays.choices[0].text

    assert [asyncio.run(main())] == want
    server.wait_until_empty()
    assert 'status="499"' in httpx.get(f"{server.url}/metrics").text


def test_one_that_leaves_before_it_has_a_slot_never_gets_one(start, slow):
    server = start(engine=slow)
    slow.gate.clear()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=0.5)
    assert server.server.loop.held == 1
    submitted = slow._engine._next_number
    slow.gate.set()
    server.wait_until_empty()
    assert slow._engine._next_number <= submitted + 1 and texts_of(server, ["a"], max_tokens=4)


# Time


def test_a_time_out_frees_the_slot_and_says_so(start, slow):
    server = start(engine=slow, request_seconds=0.6)
    slow._seconds = 0.2
    got = server.post("/v1/completions", json=LONG)
    assert (got.status_code, got.json()["error"]["code"]) == (504, "timeout")
    with server.client() as client, pytest.raises(openai.APIError, match="not done within"):
        list(client.completions.create(model="tiny", prompt="a", max_tokens=200, stream=True,
                                       extra_body={"ignore_eos": True}))  # fmt: skip
    server.wait_until_empty()


# The engine fails


@pytest.mark.parametrize("times", [1, 2])
def test_an_engine_failure_ends_what_runs_and_nothing_else(start, slow, times):
    server = start(engine=slow)
    want = texts_of(server, ["hello"], seed=1, max_tokens=20)

    async def main():
        async with httpx.AsyncClient(timeout=120) as client:
            bodies = [LONG | {"stream": i % 2 == 0} for i in range(30)]
            asked = [asyncio.create_task(client.post(f"{server.url}/v1/completions", json=body)) for body in bodies]
            while server.server.loop.held < 30:
                await asyncio.sleep(0.01)
            slow.fail = times
            slow.gate.set()
            return await asyncio.gather(*asked)

    slow.gate.clear()
    answers = asyncio.run(main())
    failed = [answer for answer in answers if "the engine failed" in answer.text]
    assert 1 <= len(failed) <= 8 * times
    assert {answer.status_code for answer in answers if answer not in failed} == {200}
    server.wait_until_empty()
    assert server.server.loop.failures == times
    assert texts_of(server, ["hello"], seed=1, max_tokens=20) == want
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_an_engine_that_always_fails_is_unhealthy_until_it_works_again(start, slow):
    server = start(engine=slow)
    slow.fail = 3
    for _ in range(3):
        assert server.post("/v1/completions", json=LONG).status_code == 500
    assert httpx.get(f"{server.url}/health").status_code == 503
    assert server.post("/v1/completions", json=LONG).status_code == 200
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_numbers_that_are_not_finite_are_no_answer(start, slow):
    server = start(engine=slow)
    slow.broken = True
    got = server.post("/v1/completions", json={"prompt": "abc", "max_tokens": 4})
    assert (got.status_code, got.json()["error"]["code"]) == (500, "not_finite")
    slow.broken = False
    assert server.post("/v1/completions", json={"prompt": "abc", "max_tokens": 4}).status_code == 200


@pytest.mark.parametrize("body", [
    b'{"prompt": [1, 2], "temperature": 1' + b"0" * 400 + b"}", b'{"prompt": [1, 2], "\\ud800": 1}',
], ids=["a huge number", "half a character"])  # fmt: skip
def test_odd_values_are_the_clients_mistake(server, body):
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "message" in answer.json()["error"]
