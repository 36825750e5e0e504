"""Results of many requests as the engine has them: whole traces in the order they finish, or block by block."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tracerl_jax.diffusion.trace import Trace
from tracerl_jax.rollout.engine import Engine
from tracerl_jax.rollout.options import Request

# What others have submitted to the engine must not finish while one of these runs: its result would be lost.


class Piece(NamedTuple):
    index: int  # of the request
    ids: np.ndarray  # that follow those of its pieces before
    trace: Trace | None  # with its last piece


def completed(engine: Engine, requests: Sequence[Request]) -> Iterator[dict[int, Trace]]:
    """Decode requests together and yield after every chunk, so at least every `EngineConfig.forwards_per_chunk`
    forwards, the traces that are finished (maybe none) by the index of their request. Raises like `Engine.generate`.
    Closing the iterator cancels the rest.
    """
    with submitted(engine, requests) as running:
        while running:
            yield step(engine, running)


def stream(engine: Engine, requests: Sequence[Request]) -> Iterator[Piece]:
    """The same, but what is new of each request after every chunk."""
    given = [0] * len(requests)
    with submitted(engine, requests) as running:
        while running:
            for index, trace in step(engine, running).items():
                yield Piece(index, trace.ids[given[index] :], trace)
            for number, blocks in engine.blocks().items():
                index, ids = running.get(number), blocks.ids
                if index is not None and len(ids) > given[index]:
                    piece = ids[given[index] :]
                    given[index] = len(ids)
                    yield Piece(index, piece, None)


@contextlib.contextmanager
def submitted(engine: Engine, requests: Sequence[Request]) -> Iterator[dict[int, int]]:
    """{number the engine gave: index of the request}. All are checked first; what is left in the end is cancelled."""
    for index, request in enumerate(requests):
        engine.check(request, f"request {index}")
    running = {engine.submit(request): index for index, request in enumerate(requests)}
    try:
        yield running
    finally:
        for number in running:
            engine.cancel(number)


def step(engine: Engine, running: dict[int, int]) -> dict[int, Trace]:
    """Decode a chunk; what finished leaves `running`."""
    if not engine.busy:
        raise RuntimeError("a request was cancelled while its results were read")
    return {running.pop(number): trace for number, trace in engine.step().items() if number in running}
