"""Engine: requests in, traces out, in order.

Requests that share a block size are decoded in batches of `batch_size` rows, in the order they came; each distinct
prompt of a batch is prefilled once. Shapes come from few buckets, so that few programs are compiled:

    rows           batch_size, batch_size / 4, batch_size / 16, ..
    distinct prompts   rows, rows / 2, rows / 4, ..
    prefill and cache length   0, 32, 48, 64, 96, 128, 192, .. (powers of two and the middles between them)

each rounded up to the block size (lengths) or to the device rows of the mesh (rows, prompts).
"""

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tracerl_jax.diffusion.decode import Program, Rows, decode, prefill
from tracerl_jax.diffusion.grid import block_of, block_start, round_up
from tracerl_jax.diffusion.reveal import ENTROPY_BOUNDED, strategy_code
from tracerl_jax.diffusion.sampling import banned_ids
from tracerl_jax.diffusion.trace import Trace
from tracerl_jax.errors import ConfigError, DataError
from tracerl_jax.models.decoder import Model
from tracerl_jax.parallel.sharding import batch_sharding, cache_sharding, row_shards
from tracerl_jax.rollout.options import Request, SamplingOptions
from tracerl_jax.rollout.weights import rollout_params

__all__ = ["Engine", "Request", "SamplingOptions"]

SHORTEST = 32  # tokens of the smallest length bucket
STOP_IDS_STEP = 4  # columns by which the table of stop ids grows


@dataclass(frozen=True)
class _Row:
    """A request with its defaults filled in."""

    prompt_ids: np.ndarray  # [p] int32
    options: SamplingOptions
    block_size: int
    stop_ids: tuple[int, ...]
    sample_index: int

    @property
    def limit(self) -> int:
        return len(self.prompt_ids) + self.options.max_tokens

    @property
    def end(self) -> int:
        """End of the last block it can reach."""
        return round_up(self.limit, self.block_size)


@dataclass(frozen=True)
class _Batch:
    """Host arrays of one batch."""

    program: Program
    rows: Rows
    canvas: np.ndarray  # [N,S]
    prompts: np.ndarray  # [U,T], the complete blocks of each distinct prompt
    prompt_len: np.ndarray  # [U]
    prompt_of: np.ndarray  # [N]

    @property
    def capacity(self) -> int:
        return self.canvas.shape[1]


class Engine:
    """Decodes requests with one model, on the devices of `model.mesh` if it has one.

    valid_vocab: ids from here on are never sampled (the tokenizer's size; None = the model's whole vocabulary).
    stop_ids: end a completion; None = the model's stop_token_ids.
    Raises ConfigError when the model cannot be decoded this way (no mask id, another attention mode).
    """

    def __init__(
        self,
        model: Model,
        params: dict,
        *,
        batch_size: int,
        valid_vocab: int | None = None,
        stop_ids: Sequence[int] | None = None,
    ):
        config = model.config
        if config.mask_token_id is None:
            raise ConfigError(
                "the model has no mask token: set mask_token_id in its config.json to the id it was trained with"
            )
        if (config.attention_mode, config.logit_alignment) != ("block_causal", "same_position"):
            raise ConfigError(
                f"cannot decode block by block: the model has attention_mode {config.attention_mode!r} and "
                f"logit_alignment {config.logit_alignment!r}; block_causal and same_position are needed"
            )
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        mesh = model.mesh
        self.model = model
        self.update_params(params)
        self.stop_ids = tuple(config.stop_token_ids if stop_ids is None else stop_ids)
        self.row_multiple = row_shards(mesh)
        self.batch_size = round_up(batch_size, self.row_multiple)
        self._sharding = None if mesh is None else batch_sharding(mesh)
        self._banned = banned_ids(config.vocab_size, config.mask_token_id, valid_vocab)

    def update_params(self, params: dict | None) -> None:
        """Decode with these parameters from the next batch on: a copy in the compute dtype, placed for the model's
        mesh (rollout/weights.py). None frees the copy; nothing can be decoded until the next call."""
        self.params = None  # first, or two copies are there for a while
        self.params = None if params is None else rollout_params(self.model, params)

    def generate(self, requests: Iterable[Request]) -> Iterator[Trace]:
        """Yield the trace of every request, in their order, as soon as its batch is done.

        Raises a UserError naming the request when a prompt is empty, holds MASK or an unknown id, or is too long.
        """
        return self._generate([self._resolve(request, f"request {i}") for i, request in enumerate(requests)])

    def check(self, request: Request, where: str = "request") -> None:
        """Raise the UserError that `generate` would, its message starting with `where`."""
        self._resolve(request, where)

    def _generate(self, rows: list[_Row]) -> Iterator[Trace]:
        finished: dict[int, Trace] = {}
        following = 0
        for indices in self._batches(rows):
            finished |= zip(indices, self._decode([rows[i] for i in indices]), strict=True)
            while following in finished:
                yield finished.pop(following)
                following += 1

    def _resolve(self, request: Request, where: str) -> _Row:
        config, options = self.model.config, request.options
        prompt = np.asarray(request.prompt_ids)
        if prompt.size == 0:
            raise DataError(f"{where}: prompt_ids is empty; give at least one token id")
        if prompt.ndim != 1 or prompt.dtype.kind not in "iu" or prompt.min() < 0 or prompt.max() >= config.vocab_size:
            raise DataError(f"{where}: prompt_ids must be a list of integers from 0 to {config.vocab_size - 1}")
        if (prompt == config.mask_token_id).any():
            raise DataError(
                f"{where}: prompt_ids contains the mask id {config.mask_token_id}; remove it from the prompt"
            )
        stop_ids = () if options.ignore_eos else self.stop_ids
        row = _Row(
            prompt_ids=prompt.astype(np.int32),
            options=options,
            block_size=options.block_size or config.block_size,
            stop_ids=tuple(dict.fromkeys(stop_ids + (options.stop_ids or ()))),
            sample_index=request.sample_index,
        )
        if row.end > config.max_positions:
            raise DataError(
                f"{where}: prompt of {len(prompt)} tokens and max_tokens {options.max_tokens} reach position "
                f"{row.end} but the model ends at {config.max_positions}; shorten the prompt or lower max_tokens"
            )
        return row

    def _batches(self, rows: list[_Row]) -> list[list[int]]:
        """Indices of each batch; batches are ordered by their first request."""
        by_block_size: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            by_block_size.setdefault(row.block_size, []).append(index)
        batches = [
            indices[i : i + self.batch_size]
            for indices in by_block_size.values()
            for i in range(0, len(indices), self.batch_size)
        ]
        return sorted(batches)

    def traced(self, requests: Iterable[Request]) -> dict[str, jax.stages.Traced]:
        """ "prefill" and "decode" as one batch of these requests runs them, for abstract parameters; nothing runs."""
        batch = self._batch([self._resolve(request, f"request {i}") for i, request in enumerate(requests)])
        everywhere = None if self.model.mesh is None else NamedSharding(self.model.mesh, PartitionSpec())

        def spec(tree, sharding):
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

        inputs = spec((batch.prompts, batch.prompt_len, batch.prompt_of), self._sharding)
        first = prefill.trace(
            self.model, self.params, *inputs, block_size=batch.program.block_size, capacity=batch.capacity
        )
        cache = spec(first.out_info, None if self.model.mesh is None else cache_sharding(self.model.mesh))
        banned = spec(self._banned, everywhere)
        inputs = spec((batch.rows, batch.canvas), self._sharding)
        return {"prefill": first, "decode": decode.trace(batch.program, self.params, banned, *inputs, cache)}

    def _decode(self, rows: list[_Row]) -> list[Trace]:
        batch = self._batch(rows)
        cache = prefill(
            self.model, self.params, *self._put((batch.prompts, batch.prompt_len, batch.prompt_of)),
            block_size=batch.program.block_size, capacity=batch.capacity,
        )  # fmt: skip
        state = decode(batch.program, self.params, self._banned, *self._put((batch.rows, batch.canvas)), cache)
        fetched = jax.device_get(
            (state.canvas, state.step_map, state.logprobs, state.behaviour_logprobs, state.committed, state.steps)
        )
        return [_trace(row, *(array[n] for array in fetched)) for n, row in enumerate(rows)]

    def _batch(self, rows: list[_Row]) -> "_Batch":
        B = rows[0].block_size
        N = _fraction_bucket(len(rows), self.batch_size, 4, self.row_multiple)
        S = _length_bucket(max(row.end for row in rows), B)
        device_rows = _device_rows(rows, N)
        program = Program(
            model=self.model,
            block_size=B,
            use_noise=bool((device_rows.temperature > 0).any()),
            use_filters=any(r.options.temperature > 0 and (r.options.top_k or r.options.top_p < 1) for r in rows),
            use_entropy=bool((device_rows.strategy == ENTROPY_BOUNDED).any()),
        )
        canvas = np.full((N, S), self.model.config.mask_token_id, np.int32)
        for n, row in enumerate(rows):
            canvas[n, : len(row.prompt_ids)] = row.prompt_ids

        distinct: dict[bytes, int] = {}
        prompt_of = np.zeros(N, np.int32)
        prompts = []
        for n, row in enumerate(rows):
            prompt_of[n] = distinct.setdefault(row.prompt_ids.tobytes(), len(distinct))
            if prompt_of[n] == len(prompts):
                prompts.append(row.prompt_ids)
        U = _fraction_bucket(len(prompts), N, 2, self.row_multiple)
        encoded = [block_start(block_of(len(prompt), B), B) for prompt in prompts]
        T = _length_bucket(max(encoded), B)
        ids = np.zeros((U, T), np.int32)
        prompt_len = np.zeros(U, np.int32)
        for u, prompt in enumerate(prompts):
            ids[u, : encoded[u]] = prompt[: encoded[u]]
            prompt_len[u] = len(prompt)
        return _Batch(program, device_rows, canvas, ids, prompt_len, prompt_of)

    def _put(self, tree):
        return jax.device_put(tree, self._sharding)


def _length_bucket(n: int, block_size: int) -> int:
    """0, or the smallest of 32, 48, 64, 96, 128, 192, .. not below n, rounded up to whole blocks."""
    if n == 0:
        return 0
    size = max(SHORTEST, 1 << (n - 1).bit_length())
    if size > SHORTEST and n <= size * 3 // 4:
        size = size * 3 // 4
    return round_up(size, block_size)


def _fraction_bucket(n: int, whole: int, factor: int, multiple: int) -> int:
    """The smallest of whole, whole / factor, whole / factor^2, .. not below n, each rounded up to `multiple`."""
    size = whole
    while True:
        smaller = round_up(math.ceil(size / factor), multiple)
        if smaller < n or smaller == size:
            return size
        size = smaller


def _device_rows(rows: list[_Row], N: int) -> Rows:
    """The rows' options as arrays of N; those behind the last request have limit 0 and harmless values."""

    def column(dtype, get, fill=0):
        values = np.full(N, fill, dtype)
        values[: len(rows)] = [get(row) for row in rows]
        return values

    width = round_up(max(len(row.stop_ids) for row in rows), STOP_IDS_STEP)
    stop_ids = np.full((N, width), -1, np.int32)
    for n, row in enumerate(rows):
        stop_ids[n, : len(row.stop_ids)] = row.stop_ids
    return Rows(
        prompt_len=column(np.int32, lambda r: len(r.prompt_ids)),
        limit=column(np.int32, lambda r: r.limit),
        stop_ids=stop_ids,
        strategy=column(np.int32, lambda r: strategy_code(r.options.strategy)),
        denoising_steps=column(np.int32, lambda r: r.options.denoising_steps or r.block_size, fill=1),
        threshold=column(np.float32, lambda r: r.options.threshold),
        entropy_bound=column(np.float32, lambda r: r.options.entropy_bound),
        temperature=column(np.float32, lambda r: r.options.temperature),
        top_k=column(np.int32, lambda r: r.options.top_k),
        top_p=column(np.float32, lambda r: r.options.top_p, fill=1),
        truncated_confidence=column(bool, lambda r: r.options.confidence == "truncated"),
        seed=column(np.uint32, lambda r: r.options.seed),
        prompt_hash=column(np.uint32, lambda r: zlib.crc32(r.prompt_ids.astype("<i4").tobytes())),
        sample_index=column(np.uint32, lambda r: r.sample_index),
    )


def _trace(row: _Row, canvas, step_map, logprobs, behaviour_logprobs, committed, steps) -> Trace:
    """Cut one row's canvas [S] into completion and tail."""
    first, last_end = len(row.prompt_ids), int(committed) + row.block_size
    end = min(row.limit, last_end)
    stops = np.flatnonzero(np.isin(canvas[first:end], row.stop_ids))
    if stops.size:
        end = first + int(stops[0]) + 1
    return Trace(
        prompt_ids=row.prompt_ids,
        ids=canvas[first:end].copy(),
        step_map=step_map[first:end].copy(),
        logprobs=logprobs[first:end].copy(),
        behaviour_logprobs=behaviour_logprobs[first:end].copy(),
        tail_ids=canvas[end:last_end].copy(),
        tail_step_map=step_map[end:last_end].copy(),
        block_size=row.block_size,
        temperature=float(row.options.temperature),
        denoise_forwards=int(steps),
        stop_reason="stop" if stops.size else "length",
        sample_index=row.sample_index,
    )
