"""Decoding of full-attention models in N slots: what the device does between two looks of the host.

The canvas of a slot has its full length from the start, and all of it is visible. Blocks are counted from the end of
the prompt and denoised one after the other:

    canvas    [ p0 p1 p2 | a  b  c  d | e  M  M  M | M  M  M  M ]        B = 4, M = MASK
    full      |------------- every token: exact ----------------|
    window                            |- live: horizon -|                later denoise steps of the block, cached
    prefix    |------ cached ---------|                 |--no one sees-|
    dual      |------ cached ---------|                 |-- cached ----|

`decode` is one `lax.while_loop`; an iteration is one forward, a denoise step for the slots that take part in it:

    cache      full forward                                 window forward
    none       every step
    prefix     a block's first step, then every `refresh`   the others: keys and values are made of the window alone
    dual       a block's first step, then every `refresh`   the same, and what lies behind the window is not forgotten

The first step of a block is exact in every mode. Later ones look back on keys and values of what the canvas was at the
last full forward: they are exact where the window reaches to the end of the canvas and nothing was revealed since.

Slots that wait for a full forward are gathered, a few at a time, so that one costs what these few cost; the others go
on meanwhile. Who waits for whom depends on the batch. What a slot sees does not.

Shifted models predict a token one position before it. A window then opens one token earlier, whose query reads the
cache and the window while its key and value stay the cached ones.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from tracerl_jax.kernels.decode import KVCache
from tracerl_jax.models.decoder import KV, Model
from tracerl_jax.parallel.sharding import row_shards
from tracerl_jax.rollout.cache import ROWS, on_shards, write_pages
from tracerl_jax.rollout.slots import (
    Needs,
    Rows,
    SlotState,
    has_stop,
    propose_groups,
    put_slots,
    reveal,
    row_keys,
    run_forwards,
    take_slots,
)


@dataclass(frozen=True)
class Program:
    """What is compiled in."""

    model: Model
    block_size: int
    needs: Needs
    cache: str  # none, prefix, dual
    window: int  # tokens, at least a block
    refresh: int | None  # denoise steps from one full forward of a block to the next; None: only at its start
    gathered: int  # slots of a shard that a full forward takes at once, where there is a cache

    @property
    def shift(self) -> int:
        return int(self.model.config.logit_alignment == "shifted")


@partial(jax.jit, static_argnames="program", donate_argnames="state")
def decode(
    program: Program,
    params: dict,
    banned: jax.Array,  # [V] bool
    rows: Rows,
    state: SlotState,
    most: jax.Array,  # [] int32, forwards
    enough: jax.Array,  # [] int32, slots
    chosen: jax.Array | None = None,  # [n] int32, n <= N
) -> SlotState:
    """Up to `most` forwards, or until `enough` slots are done, see `run_forwards`."""
    step = partial(_without_cache if program.cache == "none" else _with_cache, program, params, banned)
    return run_forwards(step, program.model, rows, state, most, enough, chosen)


def _without_cache(program, params, banned, rows: Rows, keys: jax.Array, state: SlotState) -> SlotState:
    hidden, _ = _full(program, params, rows, state)
    return _denoise(program, params, banned, rows, keys, state, hidden, ~state.done)


def _with_cache(program, params, banned, rows: Rows, keys: jax.Array, state: SlotState) -> SlotState:
    waiting = _waiting(program, state)
    together = min(program.gathered * row_shards(program.model.mesh), len(waiting))
    count = jnp.sum(waiting, dtype=jnp.int32)
    nobody_else = ~jnp.any(~state.done & ~waiting)

    def refresh(state):
        chosen = _first(program.model, waiting, program.gathered)
        part_rows, part = take_slots(program.model, rows, state, chosen)
        active = _waiting(program, part)
        hidden, kv = _full(program, params, part_rows, part)
        part = dataclasses.replace(part, cache=_write(program, part_rows, part, kv, active))
        part = _denoise(program, params, banned, part_rows, row_keys(part_rows), part, hidden, active)
        return put_slots(program.model, state, part, chosen)

    def step(state):
        active = ~state.done & ~waiting
        hidden = _window(program, params, rows, state, active)
        return _denoise(program, params, banned, rows, keys, state, hidden, active)

    full = (count >= together) | nobody_else
    return _if(~full, step, _if(full, refresh, state))


def _if(wanted: jax.Array, function: Callable[[SlotState], SlotState], state: SlotState) -> SlotState:
    """`function(state)`, or `state`: as a loop of one turn or none. Loops update what they carry in place; `lax.cond`
    makes GPUs copy the whole cache where one branch writes it and the other does not."""
    with jax.named_scope(function.__name__):  # by which a plan tells the two loops apart
        return lax.while_loop(lambda c: c[0], lambda c: (jnp.zeros((), bool), function(c[1])), (wanted, state))[1]


def _waiting(program: Program, state: SlotState) -> jax.Array:
    """[N] bool: the slots whose next step is a full forward."""
    since = state.block_step if program.refresh is None else state.block_step % program.refresh
    return ~state.done & (since == 0)


def _first(model: Model, waiting: jax.Array, count: int) -> jax.Array:
    """[n] int32, up to `count` slots of each shard, numbered within it: those that wait first."""

    def first(waiting):
        return jnp.argsort(~waiting, stable=True)[:count].astype(jnp.int32)

    return on_shards(model, first, (ROWS,), ROWS)(waiting)


# Forwards: hidden states [N,B,E] that predict the current block

def _full(program: Program, params: dict, rows: Rows, state: SlotState) -> tuple[jax.Array, KV]:
    """Of the whole canvas, and all its keys and values [L,N,S,K,D]."""
    positions = jnp.broadcast_to(jnp.arange(state.canvas.shape[1]), state.canvas.shape)
    end = jnp.where(positions < rows.limit[:, None], rows.limit[:, None], 0)
    nothing = jnp.zeros_like(end)
    intervals = jnp.stack([nothing, end, nothing, nothing], axis=-1)
    hidden, kv = program.model.hidden_and_kv(params, state.canvas, positions, intervals)
    at = state.start[:, None] - program.shift + jnp.arange(program.block_size)
    return jnp.take_along_axis(hidden, jnp.maximum(at, 0)[..., None], axis=1), kv


def _window(program: Program, params: dict, rows: Rows, state: SlotState, active: jax.Array) -> jax.Array:
    """Of the window, with the cache as the last full forward left it."""
    model, shift, S = program.model, program.shift, state.canvas.shape[1]
    places = jnp.arange(program.window + shift)
    positions = jnp.clip(state.start[:, None] - shift + places, 0, S - 1)
    ids = jnp.take_along_axis(state.canvas, positions, axis=1)
    end = _window_end(program, rows, state)
    live = jnp.stack([jnp.full_like(end, shift), end - state.start + shift], axis=-1)
    intervals = jnp.broadcast_to(live[:, None], (*ids.shape, 2))
    hidden, _ = model.decode(params, ids, positions, state.cache, jnp.where(active, _cached(program, rows, state), 0),
                             intervals)  # fmt: skip
    return hidden[:, : program.block_size]


def _window_end(program: Program, rows: Rows, state: SlotState) -> jax.Array:
    return jnp.minimum(state.start + program.window, rows.limit)


def _cached(program: Program, rows: Rows, state: SlotState) -> jax.Array:
    """[N] int32, tokens in the cache: those before the block, and with a dual cache right behind them those behind
    the window. Attention does not ask in which order keys come."""
    behind = rows.limit - _window_end(program, rows, state) if program.cache == "dual" else 0
    return state.start + behind


def _write(program: Program, rows: Rows, state: SlotState, kv: KV, active: jax.Array) -> KVCache:
    """The cache behind a full forward; of slots that are not `active` as before."""
    S = state.canvas.shape[1]
    entry = jnp.arange(S)
    if program.cache == "dual":
        skipped = _window_end(program, rows, state) - state.start
        source = jnp.where(entry < state.start[:, None], entry, entry + skipped[:, None])
        source = jnp.minimum(source, S - 1)[None, :, :, None, None]
        kv = KV(*(jnp.take_along_axis(x, source, axis=2) for x in kv))
    pages = jnp.where(active[:, None], state.cache.pages, 0)
    return write_pages(program.model, state.cache, kv, pages)


def _denoise(
    program: Program, params: dict, banned: jax.Array, rows: Rows, keys: jax.Array, state: SlotState, hidden: jax.Array,
    active: jax.Array,
) -> SlotState:  # fmt: skip
    """One denoise step of the slots that are `active`, given what predicts their blocks [N,B,E]."""
    model, B, mask_id = program.model, program.block_size, program.model.config.mask_token_id
    positions = state.start[:, None] + jnp.arange(B)  # [N,B]
    block = jnp.take_along_axis(state.canvas, positions, axis=1)
    masked = (block == mask_id) & active[:, None]
    number = state.steps[:, None] + 1
    groups = propose_groups(model, program.needs, params, banned, rows, keys, hidden[:, None], number, masked[:, None])
    proposal = jax.tree.map(lambda x: x[:, 0], groups)
    revealed = reveal(model, rows, masked, proposal, state.block_step)
    block = jnp.where(revealed, proposal.ids, block)

    complete = active & ~(block == mask_id).any(axis=-1)
    last = has_stop(rows, block, positions) | (state.start + B >= rows.limit)
    left = complete & ~last

    place = jnp.arange(state.canvas.shape[1]) - state.start[:, None]  # [N,S], in the block
    inside = jnp.clip(place, 0, B - 1)
    is_new = (place == inside) & jnp.take_along_axis(revealed, inside, axis=1)

    def record(array, values):  # [N,S], [N,B]
        return jnp.where(is_new, jnp.take_along_axis(values, inside, axis=1), array)

    return dataclasses.replace(
        state,
        canvas=record(state.canvas, block),
        step_map=record(state.step_map, jnp.broadcast_to(number, block.shape)),
        logprobs=record(state.logprobs, proposal.logprobs),
        behaviour_logprobs=record(state.behaviour_logprobs, proposal.behaviour_logprobs),
        start=state.start + B * left,
        block_step=jnp.where(left, 0, state.block_step + active),
        steps=state.steps + active,
        forwards=state.forwards + active,
        done=state.done | (complete & last),
    )
