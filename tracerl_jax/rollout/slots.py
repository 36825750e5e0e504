"""What the decoding programs share: what every slot was asked for and where it stands, proposals and reveals, and the
loop over forwards."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from tracerl_jax.diffusion.reveal import SEQUENTIAL, choose_reveals, score_of
from tracerl_jax.diffusion.sampling import Proposal, propose
from tracerl_jax.kernels.decode import KVCache
from tracerl_jax.models.decoder import Model
from tracerl_jax.rollout.cache import ROWS, on_shards


class Needs(NamedTuple):
    """Work that some slot needs; compiled in, and without influence on the results of the others."""

    noise: bool = False  # temperature > 0
    filters: bool = False  # top-k or top-p, or other probabilities to rank by
    entropy: bool = False
    margin: bool = False


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """What every slot was asked for. All arrays are traced, so any values share a program."""

    prompt_len: jax.Array  # [N] int32
    limit: jax.Array  # [N] int32, prompt_len + max_tokens
    stop_ids: jax.Array  # [N,W] int32, filled up with -1
    strategy: jax.Array  # [N] int32, index into reveal.STRATEGIES
    score: jax.Array  # [N] int32, index into reveal.SCORES
    schedule: jax.Array  # [N,B] int32, from reveal.schedule
    threshold: jax.Array  # [N] f32
    entropy_bound: jax.Array  # [N] f32
    first_token: jax.Array  # [N] bool
    pad_penalty: jax.Array  # [N] f32, 1 = off
    temperature: jax.Array  # [N] f32, 0 = greedy
    top_k: jax.Array  # [N] int32, 0 = off
    top_p: jax.Array  # [N] f32, 1 = off
    confidence: jax.Array  # [N] int32, index into sampling.CONFIDENCES
    seed: jax.Array  # [N] uint32
    prompt_hash: jax.Array  # [N] uint32
    sample_index: jax.Array  # [N] uint32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotState:
    """Where every slot stands. The arrays over S are indexed by absolute position; a program may add arrays of its own
    with a row for each slot."""

    canvas: jax.Array  # [N,S] int32, prompt, what was revealed, MASK elsewhere
    step_map: jax.Array  # [N,S] int32, denoise step of the reveal; 0 = prompt or not revealed
    logprobs: jax.Array  # [N,S] f32
    behaviour_logprobs: jax.Array  # [N,S] f32
    start: jax.Array  # [N] int32, of the current block
    block_step: jax.Array  # [N] int32, denoise steps done in the current block
    steps: jax.Array  # [N] int32, denoise steps done in all blocks
    forwards: jax.Array  # [N] int32
    done: jax.Array  # [N] bool
    cache: KVCache | None  # paged: [L,P,K,C,D]; its keys and values belong to no slot


State = TypeVar("State", bound=SlotState)


@partial(jax.jit, donate_argnames="state")
def refill(
    state: State,
    fresh: jax.Array,  # [N] bool, slots that get a new request
    stopped: jax.Array,  # [N] bool, slots that are given up
    canvas: jax.Array,  # [N,S] int32, of fresh slots: the prompt, followed by MASK
    start: jax.Array,  # [N] int32, of fresh slots: of the first block
    pages: jax.Array,  # [N,W] int32, of all slots
) -> State:
    """The state before the first forward of the fresh slots; the others stay as they are."""

    def put(new, old):
        return jnp.where(fresh.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    cleared = jax.tree.map(lambda x: put(jnp.zeros((), x.dtype), x), dataclasses.replace(state, cache=None))
    return dataclasses.replace(
        cleared,
        canvas=put(canvas, state.canvas),
        start=put(start, state.start),
        done=cleared.done | stopped,
        cache=state.cache and state.cache._replace(pages=pages),
    )


def row_keys(rows: Rows) -> jax.Array:
    """[N] keys from (seed, prompt, sample index) alone, whatever PRNG the process has chosen as its default."""

    def row_key(seed, prompt_hash, sample_index):
        key = jax.random.key(seed, impl="threefry2x32")
        return jax.random.fold_in(jax.random.fold_in(key, prompt_hash), sample_index)

    return jax.vmap(row_key)(rows.seed, rows.prompt_hash, rows.sample_index)


def propose_groups(
    model: Model, needs: Needs, params: dict, banned: jax.Array, rows: Rows, keys: jax.Array,
    hidden: jax.Array, number: jax.Array, wanted: jax.Array,
) -> Proposal:  # fmt: skip
    """Proposals [N,g,B] from hidden [N,g,B,E], for the denoise steps `number` [N,g], where `wanted` [N,g,B]."""
    N, g = number.shape

    def of_groups(x):  # [N,..] -> [N * g,..]
        return jnp.repeat(x, g, axis=0)

    flat = propose(
        hidden.reshape(N * g, *hidden.shape[2:]),
        model.head_kernel(params),
        jax.vmap(jax.random.fold_in)(of_groups(keys), number.reshape(-1)) if needs.noise else None,
        banned,
        *map(of_groups, (rows.temperature, rows.top_k, rows.top_p, rows.confidence)),
        wanted.reshape(N * g, -1),
        use_filters=needs.filters,
        use_entropy=needs.entropy,
        use_margin=needs.margin,
        top_p_of_all=model.config.attention_mode == "full",
        mesh=model.mesh,
    )
    return jax.tree.map(lambda x: x.reshape(N, g, -1), flat)


def reveal(model: Model, rows: Rows, masked: jax.Array, proposal: Proposal, block_step: jax.Array) -> jax.Array:
    """[N,B] bool, what the denoise step `block_step` [N] of a block, from 0, reveals of `masked` [N,B]."""
    B = masked.shape[1]
    count = jnp.take_along_axis(rows.schedule, jnp.minimum(block_step, B - 1)[:, None], axis=1)[:, 0]
    alone = rows.first_token & (block_step == 0)
    strategy, count = jnp.where(alone, SEQUENTIAL, rows.strategy), jnp.where(alone, 1, count)
    score = score_of(proposal, rows.score, model.config.pad_token_id, rows.pad_penalty)
    return choose_reveals(masked, score, proposal.entropy, strategy, count, rows.threshold, rows.entropy_bound)


def has_stop(rows: Rows, block: jax.Array, positions: jax.Array) -> jax.Array:
    """[N] bool: a stop id in the block [N,B], in that part of it that belongs to the completion."""
    in_completion = (positions >= rows.prompt_len[:, None]) & (positions < rows.limit[:, None])
    return ((block[:, :, None] == rows.stop_ids[:, None, :]).any(axis=-1) & in_completion).any(axis=-1)


def run_forwards(
    forward: Callable[[Rows, jax.Array, State], State],  # (rows, keys [N], state) -> state
    model: Model,
    rows: Rows,
    state: State,
    most: jax.Array,  # [] int32, forwards
    enough: jax.Array,  # [] int32, slots
    chosen: jax.Array | None = None,  # [n] int32, n <= N
) -> State:
    """Up to `most` forwards, or until `enough` slots are done. Nothing leaves the device meanwhile.

    `chosen`: only these slots take part and are counted, see `take_slots`.
    """
    if chosen is not None:
        part = run_forwards(forward, model, *take_slots(model, rows, state, chosen), most, enough)
        return put_slots(model, state, part, chosen)
    keys = row_keys(rows)

    def going_on(carry):
        count, state = carry
        return (count < most) & (jnp.sum(state.done, dtype=jnp.int32) < enough)

    def step(carry):
        count, state = carry
        return count + 1, forward(rows, keys, state)

    return lax.while_loop(going_on, step, (jnp.int32(0), state))[1]


def take_slots(model: Model, rows: Rows, state: State, chosen: jax.Array) -> tuple[Rows, State]:
    """Rows and state of the slots `chosen` [n] int32: numbered within their shard, as many of each. Keys and values
    stay where they are: what moves is the slots' place in the batch."""
    take = on_shards(model, lambda x, chosen: x[chosen], (ROWS, ROWS), ROWS)
    return jax.tree.map(lambda x: take(x, chosen), rows), _per_slot(lambda x: take(x, chosen), state)


def put_slots(model: Model, state: State, part: State, chosen: jax.Array) -> State:
    """`state` with the slots `chosen` as in `part`, and the keys and values of `part`."""
    put = on_shards(model, lambda old, new, chosen: old.at[chosen].set(new), (ROWS,) * 3, ROWS)
    return _per_slot(lambda old, new: put(old, new, chosen), state, part)


def _per_slot(function: Callable, state: State, *others: State) -> State:
    """`function` on every array with a row for each slot; the keys and values are those of the last state."""

    def split(state):  # pages are per slot, keys and values are not
        return dataclasses.replace(state, cache=state.cache and state.cache.pages), state.cache

    (first, cache), *rest = map(split, (state, *others))
    mapped = jax.tree.map(function, first, *(state for state, _ in rest))
    cache = rest[-1][1] if rest else cache
    return dataclasses.replace(mapped, cache=cache and cache._replace(pages=mapped.cache))
