"""Block-diffusion decoding in N slots: what the device does between two looks of the host.

    canvas   [ p0 p1 p2 p3 | p4 p5  M  M |  M  M  M  M | .. ]      B = 4, prompt of 6 tokens, M = MASK
    cache    |- prefilled -|                                       K/V of the positions before the current block
                            |- current block -|                    opens with the prompt's last p mod B tokens

`decode` is one `lax.while_loop`; an iteration is one forward of every slot, each at its own place:

    separate commit   Q = B    block has MASK    denoise: propose, rank, reveal, record
                               block complete    commit: its K/V are now those of the final tokens; on to the next block
    fused commit      Q = 2B   [finished block | current block]: the finished block's K/V are committed by the forward
                               that denoises the next one. A slot without a finished block ignores the first half.

The last block, once complete, ends the slot: nobody needs its K/V. A slot that is done computes nothing of use and
writes to page 0, which belongs to nobody.

With a separate commit every forward writes the block's K/V at their place. Only how far the slot has come decides what
later forwards see, so a denoise step's K/V are overwritten by the next one and those of the commit stay.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from tracerl_jax.diffusion.grid import block_of, block_start
from tracerl_jax.diffusion.reveal import choose_reveals, scheduled_count
from tracerl_jax.diffusion.sampling import propose
from tracerl_jax.kernels.decode import KVCache
from tracerl_jax.models.decoder import Model
from tracerl_jax.rollout.cache import write_blocks


@dataclass(frozen=True)
class Program:
    """What is compiled in. The flags say which work some slot needs; they never change the result of another."""

    model: Model
    block_size: int
    fused: bool  # commit a block by the forward of the next one
    use_noise: bool  # some slot has temperature > 0
    use_filters: bool  # some such slot uses top-k or top-p
    use_entropy: bool  # some slot is entropy_bounded


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """What every slot was asked for. All arrays are traced, so any values share a program."""

    prompt_len: jax.Array  # [N] int32
    limit: jax.Array  # [N] int32, prompt_len + max_tokens
    stop_ids: jax.Array  # [N,W] int32, filled up with -1
    strategy: jax.Array  # [N] int32, index into reveal.STRATEGIES
    denoising_steps: jax.Array  # [N] int32
    threshold: jax.Array  # [N] f32
    entropy_bound: jax.Array  # [N] f32
    temperature: jax.Array  # [N] f32, 0 = greedy
    top_k: jax.Array  # [N] int32, 0 = off
    top_p: jax.Array  # [N] f32, 1 = off
    truncated_confidence: jax.Array  # [N] bool
    seed: jax.Array  # [N] uint32
    prompt_hash: jax.Array  # [N] uint32
    sample_index: jax.Array  # [N] uint32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Where every slot stands. The arrays over S are indexed by absolute position."""

    canvas: jax.Array  # [N,S] int32, prompt, what was revealed, MASK elsewhere
    step_map: jax.Array  # [N,S] int32, denoise step of the reveal; 0 = prompt or not revealed
    logprobs: jax.Array  # [N,S] f32
    behaviour_logprobs: jax.Array  # [N,S] f32
    start: jax.Array  # [N] int32, of the current block
    pending: jax.Array  # [N] bool, the block before is finished but not committed (fused commit only)
    block_step: jax.Array  # [N] int32, denoise steps done in the current block
    steps: jax.Array  # [N] int32, denoise steps done in all blocks
    forwards: jax.Array  # [N] int32, these and commits
    done: jax.Array  # [N] bool
    cache: KVCache  # paged: [L,P,K,C,D]


@partial(jax.jit, donate_argnames="state")
def refill(
    state: State,
    rows: Rows,
    fresh: jax.Array,  # [N] bool, slots that get a new request
    stopped: jax.Array,  # [N] bool, slots that are given up
    canvas: jax.Array,  # [N,S] int32, of fresh slots: the prompt, followed by MASK
    pages: jax.Array,  # [N,W] int32, of all slots
    block_size: jax.Array,  # [] int32
) -> State:
    """The state before the first forward of the fresh slots; the others stay as they are."""

    def put(new, old):
        return jnp.where(fresh.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return State(
        canvas=put(canvas, state.canvas),
        step_map=put(0, state.step_map),
        logprobs=put(0.0, state.logprobs),
        behaviour_logprobs=put(0.0, state.behaviour_logprobs),
        start=put(block_start(block_of(rows.prompt_len, block_size), block_size), state.start),
        pending=put(False, state.pending),
        block_step=put(0, state.block_step),
        steps=put(0, state.steps),
        forwards=put(0, state.forwards),
        done=put(False, state.done) | stopped,
        cache=state.cache._replace(pages=pages),
    )


@partial(jax.jit, static_argnames="program", donate_argnames="state")
def decode(
    program: Program,
    params: dict,
    banned: jax.Array,  # [V] bool
    rows: Rows,
    state: State,
    most: jax.Array,  # [] int32, forwards
    enough: jax.Array,  # [] int32, slots
) -> State:
    """Up to `most` forwards, or until `enough` slots are done. Nothing leaves the device meanwhile."""
    keys = _row_keys(rows)

    def going_on(carry):
        count, state = carry
        return (count < most) & (jnp.sum(state.done, dtype=jnp.int32) < enough)

    def step(carry):
        count, state = carry
        return count + 1, _forward(program, params, banned, rows, keys, state)

    return lax.while_loop(going_on, step, (jnp.int32(0), state))[1]


def _row_keys(rows: Rows) -> jax.Array:
    """[N] keys from (seed, prompt, sample index) alone, whatever PRNG the process has chosen as its default."""

    def row_key(seed, prompt_hash, sample_index):
        key = jax.random.key(seed, impl="threefry2x32")
        return jax.random.fold_in(jax.random.fold_in(key, prompt_hash), sample_index)

    return jax.vmap(row_key)(rows.seed, rows.prompt_hash, rows.sample_index)


def _forward(program: Program, params: dict, banned: jax.Array, rows: Rows, keys: jax.Array, state: State) -> State:
    """One forward of every slot, and what follows from it."""
    model, B = program.model, program.block_size
    positions = state.start[:, None] + jnp.arange(B)  # [N,B]
    block = jnp.take_along_axis(state.canvas, positions, axis=1)
    masked = (block == model.config.mask_token_id) & ~state.done[:, None]
    denoising = masked.any(axis=-1)
    active = ~state.done

    hidden, cache = _attend(program, params, state, block, positions)
    steps = state.steps + denoising
    proposal = propose(
        hidden,
        model.head_kernel(params),
        jax.vmap(jax.random.fold_in)(keys, steps) if program.use_noise else None,
        banned,
        rows.temperature,
        rows.top_k,
        rows.top_p,
        rows.truncated_confidence,
        masked,
        use_filters=program.use_filters,
        use_entropy=program.use_entropy,
        mesh=model.mesh,
    )
    revealed = choose_reveals(
        masked,
        proposal.confidence,
        proposal.entropy,
        rows.strategy,
        scheduled_count(state.block_step, rows.denoising_steps, B),
        rows.threshold,
        rows.entropy_bound,
    )

    block = jnp.where(revealed, proposal.ids, block)
    complete = denoising & ~(masked & ~revealed).any(axis=-1)
    in_completion = (positions >= rows.prompt_len[:, None]) & (positions < rows.limit[:, None])
    stops = (block[:, :, None] == rows.stop_ids[:, None, :]).any(axis=-1) & in_completion  # [N,B]
    last = stops.any(axis=-1) | (state.start + B >= rows.limit)
    # A complete block is left at once where the next forward commits it, and else after a forward of its own.
    left = complete & ~last if program.fused else active & ~denoising

    # Compared with every position of the canvas: as a scatter it would be gathered from all devices.
    is_here = (jnp.arange(state.canvas.shape[1] // B) == state.start[:, None] // B)[..., None]  # [N,S/B,1]
    is_new = is_here & revealed[:, None]  # [N,S/B,B]

    def record(array, values):  # [N,S], [N,B]
        blocks = array.reshape(is_new.shape)
        return jnp.where(is_new, values[:, None], blocks).reshape(array.shape)

    return State(
        canvas=record(state.canvas, proposal.ids),
        step_map=record(state.step_map, jnp.broadcast_to(steps[:, None], block.shape)),
        logprobs=record(state.logprobs, proposal.logprobs),
        behaviour_logprobs=record(state.behaviour_logprobs, proposal.behaviour_logprobs),
        start=state.start + B * left,
        pending=left & program.fused,
        block_step=jnp.where(left, 0, state.block_step + denoising),
        steps=steps,
        forwards=state.forwards + active,
        done=state.done | (complete & last),
        cache=cache,
    )


def _attend(
    program: Program, params: dict, state: State, block: jax.Array, positions: jax.Array
) -> tuple[jax.Array, KVCache]:
    """(hidden states [N,B,E] of the current block, the cache behind this forward)."""
    model, B, active = program.model, program.block_size, ~state.done
    if not program.fused:
        committed = jnp.where(active, state.start, 0)
        hidden, kv = model.decode(params, block, positions, state.cache, committed)
        return hidden, write_blocks(model, state.cache, kv, state.start, active)
    pending = state.pending & active
    before = jnp.maximum(positions - B, 0)
    both = jnp.concatenate([jnp.take_along_axis(state.canvas, before, axis=1), block], axis=1)
    # The finished block sees itself; the current one sees it too, where there is one.
    end = jnp.where(jnp.arange(2 * B) < B, B, 2 * B)
    first = jnp.where(pending[:, None], 0, B)
    new_intervals = jnp.stack(jnp.broadcast_arrays(first, jnp.where(pending[:, None] | (end > B), end, 0)), axis=-1)
    committed = jnp.where(active, state.start - B * pending, 0)
    both_positions = jnp.concatenate([before, positions], axis=1)
    hidden, kv = model.decode(params, both, both_positions, state.cache, committed, new_intervals)
    finished = jax.tree.map(lambda x: x[:, :, :B], kv)
    return hidden[:, B:], write_blocks(model, state.cache, finished, state.start - B, pending)
