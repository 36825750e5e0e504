"""What a model says about the targets of packed rows (log-probabilities, entropies, values), and about traces."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tracerl_jax.diffusion.packing import PackedRows, pack
from tracerl_jax.diffusion.replay import ReplayItem, item_of_trace
from tracerl_jax.diffusion.trace import Trace
from tracerl_jax.errors import ConfigError, DataError
from tracerl_jax.kernels.logprob.api import token_logprobs
from tracerl_jax.models.decoder import Model, Params
from tracerl_jax.parallel.sharding import row_shards
from tracerl_jax.training.step import put_batch

SCORE_ROW_LENGTHS = tuple(2**k for k in range(8, 20))
SCORE_TOKENS_PER_BATCH = 16384


def packed_logprobs(
    model: Model, params: Params, rows: PackedRows, temperature: float | jax.Array = 1.0
) -> tuple[jax.Array, jax.Array]:
    """(log-prob, entropy in nats) of every target [N,P] f32, over the full vocabulary; no [tokens, V] array is held.

    `temperature`: one for all, or [N,P] (`rows.gather` of one per item). Where it is 0 (greedy, padding) 1 is used: the
    convention of `Trace.logprobs`. Results at padding mean nothing. Differentiable in params.
    """
    hidden = _target_hidden(model, params, rows, model.predicting(rows.target_index))
    N, P, E = hidden.shape
    temperature = jnp.broadcast_to(jnp.where(temperature == 0, 1.0, temperature), (N, P)).reshape(N * P)
    logprobs, entropy = token_logprobs(
        hidden.reshape(N * P, E), model.head_kernel(params), rows.target_ids.reshape(N * P), temperature=temperature,
        mesh=model.mesh,
    )  # fmt: skip
    return logprobs.reshape(N, P), entropy.reshape(N, P)


def packed_values(model: Model, params: Params, rows: PackedRows) -> jax.Array:
    """The value model's output at every target [N,P] f32; at padding it means nothing. Differentiable in params."""
    return model.values(params, _target_hidden(model, params, rows, rows.target_index))


def score_traces(
    model: Model,
    params: Params,
    traces: Sequence[Trace],
    *,
    row_length: int | Sequence[int] = SCORE_ROW_LENGTHS,
    tokens_per_batch: int = SCORE_TOKENS_PER_BATCH,
) -> list[np.ndarray]:
    """Policy log-prob of each completion token [r] f32 in the state it was revealed in, at the trace's temperature.

    For the weights that made the traces this is `Trace.logprobs` up to rounding. Traces may differ in block size.
    `tokens_per_batch`: tokens of one forward on each device, at least one row. Raises DataError for a trace that is
    longer than the longest row or of the other kind of attention, ConfigError for a model without mask token.
    """
    mask_id = model.config.mask_token_id
    if mask_id is None:
        raise ConfigError("the model has no mask_token_id, so traces cannot be replayed; add it to its config.json")
    full = model.config.attention_mode == "full"
    for i, trace in enumerate(traces):
        if full != bool(trace.canvas_len):
            raise DataError(
                f"trace {i} has canvas_len {trace.canvas_len}, but the model ({model.config.family}) has "
                f"{'full' if full else 'block-causal'} attention: score it with a model of the kind that made it"
            )
    items = [item_of_trace(t, mask_id=mask_id) for t in traces]
    rows, scores = score_items(
        model, params, items, [t.temperature for t in traces], row_length=row_length, tokens_per_batch=tokens_per_batch
    )
    return rows.scatter(scores)


def score_items(
    model: Model,
    params: Params,
    items: Sequence[ReplayItem],
    temperature: Sequence[float],
    *,
    row_length: int | Sequence[int] = SCORE_ROW_LENGTHS,
    tokens_per_batch: int = SCORE_TOKENS_PER_BATCH,
) -> tuple[PackedRows, np.ndarray]:
    """(rows, log-prob of every target [N,P] f32) of replay items, each at its `temperature`. Limits and errors are
    those of `score_traces`."""
    shards = row_shards(model.mesh)
    rows = pack(items, row_length=row_length, rows_multiple=shards)
    N, T = rows.shape
    n = min(N, max(1, tokens_per_batch // T) * shards)
    scores = [_score(model, params, *put_batch((part, part.gather(temperature)), model.mesh)) for part in rows.split(n)]
    return rows, np.concatenate([np.asarray(s) for s in scores])[:N]


@partial(jax.jit, static_argnums=0)
def _score(model: Model, params: Params, rows: PackedRows, temperature: jax.Array) -> jax.Array:
    return packed_logprobs(model, params, rows, temperature)[0]


def _target_hidden(model: Model, params: Params, rows: PackedRows, columns: jax.Array) -> jax.Array:
    """[N,P,E] at columns [N,P]: the head sees nothing but the targets."""
    hidden = model.hidden(params, rows.ids, rows.positions, rows.intervals)
    return jnp.take_along_axis(hidden, columns[..., None], axis=1)
