"""Chat completions of an OpenAI-compatible server: many at once, with retries, a rate limit and an end to patience."""

import asyncio
import os
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx

from tracerl_jax.config_rewards import JudgeSection
from tracerl_jax.errors import ConfigError
from tracerl_jax.parallel.distributed import process_count
from tracerl_jax.rewards.judge_text import Answer, Failure

ENOUGH_FAILURES = 4  # in a row, for a process that may ask less at a time
MAX_WAIT = 60.0  # seconds, between two tries
_RETRIED = {408, 409, 425, 429, *range(500, 600)}
_OUT_OF_ORDER = {401, 403, 404}  # whatever is asked
_QUOTED = 200  # characters of a server's message

Body = Mapping[str, Any]
Result = TypeVar("Result")


def ask(
    bodies: Sequence[Body], section: JudgeSection, received: Callable[[int, Answer], None] = lambda *_: None
) -> list[Answer | Failure]:
    """One answer per request body, in order. `received(index, answer)` is called for each as soon as it is there.

    Never raises for what the server does. Takes, per request, at most `retries` + 1 times `timeout_seconds` and the
    waits between; and when as many in a row as are asked at a time have failed for good, the rest is not asked any
    more. The processes of a job share `concurrency` and `requests_per_minute`. Raises ConfigError when the variable of
    the API key is not set.
    """
    return _run(_ask(bodies, section, received))


def _run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as thread:  # called from a notebook, say, whose loop cannot wait for us
        return thread.submit(asyncio.run, coroutine).result()


async def _ask(bodies, section, received) -> list[Answer | Failure]:
    limits = httpx.Limits(max_connections=share_of(section))
    async with httpx.AsyncClient(headers=_headers(section), timeout=None, limits=limits) as client:
        server = _Server(section, client)

        async def one(index: int) -> Answer | Failure:
            answer = await server.ask(bodies[index])
            if isinstance(answer, Answer):
                received(index, answer)
            return answer

        return await asyncio.gather(*map(one, range(len(bodies))))


def share_of(section: JudgeSection) -> int:
    """Of the requests at a time: those of this process of a job, at least one."""
    return max(1, section.concurrency // process_count())


def _headers(section: JudgeSection) -> dict[str, str]:
    name = section.api_key_variable
    if not name:
        return {}
    if not os.environ.get(name):
        raise ConfigError(
            f"reward.judge.api_key_variable is {name}, and there is no such environment variable: set it to the API key"
        )
    return {"Authorization": f"Bearer {os.environ[name]}"}


class _Retry(Exception):
    """(what happened, seconds that the server asks to wait or None)."""


class _Server:
    def __init__(self, section: JudgeSection, client: httpx.AsyncClient):
        self._section, self._client, self._share = section, client, share_of(section)
        self._url = f"{section.url.rstrip('/')}/chat/completions"
        self._places = asyncio.Semaphore(self._share)
        self._next_start = 0.0
        self._failed_in_a_row = 0

    async def ask(self, body: Body) -> Answer | Failure:
        async with self._places:
            if self._failed_in_a_row >= max(self._share, min(ENOUGH_FAILURES, self._section.concurrency)):
                return Failure(f"not asked, after {self._failed_in_a_row} failures in a row")
            answer, counts = await self._persist(body)
            self._failed_in_a_row = self._failed_in_a_row + 1 if counts else 0
            return answer

    async def _persist(self, body: Body) -> tuple[Answer | Failure, bool]:
        """(the answer, whether it is a failure that any other request would meet as well)"""
        for attempt in range(self._section.retries + 1):
            await self._take_turn()
            try:
                async with asyncio.timeout(self._section.timeout_seconds):
                    response = await self._client.post(self._url, json=dict(body))
                return _read(response), response.status_code in _OUT_OF_ORDER
            except _Retry as retry:
                reason, wait = retry.args
            except TimeoutError:
                reason, wait = f"no answer in {self._section.timeout_seconds:g} s", None
            except httpx.HTTPError as error:
                reason, wait = f"{type(error).__name__} {error}".strip(), None
            if attempt < self._section.retries:
                # Spread, so that those refused together do not come back together.
                backoff = self._section.backoff_seconds * 2**attempt * random.uniform(0.5, 1.0)
                await asyncio.sleep(min(MAX_WAIT, backoff if wait is None else wait))
        return Failure(reason), True

    async def _take_turn(self) -> None:
        """Waits until the rate limit allows another request."""
        if self._section.requests_per_minute:
            now = asyncio.get_running_loop().time()
            start = max(now, self._next_start)
            self._next_start = start + 60 * process_count() / self._section.requests_per_minute
            await asyncio.sleep(start - now)


def _read(response: httpx.Response) -> Answer | Failure:
    """Raises _Retry for what may be different next time."""
    if response.status_code in _RETRIED:
        raise _Retry(f"HTTP {response.status_code}", _seconds(response.headers.get("Retry-After")))
    if response.status_code != 200:
        return Failure(f"HTTP {response.status_code}: {' '.join(response.text.split())[:_QUOTED]}")
    try:
        choice = response.json()["choices"][0]
        text = choice["message"]["content"] or ""
        if not isinstance(text, str):
            raise TypeError
    except (ValueError, LookupError, TypeError):
        raise _Retry("the answer is no chat completion", None) from None
    return Answer(text, choice.get("finish_reason") == "length")


def _seconds(header: str | None) -> float | None:
    """Of a Retry-After header; None for one that is no number of seconds."""
    try:
        return max(0.0, float(header))
    except (TypeError, ValueError):
        return None
