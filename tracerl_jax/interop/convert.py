"""Conversion between the three kinds of model folder, and the proof that nothing was lost."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tracerl_jax.errors import CheckpointError
from tracerl_jax.interop.hf_load import load_hf, stored_dtype
from tracerl_jax.interop.hf_save import save_hf
from tracerl_jax.interop.names import leaves_by_path
from tracerl_jax.interop.native import CONFIG_FILE, load_native, load_run, save_native
from tracerl_jax.models import Model
from tracerl_jax.models.visibility import row_intervals

Kind = Literal["hf", "native", "run"]


def folder_kind(folder: str | os.PathLike) -> Kind:
    """Which kind of model folder this is; CheckpointError when it is none."""
    folder = Path(folder)
    if (folder / CONFIG_FILE).exists():
        return "native"
    if (folder / "checkpoints").is_dir():
        return "run"
    if (folder / "config.json").exists():
        return "hf"
    raise CheckpointError(f"{folder}: no model folder; give a Hugging Face folder (config.json), a converted one "
                          f"({CONFIG_FILE}) or a run (checkpoints/)")  # fmt: skip


@dataclass(frozen=True)
class Conversion:
    """What was written: the model and its parameters as they were read."""

    kind: Kind  # of the target: "native" or "hf"
    model: Model
    params: Mapping[str, Any]
    dtype: str  # of the tensors written


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    dtype: str | None = None,
    head: Literal["lm", "value"] = "lm",
    step: int | None = None,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
) -> Conversion:
    """A Hugging Face folder to a native checkpoint, a native checkpoint or a run to a Hugging Face folder.

    Args:
        dtype: of the tensors written; default: as they are in `source` (a mix, or float16, becomes float32).
        head: which head of a Hugging Face folder to read.
        step: checkpoint of a run; default: the newest.
        max_shard_bytes, overwrite: see `save_hf`.

    Raises:
        CheckpointError: a weight overflows float16; see also `load_hf`, `load_native`, `load_run`, `save_hf` and
            `save_native`.
    """
    kind = folder_kind(source)
    if kind == "hf":
        model, params = load_hf(source, dtype=dtype or stored_dtype(source), head=head)
        save_native(target, model, params, source=source, overwrite=overwrite)
    else:
        model, params = load_native(source) if kind == "native" else load_run(source, step=step)
        _check_range(params, dtype, source)
        limit = {} if max_shard_bytes is None else {"max_shard_bytes": max_shard_bytes}
        save_hf(target, model, params, source=Path(source) / "model", dtype=dtype, overwrite=overwrite, **limit)
    written = dtype or str(params["embed"]["embedding"].dtype)
    return Conversion("native" if kind == "hf" else "hf", model, params, written)


def _check_range(params: Mapping[str, Any], dtype: str | None, source: str | os.PathLike) -> None:
    """Raises CheckpointError for a weight that is infinite in float16, which ends at 65504."""
    if dtype != "float16":
        return
    for path, leaf in leaves_by_path(params).items():
        if not bool(jnp.isfinite(leaf.astype(dtype)).all()):
            raise CheckpointError(
                f"{source}: {path} holds weights beyond the range of float16 (65504): convert to bfloat16 or float32"
            )


@dataclass(frozen=True)
class Check:
    """How a written checkpoint compares with what was converted."""

    parameters: int  # stacked parameters compared
    wrong: list[str]  # paths of those that are not the converted ones rounded to the written dtype
    max_difference: float  # largest of any weight, rounding to a narrower dtype included
    output_difference: float  # largest of any logit (or value) on random ids
    max_kl: float | None  # largest KL divergence of a position's distribution; None for a value model


def check(conversion: Conversion, target: str | os.PathLike) -> Check:
    """Reads `target` again and compares every parameter and the forward pass with what was converted."""
    model, before = conversion.model, leaves_by_path(conversion.params)
    if conversion.kind == "native":
        _, params = load_native(target)
    else:
        _, params = load_hf(target, dtype=model.config.param_dtype, head=model.head)
    after = leaves_by_path(params)
    wrong, differences = sorted(before.keys() ^ after.keys()), [0.0]
    for path in before.keys() & after.keys():
        old, new = np.asarray(before[path]), np.asarray(after[path])
        if not np.array_equal(old.astype(jnp.dtype(conversion.dtype)).astype(new.dtype), new):
            wrong.append(path)
        differences.append(float(np.max(np.abs(old.astype(np.float32) - new.astype(np.float32)))))
    forward = jax.jit(partial(_random_forward, model))
    outputs = [forward(p) for p in (conversion.params, params)]
    kl = None
    if model.head == "lm":
        p, q = (jax.nn.log_softmax(logits) for logits in outputs)
        kl = float(jnp.max(jnp.sum(jnp.exp(p) * (p - q), axis=-1)))
    return Check(len(before), wrong, max(differences), float(jnp.max(jnp.abs(outputs[0] - outputs[1]))), kl)


def _random_forward(model: Model, params: Mapping[str, Any]) -> jax.Array:
    """Logits [2,T,V] or values [2,T] of random ids under the model's own mask."""
    config = model.config
    length = 4 * config.block_size
    ids = jax.random.randint(jax.random.key(0), (2, length), 0, config.vocab_size, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), ids.shape)
    intervals = row_intervals(config.attention_mode, length, first=jnp.zeros(2), block_size=config.block_size)
    hidden = model.hidden(params, ids, positions, intervals)
    return model.logits(params, hidden) if model.head == "lm" else model.values(params, hidden)
