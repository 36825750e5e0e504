"""Model folders for tests of interop: copies of recorded ones, and comparison of tensors and trees."""

from __future__ import annotations

import json

import jax
import numpy as np
from golden_utils import GOLDEN
from safetensors.numpy import load_file, save_file


def assert_trees_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def assert_files_equal(got, want):
    """Same tensors, byte for byte."""
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name].dtype, got[name].shape) == (want[name].dtype, want[name].shape), name
        assert got[name].tobytes() == want[name].tobytes(), name


def tensors_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), model.abstract_params())


def make_folder(path, change=lambda tensors: None, name="sdar_tiny", **config_changes):
    """A copy of a recorded model whose tensors went through `change`."""
    path.mkdir()
    config = json.loads((GOLDEN / name / "config.json").read_text()) | config_changes
    (path / "config.json").write_text(json.dumps(config))
    tensors = load_file(GOLDEN / name / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path
