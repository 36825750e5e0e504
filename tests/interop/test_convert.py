"""`tracerl convert`: Hugging Face folder, native checkpoint and run."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import GOLDEN, load_golden
from safetensors.numpy import load_file

from tracerl_jax.config import CheckpointSection
from tracerl_jax.data.char_tokenizer import build_char_tokenizer
from tracerl_jax.errors import CheckpointError
from tracerl_jax.interop.convert import check, convert, folder_kind
from tracerl_jax.interop.hf_load import load_hf
from tracerl_jax.interop.hf_save import save_hf
from tracerl_jax.interop.native import load_native, load_run
from tracerl_jax.launch.cli import main
from tracerl_jax.models import PRESETS, Model
from tracerl_jax.parallel.mesh import make_mesh
from tracerl_jax.training.checkpoint import Checkpointer

TINY = GOLDEN / "sdar_tiny"


@pytest.fixture
def hf(tmp_path):
    """A model folder with tokenizer."""
    folder = tmp_path / "hf"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY / name, folder)
    build_char_tokenizer(folder)
    return folder


def names_of(folder):
    return sorted(path.name for path in folder.iterdir())


def test_there_and_back(hf, tmp_path, capsys):
    native, back = tmp_path / "native", tmp_path / "back"
    assert main(["convert", "--from", str(hf), "--to", str(native), "--check"]) == 0
    assert names_of(native) == ["model", "model_config.json", "params"]
    assert main(["convert", "--from", str(native), "--to", str(back), "--check"]) == 0
    output = capsys.readouterr().out
    assert output.count("check passed") == 2
    assert output.count("max difference 0\n") == 4  # weights and logits, twice

    assert names_of(back) == names_of(hf)
    for name in names_of(hf):
        if name == "model.safetensors":
            old, new = (load_file(folder / name) for folder in (hf, back))
            assert old.keys() == new.keys()
            assert all(old[k].tobytes() == new[k].tobytes() for k in old)
        elif name == "config.json":
            assert json.loads((hf / name).read_text()) == json.loads((back / name).read_text())
        else:
            assert (hf / name).read_bytes() == (back / name).read_bytes()


def test_bfloat16_stays_bfloat16(hf, tmp_path):
    model, params = load_hf(hf)
    save_hf(tmp_path / "half", model, params, source=hf, dtype="bfloat16")
    convert(tmp_path / "half", tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "back")
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "back"))
    assert {tensor.dtype.name for tensor in new.values()} == {"bfloat16"}
    assert all(old[name].tobytes() == new[name].tobytes() for name in old)


def test_check_reports_rounding_without_failing(hf, tmp_path):
    convert(hf, tmp_path / "native")
    result = check(convert(tmp_path / "native", tmp_path / "half", dtype="bfloat16"), tmp_path / "half")
    assert result.wrong == []
    assert 0 < result.max_difference < 0.02  # 2^-8 of the largest weight
    assert result.output_difference > 0 and result.max_kl > 0


def test_weights_beyond_float16_are_named(hf, tmp_path):
    model, params = load_hf(hf)
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].set(7e4)
    save_hf(tmp_path / "large", model, params, source=hf)
    convert(tmp_path / "large", tmp_path / "native")
    with pytest.raises(CheckpointError, match=r"final_norm/scale holds weights beyond the range of float16"):
        convert(tmp_path / "native", tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()


def test_check_finds_a_changed_weight(hf, tmp_path, capsys, monkeypatch):
    conversion = convert(hf, tmp_path / "native")
    conversion.params["layers"]["mlp"]["up_proj"]["kernel"] *= 1.001
    result = check(conversion, tmp_path / "native")
    assert result.wrong == ["layers/mlp/up_proj/kernel"]

    monkeypatch.setattr("tracerl_jax.interop.convert.check", lambda *_: result)
    assert main(["convert", "--from", str(hf), "--to", str(tmp_path / "other"), "--check"]) == 1
    assert "check FAILED" in capsys.readouterr().out


def test_value_model(hf, tmp_path, capsys):
    arguments = ["--from", str(hf), "--to", str(tmp_path / "native"), "--head", "value", "--check"]
    assert main(["convert", *arguments]) == 0
    assert "values on random ids: max difference 0" in capsys.readouterr().out
    convert(tmp_path / "native", tmp_path / "back")
    tensors = load_file(tmp_path / "back" / "model.safetensors")
    assert "value_head.weight" in tensors and "lm_head.weight" not in tensors


def test_experts_in_small_files(tmp_path):
    model = Model(PRESETS["sdar_tiny"].replace(num_experts=4, experts_per_token=2, expert_width=24, family="sdar_moe"))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), model.abstract_params())
    save_hf(tmp_path / "moe", model, params)
    convert(tmp_path / "moe", tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "back", max_shard_bytes=50_000)
    old = load_file(tmp_path / "moe" / "model.safetensors")
    files = [load_file(path) for path in (tmp_path / "back").glob("*.safetensors")]
    assert len(files) > 2 and sum(map(len, files)) == len(old)
    assert all(file[name].tobytes() == old[name].tobytes() for file in files for name in file)


def test_native_checkpoint_on_a_mesh(hf, tmp_path):
    convert(hf, tmp_path / "native")
    _, params = load_native(tmp_path / "native", mesh=make_mesh(2, 2, 2))
    jax.tree.map(np.testing.assert_array_equal, params, load_golden("sdar_tiny").params)
    assert len(params["lm_head"]["kernel"].sharding.device_set) == 8


def test_run_folder(hf, tmp_path):
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    for name in set(names_of(hf)) - {"model.safetensors"}:
        shutil.copy(hf / name, run / "model")
    old, new = load_golden("sdar_tiny").params, load_golden("sdar_tiny").params_new
    checkpointer = Checkpointer(run, CheckpointSection())
    for step, params in ((9, old), (10, new)):
        trees = {"params": jax.tree.map(jnp.asarray, params), "train": {"updates": jnp.int32(step)}}
        checkpointer.save(step, trees, {"data": {}, "meta": {}})
    checkpointer.close()
    assert folder_kind(run) == "run"
    convert(run, tmp_path / "newest")
    convert(run, tmp_path / "ninth", step=9)
    for folder, file in (("newest", "model_new.safetensors"), ("ninth", "model.safetensors")):
        got, want = load_file(tmp_path / folder / "model.safetensors"), load_file(TINY / file)
        assert all(got[name].tobytes() == want[name].tobytes() for name in want)
        assert names_of(tmp_path / folder) == names_of(hf)
    with pytest.raises(CheckpointError, match="no step 11"):
        load_run(run, step=11)


def test_refusals(hf, tmp_path, capsys):
    with pytest.raises(CheckpointError, match="no model folder"):
        convert(tmp_path, tmp_path / "x")
    convert(hf, tmp_path / "native")
    assert main(["convert", "--from", str(hf), "--to", str(tmp_path / "native")]) == 2
    assert "already there and not empty" in capsys.readouterr().err
    assert main(["convert", "--from", str(hf), "--to", str(tmp_path / "new"), "--max_shard_gb", "0"]) == 2
    assert "--max_shard_gb is 0.0; it must be above 0" in capsys.readouterr().err
    assert main(["convert", "--from", str(hf), "--to", str(tmp_path / "native"), "--overwrite"]) == 0
    (tmp_path / "native" / "model_config.json").write_text('{"head": "lm", "widht": 48}')
    with pytest.raises(CheckpointError, match=r"model_config\.json: not the config of a model"):
        load_native(tmp_path / "native")
    shutil.rmtree(tmp_path / "native" / "params")
    fields = dataclasses.asdict(load_golden("sdar_tiny").config)
    (tmp_path / "native" / "model_config.json").write_text(json.dumps({"head": "lm", **fields}))
    with pytest.raises(CheckpointError, match="params: no such folder"):
        load_native(tmp_path / "native")
