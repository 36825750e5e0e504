"""An engine for a Hugging Face folder."""

import dataclasses
import os
from typing import Any

from tracerl_jax.interop.hf_config import read_model_config
from tracerl_jax.interop.hf_load import load_hf
from tracerl_jax.interop.tokenizer import load_tokenizer, valid_vocab
from tracerl_jax.models import Model
from tracerl_jax.parallel.mesh import make_mesh
from tracerl_jax.parallel.place import local_mesh
from tracerl_jax.rollout.engine import Engine
from tracerl_jax.rollout.options import EngineConfig


def open_engine(folder: str | os.PathLike, config: EngineConfig, dtype: str = "float32") -> tuple[Engine, Any]:
    """(engine, tokenizer or None) of a model folder, on all devices of this process; ids without a token are never
    sampled.

    The engine has no weights yet, which may take minutes to read: check the requests, then `load_weights`.
    Raises CheckpointError for a folder that is none, ConfigError for a model that cannot be decoded.
    """
    model = Model(read_model_config(folder, dtype=dtype, param_dtype=dtype), mesh=local_mesh(make_mesh()))
    tokenizer = load_tokenizer(folder)
    valid = valid_vocab(tokenizer, model.config.vocab_size)
    return Engine(model, None, dataclasses.replace(config, valid_vocab=valid)), tokenizer


def load_weights(engine: Engine, folder: str | os.PathLike) -> None:
    """Raises CheckpointError like `load_hf`."""
    model = engine.model
    engine.update_params(load_hf(folder, mesh=model.mesh, dtype=model.config.param_dtype)[1])
