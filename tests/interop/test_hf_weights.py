"""Weights of Hugging Face folders in and out: recorded models, shards, dtypes, meshes, experts, and what is refused."""

import errno
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from folder_utils import assert_files_equal, assert_trees_equal, make_folder, random_params, tensors_of
from golden_utils import GOLDEN, NAMES, load_golden, load_value_golden
from safetensors import safe_open
from safetensors.numpy import load_file

from tracerl_jax.data.char_tokenizer import build_char_tokenizer
from tracerl_jax.errors import CheckpointError, ConfigError
from tracerl_jax.interop import hf_load, hf_save
from tracerl_jax.interop.folders import whole_folder
from tracerl_jax.interop.hf_load import load_hf, stored_dtype
from tracerl_jax.interop.hf_save import save_hf
from tracerl_jax.interop.tokenizer import load_tokenizer
from tracerl_jax.models import PRESETS, Model
from tracerl_jax.parallel.mesh import make_mesh
from tracerl_jax.parallel.sharding import param_shardings

TINY = GOLDEN / "sdar_tiny"
MOE = PRESETS["sdar_tiny"].replace(num_experts=4, experts_per_token=2, expert_width=24, family="sdar_moe")


# --- recorded models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_recorded_model_round_trip(name, tmp_path):
    golden = load_golden(name)
    model, params = load_hf(GOLDEN / name)
    assert model.config == golden.config.replace(max_positions=2048)
    assert_trees_equal(params, golden.params)

    case = golden.arrays("forward", "bc")
    ids = jnp.asarray(case["input_ids"], jnp.int32)
    positions = jnp.broadcast_to(jnp.asarray(case["position_ids"], jnp.int32), ids.shape)
    zero = jnp.zeros_like(positions)
    intervals = jnp.stack([zero, (positions // 4 + 1) * 4, zero, zero], axis=-1)
    logits = model.logits(params, model.hidden(params, ids, positions, intervals))
    np.testing.assert_allclose(logits, case["logits"], atol=5e-4)

    save_hf(tmp_path / "saved", model, params, source=GOLDEN / name)
    assert_files_equal(tensors_of(tmp_path / "saved"), load_file(GOLDEN / name / "model.safetensors"))
    saved, original = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "saved", GOLDEN / name)
    )
    assert saved == original
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name", NAMES)
def test_value_model_round_trip(name, tmp_path):
    head = load_file(GOLDEN / name / "value_head.safetensors")
    folder = make_folder(tmp_path / "value", lambda tensors: tensors.update(head), name)
    model, params = load_hf(folder, head="value")
    assert_trees_equal(params, load_value_golden(name).params)
    save_hf(tmp_path / "saved", model, params, source=folder)
    expected = load_file(folder / "model.safetensors")
    expected.pop("lm_head.weight", None)
    assert_files_equal(tensors_of(tmp_path / "saved"), expected)


def test_value_model_of_a_language_model_starts_at_zero():
    model, params = load_hf(TINY, head="value")
    assert "lm_head" not in params
    np.testing.assert_array_equal(params["value_head"]["kernel"], np.zeros((48, 1)))


def test_tied_head_may_repeat_the_embedding(tmp_path):
    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    def differ(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    same = make_folder(tmp_path / "same", repeat, "sdar_tied")
    assert_trees_equal(load_hf(same)[1], load_golden("sdar_tied").params)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs .* tie_word_embeddings is true"):
        load_hf(make_folder(tmp_path / "differs", differ, "sdar_tied"))


# --- files and dtypes -------------------------------------------------------------------------------------------------


def test_sharded_write_and_read(tmp_path):
    model, params = load_hf(TINY)
    save_hf(tmp_path / "saved", model, params, source=TINY, max_shard_bytes=100_000)
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(sum(t.nbytes for t in load_file(path).values()) <= 100_000 for path in files)
    assert index["weight_map"] == {name: path.name for path in files for name in load_file(path)}
    assert index["metadata"]["total_size"] == 4 * model.config.num_params()
    assert_files_equal(tensors_of(tmp_path / "saved"), load_file(TINY / "model.safetensors"))
    assert_trees_equal(load_hf(tmp_path / "saved")[1], params)

    (tmp_path / "saved" / "model.safetensors.index.json").unlink()  # shards are found without it as well
    assert_trees_equal(load_hf(tmp_path / "saved")[1], params)
    shutil.copy(files[0], tmp_path / "saved" / "again.safetensors")
    with pytest.raises(CheckpointError, match="and so does"):
        load_hf(tmp_path / "saved")


def test_index_that_lists_an_absent_file(tmp_path):
    model, params = load_hf(TINY)
    save_hf(tmp_path / "saved", model, params, source=TINY, max_shard_bytes=100_000)
    next((tmp_path / "saved").glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match="not there, but listed: model-00002-of"):
        load_hf(tmp_path / "saved")


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_round_trip(dtype, tmp_path):
    def narrow(tensors):
        tensors.update({name: tensor.astype(dtype) for name, tensor in tensors.items()})

    folder = make_folder(tmp_path / "half", narrow, torch_dtype=np.dtype(dtype).name)
    model, params = load_hf(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    expected = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), load_golden("sdar_tiny").params)
    assert_trees_equal(params, expected)
    save_hf(tmp_path / "saved", model, params, source=folder, dtype=np.dtype(dtype).name)
    assert_files_equal(tensors_of(tmp_path / "saved"), load_file(folder / "model.safetensors"))
    assert (tmp_path / "saved" / "config.json").read_text() == json.dumps(
        json.loads((folder / "config.json").read_text()), indent=2
    ) + "\n"


def test_bfloat16_parameters(tmp_path):
    _, params = load_hf(TINY, dtype="bfloat16")
    expected = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), load_golden("sdar_tiny").params)
    assert_trees_equal(params, expected)
    model = Model(load_golden("sdar_tiny").config.replace(param_dtype="bfloat16"))
    save_hf(tmp_path / "saved", model, params, source=TINY)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert stored_dtype(tmp_path / "saved") == "bfloat16"
    assert stored_dtype(TINY) == "float32"


def test_overrides_reach_the_model():
    model, _ = load_hf(TINY, overrides={"dtype": "bfloat16", "remat": "full", "scan_layers": False})
    assert (model.config.dtype, model.config.remat, model.config.scan_layers) == ("bfloat16", "full", False)


# --- experts ----------------------------------------------------------------------------------------------------------


def test_experts_round_trip(tmp_path):
    model = Model(MOE)
    params = random_params(model)
    save_hf(tmp_path / "moe", model, params)
    tensors = tensors_of(tmp_path / "moe")
    moe = params["layers"]["moe"]
    np.testing.assert_array_equal(tensors["model.layers.2.mlp.experts.3.up_proj.weight"], moe["up_proj"][2, 3].T)
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.experts.0.down_proj.weight"], moe["down_proj"][1, 0].T)
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.gate.weight"], moe["router"]["kernel"][1].T)
    assert len(tensors) == 3 * (8 + 1 + 3 * 4) + 3

    again, loaded = load_hf(tmp_path / "moe")
    assert again.config == MOE
    assert_trees_equal(loaded, params)
    save_hf(tmp_path / "again", again, loaded, source=tmp_path / "moe", max_shard_bytes=50_000)
    assert_files_equal(tensors_of(tmp_path / "again"), tensors)


# --- meshes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "experts"), [((2, 2, 2), False), ((1, 8, 1), False), ((8, 1, 1), False), ((2, 2, 2), True)]
)
def test_sharded_loading_equals_unsharded(sizes, experts, tmp_path, monkeypatch):
    folder = TINY
    if experts:
        folder = tmp_path / "moe"
        save_hf(folder, Model(MOE), random_params(Model(MOE)))
    _, plain = load_hf(folder)

    read = hf_load.Safetensors.read
    sizes_read = []

    def counted(self, name, bounds=None):
        block = read(self, name, bounds)
        sizes_read.append(block.size)
        return block

    monkeypatch.setattr(hf_load.Safetensors, "read", counted)
    mesh = make_mesh(*sizes)
    model, params = load_hf(folder, mesh=mesh)
    assert_trees_equal(params, plain)
    shardings = param_shardings(model, mesh)
    jax.tree.map(lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim) or 1 / 0, params, shardings)
    assert sum(sizes_read) == sum(leaf.size for leaf in jax.tree.leaves(plain))  # nothing is read twice

    save_hf(tmp_path / "saved", model, params)
    assert_files_equal(tensors_of(tmp_path / "saved"), load_file(folder / "model.safetensors"))


def test_mesh_that_does_not_fit():
    with pytest.raises(ConfigError, match="cannot be split evenly over 8"):
        load_hf(TINY, mesh=make_mesh(1, 1, 8))


# --- refused weights --------------------------------------------------------------------------------------------------


def test_missing_extra_and_misshapen_tensors_are_named_together(tmp_path):
    def damage(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
        tensors["model.norm.weight"] = np.zeros(47, np.float32)

    with pytest.raises(CheckpointError) as caught:
        load_hf(make_folder(tmp_path / "bad", damage))
    message = str(caught.value)
    assert str(tmp_path / "bad") in message
    assert "missing: model.layers.1.mlp.up_proj.weight\n" in message
    assert "not known: model.layers.0.self_attn.q_proj.bias\n" in message
    assert "misshapen: model.norm.weight is [47], the config says [48]" in message


def test_long_lists_are_cut(tmp_path):
    with pytest.raises(CheckpointError, match=r"and \d+ more"):
        load_hf(make_folder(tmp_path / "deep", num_hidden_layers=40))


def test_value_model_is_not_a_language_model(tmp_path):
    head = load_file(TINY / "value_head.safetensors")
    with pytest.raises(CheckpointError, match="this is a value model"):
        load_hf(make_folder(tmp_path / "value", lambda tensors: tensors.update(head)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.layers.2.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_non_finite_weights_are_refused(bad, name, tmp_path):
    def poison(tensors):
        tensors[name][1, 3] = bad

    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {name} holds NaN or infinite"):
        load_hf(make_folder(tmp_path / "nan", poison))


def test_damaged_file(tmp_path):
    folder = make_folder(tmp_path / "cut")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged or incomplete"):
        load_hf(folder)


def test_other_dtypes(tmp_path):
    def widen(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64)

    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has dtype F64"):
        load_hf(make_folder(tmp_path / "wide", widen))


def test_folders_without_usable_weights(tmp_path):
    shutil.copy(TINY / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        load_hf(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        load_hf(tmp_path)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_everything_that_belongs_to_a_model_comes_along(tmp_path):
    source = make_folder(tmp_path / "source")
    tokenizer = build_char_tokenizer(source)
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 363]}')
    (source / "modeling_sdar.py").write_text("# remote code\n")
    (source / "LICENSE").write_text("terms\n")
    (source / "optimizer.pt").write_text("not part of the model")
    model, params = load_hf(source)
    save_hf(tmp_path / "saved", model, params, source=source)
    names = {path.name for path in source.iterdir()} - {"optimizer.pt"}
    assert {path.name for path in (tmp_path / "saved").iterdir()} == names
    for name in names - {"model.safetensors", "config.json"}:
        assert (tmp_path / "saved" / name).read_bytes() == (source / name).read_bytes()
    carried = load_tokenizer(tmp_path / "saved")
    assert carried.encode("12+3=") == tokenizer.encode("12+3=")
    assert load_hf(tmp_path / "saved")[0].config == model.config
    assert (tmp_path / "saved" / "model.safetensors").stat().st_mode == (tmp_path / "saved" / "LICENSE").stat().st_mode


def test_existing_folders_are_not_touched_unasked(tmp_path):
    model, params = load_hf(TINY)
    target = tmp_path / "saved"
    target.mkdir()
    save_hf(target, model, params)  # an empty folder is as good as none
    (target / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="already there and not empty"):
        save_hf(target, model, params)
    assert (target / "notes.txt").exists()
    save_hf(target, model, params, overwrite=True)
    assert {path.name for path in target.iterdir()} == {"config.json", "model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    model, params = load_hf(TINY)
    save_hf(tmp_path / "old", model, params)
    before = (tmp_path / "old" / "model.safetensors").read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hf_save, "save_file", full_disk)
    for target, overwrite in (("old", True), ("new", False)):
        with pytest.raises(CheckpointError, match=r"cannot be written \(.*No space left"):
            save_hf(tmp_path / target, model, params, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old" / "model.safetensors").read_bytes() == before


def test_what_a_killed_save_left_behind_is_put_right(tmp_path):
    (tmp_path / ".x.partial").mkdir()
    (tmp_path / ".x.partial" / "half").write_text("")
    with whole_folder(tmp_path / "x") as partial:
        (partial / "content").write_text("first")
    (tmp_path / "x").rename(tmp_path / ".x.replaced")  # killed after setting the old folder aside
    with pytest.raises(CheckpointError, match="already there"), whole_folder(tmp_path / "x"):
        pass
    assert (tmp_path / "x" / "content").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
