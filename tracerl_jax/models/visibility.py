"""Who sees whom in whole sequences, as two-interval attention (kernels/attention) describes it."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def row_intervals(mode: str, length: int, *, first: jax.Array | int = 0, block_size: int = 1) -> jax.Array:
    """Intervals [..,T,4] int32 of rows of T = `length` columns, in one of the modes of `ModelConfig.attention_mode`.

    first: int32 [..], column of each row's first token. What is before it is left padding: it sees nothing and is not
        seen. 0 makes pads tokens like others, which the published code of LLaDA and MMaDA does.
    block_size: of "block_causal"; blocks are counted from the first token.
    """
    column = jnp.arange(length, dtype=jnp.int32)
    first = jnp.asarray(first, jnp.int32)[..., None]
    if mode == "full":
        end = jnp.full_like(column, length)
    elif mode == "causal":
        end = column + 1
    elif mode == "block_causal":
        end = jnp.minimum(first + ((column - first) // block_size + 1) * block_size, length)
    else:
        raise ValueError(f"attention mode {mode!r} is none of full, causal, block_causal")
    start, end, nothing = jnp.broadcast_arrays(first, jnp.where(column < first, 0, end), 0)
    return jnp.stack([start, end, nothing, nothing], axis=-1)
