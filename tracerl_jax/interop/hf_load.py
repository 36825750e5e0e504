"""Hugging Face folder to parameters: safetensors read slice by slice into the stacked, sharded arrays."""

import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from safetensors import SafetensorError, safe_open

from tracerl_jax.errors import CheckpointError
from tracerl_jax.interop.families import FAMILIES, others_with_tensors
from tracerl_jax.interop.folders import read_json
from tracerl_jax.interop.hf_config import read_model_config
from tracerl_jax.interop.names import HfTensor, hf_tensors
from tracerl_jax.models import Model
from tracerl_jax.parallel.sharding import param_shardings

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LISTED = 40  # names per kind of problem in a message


def load_hf(
    folder: str | os.PathLike,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    head: Literal["lm", "value"] = "lm",
    overrides: Mapping[str, Any] | None = None,
) -> tuple[Model, dict[str, Any]]:
    """The model of a Hugging Face folder and its parameters.

    Tensors are read from the file one slice of a layer at a time; host memory beyond the result is one stacked leaf.

    Args:
        folder: with `config.json` and safetensors: `model.safetensors`, the shards of `model.safetensors.index.json`,
            or any `*.safetensors`.
        dtype: of the parameters, "float32" (default) or "bfloat16".
        mesh: place the parameters by `param_shardings`; without it they go to the first device.
        head: "value" reads `value_head.weight`, or zeros when there is none, and leaves the language-model head out.
        overrides: fields of `ModelConfig` to set, such as compute dtype or remat.

    Raises:
        CheckpointError: no or damaged files, another architecture; missing, extra and misshapen tensors, all in one
            message; NaN or infinite weights.
        ConfigError: the model cannot be split over the mesh.
    """
    config = read_model_config(folder, **(overrides or {}))
    if dtype is not None:
        config = config.replace(param_dtype=dtype)
    model = Model(config, head=head, mesh=mesh)
    tensors = Safetensors(folder)
    wanted = hf_tensors(model.abstract_params(), FAMILIES[config.family].tensors)
    if head == "value" and "value_head.weight" not in tensors.shapes:
        wanted = [tensor for tensor in wanted if tensor.name != "value_head.weight"]
    _check_names(tensors, wanted, model)

    by_path: dict[str, dict[tuple[int, ...], HfTensor]] = defaultdict(dict)
    for tensor in wanted:
        by_path[tensor.path][tensor.index] = tensor
    if mesh is None:
        device = SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, model.abstract_params())
    else:
        shardings = param_shardings(model, mesh)

    def load(path: tuple, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
        slices = by_path[jax.tree_util.keystr(path, simple=True, separator="/")]
        shards: dict[tuple, np.ndarray] = {}  # replicas of a shard are asked for once per device

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            bounds = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
            if bounds not in shards:
                shards[bounds] = _read_shard(tensors, slices, bounds, leaf.dtype)
            return shards[bounds]

        return jax.make_array_from_callback(leaf.shape, sharding, shard)

    return model, jax.tree_util.tree_map_with_path(load, model.abstract_params(), shardings)


def stored_dtype(folder: str | os.PathLike) -> str:
    """The dtype that holds all tensors of a folder exactly: "bfloat16" when every one has it, else "float32"."""
    return "bfloat16" if set(Safetensors(folder).dtypes.values()) == {"bfloat16"} else "float32"


class Safetensors:
    """The tensors of a folder: `shapes` and `dtypes` by name, `read` for slices. Files stay mapped, not loaded."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._files: dict[str, Any] = {}  # tensor name -> open file
        self._paths: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for path in _files_of(self.folder):
            self._open(path)

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: damaged or incomplete ({error}); fetch the file again") from None
        for name in file.keys():
            if name in self._files:
                raise CheckpointError(f"{path}: holds {name}, and so does {self._paths[name]}; remove one of the files")
            header = file.get_slice(name)
            if header.get_dtype() not in _DTYPES:
                raise CheckpointError(f"{path}: {name} has dtype {header.get_dtype()}; save it as F32, BF16 or F16")
            self._files[name], self._paths[name] = file, path
            self.shapes[name], self.dtypes[name] = tuple(header.get_shape()), _DTYPES[header.get_dtype()]

    def read(self, name: str, bounds: tuple[tuple[int, int], ...] | None = None) -> np.ndarray:
        """A tensor, or the part of it inside (start, stop) per dimension, in the file's dtype."""
        if bounds is None:
            return self._files[name].get_tensor(name)
        return self._files[name].get_slice(name)[tuple(slice(*bound) for bound in bounds)]

    def check_finite(self, name: str, values: np.ndarray) -> None:
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{self._paths[name]}: {name} holds NaN or infinite values; use a checkpoint from before that, "
                "or fetch the file again"
            )


def _files_of(folder: Path) -> list[Path]:
    if (folder / INDEX_FILE).exists():
        names = sorted(set(read_json(folder / INDEX_FILE).get("weight_map", {}).values()))
        absent = [name for name in names if not (folder / name).exists()]
        if absent or not names:
            raise CheckpointError(
                f"{folder / INDEX_FILE}: not there, but listed: {', '.join(absent) or 'no file at all'}"
            )
        return [folder / name for name in names]
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE]
    found = sorted(folder.glob("*.safetensors"))
    if found:
        return found
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder}: has only pickled weights (*.bin, *.pt), which can run code when they are read; save the model "
            "as safetensors (save_pretrained does by default)"
        )
    raise CheckpointError(f"{folder}: no *.safetensors; give a model folder with weights")


def _check_names(tensors: Safetensors, wanted: list[HfTensor], model: Model) -> None:
    """Refuses anything missing, extra or misshapen, all in one message; a tied head may repeat the embedding."""
    family = FAMILIES[model.config.family]
    embedding, lm_head, value_head = (
        family.tensors[path][0] for path in ("embed/embedding", "lm_head/kernel", "value_head/kernel")
    )
    expected = {tensor.name: tensor.shape for tensor in wanted}
    optional = {lm_head} if model.head == "value" or model.config.tie_embeddings else set()
    shapes = tensors.shapes
    problems = [
        ("missing", [name for name in expected if name not in shapes]),
        ("not known", [name for name in shapes if name not in expected and name not in optional]),
        ("misshapen", [f"{name} is {list(shapes[name])}, the config says {list(shape)}"
                       for name, shape in expected.items() if name in shapes and shapes[name] != shape]),
    ]  # fmt: skip
    if lm_head in shapes and model.head == "lm" and model.config.tie_embeddings:
        if embedding not in shapes or not np.array_equal(tensors.read(lm_head), tensors.read(embedding)):
            key = family.keys["tie_embeddings"].name
            problems.append(("contradictory", [f"{lm_head} differs from {embedding} although {key} is true"]))
    lines = [f"  {kind}: {_listing(names)}" for kind, names in problems if names]
    if lines:
        others = others_with_tensors(shapes, family)
        if model.head == "lm" and value_head in shapes:
            hint = "this is a value model, load it as one"
        elif others and (problems[0][1] or problems[1][1]):
            hint = (
                f"its tensors are named as those of model_type {' or '.join(others)}, config.json says "
                f"{family.model_type}: take the config.json that belongs to the weights"
            )
        else:
            hint = "compare config.json with the weights"
        raise CheckpointError("\n".join([f"{tensors.folder}: the weights do not fit the config; {hint}", *lines]))


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _read_shard(
    tensors: Safetensors, slices: Mapping[tuple[int, ...], HfTensor], bounds: tuple, dtype: np.dtype
) -> np.ndarray:
    """The part of a stacked leaf inside (start, stop) per dimension; zeros for a leaf the checkpoint does not have."""
    starts = tuple(start for start, _ in bounds)
    part = np.zeros([stop - start for start, stop in bounds], dtype)
    if not slices:
        return part
    leading = len(next(iter(slices)))
    for position in np.ndindex(part.shape[:leading]):
        tensor = slices[tuple(start + i for start, i in zip(starts, position, strict=False))]
        inner = bounds[leading:]
        block = tensors.read(tensor.name, inner[::-1] if tensor.transpose else inner)
        part[position] = block.T if tensor.transpose else block
        tensors.check_finite(tensor.name, part[position])
    return part
