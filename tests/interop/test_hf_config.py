"""config.json to ModelConfig and back."""

import json
import shutil

import pytest
from golden_utils import GOLDEN, NAMES, load_golden

from tracerl_jax.data.char_tokenizer import build_char_tokenizer
from tracerl_jax.errors import CheckpointError, ConfigError
from tracerl_jax.interop.hf_config import hf_config_from_model, model_config_from_hf, read_model_config
from tracerl_jax.models import PRESETS

SDAR_4B = {  # as published
    "model_type": "sdar", "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 1000000, "rope_scaling": None, "attention_bias": False, "tie_word_embeddings": False,
    "max_position_embeddings": 32768, "use_sliding_window": False, "fuse_cross_entropy": True, "block_size": 4,
    "mask_token_id": 151669, "eos_token_id": 151643, "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig"},
}  # fmt: skip
SDAR_MOE = SDAR_4B | {
    "model_type": "sdar_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 768,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
}  # fmt: skip


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize("name", NAMES)
def test_golden_config(name):
    assert read_model_config(GOLDEN / name) == load_golden(name).config.replace(max_positions=2048)


def test_published_config_is_the_preset():
    config = model_config_from_hf(SDAR_4B, generation={"eos_token_id": [151645, 151643]})
    assert config.replace(stop_token_ids=(151643, 151645)) == PRESETS["sdar_4b"]
    assert config.stop_token_ids == (151643, 151645)


def test_experts():
    config = model_config_from_hf(SDAR_MOE)
    assert (config.num_experts, config.experts_per_token, config.expert_width) == (8, 2, 768)
    assert config.family == "sdar_moe"
    assert model_config_from_hf(SDAR_MOE | {"model_type": "sdar"}).num_experts == 0


def test_defaults_are_those_of_the_configuration_class():
    keys = ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "attention_bias", "tie_word_embeddings")
    config = model_config_from_hf(without(SDAR_4B, *keys))
    assert (config.num_kv_heads, config.head_dim, config.norm_eps, config.rope_theta) == (32, 128, 1e-6, 10000.0)
    assert not config.qkv_bias and not config.tie_embeddings
    assert model_config_from_hf(SDAR_4B | {"num_key_value_heads": None}).num_kv_heads == 32


def test_biases_are_on_all_four_projections():
    config = model_config_from_hf(SDAR_4B | {"attention_bias": True})
    assert config.qkv_bias and config.out_bias


def test_rope_in_the_newer_spelling():
    rope = {"rope_theta": 5e5, "rope_type": "default"}
    new = without(SDAR_4B, "rope_theta", "rope_scaling") | {"rope_parameters": rope}
    config = model_config_from_hf(new)
    assert config.rope_theta == 5e5
    exported = hf_config_from_model(config.replace(rope_theta=1e6), new)
    assert model_config_from_hf(exported).rope_theta == 1e6


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("hidden_act", "gelu"),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e6}),
        ("decoder_sparse_step", 2),
        ("mlp_only_layers", [0]),
        ("shared_expert_intermediate_size", 64),
    ],
)
def test_unsupported_features_are_named_with_the_file(key, value):
    with pytest.raises(CheckpointError, match=rf"^some/config\.json: {key}"):
        model_config_from_hf(SDAR_MOE | {key: value}, source="some/config.json")


def test_missing_and_impossible_keys_are_named_with_the_file():
    with pytest.raises(CheckpointError, match=r"^config\.json: the key hidden_size is missing"):
        model_config_from_hf(without(SDAR_4B, "hidden_size"))
    with pytest.raises(CheckpointError, match=r"^config\.json: .*num_heads.*multiple"):
        model_config_from_hf(SDAR_4B | {"num_key_value_heads": 5})


def test_an_impossible_override_is_not_blamed_on_the_file():
    with pytest.raises(ConfigError, match="remat"):
        model_config_from_hf(SDAR_4B, remat="some")


# --- special ids ------------------------------------------------------------------------------------------------------


def test_ids_from_the_generation_config():
    config = model_config_from_hf(
        without(SDAR_4B, "eos_token_id"), generation={"eos_token_id": [151645, 151643], "pad_token_id": 7}
    )
    assert (config.eos_token_id, config.stop_token_ids, config.pad_token_id) == (151645, (151645, 151643), 7)


def test_pad_of_the_config_comes_first():
    assert model_config_from_hf(SDAR_4B | {"pad_token_id": 0}, generation={"pad_token_id": 7}).pad_token_id == 0


def test_mask_id_of_published_checkpoints_without_one():
    assert model_config_from_hf(without(SDAR_4B, "mask_token_id")).mask_token_id == 151669


def test_no_mask_id_at_all():
    small = without(SDAR_4B, "mask_token_id", "eos_token_id") | {"vocab_size": 1000}
    with pytest.raises(CheckpointError, match=r"config\.json: no mask id"):
        model_config_from_hf(small)
    assert model_config_from_hf(small, mask_token_id=999).mask_token_id == 999


def test_mask_id_of_the_tokenizer(tmp_path):
    config = json.loads((GOLDEN / "sdar_tiny" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(without(config, "mask_token_id")))
    with pytest.raises(CheckpointError, match="no mask id"):
        read_model_config(tmp_path)
    tokenizer = build_char_tokenizer(tmp_path)
    assert read_model_config(tmp_path).mask_token_id == tokenizer.mask_token_id == 2


def test_stop_ids_of_a_folder(tmp_path):
    shutil.copy(GOLDEN / "sdar_tiny" / "config.json", tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 363]}))
    assert read_model_config(tmp_path).stop_token_ids == (363, 5)


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("original", [SDAR_4B, SDAR_MOE])
def test_unchanged_config_is_exported_unchanged(original):
    assert hf_config_from_model(model_config_from_hf(original), original) == original


def test_only_changes_are_written():
    config = model_config_from_hf(SDAR_4B).replace(block_size=8, tie_embeddings=True)
    expected = SDAR_4B | {"block_size": 8, "tie_word_embeddings": True}
    assert hf_config_from_model(config, SDAR_4B) == expected


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_new_config_reads_back(preset):
    assert model_config_from_hf(json.loads(json.dumps(hf_config_from_model(PRESETS[preset])))) == PRESETS[preset]


# --- files ------------------------------------------------------------------------------------------------------------


def test_bad_folders(tmp_path):
    with pytest.raises(CheckpointError, match=r"not a folder.*: hf download OWNER/NAME"):
        read_model_config(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(CheckpointError, match=r"config\.json: not readable as JSON"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json: holds a list"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"name": "demo"}')
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match=r"a run folder, not a model folder; give .*/hf"):
        read_model_config(tmp_path)
