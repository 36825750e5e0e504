"""Parameters to a Hugging Face folder: safetensors, config and everything that goes with a model."""

import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from tracerl_jax.errors import CheckpointError
from tracerl_jax.files import write_json
from tracerl_jax.interop.chat_template import add_chat_template
from tracerl_jax.interop.families import FAMILIES
from tracerl_jax.interop.folders import copy_companions, read_json, whole_folder
from tracerl_jax.interop.hf_config import hf_config_from_model
from tracerl_jax.interop.hf_load import INDEX_FILE, SINGLE_FILE
from tracerl_jax.interop.names import HfTensor, hf_tensors, leaves_by_path
from tracerl_jax.models import Model
from tracerl_jax.parallel.distributed import is_lead
from tracerl_jax.parallel.place import fetch

MAX_SHARD_BYTES = 5 * 10**9


def save_hf(
    folder: str | os.PathLike,
    model: Model,
    params: Mapping[str, Any],
    *,
    source: str | os.PathLike | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Writes a model folder that `load_hf`, and the original code, can read.

    The folder appears complete or not at all. A tied head is left out, a value model gets `value_head.weight`.

    Args:
        params: of `model`, on any devices. In a job all processes call this, and process 0 writes.
        source: model folder the config, tokenizer, chat template, generation config, remote code and licence are taken
            from; without it a plain config is written and nothing else. A tokenizer without chat template gets the
            family's, if it has the tokens for it.
        dtype: of the tensors, "float32", "bfloat16" or "float16"; default: as the parameters are.
        max_shard_bytes: larger models are split over several files with an index.
        overwrite: replace a folder that is already there.

    Raises:
        CheckpointError: `folder` is not empty and `overwrite` is off, or it cannot be written.
    """
    tensor_dtype = jnp.dtype(dtype or params["embed"]["embedding"].dtype)
    read = _reader(params, tensor_dtype)
    shards = _shards(hf_tensors(params, FAMILIES[model.config.family].tensors), tensor_dtype.itemsize, max_shard_bytes)
    if not is_lead():  # it takes part in what `read` has to gather
        for tensor in (tensor for shard in shards for tensor in shard):
            read(tensor)
        return
    with whole_folder(folder, overwrite=overwrite) as partial:
        save_model_files(partial, model, source=source, dtype=str(tensor_dtype))
        names = [SINGLE_FILE]
        if len(shards) > 1:
            names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
            weight_map = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
            total = sum(_nbytes(t, tensor_dtype.itemsize) for shard in shards for t in shard)
            write_json(partial / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        for name, shard in zip(names, shards, strict=True):
            try:
                save_file({t.name: read(t) for t in shard}, partial / name, metadata={"format": "pt"})
            except SafetensorError as error:  # how the library reports a full disk
                raise CheckpointError(
                    f"{folder}: {name} cannot be written ({error}); make room and run the command again"
                ) from error
            (partial / name).chmod((partial / "config.json").stat().st_mode)  # the library makes files private


def save_model_files(
    folder: str | os.PathLike, model: Model, *, source: str | os.PathLike | None, dtype: str | None = None
) -> None:
    """Everything of a model folder but the weights, into an existing folder (arguments as of `save_hf`).

    Runs and native checkpoints keep this in `model/`, so that they can be decoded and exported without `source`.
    """
    config = hf_config_from_model(model.config, None if source is None else read_json(Path(source) / "config.json"))
    if dtype is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    write_json(Path(folder) / "config.json", config)
    if source is not None:
        copy_companions(source, folder)
        add_chat_template(folder, FAMILIES[model.config.family])


def _reader(params: Mapping[str, Any], dtype: np.dtype) -> Callable[[HfTensor], np.ndarray]:
    """Function from tensor to its values; one layer of one leaf is on the host at a time."""
    leaves = leaves_by_path(params)

    @lru_cache(maxsize=1)
    def layer(path: str, index: int) -> np.ndarray:
        return fetch(leaves[path][index])

    def read(tensor: HfTensor) -> np.ndarray:
        if tensor.index:
            values = layer(tensor.path, tensor.index[0])[tensor.index[1:]]
        else:
            values = np.asarray(fetch(leaves[tensor.path]))
        # save_file writes the memory as it lies, so a transposed view must be copied.
        return np.ascontiguousarray((values.T if tensor.transpose else values).astype(dtype, copy=False))

    return read


def _shards(tensors: list[HfTensor], itemsize: int, limit: int) -> list[list[HfTensor]]:
    """Tensors in order, cut where a file would exceed the limit (a larger tensor gets a file of its own)."""
    shards: list[list[HfTensor]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = _nbytes(tensor, itemsize)
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    return shards


def _nbytes(tensor: HfTensor, itemsize: int) -> int:
    return int(np.prod(tensor.shape)) * itemsize
