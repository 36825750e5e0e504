"""Reward models of Hugging Face: their folders, their scores against plain numpy, batches, meshes, failures."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from reward_model_utils import CONFIGS, SIZES, make_folder
from safetensors.numpy import load_file
from tokenizer_utils import build_byte_tokenizer

from tracerl_jax.config_rewards import RewardModelSection
from tracerl_jax.errors import CheckpointError, ConfigError
from tracerl_jax.interop.hf_reward import load_reward_model, reward_config_from_hf
from tracerl_jax.parallel.mesh import make_mesh
from tracerl_jax.rewards import check_row, score, settings, start_rewards
from tracerl_jax.rewards.scorer import Scorer, last_token


def reference_score(config: dict, weights: dict[str, np.ndarray], ids: list[int], last: int) -> float:
    """The forward of `*ForSequenceClassification` in float64, one token's logit."""
    w = {name: weight.astype(np.float64) for name, weight in weights.items()}
    T, H, K = len(ids), config["num_attention_heads"], config["num_key_value_heads"]
    D = config.get("head_dim", config["hidden_size"] // H)
    theta = config.get("rope_parameters", config).get("rope_theta", 10000.0)
    angle = np.arange(T)[:, None] * theta ** -(np.arange(0, D, 2) / D)
    cos, sin = (np.concatenate([f(angle)] * 2, -1)[:, None] for f in (np.cos, np.sin))

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weight

    def rotate(x):
        return x * cos + np.concatenate([-x[..., D // 2 :], x[..., : D // 2]], -1) * sin

    x = w["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        h = norm(x, w[p + "input_layernorm.weight"])
        q, k, v = (
            (h @ w[f"{p}self_attn.{n}_proj.weight"].T + w.get(f"{p}self_attn.{n}_proj.bias", 0)).reshape(T, -1, D)
            for n in "qkv"
        )
        if p + "self_attn.q_norm.weight" in w:
            q, k = norm(q, w[p + "self_attn.q_norm.weight"]), norm(k, w[p + "self_attn.k_norm.weight"])
        q, k, v = rotate(q), np.repeat(rotate(k), H // K, 1), np.repeat(v, H // K, 1)
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(D)
        scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hts,shd->thd", scores / scores.sum(-1, keepdims=True), v).reshape(T, -1)
        x = x + mixed @ w[p + "self_attn.o_proj.weight"].T
        h = norm(x, w[p + "post_attention_layernorm.weight"])
        gate = h @ w[p + "mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w[p + "mlp.up_proj.weight"].T)) @ w[p + "mlp.down_proj.weight"].T
    return float(norm(x, w["model.norm.weight"])[last] @ w["score.weight"][0])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("reward models")
    return {family: make_folder(root / family, family) for family in CONFIGS}


FLOAT32 = {"dtype": "float32", "tokens_per_device": 256}

CHATS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in [("1+1=", "2"), ("Why?", "Because. " * 9), ("", ""), ("1+1=", "3"), ("é", "ü" * 40)]
]


def expected_scores(folder: Path, chats) -> list[float]:
    config, scores = json.loads((folder / "config.json").read_text()), []
    weights = load_file(folder / "model.safetensors")
    for chat in chats:
        text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in chat)
        text += "<|im_start|>assistant"  # this template always adds it
        ids = build_byte_tokenizer()(text, add_special_tokens=False)["input_ids"]
        scores.append(reference_score(config, weights, ids, len(ids) - 1))
    return scores


def scorer_of(folder: Path, mesh=None, **keys) -> Scorer:
    """Few tokens a batch: its rows are all computed, also those without a chat."""
    return Scorer(RewardModelSection(**FLOAT32 | {"path": str(folder)} | keys), mesh)


def values(verdicts) -> list[float]:
    return [verdict.reward for verdict in verdicts]


@pytest.mark.parametrize("family", CONFIGS)
def test_scores_are_those_of_the_published_arithmetic(folders, family):
    got, expected = values(scorer_of(folders[family]).score(CHATS)), expected_scores(folders[family], CHATS)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert np.std(expected) > 0.1


def test_bfloat16_is_near(folders):
    exact, near = expected_scores(folders["qwen3"], CHATS), scorer_of(folders["qwen3"], dtype="bfloat16").score(CHATS)
    np.testing.assert_allclose(values(near), exact, atol=0.2 * np.std(exact))


def test_a_score_does_not_depend_on_its_batch(folders):
    scorer = scorer_of(folders["qwen2"])
    alone = [values(scorer.score([chat]))[0] for chat in CHATS]
    np.testing.assert_allclose(values(scorer.score(CHATS * 2)), alone * 2, rtol=1e-5, atol=1e-5)
    longer_rows = scorer_of(folders["qwen2"], max_tokens=116)  # the longest chat; rows of 116 and 64 tokens
    np.testing.assert_allclose(values(longer_rows.score(CHATS)), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(2, 2, 2), pytest.param((1, 4, 2), marks=pytest.mark.slow)])
def test_a_mesh_gives_the_scores_of_one_device(folders, sizes):
    one, split = scorer_of(folders["llama"]), scorer_of(folders["llama"], make_mesh(*sizes))
    np.testing.assert_allclose(values(split.score(CHATS)), values(one.score(CHATS)), rtol=1e-4, atol=1e-4)
    assert one.memory().split()[0] == split.memory().split()[0]  # as many parameters, in parts

    def held(scorer):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(scorer.params))

    assert held(split) < held(one) / (sizes[1] * sizes[2]) * 1.1


@pytest.mark.parametrize(
    ("ids", "pad", "last"),
    [([5, 6, 7], 0, 2), ([5, 6, 0], 0, 1), ([0, 5, 0, 0], 0, 1), ([5, 0], None, 1), ([0, 0], 0, 0)],
)
def test_the_token_that_is_scored(ids, pad, last):
    assert last_token(ids, pad) == last


def test_too_long_a_chat_and_scores_that_are_not_finite_have_no_verdict(folders, tmp_path):
    verdicts = scorer_of(folders["qwen2"], max_tokens=64).score(CHATS)
    assert [verdict.reward is None for verdict in verdicts] == [False, True, False, False, True]
    assert "reward.model.max_tokens=64" in verdicts[1].detail
    huge = {"score.weight": np.full((1, 32), 3e38, np.float32)}
    assert values(scorer_of(make_folder(tmp_path / "m", "qwen2", tensors=huge)).score(CHATS[:1])) == [None]


# As a reward


def test_as_a_reward(configure, folders, caplog):
    configure(model=FLOAT32 | {"path": str(folders["qwen3"]), "max_tokens": 64})
    with caplog.at_level("INFO"):
        start_rewards(["reward_model"])
    assert "parameters take" in caplog.text
    rows = [{"question": "1+1="}, {"question": "Why?"}, {"question": None}, {"question": "1+1="}]
    result = score({"reward_model": 2.0}, ["p"] * 4, ["2", "Because. " * 9, "?", "3"], rows)
    expected = expected_scores(folders["qwen3"], [CHATS[0], CHATS[3]])
    np.testing.assert_allclose(result.total[[0, 3]], 2 * np.array(expected), rtol=1e-4, atol=1e-4)
    assert np.isnan(result.total[[1, 2]]).all() and result.no_verdict == 2
    assert "no score for 1 of 4 completions: missing field 'question'" in caplog.text
    assert check_row("reward_model", {"question": None}) == "missing field 'question', which reward.model.prompt names"


def test_another_folder_and_the_mesh_of_a_run(configure, folders):
    configure(model=FLOAT32 | {"path": str(folders["qwen2"]), "prompt": "{prompt}"})
    first = score({"reward_model": 1.0}, ["1+1="], ["2"], [{}]).total
    configure(model=FLOAT32 | {"path": str(folders["llama"]), "prompt": "{prompt}"})
    second = score({"reward_model": 1.0}, ["1+1="], ["2"], [{}]).total
    settings.configure(settings.current(), make_mesh(2, 2, 2))
    on_mesh = score({"reward_model": 1.0}, ["1+1="], ["2"], [{}]).total
    np.testing.assert_allclose(first, expected_scores(folders["qwen2"], CHATS[:1]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(second, expected_scores(folders["llama"], CHATS[:1]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(on_mesh, second, rtol=1e-4, atol=1e-4)


# Folders


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("qwen2", {"architectures": ["Qwen2ForCausalLM"]}, "architectures is .*must be .ForSequenceClassification"),
        ("qwen2", {"architectures": None}, "not a reward model"),
        ("qwen2", {"model_type": "gemma2"}, "model_type is 'gemma2': only reward models of qwen2, qwen3, llama"),
        ("qwen2", {"id2label": {"0": "good", "1": "bad"}}, "one label"),
        ("llama", {"num_labels": 3}, "one label"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling is .*plain rotary"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters is .*plain rotary"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64}, "only full attention"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "only full attention"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("qwen2", {"num_attention_heads": 3}, "num_heads"),
    ],
)
def test_configs_that_cannot_be_read_name_their_key(family, config, message):
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        reward_config_from_hf(SIZES | CONFIGS[family] | {"model_type": family} | config)


def test_a_key_that_is_missing():
    config = {**SIZES, **CONFIGS["llama"], "model_type": "llama"}
    del config["hidden_size"]
    with pytest.raises(CheckpointError, match="the key 'hidden_size' is missing"):
        reward_config_from_hf(config)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"score.weight": None}, r"missing: score\.weight"),
        ({"score.weight": np.zeros((2, 32), np.float32)}, r"misshapen: score\.weight is \[2, 32\]"),
        ({"score.bias": np.zeros(1, np.float32)}, r"not known: score\.bias"),
        ({"model.norm.weight": np.full(32, np.nan, np.float32)}, "NaN or infinite"),
    ],
)
def test_weights_that_are_no_reward_model(tmp_path, tensors, message):
    folder = make_folder(tmp_path / "m", "qwen3", tokenizer=False, tensors=tensors)
    with pytest.raises(CheckpointError, match=message):
        load_reward_model(folder, dtype="float32")


def test_what_is_missing_is_said_at_the_start(configure, tmp_path):
    with pytest.raises(ConfigError, match=r"needs reward\.model\.path"):
        start_rewards(["reward_model"])
    folder = make_folder(tmp_path / "m", "qwen2", tokenizer=False)
    configure(model={"path": str(folder)})
    with pytest.raises(ConfigError, match="the folder has no tokenizer"):
        start_rewards(["reward_model"])
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match="the folder has no chat template"):
        start_rewards(["reward_model"])
    configure(model={"path": str(tmp_path / "nowhere")})
    with pytest.raises((ConfigError, CheckpointError), match="nowhere"):
        start_rewards(["reward_model"])
