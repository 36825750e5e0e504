"""A tiny model folder, its engine, and servers around it in a thread."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
import uvicorn
from folders import make_folder

from tracerl_jax.interop.hf_load import load_hf
from tracerl_jax.interop.tokenizer import load_tokenizer
from tracerl_jax.rollout.engine import Engine, EngineConfig, SamplingOptions
from tracerl_jax.serve.app import Server
from tracerl_jax.serve.options import ServeConfig
from tracerl_jax.serve.run import bind

MAX_LENGTH, SLOTS = 256, 8
DEFAULTS = SamplingOptions(max_tokens=16)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def engine(folder):
    model, params = load_hf(folder)
    return Engine(model, params, EngineConfig(SLOTS, MAX_LENGTH, forwards_per_chunk=8))


class Running:
    """A server at `url` and its insides."""

    def __init__(self, server: Server, url: str):
        self.server, self.url = server, url

    def client(self, **options) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="secret", max_retries=0, timeout=120, **options)

    def async_client(self, **options) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="secret", max_retries=0, timeout=120, **options)

    def post(self, path: str, **options) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", timeout=120, **options)

    def wait_until_empty(self) -> None:
        """Until no sample, slot, page or open answer is left."""
        end = time.monotonic() + 60
        while self.server.loop.held or self.server.engine.busy or self.server._open:
            assert time.monotonic() < end, (self.server.loop.held, self.server.engine.busy, self.server._open)
            time.sleep(0.02)
        engine = self.server.engine
        assert engine.running == 0
        assert engine._batch is None or all(pool.held == 0 for pool in engine._batch._pools)


@contextlib.contextmanager
def running(engine, tokenizer, **settings) -> Iterator[Running]:
    config = ServeConfig(**{
        "model_name": "tiny", "block_sizes": (4, 8), "max_length": MAX_LENGTH, "slots": SLOTS, "defaults": DEFAULTS,
        **settings,
    })  # fmt: skip
    server, bound = Server(engine, tokenizer, config), bind("127.0.0.1", 0)
    inner = uvicorn.Server(uvicorn.Config(server.app, log_config=None, timeout_graceful_shutdown=2))
    thread = threading.Thread(target=lambda: asyncio.run(inner.serve(sockets=[bound])))
    thread.start()
    try:
        while not inner.started:
            time.sleep(0.01)
        yield Running(server, f"http://127.0.0.1:{bound.getsockname()[1]}")
    finally:
        inner.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def server(engine, tokenizer):
    with running(engine, tokenizer) as started:
        yield started


@pytest.fixture
def start(engine, tokenizer):
    """Starts a server with other settings: start(max_queue=0)."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(
            running(settings.pop("engine", engine), tokenizer, **settings)
        )
