"""Completions block by block, as the engine finishes them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tracerl_jax.diffusion.trace import Trace
from tracerl_jax.rollout.engine import Engine
from tracerl_jax.rollout.options import Request


class Piece(NamedTuple):
    index: int  # of the request
    ids: np.ndarray  # that follow those of its pieces before
    trace: Trace | None  # with its last piece


def stream(engine: Engine, requests: Sequence[Request]) -> Iterator[Piece]:
    """Decode requests together and yield what is new of each after every chunk, so at least every
    `EngineConfig.forwards_per_chunk` forwards. Raises like `Engine.generate`. Closing the iterator cancels the rest.

    What others have submitted to the engine must not finish meanwhile: its result would be lost.
    """
    for index, request in enumerate(requests):
        engine.check(request, f"request {index}")
    running = {engine.submit(request): index for index, request in enumerate(requests)}
    given = [0] * len(requests)
    try:
        while running:
            if not engine.busy:
                raise RuntimeError("a streamed request was cancelled while its pieces were read")
            for number, trace in engine.step().items():
                if (index := running.pop(number, None)) is not None:
                    yield Piece(index, trace.ids[given[index] :], trace)
            for number, blocks in engine.blocks().items():
                index, ids = running.get(number), blocks.ids
                if index is not None and len(ids) > given[index]:
                    piece = ids[given[index] :]
                    given[index] = len(ids)
                    yield Piece(index, piece, None)
    finally:
        for number in running:
            engine.cancel(number)
