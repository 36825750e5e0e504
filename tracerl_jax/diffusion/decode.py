"""Block-diffusion decoding of N rows: prefill, then one `lax.while_loop` in which every row runs at its own pace.

    canvas   [ p0 p1 p2 p3 | p4 p5  M  M |  M  M  M  M | .. ]      B = 4, prompt of 6 tokens, M = MASK
    cache    |- prefilled -|                                       K/V of positions [0, committed)
                            |- current block -|                    opens with the prompt's last p mod B tokens

One iteration is one forward of each row's current block against its cache. What it means differs by row:

    block has MASK    denoise: propose, rank, reveal, record. The last block, once complete, ends the row.
    block complete    commit: its K/V are now those of the final tokens; move on to the next block.
    row done          nothing: its results are ignored.

The block's K/V are written behind the committed ones by every forward. Only `committed` decides what later forwards
see, so a denoise step's K/V are overwritten by the next one and those of the commit stay.
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
from tracerl_jax.models.decoder import KV, Model
from tracerl_jax.parallel.sharding import cache_sharding, mesh_spec


@dataclass(frozen=True)
class Program:
    """What is compiled in. The flags say which work some row needs; they never change the result of another row."""

    model: Model
    block_size: int
    use_noise: bool  # some row has temperature > 0
    use_filters: bool  # some such row uses top-k or top-p
    use_entropy: bool  # some row is entropy_bounded


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """What every row was asked for; constant during decoding. All arrays are traced, so any values share a program."""

    prompt_len: jax.Array  # [N] int32
    limit: jax.Array  # [N] int32, prompt_len + max_tokens; 0 = no request in this row
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
    """Where every row stands. The arrays over S are indexed by absolute position."""

    canvas: jax.Array  # [N,S] int32, prompt, what was revealed, MASK elsewhere
    step_map: jax.Array  # [N,S] int32, denoise step of the reveal; 0 = prompt or not revealed
    logprobs: jax.Array  # [N,S] f32
    behaviour_logprobs: jax.Array  # [N,S] f32
    committed: jax.Array  # [N] int32, start of the current block = valid entries of the cache
    block_step: jax.Array  # [N] int32, denoise steps done in the current block
    steps: jax.Array  # [N] int32, denoise steps done in all blocks
    done: jax.Array  # [N] bool
    cache: KVCache  # slot-contiguous: [L,N,K,S,D]


@partial(jax.jit, static_argnames=("model", "block_size", "capacity"))
def prefill(
    model: Model,
    params: dict,
    prompts: jax.Array,  # [U,T] int32, each distinct prompt once, anything behind its end
    prompt_len: jax.Array,  # [U] int32
    prompt_of: jax.Array,  # [N] int32, the prompt of each row
    *,
    block_size: int,
    capacity: int,  # S
) -> KVCache:  # slot-contiguous: [L,N,K,S,D]
    """Encode the complete blocks of each prompt, block-causally, and copy their K/V to the rows that start from it.

    T may be shorter than a prompt but must cover its complete blocks; T = 0 gives an empty cache.
    """
    config = model.config
    U, T = prompts.shape
    if T == 0:
        shape = (config.num_layers, prompt_of.shape[0], config.num_kv_heads, capacity, config.head_dim)
        return _constrain_cache(model, KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)))
    positions = jnp.broadcast_to(jnp.arange(T), (U, T))
    encoded = block_start(block_of(prompt_len, block_size), block_size)[:, None]  # [U,1]
    block_end = block_start(block_of(positions, block_size) + 1, block_size)
    visible = jnp.where(positions < encoded, block_end, 0)  # [U,T]
    nothing = jnp.zeros_like(visible)
    intervals = jnp.stack([nothing, visible, nothing, nothing], axis=-1)
    _, kv = model.hidden_and_kv(params, prompts, positions, intervals)

    def fan_out(x):  # [L,U,T,K,D] -> [L,N,S,K,D]
        return jnp.pad(x[:, prompt_of], ((0, 0), (0, 0), (0, capacity - T), (0, 0), (0, 0)))

    return _constrain_cache(model, KVCache.from_tokens(fan_out(kv.k), fan_out(kv.v)))


def start(rows: Rows, canvas: jax.Array, cache: KVCache, block_size: int) -> State:
    """The state before the first forward; rows without a request are done."""
    N = canvas.shape[0]
    zeros = jnp.zeros(N, jnp.int32)
    return State(
        canvas=canvas,
        step_map=jnp.zeros_like(canvas),
        logprobs=jnp.zeros(canvas.shape, jnp.float32),
        behaviour_logprobs=jnp.zeros(canvas.shape, jnp.float32),
        committed=block_start(block_of(rows.prompt_len, block_size), block_size),
        block_step=zeros,
        steps=zeros,
        done=rows.limit == 0,
        cache=cache,
    )


@partial(jax.jit, static_argnames="program", donate_argnames=("canvas", "cache"))
def decode(
    program: Program,
    params: dict,
    banned: jax.Array,  # [V] bool
    rows: Rows,
    canvas: jax.Array,  # [N,S] int32, prompts followed by MASK; S a multiple of B
    cache: KVCache,  # from `prefill`
) -> State:
    """Decode every row to its end. Nothing leaves the device before the last row is done."""
    keys = _row_keys(rows)

    def unfinished(state):
        return ~jnp.all(state.done)

    return lax.while_loop(
        unfinished,
        lambda state: _forward(program, params, banned, rows, keys, state),
        start(rows, canvas, cache, program.block_size),
    )


def _row_keys(rows: Rows) -> jax.Array:
    """[N] keys from (seed, prompt, sample index) alone, whatever PRNG the process has chosen as its default."""

    def row_key(seed, prompt_hash, sample_index):
        key = jax.random.key(seed, impl="threefry2x32")
        return jax.random.fold_in(jax.random.fold_in(key, prompt_hash), sample_index)

    return jax.vmap(row_key)(rows.seed, rows.prompt_hash, rows.sample_index)


def _forward(program: Program, params: dict, banned: jax.Array, rows: Rows, keys: jax.Array, state: State) -> State:
    """One forward of every row's current block, and what follows from it."""
    model, B = program.model, program.block_size
    mask_id = model.config.mask_token_id
    positions = state.committed[:, None] + jnp.arange(B)  # [N,B]
    block = jnp.take_along_axis(state.canvas, positions, axis=1)
    masked = (block == mask_id) & ~state.done[:, None]
    denoising = masked.any(axis=-1)
    committing = ~denoising & ~state.done

    hidden, kv = model.decode(params, block, positions, state.cache, state.committed)
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
    last = stops.any(axis=-1) | (state.committed + B >= rows.limit)

    # Compared with every position of the canvas: as a scatter it would be gathered from all devices.
    is_here = (jnp.arange(state.canvas.shape[1] // B) == state.committed[:, None] // B)[..., None]  # [N,S/B,1]
    is_new = is_here & revealed[:, None]  # [N,S/B,B]

    def record(array, values):  # [N,S], [N,B]
        blocks = array.reshape(is_new.shape)
        return jnp.where(is_new, values[:, None], blocks).reshape(array.shape)

    return State(
        canvas=record(state.canvas, proposal.ids),
        step_map=record(state.step_map, jnp.broadcast_to(steps[:, None], block.shape)),
        logprobs=record(state.logprobs, proposal.logprobs),
        behaviour_logprobs=record(state.behaviour_logprobs, proposal.behaviour_logprobs),
        committed=state.committed + B * committing,
        block_step=jnp.where(committing, 0, state.block_step + denoising),
        steps=steps,
        done=state.done | (complete & last),
        cache=_write_block(model, state.cache, kv, state.committed),
    )


def _write_block(model: Model, cache: KVCache, kv: KV, at: jax.Array) -> KVCache:
    """cache [L,N,K,S,D] with kv [L,N,B,K,D] written at position `at` [N] of each row, in place.

    A loop of slice updates on each device's own rows and heads. As one scatter, which is what `vmap` makes of it, a
    TPU would keep the rows in front and copy the whole cache for the kernel that reads it, at every forward.
    """

    def write(array, new, at):  # [L,N,K,S,D], [L,N,B,K,D], [N], of one device
        def row(n, array):
            block = jnp.swapaxes(lax.dynamic_slice_in_dim(new, n, 1, axis=1), 2, 3).astype(array.dtype)
            return lax.dynamic_update_slice(array, block, (0, n, 0, at[n], 0))

        return lax.fori_loop(0, len(at), row, array)

    if model.mesh is not None:
        stored, rows = (mesh_spec(axes, model.mesh) for axes in (("layers", "batch", "kv_heads"), ("batch",)))
        fresh = mesh_spec(("layers", "batch", None, "kv_heads"), model.mesh)
        write = jax.shard_map(write, mesh=model.mesh, in_specs=(stored, fresh, rows), out_specs=stored)
    return cache._replace(k=write(cache.k, kv.k, at), v=write(cache.v, kv.v, at))


def _constrain_cache(model: Model, cache: KVCache) -> KVCache:
    if model.mesh is None:
        return cache
    return lax.with_sharding_constraint(cache, cache_sharding(model.mesh))
