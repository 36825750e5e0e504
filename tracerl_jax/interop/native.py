"""Our own checkpoint folder: parameters as Orbax writes them, and everything needed to use them.

    <folder>/params/            Orbax StandardCheckpointer, stacked layers
            /model_config.json  fields of ModelConfig, and the head
            /model/             Hugging Face folder without weights: config, tokenizer, chat template, remote code

A run folder (runs/<name>) has the same `model/`, and its parameters in `checkpoints/<step>/params`.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, SingleDeviceSharding

from tracerl_jax.errors import CheckpointError
from tracerl_jax.files import write_json
from tracerl_jax.interop.families import check_flags
from tracerl_jax.interop.folders import read_json, whole_folder
from tracerl_jax.interop.hf_config import read_model_config
from tracerl_jax.interop.hf_save import save_model_files
from tracerl_jax.models import Model, ModelConfig
from tracerl_jax.parallel.sharding import param_shardings
from tracerl_jax.training.checkpoint import load_params

CONFIG_FILE = "model_config.json"


def save_native(
    folder: str | os.PathLike,
    model: Model,
    params: Mapping[str, Any],
    *,
    source: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a native checkpoint folder, complete or not at all.

    Args:
        source: model folder that config and companions are taken from, as for `save_hf`.

    Raises:
        CheckpointError: `folder` is not empty and `overwrite` is off, or it cannot be written.
    """
    with whole_folder(folder, overwrite=overwrite) as partial:
        (partial / "model").mkdir()
        save_model_files(partial / "model", model, source=source)
        write_json(partial / CONFIG_FILE, {"head": model.head, **dataclasses.asdict(model.config)})
        with ocp.StandardCheckpointer() as checkpointer:  # closing it waits for the write
            checkpointer.save(partial / "params", params)


def load_native(folder: str | os.PathLike, *, mesh: Mesh | None = None) -> tuple[Model, dict[str, Any]]:
    """Model and parameters of a native checkpoint folder, in the dtype they were saved in.

    Raises:
        CheckpointError: not such a folder, or it cannot be read.
    """
    fields = read_json(Path(folder) / CONFIG_FILE)
    try:
        model = Model(ModelConfig(**{k: v for k, v in fields.items() if k != "head"}), head=fields["head"], mesh=mesh)
    except (TypeError, KeyError) as error:
        raise CheckpointError(
            f"{Path(folder) / CONFIG_FILE}: not the config of a model ({error}); convert again"
        ) from None
    check_flags(model.config, str(Path(folder) / CONFIG_FILE))
    path = Path(folder).absolute() / "params"
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; convert again")
    try:
        return model, ocp.StandardCheckpointer().restore(path, _targets(model))
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def load_run(
    folder: str | os.PathLike, *, step: int | None = None, mesh: Mesh | None = None
) -> tuple[Model, dict[str, Any]]:
    """Policy of a run folder at a checkpoint (default: the newest).

    Raises:
        CheckpointError: not a run folder, no such step, or it cannot be read.
    """
    model = Model(read_model_config(Path(folder) / "model"), mesh=mesh)
    return model, load_params(folder, _targets(model), step)


def _targets(model: Model) -> Any:
    """Shapes, dtypes and places to restore to."""
    abstract = model.abstract_params()
    if model.mesh is None:
        device = SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, abstract)
    else:
        shardings = param_shardings(model, model.mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
