"""The HTTP server: routes, limits, and the life of a request.

    body read (size, time) -> parsed in a thread -> samples held by the engine loop -> whole answer, or events per block

The rest of a request runs as one task beside another that waits for the client to leave; the first to end, or the
time-out, ends both, and what is left in the engine is cancelled.
"""

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tracerl_jax.rollout.engine import Engine
from tracerl_jax.serve.completion import Completion, Piece
from tracerl_jax.serve.engine_loop import EngineLoop, Sample
from tracerl_jax.serve.errors import ApiError, stopping, timed_out
from tracerl_jax.serve.metrics import Metrics
from tracerl_jax.serve.options import ServeConfig
from tracerl_jax.serve.protocol import Call, parse_call, parse_json
from tracerl_jax.serve.responses import Answer, event, model_card

CLIENT_LEFT = 499
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'"
)


class Server:
    """The state of one server. `app` is the ASGI application, whose lifespan starts and ends the engine's thread."""

    def __init__(self, engine: Engine, tokenizer, config: ServeConfig):
        self.engine, self.tokenizer, self.config = engine, tokenizer, config
        self.metrics = Metrics()
        self.loop = EngineLoop(engine, config.capacity, self.metrics.step_seconds.observe)
        self.metrics.watch(self.loop, config.slots)
        self.block_size = config.defaults.block_size or engine.model.config.block_size
        self._created = int(time.time())
        self._stopping = asyncio.Event()  # no new requests
        self._cut = asyncio.Event()  # no old ones either
        self._open = 0  # requests being answered
        self._parser = ThreadPoolExecutor(1, "parser")  # one: tokenizers are not made for several threads
        self.app = Starlette(
            routes=[
                Route("/", self._page),
                Route("/health", self._health),
                Route("/metrics", self._guarded(self._metrics)),
                Route("/v1/models", self._guarded(self._models)),
                Route("/v1/models/{name:path}", self._guarded(self._model)),
                Route("/v1/chat/completions", self._completions("chat"), methods=["POST"]),
                Route("/v1/completions", self._completions("completions"), methods=["POST"]),
            ],
            exception_handlers={HTTPException: _http_error, ApiError: _api_error, Exception: _unexpected},
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _app) -> AsyncIterator[None]:
        self.loop.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.loop.stop, 5.0)
            self._parser.shutdown(wait=False, cancel_futures=True)

    async def drain(self) -> None:
        """Refuse new requests with 503; returns when the running ones are answered or, `drain_seconds` later, cut."""
        self._stopping.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.drain_seconds):
                while self._open:
                    await asyncio.sleep(0.02)
        self._cut.set()
        for _ in range(50):  # their answers say so
            if self._open:
                await asyncio.sleep(0.02)

    # Small answers

    async def _page(self, _request: HttpRequest) -> Response:
        page, style = (
            files(f"tracerl_jax.{folder}").joinpath(name).read_text(encoding="utf-8")
            for folder, name in (("serve", "page.html"), ("report", "page.css"))
        )
        page = page.replace("/*STYLE*/", style, 1)
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY, "X-Frame-Options": "DENY"})

    async def _health(self, _request: HttpRequest) -> Response:
        status = "stopping" if self._stopping.is_set() else "ok" if self.loop.healthy else "failing"
        return JSONResponse({"status": status, "model": self.config.model_name}, 200 if status == "ok" else 503)

    async def _metrics(self, _request: HttpRequest) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def _models(self, _request: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: HttpRequest) -> Response:
        if request.path_params["name"] != self.config.model_name:
            raise ApiError(404, f"this server has {self.config.model_name!r} only", code="model_not_found")
        return JSONResponse(self._card())

    def _card(self) -> dict:
        config = self.config
        return model_card(config.model_name, self._created, config.max_length, self.block_size)

    def _guarded(self, handler: Callable[[HttpRequest], Awaitable[Response]]):
        async def guarded(request: HttpRequest) -> Response:
            self._authorize(request)
            return await handler(request)

        return guarded

    def _authorize(self, request: HttpRequest) -> None:
        if self.config.api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self.config.api_key.encode()):
            raise ApiError(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                           code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})  # fmt: skip

    # Completions

    def _completions(self, kind: str):
        async def endpoint(request: HttpRequest) -> Response:
            """Everything that is refused is refused here; the answer is given by `_Respond`."""
            started = time.monotonic()
            try:
                self._authorize(request)
                if self._stopping.is_set():
                    raise stopping()
                call = await self._read(kind, request)
                samples = self.loop.submit(call.requests(), call.stream or bool(call.stop))
            except ApiError as error:
                self.metrics.requests.labels(kind, error.status).inc()
                raise
            except ClientDisconnect:  # amid its body
                self.metrics.requests.labels(kind, CLIENT_LEFT).inc()
                return Response(status_code=CLIENT_LEFT)
            self.metrics.prompt_tokens.inc(sum(map(len, call.prompts)))
            return _Respond(self, call, samples, started)

        return endpoint

    async def _read(self, kind: str, request: HttpRequest) -> Call:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise ApiError(415, "the content type must be application/json")
        try:
            async with asyncio.timeout(self.config.body_seconds):
                body = await _read_body(request, self.config.max_body_bytes)
        except TimeoutError:
            raise ApiError(408, f"the body was not there after {self.config.body_seconds:g} s") from None
        parse = lambda: parse_call(kind, parse_json(body), self.tokenizer, self.config, self.engine.check)  # noqa: E731
        return await asyncio.get_running_loop().run_in_executor(self._parser, parse)


async def _read_body(request: HttpRequest, limit: int) -> bytes:
    body = bytearray()
    too_large = ApiError(413, f"the body is larger than the {limit} bytes allowed", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limit:
        raise too_large
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise too_large
    return bytes(body)


class _Respond(Response):
    """Sends the answer to a call as its samples come."""

    def __init__(self, server: Server, call: Call, samples: list[Sample], started: float):
        self._server, self._call, self._samples, self._started = server, call, samples, started
        self._answer = Answer(call, server.config.model_name, server.block_size)
        self._completions = [
            Completion(server.tokenizer, sample.request.prompt_ids, call.stop, call.logprobs) for sample in samples
        ]
        self._streaming = False  # the status line is sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server, seconds = self._server, self._server.config.request_seconds
        answer = self._send_stream(send) if self._call.stream else self._send_whole(scope, receive, send)
        tasks = {
            "answer": asyncio.create_task(answer),
            "left": asyncio.create_task(_client_left(receive)),
            "cut": asyncio.create_task(server._cut.wait()),
        }
        server._open += 1
        status = CLIENT_LEFT
        try:
            left = max(0.0, self._started + seconds - time.monotonic())
            await asyncio.wait(tasks.values(), timeout=left, return_when=asyncio.FIRST_COMPLETED)
            try:
                if tasks["answer"].done():
                    status = 500
                    tasks["answer"].result()
                    status = 200
                elif not tasks["left"].done():
                    raise stopping() if tasks["cut"].done() else timed_out(seconds)
            except ApiError as error:
                status = error.status
                await self._end(tasks)
                await self._send_error(error, scope, receive, send)
        finally:
            await self._end(tasks)
            server._open -= 1
            server.metrics.requests.labels(self._call.kind, status).inc()
            server.metrics.seconds.labels(self._call.kind).observe(time.monotonic() - self._started)
            server.metrics.completion_tokens.inc(sum(completion.tokens for completion in self._completions))

    async def _end(self, tasks: dict[str, asyncio.Task]) -> None:
        """Give up what is not done, here and in the engine."""
        self._server.loop.cancel(self._samples)
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)

    async def _pieces(self, index: int) -> AsyncIterator[Piece]:
        """Pieces of a sample until it is finished. Raises the ApiError that ended it."""
        sample, completion = self._samples[index], self._completions[index]
        while completion.finish_reason is None:
            grown = await sample.events.get()
            if isinstance(grown, ApiError):
                raise grown
            yield completion.push(*grown.blocks, grown.end)
        self._server.loop.cancel([sample])  # a stop string may have come before the engine's end

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        pieces = [_join([piece async for piece in self._pieces(i)]) for i in range(len(self._samples))]
        await JSONResponse(self._answer.whole(pieces))(scope, receive, send)

    async def _send_stream(self, send: Send) -> None:
        queue: asyncio.Queue[tuple[int, Piece] | Exception] = asyncio.Queue()
        sent = [0] * len(self._samples)

        async def collect(index: int) -> None:
            try:
                async for piece in self._pieces(index):
                    queue.put_nowait((index, piece))
            except Exception as error:
                queue.put_nowait(error)

        collectors = [asyncio.create_task(collect(index)) for index in range(len(self._samples))]
        try:
            unfinished = len(self._samples)
            while unfinished:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                await self._open_stream(send)
                index, piece = item
                unfinished -= piece.finish_reason is not None
                await _send_events(send, [self._answer.chunk(index, piece, sent[index])])
                sent[index] += len(piece.text)
        finally:
            for collector in collectors:
                collector.cancel()
        await _send_events(send, [*self._answer.closing([c.tokens for c in self._completions]), "[DONE]"])
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _open_stream(self, send: Send) -> None:
        """The head, when there is something to say: what fails before has its own status."""
        if self._streaming:
            return
        self._streaming = True
        self._server.metrics.first_seconds.observe(time.monotonic() - self._started)
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
                   (b"x-accel-buffering", b"no")]  # fmt: skip
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await _send_events(send, self._answer.opening())

    async def _send_error(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._streaming:
            await _error_response(error)(scope, receive, send)
            return
        with contextlib.suppress(TimeoutError):  # a client that does not read
            async with asyncio.timeout(1.0):
                await _send_events(send, [error.body(), "[DONE]"])
                await send({"type": "http.response.body", "body": b"", "more_body": False})


def _join(pieces: list[Piece]) -> Piece:
    names = ("ids", "step_map", "logprobs", "tokens")
    lists = {name: [x for piece in pieces for x in getattr(piece, name)] for name in names}
    text = "".join(piece.text for piece in pieces)
    return Piece(text, **lists, position=pieces[0].position, finish_reason=pieces[-1].finish_reason)


async def _send_events(send: Send, data: list[dict | str]) -> None:
    if data:
        await send({"type": "http.response.body", "body": b"".join(map(event, data)), "more_body": True})


async def _client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# Errors outside a running answer


def _error_response(error: ApiError) -> Response:
    """In ASCII, whatever the request held: a lone surrogate, say, which UTF-8 cannot carry."""
    return Response(json.dumps(error.body()), error.status, error.headers, "application/json")


async def _api_error(_request: HttpRequest, error: ApiError) -> Response:
    return _error_response(error)


async def _http_error(request: HttpRequest, error: HTTPException) -> Response:
    """Of the router: no such path, another method."""
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _error_response(ApiError(error.status_code, message, headers=dict(error.headers or {})))


async def _unexpected(_request: HttpRequest, _error: Exception) -> Response:
    return _error_response(ApiError(500, "the server failed; its log says why"))
