"""Engine: requests in, traces out, with continuous batching.

    waiting    oldest first -> a slot and its pages, as soon as there are both
    slots      decode on the device in chunks of forwards, each slot at its own pace
    finished   fetched, their pages released; the next chunk starts with the slots refilled

While requests wait, the host looks at the device when a further eighth of the slots is done; in any case after
`forwards_per_chunk` forwards. As they run out, forwards go on with a half of the slots, a quarter, an eighth, where
that saves time. Requests that share a block size are decoded together; those of another one wait until the slots are
empty, in the order they came.

Shapes come from few buckets, so that few programs are compiled:

    slots     config.slots; without `max_length` also a quarter, a sixteenth, .. of it, for few requests
    length    of a slot: `max_length`, or a bucket of what the longest waiting request needs
    prefill   1, 4 or 16 prompts of each shard; tokens: buckets; with or without a cached prefix

Length buckets are 32, 48, 64, 96, 128, 192, .. (powers of two and the middles between them), rounded up to whole pages.
"""

import dataclasses
import zlib
from collections import deque
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from tracerl_jax.diffusion.grid import round_up
from tracerl_jax.diffusion.sampling import banned_ids
from tracerl_jax.diffusion.trace import Trace
from tracerl_jax.errors import ConfigError, DataError
from tracerl_jax.models.decoder import Model
from tracerl_jax.rollout.batch import Batch, Blocks, Entry, batch_for
from tracerl_jax.rollout.canvas import Program as CanvasProgram
from tracerl_jax.rollout.canvas_batch import CanvasBatch
from tracerl_jax.rollout.decode import Program
from tracerl_jax.rollout.options import EngineConfig, Request, SamplingOptions
from tracerl_jax.rollout.slots import SlotState
from tracerl_jax.rollout.weights import rollout_params

BATCHES = {"block_causal": Batch, "full": CanvasBatch}

__all__ = ["Engine", "EngineConfig", "Request", "SamplingOptions"]


class Engine:
    """Decodes requests with one model, on the devices of `model.mesh` if it has one.

    Raises ConfigError when the model cannot be decoded this way (no mask id, another attention mode).
    """

    def __init__(self, model: Model, params: dict | None, config: EngineConfig | None = None):
        c = model.config
        if c.mask_token_id is None:
            raise ConfigError(
                "the model has no mask token: set mask_token_id in its config.json to the id it was trained with"
            )
        if c.attention_mode not in BATCHES:
            raise ConfigError(
                f"cannot decode block by block: the model has attention_mode {c.attention_mode!r}; "
                f"{' or '.join(BATCHES)} is needed"
            )
        self.model, self.config = model, config or EngineConfig()
        self._kind = BATCHES[c.attention_mode]
        self._kind.check(c, self.config)
        if self._full:  # a prompt's keys depend on what follows it
            self.config = dataclasses.replace(self.config, prefix_cache=False)
        self.stop_ids = c.stop_token_ids if self.config.stop_ids is None else self.config.stop_ids
        self._banned = banned_ids(c.vocab_size, c.mask_token_id, self.config.valid_vocab)
        self._banned |= banned_ids(c.vocab_size, c.mask_token_id, c.text_vocab_size)
        self._waiting: deque[Entry] = deque()
        self._batch: Batch | None = None
        self._finished: dict[int, Trace] = {}  # that nobody has taken yet
        self._streamed: set[int] = set()  # numbers that belong to a `generate`
        self._next_number, self._reshape = 0, False
        self.update_params(params)

    def update_params(self, params: dict | None, own: bool = False) -> None:
        """Decode with these parameters from now on: a copy in the compute dtype, placed for the model's mesh
        (rollout/weights.py), or themselves where they are so already, unless `own`: then the caller may donate
        `params` while the engine decodes. None frees the copy and the cache; nothing can be decoded until the next
        call.

        Raises RuntimeError while requests are waiting or running.
        """
        if self._working:
            raise RuntimeError("update_params while requests are waiting or running; finish or cancel them first")
        self.params = None  # first, or two copies are there for a while
        if params is None:
            self._batch = None
            return
        if self._batch is not None:
            self._batch.forget_prompts()
        self.params = rollout_params(self.model, params, own)

    # One stream of requests

    def generate(self, requests: Iterable[Request]) -> Iterator[Trace]:
        """Yield the trace of every request, in their order, as soon as it and those before it are done.

        Raises a UserError naming the request when a prompt is empty, holds MASK or an unknown id, or is too long; all
        are checked before anything runs. Closing the iterator cancels what is left.
        """
        return self._generate(self._resolve_all(requests))

    def check(self, request: Request, where: str = "request") -> None:
        """Raise the UserError that `generate` would, its message starting with `where`."""
        self._resolve(request, where)

    def _generate(self, entries: Iterable[Entry]) -> Iterator[Trace]:
        numbers = [self._enqueue(entry) for entry in entries]
        self._streamed.update(numbers)
        following = 0
        try:
            for number in numbers:
                while number not in self._finished:
                    if not self._working:
                        raise RuntimeError(f"request {number} was cancelled while its results were read")
                    self._advance()
                following += 1
                yield self._finished.pop(number)
        finally:
            self._streamed.difference_update(numbers)
            self._give_up(set(numbers[following:]))

    # Requests that come and go

    def submit(self, request: Request) -> int:
        """Queue a request; returns the number under which `step` will give its trace. Raises like `generate`."""
        return self._enqueue(self._resolve(request, "request"))

    def cancel(self, number: int) -> bool:
        """Give a request up, waiting or running; its slot is free from the next `step` on. False: it is not there."""
        return self._give_up({number})

    def _give_up(self, numbers: set[int]) -> bool:
        before = len(self._waiting)
        if any(entry.number in numbers for entry in self._waiting):
            self._waiting = deque(entry for entry in self._waiting if entry.number not in numbers)
        found = [number for number in numbers if self._finished.pop(number, None)]
        running = self._batch is not None and self._batch.cancel(numbers)
        return bool(found or running or len(self._waiting) < before)

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do or to give."""
        return self._working or any(number not in self._streamed for number in self._finished)

    @property
    def _working(self) -> bool:
        return bool(self._waiting) or (self._batch is not None and self._batch.running > 0)

    def step(self) -> dict[int, Trace]:
        """Fill free slots, decode one chunk, and return what finished, by request number."""
        if self._working:
            self._advance()
        return {n: self._finished.pop(n) for n in list(self._finished) if n not in self._streamed}

    def _advance(self) -> None:
        if self.params is None:
            raise RuntimeError("the engine has no weights: call update_params first")
        try:
            self._choose_batch()
            self._batch.admit(self.params, self._waiting)
            if not self._batch.running and self._waiting:
                raise RuntimeError("no request can be admitted to an empty engine; this is a bug")
            self._finished |= self._batch.decode(self.params, self._waiting)
        except BaseException:
            self._batch = None  # what its slots and pages hold is not known any more
            raise

    def _choose_batch(self) -> None:
        present = self._batch
        if present is None or (not present.running and (self._reshape or not present.fits(self._waiting[0]))):
            self._batch = None  # if the new one has another shape: before it makes its cache
            self._batch = batch_for(self._kind, self.model, self.config, self._banned, self._waiting, present)
            self._reshape = False

    def blocks(self) -> dict[int, Blocks]:
        """The finished blocks of every running request, by number: ids, denoise steps and log-probs."""
        batch = self._batch  # once: another thread may be at work
        return {} if batch is None else batch.blocks()

    @property
    def running(self) -> int:
        """Requests in slots."""
        batch = self._batch
        return 0 if batch is None else batch.running

    def memory_bytes(self, requests: Iterable[Request] = ()) -> dict[str, int]:
        """What the engine keeps on all devices together besides the weights: {"cache", "state"}.

        Known before anything runs where `max_length` is set; otherwise for decoding `requests`.
        """
        return self._batch_of(self._resolve_all(requests)).memory_bytes()

    def traced(self, requests: Iterable[Request]) -> dict[str, jax.stages.Traced]:
        """"prefill" and "decode" as these requests run them, for abstract parameters; nothing runs."""
        entries = self._resolve_all(requests)
        return self._batch_of(entries).traced(self.params, entries)

    def abstract_state(self, requests: Iterable[Request]) -> SlotState:
        """What `memory_bytes` counts, as ShapeDtypeStructs with shardings."""
        return self._batch_of(self._resolve_all(requests)).abstract_state()

    def program(self, requests: Iterable[Request]) -> Program | CanvasProgram:
        """What is compiled into "decode" of these requests."""
        return self._batch_of(self._resolve_all(requests)).program()

    @property
    def _full(self) -> bool:
        return self.model.config.attention_mode == "full"

    def _batch_of(self, entries: deque[Entry]) -> Batch:
        """The batch that an idle engine would make for these."""
        return batch_for(self._kind, self.model, self.config, self._banned, entries, None)

    def _enqueue(self, entry: Entry) -> int:
        self._reshape = True  # an empty engine takes as many slots, and as long ones, as those that wait need
        entry.number, self._next_number = self._next_number, self._next_number + 1
        self._waiting.append(entry)
        return entry.number

    def _resolve_all(self, requests: Iterable[Request]) -> deque[Entry]:
        return deque(self._resolve(request, f"request {i}") for i, request in enumerate(requests))

    def _resolve(self, request: Request, where: str) -> Entry:
        c, options, limit = self.model.config, request.options, self.config.max_length
        prompt = np.asarray(request.prompt_ids)
        if prompt.size == 0:
            raise DataError(f"{where}: prompt_ids is empty; give at least one token id")
        if prompt.ndim != 1 or prompt.dtype.kind not in "iu" or prompt.min() < 0 or prompt.max() >= c.vocab_size:
            raise DataError(f"{where}: prompt_ids must be a list of integers from 0 to {c.vocab_size - 1}")
        if (prompt == c.mask_token_id).any():
            raise DataError(f"{where}: prompt_ids contains the mask id {c.mask_token_id}; remove it from the prompt")
        if any(i >= c.vocab_size for i in options.stop_ids or ()):
            raise DataError(f"{where}: stop_ids must be integers from 0 to {c.vocab_size - 1}")
        if not 0 <= request.sample_index < 2**32:
            raise DataError(f"{where}: sample_index is {request.sample_index}; it must be from 0 to {2**32 - 1}")
        entry = Entry(
            prompt_ids=prompt.astype(np.int32),
            prompt_hash=zlib.crc32(prompt.astype("<i4").tobytes()),
            options=options,
            block_size=options.block_size or c.block_size,
            stop_ids=tuple(
                dict.fromkeys((() if options.ignore_eos else tuple(self.stop_ids)) + (options.stop_ids or ()))
            ),
            sample_index=request.sample_index,
            full=self._full,
        )
        self._kind.check_entry(entry, c, self.config, where)
        need = f"{where}: prompt of {len(prompt)} tokens and max_tokens {options.max_tokens} reach position {entry.end}"
        if entry.end > c.max_positions:
            raise DataError(
                f"{need} but the model ends at {c.max_positions}; shorten the prompt or lower max_tokens"
            )
        if limit is not None and entry.limit > limit:
            raise DataError(f"{need} but the engine's max_length is {limit}; shorten the prompt or lower max_tokens")
        if self.config.pages is not None:
            page = round_up(self.config.page_size, entry.block_size)
            if -(-entry.end // page) > self.config.pages - 1:
                raise DataError(f"{need} but the cache has {self.config.pages} pages of {page} tokens, one of them "
                                "reserved; raise pages, shorten the prompt or lower max_tokens")  # fmt: skip
        return entry
