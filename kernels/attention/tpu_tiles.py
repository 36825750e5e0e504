"""How the TPU attention kernels cut their work: tiles to compute on inside larger blocks to fetch.

    keys            | window 0                  | window 1                  |
    query block   0 | # .  .  . |               |                           |    .  tile of 128 x 128 pairs
                  1 | # #  .  . |               |                           |    #  one that some query needs
                  2 | # #  #  . |               | #                         |
                  3 | # #  #  . |               | #                         |

A grid step brings one block of query tiles (all query heads of a few key/value heads) together with one window of
keys; which tiles of the window a query tile needs is a list in scalar memory, and the kernel loops over that list. So
grid steps and copies are large, which keeps their fixed cost (about 0.35 us a step) small, while the mask is followed
at a grain of 128 x 128. A window that a query block does not need is not fetched. Windows are as large as the chip's
vector memory allows: where all keys of a row fit, every key and value is read from HBM once per row and head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from tracerl_jax.kernels.attention.masks import live_tiles

# One vector register across and one pass of the matrix unit: smaller query tiles waste lanes, larger ones compute more
# pairs that no query sees (benchmarks/attention.py: 1.3 instead of 1.5 and more, at 8192 tokens).
TILE = 128
LANES = 128
# Query rows that a visit of key tiles should at least have, over all heads of a step: below, the latency of
# score -> softmax -> product is not hidden.
ROWS_PER_VISIT = 512
BLOCK_BYTES = 2**19  # of one operand's query block: at most, and at most
BLOCK_SHARE = 1 / 64  # of the vector memory
# Of the vector memory that query blocks and scores leave: the rest is the compiler's.
WINDOW_SHARE = 0.75
# What a visit holds at a time, in arrays of scores [keys, rows] f32.
SCORES = 10


class Plan(NamedTuple):
    """Static sizes of one call."""

    heads: int  # key/value heads of a step
    blocks: int  # query blocks of a row
    block: int  # query tiles of a block
    windows: int  # of a row
    window: int  # key tiles of a window
    visit: int  # key tiles that are worked on together


def make_plan(
    shape: tuple[int, int, int, int, int],  # T, S, K, G, D
    *,
    vmem: int,  # bytes of vector memory
    query_bytes: int,  # held per query row and lane of D
    key_bytes: int,  # held per key, key/value head and lane of D
    itemsize: int,
    block: int | None = None,
    window: int | None = None,
) -> Plan:
    """`block` and `window` (in tiles) override the choice, for tests."""
    T, S, K, G, D = shape
    heads = max(h for h in range(1, K + 1) if K % h == 0 and (h == 1 or h * G * TILE <= ROWS_PER_VISIT))
    rows, lanes = heads * G * TILE, pl.cdiv(D, LANES) * LANES
    visit = 2 if rows <= ROWS_PER_VISIT else 1
    block_bytes = min(BLOCK_BYTES, int(BLOCK_SHARE * vmem))
    query_tiles, key_tiles = pl.cdiv(T, TILE), pl.cdiv(S, TILE)
    block = min(query_tiles, block or max(1, block_bytes // (rows * lanes * itemsize)))
    left = vmem - block * rows * lanes * query_bytes - SCORES * visit * TILE * rows * 4
    window = min(key_tiles, window or max(1, int(WINDOW_SHARE * left) // (heads * TILE * lanes * key_bytes)))
    windows = pl.cdiv(key_tiles, window)
    # Windows of equal length: the last one is then not mostly padding.
    return Plan(heads, pl.cdiv(query_tiles, block), block, windows, pl.cdiv(key_tiles, windows), visit)


def tile_lists(intervals: jax.Array, plan: Plan) -> jax.Array:
    """intervals [N,T,4], T whole blocks -> [N, windows, blocks, block, 1 + length] int32: the visits of a query tile.

    The first entry is the number of visits, then follow, `visit` tiles each, the key tiles in ascending order as
    numbers of the row, and the first number behind the row where a visit or the list is not full.
    """
    N = intervals.shape[0]
    total = plan.windows * plan.window
    live = live_tiles(intervals, TILE, TILE, total).reshape(N, plan.blocks, plan.block, plan.windows, plan.window)
    live = jnp.moveaxis(live, 3, 1)  # [N, windows, blocks, block, window]
    number = jnp.arange(total, dtype=jnp.int32).reshape(plan.windows, 1, 1, plan.window)
    # The j-th entry is the tile that j live ones precede. (The TPU compiler takes seconds for a sort.)
    entry = jnp.arange(pl.cdiv(plan.window, plan.visit) * plan.visit)
    preceding = jnp.where(live, jnp.cumsum(live, axis=-1) - 1, -1)
    tiles = jnp.min(jnp.where(preceding[..., None, :] == entry[:, None], number[..., None, :], total), axis=-1)
    visits = pl.cdiv(jnp.sum(live, axis=-1, keepdims=True, dtype=jnp.int32), plan.visit)
    return jnp.concatenate([visits, tiles], axis=-1)


def fetched_windows(lists: jax.Array) -> jax.Array:
    """tile_lists -> [N, blocks * windows], the window a step fetches: its own, or the latest where it needs none."""
    needed = jnp.any(lists[..., 0] > 0, axis=-1)  # [N, windows, blocks]
    windows = needed.shape[1]
    needed = needed.swapaxes(1, 2).reshape(len(needed), -1)
    steps = jnp.arange(needed.shape[1], dtype=jnp.int32)
    return jax.lax.cummax(jnp.where(needed, steps, 0), axis=1) % windows
