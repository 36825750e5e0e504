"""The slots of an engine: which request each decodes, the arrays on the device, and the calls that move them on."""

import dataclasses
import math
import operator
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tracerl_jax.diffusion.grid import block_of, block_start, round_up
from tracerl_jax.diffusion.reveal import ENTROPY_BOUNDED, SCORES, schedule, strategy_code
from tracerl_jax.diffusion.sampling import CONFIDENCES
from tracerl_jax.diffusion.trace import Trace
from tracerl_jax.errors import ConfigError
from tracerl_jax.kernels.decode import KVCache
from tracerl_jax.kernels.dispatch import target_platform
from tracerl_jax.models.config import ModelConfig
from tracerl_jax.models.decoder import Model
from tracerl_jax.parallel.order import in_order
from tracerl_jax.parallel.sharding import batch_sharding, row_shards
from tracerl_jax.rollout.cache import cache_shapes, copy_pages, prefill
from tracerl_jax.rollout.decode import Program, State, decode
from tracerl_jax.rollout.options import EngineConfig, SamplingOptions
from tracerl_jax.rollout.pages import Allocation, PagePool, PromptPages, prompt_pages
from tracerl_jax.rollout.slots import Needs, Rows, SlotState, refill

SHORTEST = 32  # tokens of the smallest length bucket
STOP_IDS_STEP = 16  # columns by which the table of stop ids grows
PROMPTS_PER_CALL = (1, 4, 16)  # of a shard
REFILL_SHARE = 8  # a chunk ends when one in so many slots is done
HALVINGS = 3  # of the slots that take part in a forward, as requests run out
# A forward costs what reading the weights costs up to about so many tokens on a device; beyond, every token costs.
# (FLOPs over bytes: of a v5p 166, a v6e 560, an H100 295, of a CPU core and fp32 weights some tens.)
FREE_TOKENS = {"cpu": 16, "gpu": 256, "tpu": 128}
# Tokens of a forward up to which `auto` fuses commits, which saves a forward in d + 1. On a CPU that pays beyond free
# tokens: at 128 of them, fused is 1.2 times as fast at width 512 and as fast at width 64 (benchmarks/rollout.py).
FUSED_TOKENS = {**FREE_TOKENS, "cpu": 128}


@dataclass(eq=False)
class Entry:
    """A request with its defaults filled in."""

    prompt_ids: np.ndarray  # [p] int32
    prompt_hash: int
    options: SamplingOptions
    block_size: int
    stop_ids: tuple[int, ...]
    sample_index: int
    full: bool = False  # of a full-attention model: blocks begin behind the prompt, of which none is encoded beforehand
    number: int = -1  # of the engine
    prompt_pages: PromptPages | None = None
    pages: Allocation | None = None

    @property
    def limit(self) -> int:
        return len(self.prompt_ids) + self.options.max_tokens

    @property
    def end(self) -> int:
        """End of the last block it can reach."""
        return self.limit if self.full else round_up(self.limit, self.block_size)

    @property
    def encoded(self) -> int:
        """End of the prompt's complete blocks."""
        return 0 if self.full else block_start(block_of(len(self.prompt_ids), self.block_size), self.block_size)

    @property
    def first_block(self) -> int:
        """Start of the first block that is denoised."""
        return len(self.prompt_ids) if self.full else self.encoded

    @property
    def needs(self) -> Needs:
        options, samples = self.options, self.options.temperature > 0
        truncates = options.top_k > 0 or options.top_p < 1
        return Needs(
            noise=samples,
            filters=options.confidence == "untempered"
            or (truncates and (samples or options.confidence == "truncated")),
            entropy=strategy_code(options.strategy) == ENTROPY_BOUNDED or options.score in ("entropy", "uncertainty"),
            margin=options.score == "margin",
        )


def _needs_of(entries: Iterable[Entry]) -> Needs:
    return Needs(*map(any, zip(Needs(), *(entry.needs for entry in entries), strict=True)))


class Blocks(NamedTuple):
    """Finished blocks of a request that is still running."""

    ids: np.ndarray  # [r] int32
    step_map: np.ndarray  # [r] int32, as in a Trace
    logprobs: np.ndarray  # [r] f32


@dataclass(frozen=True)
class Shape:
    """What the programs of a batch are compiled for."""

    slots: int  # N
    length: int  # S, whole pages
    block_size: int
    page_size: int
    stop_ids: int
    window: int  # of a forward with a cache of a full-attention model; 0: none

    @property
    def width(self) -> int:
        """Pages of a slot."""
        return self.length // self.page_size


def batch_for(
    kind: type["Batch"], model: Model, config: EngineConfig, banned: np.ndarray, waiting: deque[Entry],
    present: "Batch | None",
) -> "Batch":  # fmt: skip
    """A batch for the oldest waiting request and those of its block size: the present one if it fits."""
    first = waiting[0] if waiting else None
    block_size = model.config.block_size if first is None else first.block_size
    same = [entry for entry in waiting if entry.block_size == block_size]
    page_size = round_up(config.page_size, block_size)
    longest = max((entry.end for entry in same), default=0)
    if config.max_length is not None:
        length, slots = round_up(config.max_length, page_size), config.slots
    else:
        length = round_up(length_bucket(longest), block_size)
        page_size = min(page_size, length)
        length, slots = round_up(length, page_size), _fraction_bucket(len(same), config.slots, 4)
    shards = row_shards(model.mesh)
    stop_ids = round_up(max([1, *(len(entry.stop_ids) for entry in same)]), STOP_IDS_STEP)
    if present is not None:
        stop_ids = max(stop_ids, present.shape.stop_ids)
    window = kind.window(config, same, length)
    if present is not None:
        window = max(window, present.shape.window)
    shape = Shape(round_up(slots, shards), length, block_size, page_size, stop_ids, window)
    if present is not None and present.shape == shape:
        return present
    return kind(model, config, banned, shape)


class Batch:
    """N slots of one shape. The requests in it have one block size."""

    run = staticmethod(decode)  # the program that moves them on

    @staticmethod
    def check(model: ModelConfig, config: EngineConfig) -> None:
        """Raises ConfigError for what such a batch cannot do."""
        if (config.cache, config.horizon, config.refresh) != ("none", None, None):
            raise ConfigError(
                "cache, horizon and refresh are for full-attention models; a block-causal model always decodes with an "
                "exact cache: leave them out"
            )

    @staticmethod
    def check_entry(entry: Entry, model: ModelConfig, config: EngineConfig, where: str) -> None:
        """Raises a UserError for a request that such a batch cannot take."""

    @staticmethod
    def window(config: EngineConfig, entries: Sequence[Entry], length: int) -> int:
        """`Shape.window` for these requests in slots of this length."""
        return 0

    def __init__(self, model: Model, config: EngineConfig, banned: np.ndarray, shape: Shape):
        self.model, self.config, self.shape = model, config, shape
        self.entries: list[Entry | None] = [None] * shape.slots
        self._banned = banned
        self._shards = row_shards(model.mesh)
        self._platform = target_platform(None if model.mesh is None else model.mesh.devices.flat[0])
        self._place = None if model.mesh is None else batch_sharding(model.mesh)
        # All slots at full length, a slot's worth of prompts to keep, and the page that belongs to nobody.
        pages = config.pages or (shape.slots // self._shards + config.prefix_cache) * shape.width + 1
        self._pools = [PagePool(pages, shape.page_size, config.prefix_cache) for _ in range(self._shards)]
        self._pages = pages
        self._stopped = np.zeros(shape.slots, bool)
        self._rows = _empty_rows(shape)
        self._device_rows: Rows | None = None
        self._needs = Needs()
        self._table = np.zeros((shape.slots, shape.width), np.int32)
        self._state: SlotState | None = None

    @property
    def running(self) -> int:
        return sum(entry is not None for entry in self.entries)

    def forget_prompts(self) -> None:
        for pool in self._pools:
            pool.forget()

    def cancel(self, numbers: set[int]) -> bool:
        """Give up those of these requests that run. False: none does."""
        found = [n for n, entry in enumerate(self.entries) if entry is not None and entry.number in numbers]
        for n in found:
            self._release(n)
            self._stopped[n] = True
        return bool(found)

    # Requests into slots

    def admit(self, params: dict, waiting: deque[Entry]) -> None:
        """Give free slots to the oldest waiting requests, as far as slots and pages go."""
        if not self.running:  # programs change between streams of requests, not within one
            self._needs = _needs_of(entry for entry in waiting if self.fits(entry))
        fresh, free = [], self._free_slots()
        while waiting and self.fits(waiting[0]):
            n = self._place_for(waiting[0], free)
            if n is None:
                break
            fresh.append(n)
            self.entries[n] = waiting.popleft()
            self._needs = Needs(*map(operator.or_, self._needs, self.entries[n].needs))
            self._stopped[n] = False
        if not fresh and not self._stopped.any():
            return
        self._prefill(params, fresh)
        canvas = np.full((self.shape.slots, self.shape.length), self.model.config.mask_token_id, np.int32)
        start = np.zeros(self.shape.slots, np.int32)
        for n in fresh:
            entry = self.entries[n]
            canvas[n, : len(entry.prompt_ids)], start[n] = entry.prompt_ids, entry.first_block
            _set_row(self._rows, n, entry)
            self._table[n] = 0
            self._table[n, : len(entry.pages.pages)] = entry.pages.pages
        self._device_rows = self._put(self._rows)
        is_fresh = np.isin(np.arange(self.shape.slots), fresh)
        self._state = refill(self._state, *self._put((is_fresh, self._stopped, canvas, start, self._table)))
        self._stopped[:] = False

    def fits(self, entry: Entry) -> bool:
        shape = self.shape
        return (entry.block_size == shape.block_size and entry.end <= shape.length
                and len(entry.stop_ids) <= shape.stop_ids)  # fmt: skip

    def _free_slots(self) -> list[list[int]]:
        """Of every shard, the last one to be filled first."""
        free = [[] for _ in range(self._shards)]
        for n in reversed(range(self.shape.slots)):
            if self.entries[n] is None:
                free[self._shard(n)].append(n)
        return free

    def _place_for(self, entry: Entry, free: list[list[int]]) -> int | None:
        """A slot out of `free` whose shard has room, with the pages in `entry.pages`: where most of the prompt is
        known, else where most pages are free."""
        entry.prompt_pages = prompt = entry.prompt_pages or prompt_pages(
            entry.prompt_ids, entry.encoded, self.shape.page_size
        )
        shards = [shard for shard in range(self._shards) if free[shard]]
        for shard in sorted(shards, key=lambda s: (-self._pools[s].known_tokens(prompt), -self._pools[s].available, s)):
            entry.pages = self._pools[shard].allocate(prompt, entry.end)
            if entry.pages is not None:
                return free[shard].pop()
        return None

    def _prefill(self, params: dict, fresh: list[int]) -> None:
        """Encode what the cache does not know of the prompts, then copy the pages in which known prompts end.

        A prompt that shares pages with one of the same round waits for that one's call.
        """
        if self._state is None:
            self._state = self._empty_state(params)
        wave_of: dict[tuple[int, int], int] = {}  # (shard, page filled in this round) -> its wave
        waves: dict[tuple[int, bool], list[int]] = {}
        for n in fresh:
            entry, shard = self.entries[n], self._shard(n)
            if entry.pages.start >= entry.encoded:
                continue
            wave = max([-1, *(wave_of.get((shard, page), -1) for page in entry.pages.shared)]) + 1
            waves.setdefault((wave, entry.pages.start > 0), []).append(n)
            first, last = (at // self.shape.page_size for at in (entry.pages.start, entry.encoded - 1))
            wave_of |= {(shard, page): wave for page in entry.pages.pages[first : last + 1]}
        cache = self._state.cache
        for key in sorted(waves):
            for members in self._calls(waves[key]):
                operands = self._put(self._prompts(members))
                with in_order(self.model.mesh):
                    cache = prefill(self.model, params, cache, *operands, np.int32(self.shape.block_size))
        copies = [n for n in fresh if self.entries[n].pages.source is not None]
        if copies:
            cache = self._copy(cache, copies)
        self._state = dataclasses.replace(self._state, cache=cache)
        for n in copies:
            self._pools[self._shard(n)].unpin(self.entries[n].pages)

    def _calls(self, slots: list[int]) -> list[list[list[int]]]:
        """Slots cut into calls of prefill, each [shards][up to PROMPTS_PER_CALL[-1]]; like lengths go together."""
        slots = sorted(slots, key=lambda n: self.entries[n].encoded - self.entries[n].pages.start)
        by_shard = [[n for n in slots if self._shard(n) == shard] for shard in range(self._shards)]
        size = PROMPTS_PER_CALL[-1]
        rounds = max(-(-len(members) // size) for members in by_shard)
        return [[members[i * size : (i + 1) * size] for members in by_shard] for i in range(rounds)]

    def _prompts(self, members: list[list[int]]) -> tuple[np.ndarray, ...]:
        """Operands of a prefill: (prompts, start, stop, prefix_pages, pages)."""
        page, entries = self.shape.page_size, [self.entries[n] for shard in members for n in shard]
        u = next(size for size in PROMPTS_PER_CALL if size >= max(map(len, members)))
        T = round_up(length_bucket(max(e.encoded - e.pages.start for e in entries)), page)
        T = min(T, self.shape.length)
        W = self.shape.width if any(e.pages.start for e in entries) else 0
        U = self._shards * u
        prompts, pages = np.zeros((U, T), np.int32), np.zeros((U, T // page), np.int32)
        start, stop, prefix = np.zeros(U, np.int32), np.zeros(U, np.int32), np.zeros((U, W), np.int32)
        for shard, slots in enumerate(members):
            for i, n in enumerate(slots):
                entry, row = self.entries[n], shard * u + i
                start[row], stop[row] = entry.pages.start, entry.encoded
                new = entry.prompt_ids[entry.pages.start : entry.encoded]
                prompts[row, : len(new)] = new
                first, last = entry.pages.start // page, -(-entry.encoded // page)
                pages[row, : last - first] = entry.pages.pages[first:last]
                if W:
                    prefix[row, :first] = entry.pages.pages[:first]
        return prompts, start, stop, prefix, pages

    def _copy(self, cache, slots: list[int]):
        per_shard = self.shape.slots // self._shards
        source, target = (np.zeros((self._shards, per_shard), np.int32) for _ in range(2))
        count = np.zeros(self._shards, np.int32)
        for n in slots:
            entry, shard = self.entries[n], self._shard(n)
            source[shard, count[shard]] = entry.pages.source
            target[shard, count[shard]] = entry.pages.pages[entry.encoded // self.shape.page_size]
            count[shard] += 1
        return copy_pages(self.model, cache, *self._put((source.reshape(-1), target.reshape(-1), count)))

    # Forwards, and what they finish

    def decode(self, params: dict, waiting: deque[Entry]) -> dict[int, Trace]:
        """One chunk; the traces of the requests that it finished, by number."""
        N = self.shape.slots
        chosen, enough = self._part(bool(waiting) and self.fits(waiting[0]))
        with in_order(self.model.mesh):
            self._state = self.run(
                self.program(), params, self._banned, self._device_rows, self._state,
                np.int32(self.config.forwards_per_chunk), np.int32(enough), self._put(chosen),
            )  # fmt: skip
        done = jax.device_get(self._state.done)
        finished = [n for n in range(N) if self.entries[n] is not None and done[n]]
        if not finished:
            return {}
        names = ("canvas", "step_map", "logprobs", "behaviour_logprobs", "start", "steps", "forwards")
        fetched = jax.device_get([getattr(self._state, name) for name in names])
        traces = {}
        for n in finished:
            entry = self._release(n)
            traces[entry.number] = _trace(entry, *(array[n] for array in fetched))
        return traces

    def _part(self, more: bool) -> tuple[np.ndarray | None, int]:
        """(slots of the next chunk, numbered within their shard, or None for all; how many of them shall be done at
        its end). `more`: requests wait for a free slot.

        Where every token costs, slots that are done cost as much as others: as requests run out, the chunk ends when
        those that are left fit half the batch.
        """
        shards, sizes = self._shards, self._part_sizes()
        members = [[n for n in range(sizes[0]) if self.entries[shard * sizes[0] + n] is not None]
                   for shard in range(shards)]
        longest = max(map(len, members))
        size, smaller = next(pair for pair in reversed(list(zip(sizes, [*sizes[1:], 0], strict=True)))
                             if pair[0] >= longest)  # fmt: skip
        total, running = shards * size, self.running
        if more:
            enough = min(total, total - running + max(1, self.shape.slots // REFILL_SHARE))
        else:
            enough = max(total - shards * smaller, total - running + 1)
        if size == sizes[0]:
            return None, enough
        for shard, slots in enumerate(members):
            idle = (n for n in range(sizes[0]) if self.entries[shard * sizes[0] + n] is None)
            slots += [next(idle) for _ in range(size - len(slots))]
        return np.array(members, np.int32).reshape(-1), enough

    def _part_sizes(self) -> list[int]:
        """Slots of a shard that may take part in a forward: all, a half, .. as long as fewer tokens take less time."""
        sizes = [self.shape.slots // self._shards]
        least = FREE_TOKENS[self._platform] // self._queries
        while len(sizes) <= HALVINGS and sizes[-1] > max(1, least):
            sizes.append(-(-sizes[-1] // 2))
        return sizes

    def blocks(self) -> dict[int, Blocks]:
        """The finished blocks of every running request, by number."""
        if self._state is None or not self.running:
            return {}
        state = self._state
        start, *arrays = jax.device_get((state.start, state.canvas, state.step_map, state.logprobs))
        found = {}
        for n, entry in enumerate(self.entries):
            if entry is not None:
                response = slice(len(entry.prompt_ids), min(int(start[n]), entry.limit))
                found[entry.number] = Blocks(*(array[n, response].copy() for array in arrays))
        return found

    def _release(self, n: int) -> Entry:
        entry = self.entries[n]
        self._pools[self._shard(n)].release(entry.pages)
        self.entries[n] = None
        return entry

    def program(self) -> Program:
        return Program(self.model, self.shape.block_size, self.groups, self._needs)

    @property
    def _queries(self) -> int:
        """Tokens of a slot in a forward."""
        return self.groups * self.shape.block_size

    @property
    def groups(self) -> int:
        """Groups of a block's size in a forward; 1: blocks are committed by forwards of their own."""
        groups, commit = 1 + self.config.drafts, self.config.commit
        if commit == "auto":
            tokens = groups * self.shape.block_size * self.shape.slots // self._shards
            commit = "fused" if tokens <= FUSED_TOKENS[self._platform] else "separate"
        return 1 if commit == "separate" else groups

    def _shard(self, n: int) -> int:
        return n // (self.shape.slots // self._shards)

    # Arrays

    def _put(self, tree):
        """Copies: what is given here changes while the device may still be reading."""
        return jax.device_put(jax.tree.map(np.array, tree), self._place)

    def abstract_state(self) -> SlotState:
        drafts = self._spec("int32", self.shape.slots, self.groups - 1, self.shape.block_size)
        pending = self._spec("bool", self.shape.slots)
        return State(**self._slot_arrays(), cache=self._abstract_cache(), pending=pending, drafts=drafts)

    def _slot_arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Of `SlotState`."""
        N, S = self.shape.slots, self.shape.length
        shapes = {
            "canvas": ("int32", N, S), "step_map": ("int32", N, S), "logprobs": ("float32", N, S),
            "behaviour_logprobs": ("float32", N, S), "start": ("int32", N), "block_step": ("int32", N),
            "steps": ("int32", N), "forwards": ("int32", N), "done": ("bool", N),
        }  # fmt: skip
        return {name: self._spec(*shape) for name, shape in shapes.items()}

    def _spec(self, dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=self._place)

    def _abstract_cache(self) -> KVCache:
        shape, dtype = self.shape, self.model.config.dtype if self.config.kv_dtype == "compute" else "int8"
        return cache_shapes(self.model, shape.slots, self._shards * self._pages, shape.page_size, shape.width, dtype)

    def _empty_state(self, params: dict) -> SlotState:
        """Every slot done. Bound to its device like what the programs return, or the first call would be compiled for
        itself."""
        abstract, place = self.abstract_state(), getattr(jax.tree.leaves(params)[0], "sharding", None)
        state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding or place), abstract)
        done = jnp.ones(self.shape.slots, bool, device=state.done.sharding)
        return dataclasses.replace(state, done=done)

    def memory_bytes(self) -> dict[str, int]:
        """{"cache", "state"} on all devices together."""
        state = self.abstract_state()
        size = {name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
                for name, tree in (("cache", state.cache), ("all", state))}  # fmt: skip
        return {"cache": size["cache"], "state": size["all"] - size["cache"]}

    def traced(self, params: dict, waiting: deque[Entry]) -> dict[str, jax.stages.Traced]:
        """ "prefill" (where a prompt has a complete block) and "decode" of these requests, for abstract parameters;
        nothing runs."""
        everywhere = None if self._place is None else NamedSharding(self.model.mesh, PartitionSpec())

        def spec(tree, sharding):
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding), tree)

        state, number = self.abstract_state(), spec(np.int32(0), everywhere)
        self._needs = _needs_of(waiting)
        fresh, free, programs = [], self._free_slots(), {}
        while waiting and (n := self._place_for(waiting[0], free)) is not None:
            self.entries[n] = waiting.popleft()
            fresh += [n] if self.entries[n].pages.start < self.entries[n].encoded else []
        if fresh:
            operands = spec(self._prompts(self._calls(fresh)[0]), self._place)
            programs["prefill"] = prefill.trace(self.model, params, state.cache, *operands, number)
        banned, rows = spec(self._banned, everywhere), spec(self._rows, self._place)
        programs["decode"] = self.run.trace(self.program(), params, banned, rows, state, number, number)
        return programs


def length_bucket(n: int) -> int:
    """The smallest of 32, 48, 64, 96, 128, 192, .. not below n."""
    size = max(SHORTEST, 1 << (max(n, 1) - 1).bit_length())
    return size * 3 // 4 if size > SHORTEST and n <= size * 3 // 4 else size


def _fraction_bucket(n: int, whole: int, factor: int) -> int:
    """The smallest of whole, whole / factor, whole / factor^2, .. not below n, or whole."""
    size = whole
    while (smaller := math.ceil(size / factor)) >= n and smaller < size:
        size = smaller
    return size


_COLUMNS: dict[str, tuple[type, Callable[[Entry], int | float | bool]]] = {
    "prompt_len": (np.int32, lambda e: len(e.prompt_ids)),
    "limit": (np.int32, lambda e: e.limit),
    "strategy": (np.int32, lambda e: strategy_code(e.options.strategy)),
    "score": (np.int32, lambda e: SCORES.index(e.options.score)),
    "threshold": (np.float32, lambda e: e.options.threshold),
    "entropy_bound": (np.float32, lambda e: e.options.entropy_bound),
    "first_token": (bool, lambda e: e.options.first_token),
    "pad_penalty": (np.float32, lambda e: e.options.pad_penalty),
    "temperature": (np.float32, lambda e: e.options.temperature),
    "top_k": (np.int32, lambda e: e.options.top_k),
    "top_p": (np.float32, lambda e: e.options.top_p),
    "confidence": (np.int32, lambda e: CONFIDENCES.index(e.options.confidence)),
    "seed": (np.uint32, lambda e: e.options.seed),
    "prompt_hash": (np.uint32, lambda e: e.prompt_hash),
    "sample_index": (np.uint32, lambda e: e.sample_index),
}


def _empty_rows(shape: Shape) -> Rows:
    """Host arrays for slots without a request; values that do no harm."""
    columns = {name: np.zeros(shape.slots, dtype) for name, (dtype, _) in _COLUMNS.items()}
    columns["top_p"][:] = columns["pad_penalty"][:] = 1
    stop_ids = np.full((shape.slots, shape.stop_ids), -1, np.int32)
    return Rows(stop_ids=stop_ids, schedule=np.ones((shape.slots, shape.block_size), np.int32), **columns)


def _set_row(rows: Rows, n: int, entry: Entry) -> None:
    for name, (_, get) in _COLUMNS.items():
        getattr(rows, name)[n] = get(entry)
    options = entry.options
    rows.schedule[n] = schedule(options.strategy, entry.block_size, options.denoising_steps or entry.block_size,
                                options.first_token)  # fmt: skip
    rows.stop_ids[n] = -1
    rows.stop_ids[n, : len(entry.stop_ids)] = entry.stop_ids


def _trace(entry: Entry, canvas, step_map, logprobs, behaviour_logprobs, start, steps, forwards) -> Trace:
    """Cut one slot's canvas [S] into completion and tail."""
    first, last_end = len(entry.prompt_ids), int(start) + entry.block_size
    end = min(entry.limit, last_end)
    stops = np.flatnonzero(np.isin(canvas[first:end], entry.stop_ids))
    if stops.size:
        end = first + int(stops[0]) + 1
    return Trace(
        prompt_ids=entry.prompt_ids,
        ids=canvas[first:end].copy(),
        step_map=step_map[first:end].copy(),
        logprobs=logprobs[first:end].copy(),
        behaviour_logprobs=behaviour_logprobs[first:end].copy(),
        tail_ids=canvas[end:last_end].copy(),
        tail_step_map=step_map[end:last_end].copy(),
        block_size=entry.block_size,
        temperature=float(entry.options.temperature),
        denoise_forwards=int(steps),
        forwards=int(forwards),
        stop_reason="stop" if stops.size else "length",
        sample_index=entry.sample_index,
        canvas_len=entry.limit if entry.full else 0,
    )
