"""The paged key/value cache of the engine on the device: made, filled by prompts, written by blocks.

Every shard of the rows (data x fsdp) has its own pages and numbers them from 0. Page 0 of each belongs to nobody: what
must not be kept is written there.

    pages   k[l, p]    C tokens of K heads          slot n holds token t in entry t % C of page pages[n, t // C]
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from tracerl_jax.diffusion.grid import block_of, block_start
from tracerl_jax.kernels.decode import KVCache, quantize_kv
from tracerl_jax.models.decoder import KV, Model
from tracerl_jax.parallel.sharding import batch_sharding, cache_sharding, mesh_spec

_CACHE = ("layers", "batch", "kv_heads")  # of [L,P,K,C,..]
_NEW = ("layers", "batch", None, "kv_heads")  # of [L,N,T,K,..]
ROWS = ("batch",)


def cache_shapes(model: Model, slots: int, pages: int, page_size: int, width: int, dtype: str) -> KVCache:
    """An empty cache as ShapeDtypeStructs: `pages` on all shards together, `width` of them to a slot."""
    c, mesh = model.config, model.mesh
    shape = (c.num_layers, pages, c.num_kv_heads, page_size, c.head_dim)
    place = None if mesh is None else cache_sharding(mesh)
    rows = None if mesh is None else batch_sharding(mesh)
    values = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)
    scales = jax.ShapeDtypeStruct(shape[:-1], jnp.float32, sharding=place) if dtype == "int8" else None
    return KVCache(values, values, scales, scales, jax.ShapeDtypeStruct((slots, width), jnp.int32, sharding=rows))


@partial(jax.jit, static_argnames=("model",), donate_argnames="cache")
def prefill(
    model: Model,
    params: dict,
    cache: KVCache,
    prompts: jax.Array,  # [U,T] int32, of each prompt what the cache does not hold yet; T a multiple of C
    start: jax.Array,  # [U] int32, tokens that the cache holds: whole pages
    stop: jax.Array,  # [U] int32, end of the prompt's complete blocks
    prefix_pages: jax.Array,  # [U,W] int32, the pages of these tokens, in order; W = 0: no prompt has any
    pages: jax.Array,  # [U, T / C] int32, where the new tokens go; 0 = nowhere
    block_size: jax.Array,  # [] int32
) -> KVCache:
    """Encode prompts from `start` on, block-causally, and write their keys and values to their pages."""
    T, C = prompts.shape[1], cache.k.shape[3]
    S = prefix_pages.shape[1] * C
    positions = start[:, None] + jnp.arange(T)
    end = jnp.minimum(block_start(block_of(positions, block_size) + 1, block_size), stop[:, None])
    known = positions < stop[:, None]
    first, nothing = jnp.where(known, start[:, None], 0), jnp.zeros_like(positions)
    last = jnp.where(known, S + end - start[:, None], 0)
    intervals = jnp.stack([nothing, first, nothing + S, last], axis=-1)
    read = on_shards(model, _read_pages, (_CACHE,) * 4 + (ROWS, ()), (("batch", None, "kv_heads"),) * 2)

    def prefix(layer):  # -> keys, values [U,S,K,D]; what lies behind `start` is none of this prompt's business
        visible = (jnp.arange(S) < start[:, None])[..., None, None]
        return tuple(jnp.where(visible, x, 0).astype(model.config.dtype) for x in read(*cache[:4], prefix_pages, layer))

    _, kv = model.hidden_and_kv(params, prompts, positions, intervals, prefix if S else None)

    return write_pages(model, cache, kv, pages)


def write_pages(model: Model, cache: KVCache, kv: KV, pages: jax.Array) -> KVCache:
    """kv [L,U,T,K,D] written to whole `pages` [U, T / C] int32; 0 = nowhere."""
    C = cache.k.shape[3]

    def pages_of(x):  # -> [L, U * T/C, C, K, D]
        L, U, T = x.shape[:3]
        return x.reshape(L, U * (T // C), C, *x.shape[3:])

    return _write(model, cache, KV(*map(pages_of, kv)), pages.reshape(-1), jnp.zeros(pages.size, jnp.int32))


@partial(jax.jit, static_argnames=("model",), donate_argnames="cache")
def copy_pages(model: Model, cache: KVCache, source: jax.Array, target: jax.Array, count: jax.Array) -> KVCache:
    """The first `count` [shards] pages of each shard's `source` to `target`, both [shards * M] int32."""

    def copy(array, source, target, count):
        def one(i, array):
            page = lax.dynamic_slice_in_dim(array, source[i], 1, axis=1)
            return lax.dynamic_update_slice_in_dim(array, page, target[i], axis=1)

        return lax.fori_loop(0, count[0], one, array)

    run = on_shards(model, copy, (_CACHE, ROWS, ROWS, ROWS), _CACHE)
    arrays = [None if array is None else run(array, source, target, count) for array in cache[:4]]
    return KVCache(*arrays, cache.pages)


def write_blocks(model: Model, cache: KVCache, kv: KV, at: jax.Array, keep: jax.Array) -> KVCache:
    """kv [L,N,B,K,D] written from token `at` [N] of every slot on where `keep` [N], in place. No block crosses a page.

    A loop of slice updates on each device's own rows and heads. As one scatter, which is what `vmap` makes of it, a
    TPU would keep the rows in front and copy the whole cache for the kernel that reads it, at every forward.
    """
    C = cache.k.shape[3]
    page = jnp.take_along_axis(cache.pages, jnp.maximum(at, 0)[:, None] // C, axis=1)[:, 0]
    return _write(model, cache, kv, jnp.where(keep, page, 0), jnp.maximum(at, 0) % C)


def _write(model: Model, cache: KVCache, kv: KV, page: jax.Array, offset: jax.Array) -> KVCache:
    """kv [L,M,t,K,D] to entries [offset, offset + t) of `page`, both [M]."""

    def write(array, new, page, offset):  # [L,P,K,C,..], [L,M,t,K,..], [M], [M], of one device
        def one(m, array):
            part = jnp.swapaxes(lax.dynamic_slice_in_dim(new, m, 1, axis=1), 2, 3).astype(array.dtype)
            return lax.dynamic_update_slice(array, part, (0, page[m], 0, offset[m], *[0] * (array.ndim - 4)))

        return lax.fori_loop(0, len(page), one, array)

    run = on_shards(model, write, (_CACHE, _NEW, ROWS, ROWS), _CACHE)
    if cache.k_scale is None:
        return cache._replace(k=run(cache.k, kv.k, page, offset), v=run(cache.v, kv.v, page, offset))
    (k, k_scale), (v, v_scale) = quantize_kv(kv.k), quantize_kv(kv.v)
    new = {"k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale}
    return cache._replace(**{name: run(getattr(cache, name), x, page, offset) for name, x in new.items()})


def _read_pages(k, v, k_scale, v_scale, pages, layer):
    """Pages [U,W] of one layer as tokens -> k, v [U, W * C, K, D]."""

    def read(values, scale):
        x = values[layer, pages]  # [U,W,K,C,D]
        if scale is not None:
            x = x.astype(jnp.float32) * scale[layer, pages][..., None]
        x = jnp.swapaxes(x, 2, 3)
        return x.reshape(len(x), -1, *x.shape[3:])

    return read(k, k_scale), read(v, v_scale)


def on_shards(model: Model, function: Callable, axes: tuple, out_axes: tuple) -> Callable:
    """`function` on each device's pages and rows; page numbers are those of the device's own shard."""
    if model.mesh is None:
        return function
    is_axes = isinstance(out_axes[0], tuple)
    out = tuple(mesh_spec(a, model.mesh) for a in out_axes) if is_axes else mesh_spec(out_axes, model.mesh)
    specs = tuple(mesh_spec(a, model.mesh) for a in axes)
    return jax.shard_map(function, mesh=model.mesh, in_specs=specs, out_specs=out, check_vma=False)
