"""A model folder of random weights that reads and writes every printable ASCII character."""

import string

import jax
import numpy as np
import pytest

from tracerl_jax.data.char_tokenizer import build_char_tokenizer
from tracerl_jax.interop.hf_save import save_hf
from tracerl_jax.models import Model, ModelConfig
from tracerl_jax.parallel.mesh import make_mesh
from tracerl_jax.rollout import folder as folder_module


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Compiling is most of what these tests do: for one device, and without optimisations."""
    before = jax.config.values["jax_disable_most_optimizations"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_module, "make_mesh", lambda: make_mesh(devices=jax.devices()[:1]))
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "hf"
    config = ModelConfig(
        vocab_size=128, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32,
        mask_token_id=2, eos_token_id=1, pad_token_id=0, stop_token_ids=(1,),
    )  # fmt: skip
    model = Model(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype), model.abstract_params())
    save_hf(folder, model, params)
    build_char_tokenizer(folder, string.printable)
    return folder
