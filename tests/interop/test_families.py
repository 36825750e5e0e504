"""Dream, LLaDA and MMaDA folders: configs and weights both ways, chat templates, and what is not a family's own."""

import json
import shutil

import jax
import numpy as np
import pytest
from folder_utils import assert_files_equal, assert_trees_equal, make_folder, random_params, tensors_of
from golden_utils import FULL_NAMES, GOLDEN, load_golden, load_value_golden
from safetensors.numpy import load_file

from tracerl_jax.errors import CheckpointError
from tracerl_jax.interop.chat_template import add_chat_template
from tracerl_jax.interop.convert import convert
from tracerl_jax.interop.families import FAMILIES
from tracerl_jax.interop.hf_config import hf_config_from_model, model_config_from_hf, read_model_config
from tracerl_jax.interop.hf_load import load_hf
from tracerl_jax.interop.hf_save import save_hf
from tracerl_jax.interop.native import load_native
from tracerl_jax.interop.tokenizer import load_tokenizer, render_chat
from tracerl_jax.launch.cli import main
from tracerl_jax.models import PRESETS, Model
from tracerl_jax.parallel.mesh import make_mesh

DREAM = {
    "model_type": "Dream", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "hidden_act": "silu",
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_scaling": None,
    "tie_word_embeddings": False, "mask_token_id": 151666, "pad_token_id": 151643, "eos_token_id": 151643,
}  # fmt: skip
LLADA = {
    "model_type": "llada", "vocab_size": 126464, "embedding_size": 126464, "d_model": 4096, "n_layers": 32,
    "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288, "block_type": "llama", "activation_type": "silu",
    "layer_norm_type": "rms", "rms_norm_eps": 1e-5, "rope": True, "rope_theta": 500000.0, "rope_full_precision": True,
    "include_bias": False, "include_qkv_bias": False, "weight_tying": False, "max_sequence_length": 4096,
    "mask_token_id": 126336, "pad_token_id": 126081, "eos_token_id": 126081,
}  # fmt: skip
MMADA = LLADA | {
    "model_type": "mmada", "vocab_size": 134656, "embedding_size": 134656, "new_vocab_size": 134656,
    "llm_vocab_size": 126464, "codebook_size": 8192, "num_vq_tokens": 1024,
}  # fmt: skip


@pytest.mark.parametrize(
    ("original", "preset"),
    [(DREAM, "dream_7b"), (DREAM, "diffucoder_7b"), (LLADA, "llada_8b"), (LLADA, "llada_1_5_8b"), (MMADA, "mmada_8b")],
)
def test_published_config_is_the_preset_and_is_exported_unchanged(original, preset):
    config = model_config_from_hf(original)
    assert config == PRESETS[preset]
    assert hf_config_from_model(config, original) == original


def test_only_changes_are_written():
    config = model_config_from_hf(MMADA).replace(vocab_size=140000, tie_embeddings=True, rope_dtype="compute")
    changes = {"vocab_size": 140000, "embedding_size": 140000, "new_vocab_size": 140000}
    assert hf_config_from_model(config, MMADA) == MMADA | changes | {"weight_tying": True, "rope_full_precision": False}
    config = model_config_from_hf(DREAM).replace(block_size=16)
    assert hf_config_from_model(config, DREAM) == DREAM | {"block_size": 16}
    assert model_config_from_hf(DREAM | {"block_size": 16}) == config


def test_the_rotation_s_dtype_is_free():
    assert model_config_from_hf(DREAM).rope_dtype == "compute"
    assert model_config_from_hf(DREAM, rope_dtype="float32").rope_dtype == "float32"
    assert model_config_from_hf(LLADA | {"rope_full_precision": False}).rope_dtype == "compute"


def test_other_vocabularies_keep_their_own_stop_ids():
    config = model_config_from_hf(LLADA | {"mask_token_id": 5, "eos_token_id": 7})
    assert (config.mask_token_id, config.stop_token_ids) == (5, (7,))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_type", "sequential"), ("activation_type", "swiglu"), ("layer_norm_type", "low_precision"),
        ("include_bias", True), ("rope", False), ("alibi", True), ("attention_layer_norm", True),
        ("scale_logits", True), ("multi_query_attention", True), ("embedding_size", 126500),
        ("rope_full_precision", None),
    ],
)  # fmt: skip
def test_unsupported_features_are_named_with_the_file(key, value):
    with pytest.raises(CheckpointError, match=rf"^some/config\.json: {key} = {value!r} is not supported"):
        model_config_from_hf(LLADA | {key: value}, source="some/config.json")


# --- recorded models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FULL_NAMES)
def test_recorded_model_round_trip(name, tmp_path):
    golden = load_golden(name)
    model, params = load_hf(GOLDEN / name)
    assert model.config == golden.config
    assert_trees_equal(params, golden.params)
    save_hf(tmp_path / "saved", model, params, source=GOLDEN / name)
    assert_files_equal(tensors_of(tmp_path / "saved"), load_file(GOLDEN / name / "model.safetensors"))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "saved", GOLDEN / name)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", FULL_NAMES)
def test_there_and_back_through_a_native_checkpoint_and_a_mesh(name, tmp_path, capsys):
    native, back = tmp_path / "native", tmp_path / "back"
    assert main(["convert", "--from", str(GOLDEN / name), "--to", str(native), "--check"]) == 0
    assert main(["convert", "--from", str(native), "--to", str(back), "--check"]) == 0
    assert capsys.readouterr().out.count("max difference 0\n") == 4
    assert_files_equal(tensors_of(back), load_file(GOLDEN / name / "model.safetensors"))
    _, params = load_hf(back, mesh=make_mesh(2, 2, 2))
    assert_trees_equal(jax.device_get(params), load_golden(name).params)


def test_value_model_round_trip(tmp_path):
    folder = make_folder(
        tmp_path / "value",
        lambda tensors: tensors.update(load_file(GOLDEN / "mmada_tiny" / "value_head.safetensors")),
        "mmada_tiny",
    )
    model, params = load_hf(folder, head="value")
    assert_trees_equal(params, load_value_golden("mmada_tiny").params)
    save_hf(tmp_path / "saved", model, params, source=folder)
    expected = load_file(folder / "model.safetensors")
    del expected["model.transformer.ff_out.weight"]
    assert_files_equal(tensors_of(tmp_path / "saved"), expected)


@pytest.mark.parametrize(
    ("name", "key", "head", "embedding"),
    [
        ("dream_tiny", "tie_word_embeddings", "lm_head.weight", "model.embed_tokens.weight"),
        ("llada_tiny", "weight_tying", "model.transformer.ff_out.weight", "model.transformer.wte.weight"),
    ],
)
def test_tied_heads(name, key, head, embedding, tmp_path):
    model, params = load_hf(make_folder(tmp_path / "tied", lambda tensors: tensors.pop(head), name, **{key: True}))
    assert "lm_head" not in params
    np.testing.assert_array_equal(model.head_kernel(params), params["embed"]["embedding"].T)
    with pytest.raises(CheckpointError, match=rf"{head} differs from {embedding} although {key} is true"):
        load_hf(make_folder(tmp_path / "untied", lambda tensors: None, name, **{key: True}))


def test_a_new_mmada_folder_reads_back(tmp_path):
    model = Model(PRESETS["llada_demo"].replace(family="mmada", text_vocab_size=96))
    params = random_params(model)
    save_hf(tmp_path / "new", model, params)
    again, loaded = load_hf(tmp_path / "new")
    assert again.config == model.config
    assert_trees_equal(loaded, params)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (config["llm_vocab_size"], config["codebook_size"], config["embedding_size"]) == (96, 32, 128)


# --- another family's checkpoint --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llada_tiny", {"model_type": "Dream"}, r"the key hidden_size is missing.* those of model_type llada"),
        ("dream_tiny", {"model_type": "llada"}, r"the key d_model is missing.* those of model_type sdar or Dream"),
        ("llada_tiny", {"model_type": "mmada"}, r"the key llm_vocab_size is missing.* those of model_type llada"),
        ("mmada_tiny", {"model_type": "llada"}, r"llm_vocab_size = 160 .*set model_type to mmada"),
        ("dream_tiny", {"model_type": "qwen2"}, r"model_type 'qwen2' is not supported.*set model_type to Dream"),
        ("dream_tiny", {"num_attention_heads": 5, "num_key_value_heads": 5},
         r"hidden_size = 48 is not a multiple of num_attention_heads = 5"),
    ],
)
def test_a_config_of_another_family_is_refused(name, changes, message, tmp_path):
    folder = make_folder(tmp_path / "wrong", lambda tensors: None, name, **changes)
    with pytest.raises(CheckpointError, match=rf"wrong/config\.json: {message}"):
        load_hf(folder)


@pytest.mark.parametrize(
    ("config", "weights", "family"),
    [("dream_tiny", "llada_tiny", "llada or mmada"), ("llada_tiny", "dream_tiny", "Dream"),
     ("sdar_tiny", "dream_tiny", "Dream"), ("dream_tiny", "sdar_tiny", "sdar")],
)  # fmt: skip
def test_weights_of_another_family_are_recognised(config, weights, family, tmp_path):
    shutil.copy(GOLDEN / config / "config.json", tmp_path)
    shutil.copy(GOLDEN / weights / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match=rf"its tensors are named as those of model_type {family}, config\.json"):
        load_hf(tmp_path)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("dream_tiny", "logit_alignment", "same_position"), ("llada_tiny", "logit_alignment", "shifted"),
        ("mmada_tiny", "attention_mode", "causal"), ("sdar_tiny", "attention_mode", "full"),
    ],
)  # fmt: skip
def test_flags_of_another_family_are_refused(name, field, value, tmp_path):
    with pytest.raises(CheckpointError, match=rf"config\.json: {field} = '{value}' does not go with model_type"):
        read_model_config(GOLDEN / name, **{field: value})
    with pytest.raises(CheckpointError, match=f"{field} = '{value}' does not go with model_type"):
        hf_config_from_model(load_golden(name).config.replace(**{field: value}))
    convert(GOLDEN / name, tmp_path / "native")
    path = tmp_path / "native" / "model_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=rf"model_config\.json: {field} = '{value}'"):
        load_native(tmp_path / "native")


# --- chat templates ---------------------------------------------------------------------------------------------------


def write_tokenizer(folder, special, **settings):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({chr(i): i for i in range(32, 127)} | {"Ċ": 127}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[0]} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dream_tiny", "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
                       "<|im_start|>assistant\n"),
        ("llada_tiny", "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
                       "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ],
)  # fmt: skip
def test_a_tokenizer_without_a_chat_template_gets_the_published_one(name, text, tmp_path):
    folder = make_folder(tmp_path / "source", lambda tensors: None, name)
    model, params = load_hf(folder)
    write_tokenizer(folder, FAMILIES[model.config.family].chat_tokens)
    save_hf(tmp_path / "saved", model, params, source=folder)
    assert render_chat(load_tokenizer(tmp_path / "saved"), [{"role": "user", "content": "2+2?"}]) == text


def test_a_template_that_is_there_stays_and_tokens_that_are_missing_forbid_one(tmp_path):
    write_tokenizer(tmp_path, FAMILIES["dream"].chat_tokens, chat_template="mine")
    assert not add_chat_template(tmp_path, FAMILIES["dream"])
    write_tokenizer(tmp_path, FAMILIES["dream"].chat_tokens)
    assert not add_chat_template(tmp_path, FAMILIES["llada"])
    assert add_chat_template(tmp_path, FAMILIES["dream"])
    assert not add_chat_template(tmp_path, FAMILIES["dream"])
