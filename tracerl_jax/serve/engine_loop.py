"""The thread that owns the engine, and how coroutines talk with it.

    event loop thread                            engine thread
    submit -> Sample   --- inbox ("submit") -->  engine.submit
                       --- inbox ("cancel") -->  engine.cancel       } before every step, in this order
    Sample.events      <-- call_soon_threadsafe  engine.step, blocks

The engine thread sleeps in `inbox.get` while the engine has nothing to do. A sample counts as held until the engine
thread has let it go, so what is admitted never exceeds `capacity`.
"""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tracerl_jax.errors import UserError
from tracerl_jax.rollout.batch import Blocks
from tracerl_jax.rollout.engine import Engine, Request
from tracerl_jax.serve.errors import ApiError, bad_request, engine_failed, overloaded

logger = logging.getLogger(__name__)

STOP = "stop"
UNHEALTHY_AFTER = 3  # failures of the engine, one after the other


class Grown(NamedTuple):
    """More of a sample; `end` with the last."""

    blocks: Blocks
    end: str | None  # "stop", "length"


class Sample:
    """One request of the engine, seen from the event loop. `events` gives Grown, or at last an ApiError."""

    def __init__(self, request: Request, watched: bool):
        self.request = request
        self.watched = watched  # wants its blocks as they come
        self.events: asyncio.Queue[Grown | ApiError] = asyncio.Queue()
        # Of the engine thread:
        self.number: int | None = None
        self.given = 0  # ids


class EngineLoop:
    """Runs `engine` in a thread. All methods are for the thread of the event loop; `observe(seconds)` is told how long
    each step took, in the engine's thread."""

    def __init__(self, engine: Engine, capacity: int, observe: Callable[[float], None] = lambda seconds: None):
        self.engine, self.capacity = engine, capacity
        self.failures = 0  # of the engine since the server started
        self._in_a_row = 0
        self._observe = observe
        self._inbox: queue.SimpleQueue[tuple[str, Sample | None]] = queue.SimpleQueue()
        self._held: set[Sample] = set()  # of the event loop: submitted and not let go
        self._running: dict[int, Sample] = {}  # of the engine thread
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Must be called in the event loop that will submit."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, requests: Sequence[Request], watched: bool) -> list[Sample]:
        """All or none of the requests. Raises ApiError: 429 when full, 500 when the engine's thread has ended."""
        if not self._thread.is_alive():
            raise engine_failed()
        if len(self._held) + len(requests) > self.capacity:
            raise overloaded(self.capacity)
        samples = [Sample(request, watched) for request in requests]
        for sample in samples:
            self._held.add(sample)
            self._inbox.put(("submit", sample))
        return samples

    def cancel(self, samples: Sequence[Sample]) -> None:
        """Give up those that are not done; their slots are free at the engine's next step."""
        for sample in samples:
            if sample in self._held:
                self._inbox.put(("cancel", sample))

    @property
    def held(self) -> int:
        """Samples waiting or running."""
        return len(self._held)

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive() and self._in_a_row < UNHEALTHY_AFTER

    def stop(self, seconds: float) -> None:
        """End the thread after its present step; waits for that as long as it is told."""
        self._inbox.put((STOP, None))
        self._thread.join(seconds)

    # The engine thread

    def _run(self) -> None:
        try:
            while self._take_commands():
                self._step()
        except BaseException:
            logger.exception("the engine's thread ended")
            left = list(self._running.values())
            with contextlib.suppress(queue.Empty):
                while True:
                    command, sample = self._inbox.get_nowait()
                    left += [sample] if command == "submit" else []
            self._tell([(sample, engine_failed(), True) for sample in left])

    def _take_commands(self) -> bool:
        """Whether to go on. Waits for a command while there is nothing else to do."""
        while True:
            try:
                command, sample = self._inbox.get(block=not self.engine.busy)
            except queue.Empty:
                return True
            if command == STOP:
                return False
            if command == "submit":
                self._submit(sample)
            elif self._running.pop(sample.number, None):
                self.engine.cancel(sample.number)
                self._tell([(sample, None, True)])

    def _submit(self, sample: Sample) -> None:
        try:
            sample.number = self.engine.submit(sample.request)
            self._running[sample.number] = sample
        except UserError as error:
            self._tell([(sample, bad_request(str(error)), True)])

    def _step(self) -> None:
        started = self._loop.time()
        try:
            finished = self.engine.step()
            grown = self.engine.blocks() if any(sample.watched for sample in self._running.values()) else {}
        except Exception:
            logger.exception("the engine failed; what it was decoding is answered with an error")
            self.failures += 1
            self._in_a_row += 1
            self._after_failure()
            return
        self._in_a_row = 0
        self._observe(self._loop.time() - started)
        news = []
        for number, trace in finished.items():
            sample = self._running.pop(number)
            blocks = Blocks(trace.ids, trace.step_map, trace.logprobs)
            broken = None if np.isfinite(trace.logprobs).all() else _broken()
            news.append((sample, broken or _new(sample, blocks, trace.stop_reason), True))
        for number, blocks in grown.items():
            sample = self._running.get(number)
            if sample is not None and sample.watched and len(blocks.ids) > sample.given:
                news.append((sample, _new(sample, blocks, None), False))
        self._tell(news)

    def _after_failure(self) -> None:
        """What was in a slot is lost; what was waiting is untouched, and waits again. Every failure ends at least one
        request, so that one which always fails cannot be tried for ever."""
        before, self._running = self._running, {}
        waiting = [before[number] for number in sorted(before) if self.engine.cancel(number)]
        lost = [sample for sample in before.values() if sample not in waiting] or waiting[:1]
        for sample in waiting:
            if sample not in lost:
                self._submit(sample)
        self._tell([(sample, engine_failed(), True) for sample in lost])

    def _tell(self, news: list[tuple[Sample, Grown | ApiError | None, bool]]) -> None:
        """(sample, event, whether it is the last) to the event loop, all in one call; to nobody once it has closed."""
        if news:
            try:
                self._loop.call_soon_threadsafe(self._receive, news)
            except RuntimeError:  # a step can outlast the drain, and the loop with it
                if not self._loop.is_closed():
                    raise

    # The event loop again

    def _receive(self, news: list[tuple[Sample, Grown | ApiError | None, bool]]) -> None:
        for sample, event, last in news:
            if event is not None:
                sample.events.put_nowait(event)
            if last:
                self._held.discard(sample)


def _new(sample: Sample, blocks: Blocks, end: str | None) -> Grown:
    start, sample.given = sample.given, len(blocks.ids)
    return Grown(Blocks(*(array[start:] for array in blocks)), end)


def _broken() -> ApiError:
    return ApiError(500, "the model gave NaN or infinite numbers for this request", code="not_finite")
