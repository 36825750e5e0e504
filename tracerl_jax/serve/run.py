"""uvicorn around the application, from the socket to the last answer after SIGTERM."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable

import uvicorn

from tracerl_jax.errors import ConfigError
from tracerl_jax.serve.app import Server

logger = logging.getLogger(__name__)


class _Uvicorn(uvicorn.Server):
    """Signals are ours: uvicorn would close the socket first and then die of the signal."""

    @contextlib.contextmanager
    def capture_signals(self):
        yield


def bind(host: str, port: int) -> socket.socket:
    """A socket with this address that does not listen yet: clients are refused until the server can answer. Port 0 is
    any that is free. Raises ConfigError when the address cannot be had."""
    if not 0 <= port < 2**16:
        raise ConfigError(f"port is {port}; it must be from 0 to {2**16 - 1}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen at {host}:{port} ({error}); choose another --host or --port") from error
    return bound


def serve(make: Callable[[], Server], bound: socket.socket, ready: Callable[[], None]) -> int:
    """Serve until SIGTERM or Ctrl-C, answer what runs, and return the exit status: 0, or 1 when a second signal cut
    it short. `ready` is called when requests are accepted."""
    return asyncio.run(_serve(make(), bound, ready))


async def _serve(server: Server, bound: socket.socket, ready: Callable[[], None]) -> int:
    config = uvicorn.Config(
        server.app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=5, server_header=False,
        h11_max_incomplete_event_size=64 * 1024, ws="none",
    )  # fmt: skip
    uvicorn_server = _Uvicorn(config)
    signals: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number.name)
    running = asyncio.create_task(uvicorn_server.serve(sockets=[bound]))
    while not uvicorn_server.started and not running.done():
        await asyncio.sleep(0.01)
    if not running.done():
        ready()
    first = asyncio.create_task(signals.get())
    await asyncio.wait([first, running], return_when=asyncio.FIRST_COMPLETED)
    status = 0
    if first.done():
        logger.info("%s: no new requests; finishing those that run (once more stops at once)", first.result())
        drained, second = asyncio.create_task(server.drain()), asyncio.create_task(signals.get())
        await asyncio.wait([drained, second], return_when=asyncio.FIRST_COMPLETED)
        if not drained.done():
            status, uvicorn_server.force_exit = 1, True
        for task in (drained, second):
            task.cancel()
    uvicorn_server.should_exit = True
    first.cancel()
    await running
    return status
