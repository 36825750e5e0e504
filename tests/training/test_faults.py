"""Whole runs with something wrong: configs, rows, model folders, numbers, disks. Each says what; none does damage."""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_runs import FULL, assert_same_run, config_file, metric_rows, saved_state, tiny

from tracerl_jax.data.char_tokenizer import build_char_tokenizer
from tracerl_jax.errors import CheckpointError, ConfigError, DataError
from tracerl_jax.launch.cli import main
from tracerl_jax.report.run_dir import intact_rows, read_json
from tracerl_jax.training import run as run_module
from tracerl_jax.training.checkpoint import Checkpointer
from tracerl_jax.training.pipeline import train
from tracerl_jax.training.run import Run

pytestmark = pytest.mark.usefixtures("quick")

# Configs


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}


def test_another_config_is_refused_with_a_diff_and_nothing_is_touched(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    before = contents(tmp_path)
    config = config_file(tmp_path / "config.py", **FULL)
    before |= contents(tmp_path)
    status = main(["rl", "--config", config, "--config.seed=1", "--config.rl.optimizer.learning_rate=0.5"])
    message = capsys.readouterr().err
    assert status == 2 and "Traceback" not in message
    assert "seed: 0 -> 1" in message and "rl.optimizer.learning_rate: 0.01 -> 0.5" in message
    assert "--config.name=" in message
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.rl.stepz=3", "did you mean --config.rl.steps"),
        ("--config.rl.steps=three", "rl.steps"),
        ("--config.rl.method=grpo", "tracerl"),
        ("--config.rl.shrink=2", "set rl.old_logprobs=recompute"),
        ("--config.rl.block_size=8", "set rl.old_logprobs=recompute"),  # the model's is 4
        (
            "--config.rl.method=coupled --config.rl.old_logprobs=recompute --config.rl.importance_sampling=token",
            "rl.method=coupled scores other states",
        ),
        ("--config.rl.importance_sampling=token --config.rl.importance_cap=0", "rl.importance_cap is 0.0"),
        ("--config.rl.importance_sampling=token --config.rollout.temperature=0", "set a temperature above 0"),
        (
            "--config.rl.overlap=one_step_off --config.rl.importance_sampling=sequence",
            "set rl.old_logprobs=recompute (or rl.importance_sampling=none",
        ),
        ("--config.rl.clip_low=-1", "rl.clip_low is -1.0, must not be negative"),
        ("--config.sft.log_every=0", "sft.log_every is 0, must be at least 1"),
        ("--config.seed=-1", "seed is -1"),
        ("--config.mesh.tensor=0", "mesh.tensor is 0"),
        ("--config.eval.limit=0", "eval.limit is 0, must be at least 1"),
        ("--config.task.train_limit=-3", "task.train_limit is -3, must be at least 1"),
        ("--config.sft.optimizer.weight_decay=-1", "weight_decay is -1.0, must not be negative"),
        ("--config.name=", "name is '', must be the name of a folder"),
        ("--config.rollout.max_tokens=40000", "position 40004, but the model ends at 32768"),
        ("--config.rollout.strategy=dinamic", "rollout: "),
        ("--config.rollout.top_p=2", "rollout: top_p is 2.0"),
        ("--config.eval.strategies=fast", "eval: unknown evaluation strategy 'fast'"),
        ("--config.model.preset=sdar_tinny", "unknown model.preset 'sdar_tinny'"),
        ("--config.task.name=arithmetics", "did you mean 'arithmetic'"),
        ("--config.task.rewards.tiny_hihg=1.0", "did you mean 'tiny_high'"),
        ("--config.mesh.fsdp=3", "mesh"),
        ("--config.rl.steps=0 --config.sft.steps=0", "nothing to do"),
    ],
)
def test_a_wrong_key_or_value_is_named_and_may_be_mended_under_the_same_name(tmp_path, capsys, flag, message):
    config = config_file(tmp_path / "config.py")
    assert main(["rl", "--config", config, *flag.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    with Run(tiny(tmp_path)):  # the folder was not tied to the wrong config
        pass


def test_a_key_that_came_after_the_run_has_its_default(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    stored = json.loads(path.read_text())
    del stored["rollout"]["temperature"], stored["checkpoint"]
    path.write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"rollout\.temperature: 1\.0 -> 0\.5"):
        Run(tiny(tmp_path, **FULL, rollout__temperature=0.5))
    with Run(tiny(tmp_path, **FULL)):
        pass
    assert json.loads(path.read_text())["rollout"]["temperature"] == 1.0


# Rows


def row_file(tmp_path, *lines) -> str:
    good = [{"question": f"{n}+1=", "ground_truth_answer": str(n + 1)} for n in range(1, 4)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{line}\n" for line in [*map(json.dumps, good[:2]), *lines, json.dumps(good[2])]))
    return str(path)


BAD_LINES = {
    "not_json": ("{", "JSON"),
    "not_an_object": ("[1]", "object"),
    "blank": ("", "blank"),
    "no_answer": ('{"question": "1+1="}', "ground_truth_answer"),
    "no_question": ('{"ground_truth_answer": "2"}', "question"),
    "too_long": ('{"question": "1+1+1+1+1+1+1=", "ground_truth_answer": "7"}', "14 tokens, the limit is 8"),
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
@pytest.mark.parametrize("role", ["path", "eval_path"])
def test_a_bad_row_is_named_before_anything_is_trained_or_skipped_and_counted(tmp_path, caplog, role, line):
    text, reason = line
    rows = row_file(tmp_path, text)
    (tmp_path / "other").mkdir()
    files = {"path": row_file(tmp_path / "other"), "eval_path": row_file(tmp_path / "other"), role: rows}
    tokenizer = tmp_path / "tokenizer"
    build_char_tokenizer(tokenizer)
    task = {"name": "gsm8k", "template": "plain", "max_prompt_tokens": 8, "options": {}, "rewards": {}, **files}
    changes = {f"task__{key}": value for key, value in task.items()} | {"model__tokenizer": str(tokenizer)}
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: .*{reason}"):
        Run(tiny(tmp_path, **changes))
    with Run(tiny(tmp_path, **changes, task__on_bad_row="skip")) as run:
        assert len(run.train_problems) == len(run.test_problems) == 3
    assert "skipped 1 bad rows, kept 3" in caplog.text and "rows.jsonl:3" in caplog.text


# Model folders


def model_folder(whole: Path, target: Path, tensors=None, **config) -> str:
    """A copy of the exported model with other weights or another config."""
    shutil.copytree(whole / "hf", target)
    weights = load_file(target / "model.safetensors")
    save_file(weights | (tensors(weights) if tensors else {}), target / "model.safetensors", {"format": "pt"})
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return str(target)


def from_folder(runs_dir: Path, folder: str, **changes):
    return tiny(runs_dir, **{"model__preset": None, "model__path": folder} | changes)


def test_another_architecture_is_refused(whole, tmp_path):
    folder = model_folder(whole, tmp_path / "model", model_type="llama")
    with pytest.raises(CheckpointError, match=r"config\.json: model_type 'llama' is not supported"):
        train(from_folder(tmp_path, folder))


def test_weights_that_do_not_fit_the_config_are_named(whole, tmp_path):
    folder = model_folder(whole, tmp_path / "model", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.self_attn"):
        train(from_folder(tmp_path, folder))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(whole, tmp_path, value):
    def spoil(weights):
        tensor = weights["model.layers.1.mlp.up_proj.weight"].copy()
        tensor[3, 1] = value
        return {"model.layers.1.mlp.up_proj.weight": tensor}

    folder = model_folder(whole, tmp_path / "model", spoil)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        train(from_folder(tmp_path, folder))
    assert read_json(tmp_path / "run" / "summary.json")["status"] == "failed"


def test_a_run_that_failed_before_its_first_row_may_be_mended_under_the_same_name(whole, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+1=", "response": "2"}\n{"prompt": "1+2="}\n')
    config = config_file(tmp_path / "config.py", sft__path=str(rows), sft__steps=1, rl__steps=0, eval__strategies=[])
    command = ["sft", "--config", config, f"--config.model.path={tmp_path / 'model'}", "--config.model.preset=none"]
    command += ["--profile", "1:1"]
    model_folder(whole, tmp_path / "model", num_hidden_layers=3)
    assert main(command) == 2
    assert "rows.jsonl:2: missing field 'response'" in capsys.readouterr().err  # named before the weights are read
    rows.write_text('{"prompt": "1+1=", "response": "2"}\n')
    assert main(command) == 2
    assert "model.layers.2" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "model")
    model_folder(whole, tmp_path / "model")
    assert main([*command, "--config.seed=7"]) == 0
    assert read_json(tmp_path / "run" / "config.json")["seed"] == 7
    assert len(list((tmp_path / "run" / "profile").glob("**/*.xplane.pb"))) == 1
    assert main(command) == 2
    assert "seed: 7 -> 0" in capsys.readouterr().err  # from now on it is held to its config


def test_a_tokenizer_without_mask_token_is_refused(whole, tmp_path):
    tokenizer = build_char_tokenizer(tmp_path / "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = tmp_path / "tokenizer" / name
        path.write_text(path.read_text().replace("<mask>", "<nothing>").replace('"mask_token"', '"other_token"'))
    with pytest.raises(ConfigError, match="tokenizer: a tokenizer with a mask token"):
        train(tiny(tmp_path, model__tokenizer=str(tmp_path / "tokenizer")))
    folder = model_folder(whole, tmp_path / "model")
    with pytest.raises(ConfigError, match=f"has no mask token, the model's mask id is {tokenizer.mask_token_id}"):
        train(from_folder(tmp_path, folder, model__tokenizer=str(tmp_path / "tokenizer")))


def test_a_model_folder_without_tokenizer_cannot_be_trained(whole, tmp_path):
    folder = model_folder(whole, tmp_path / "model")
    for path in Path(folder).glob("*token*"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"set model\.tokenizer"):
        train(from_folder(tmp_path, folder))


# Numbers


def huge_head(weights):
    return {"lm_head.weight": np.full_like(weights["lm_head.weight"], 3e38)}


def test_sft_updates_that_are_not_finite_change_nothing_and_are_counted(whole, tmp_path, capsys):
    folder = model_folder(whole, tmp_path / "model", huge_head)
    changes = {"model__preset": None, "model__path": folder, "eval__strategies": []}
    config = config_file(tmp_path / "config.py", **changes)
    run = tmp_path / "run"
    assert main(["sft", "--config", config, "--config.rl.max_skipped_updates=3"]) == 2
    error = capsys.readouterr().err
    evidence = run / "nonfinite-sft-update-3-policy.npz"
    assert "sft update 3, policy: 3 updates in a row had a loss, a gradient or samples that are not finite" in error
    assert str(evidence) in error and "tracerl convert --from" in error
    assert {"rows.source_ids", "rows.segments.column", "rows.target_weight"} <= set(np.load(evidence))
    assert main(["sft", "--config", config, "--config.rl.max_skipped_updates=9"]) == 0
    rows = metric_rows(run)
    assert [(row["sft/skipped"], row["sft/loss"]) for row in rows] == [(1, None), (2, None), (3, None), (4, None)]
    leaves, position = saved_state(run)
    assert position["skipped_in_a_row"] == {"policy": 4}  # two of them from the checkpoint it went on from
    assert leaves["train['updates']"] == 0
    assert all(not leaf.any() for name, leaf in leaves.items() if "mu" in name or "nu" in name)
    weights, exported = load_file(Path(folder) / "model.safetensors"), load_file(run / "hf" / "model.safetensors")
    assert all(np.array_equal(exported[name], weight) for name, weight in weights.items())


def huge_value_head(weights):
    return {"value_head.weight": np.full((1, weights["model.norm.weight"].size), 1e30, np.float32)}


def test_rl_updates_that_are_not_finite_change_nothing_and_end_the_run_with_the_evidence(whole, tmp_path, capsys):
    """The value loss overflows, and the policy's with its advantages. Each step has four updates."""
    folder = model_folder(whole, tmp_path / "model")
    value = model_folder(whole, tmp_path / "value", huge_value_head)
    changes = FULL | {
        "model__preset": None, "model__path": folder, "value__path": value, "eval__strategies": [],
        "sft__steps": 0, "rl__steps": 3, "checkpoint__every": 1,
    }  # fmt: skip
    config = config_file(tmp_path / "config.py", **changes)
    run = tmp_path / "run"
    assert main(["rl", "--config", config, "--config.rl.max_skipped_updates=6"]) == 2
    assert "rl step 2, value: 6 updates in a row" in capsys.readouterr().err
    assert saved_state(run)[1]["skipped_in_a_row"] == {"policy": 4, "value": 4}
    assert {"rows.source_ids", "old_values", "returns"} <= set(np.load(run / "nonfinite-rl-step-2-value.npz"))
    assert main(["rl", "--config", config, "--config.rl.max_skipped_updates=99"]) == 0
    assert [row["updates/skipped"] for row in metric_rows(run)] == [8, 8, 8]
    weights, exported = load_file(Path(folder) / "model.safetensors"), load_file(run / "hf" / "model.safetensors")
    assert all(np.array_equal(exported[name], weight) for name, weight in weights.items())


def test_a_policy_that_only_gives_nan_ends_the_run_though_no_group_is_usable(whole, tmp_path, capsys):
    """Nothing is learnt from its samples, so no update sees a loss that is not finite."""
    folder = model_folder(whole, tmp_path / "model", huge_head)
    changes = {"model__preset": None, "model__path": folder, "eval__strategies": [], "sft__steps": 0, "rl__steps": 9}
    config = config_file(tmp_path / "config.py", **changes)
    command = ["rl", "--config", config, "--config.task.rewards={'tiny_flat': 1.0}"]
    assert main([*command, "--config.rl.max_skipped_updates=2"]) == 2
    error = capsys.readouterr().err
    evidence = tmp_path / "run" / "nonfinite-rl-step-2-rollout.npz"
    assert "rl step 2, rollout: 2 updates in a row" in error and str(evidence) in error
    assert not np.isfinite(np.load(evidence)["0.logprobs"]).all()


ONE_STEP = FULL | {"sft__steps": 0, "rl__steps": 1, "eval__strategies": []}


def test_a_step_without_usable_group_is_skipped_and_said(tmp_path, caplog):
    train(tiny(tmp_path, **ONE_STEP, task__rewards={"tiny_flat": 1.0}))
    assert "rl step 1: no usable group" in caplog.text and "needs rl.accuracy_low=0.0" in caplog.text
    (row,) = metric_rows(tmp_path / "run")
    assert row["updates/skipped"] == 1 and row["groups/kept_fraction"] == 0 and row["reward"] == 1
    assert saved_state(tmp_path / "run")[0]["train['policy']['updates']"] == 0


def test_samples_without_verdict_are_masked_and_counted(tmp_path):
    train(tiny(tmp_path, **ONE_STEP, task__rewards={"tiny_shy": 1.0}, report__samples_per_step=8))
    (row,) = metric_rows(tmp_path / "run")
    samples = list(intact_rows(tmp_path / "run" / "samples.jsonl"))
    silent = [sample for sample in samples if "7" in sample["text"]]
    assert 0 < len(silent) == row["no_verdict"] < 8
    assert all(sample["reward"] is None for sample in silent)
    assert all(sample["reward"] is not None for sample in samples if sample not in silent)
    assert row["reward"] == pytest.approx(np.mean([s["reward"] for s in samples if s not in silent]))
    assert row["updates/skipped"] == 0 and row["policy/grad_norm"] > 0


# Disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder: Path) -> Path:
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return filler


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of writes that Orbax gave up
@pytest.mark.parametrize("save", [pytest.param(2, marks=pytest.mark.slow), 4], ids=["sft", "rl"])
def test_a_disk_that_fills_up_while_saving_is_said_and_the_run_goes_on_later(
    whole, small_disk, capsys, monkeypatch, tmp_path, save
):
    original, calls = Checkpointer.save, []

    def save_on_a_full_disk(*args):
        calls.append(args)
        if len(calls) == save:
            fill(small_disk)
        original(*args)

    config = config_file(tmp_path / "config.py", **FULL)
    command = ["rl", "--config", config, f"--config.runs_dir={small_disk}"]
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", save_on_a_full_disk)
        assert main(command) == 2
    error = capsys.readouterr().err
    assert "disk" in error and "full" in error and "free some space" in error and "Traceback" not in error
    os.unlink(small_disk / "filler")
    assert main(command) == 0
    assert_same_run(small_disk / "run", whole)


def test_a_tokenizer_that_fails_costs_the_verdict_of_its_sample(tmp_path, monkeypatch, caplog):
    original, calls = run_module.decode, []

    def decode(tokenizer, ids):
        calls.append(len(ids))
        if len(calls) in (2, 12):  # 4 of the evaluation before, 8 of the rollout
            raise OverflowError("this id is too large")
        return original(tokenizer, ids)

    monkeypatch.setattr(run_module, "decode", decode)
    train(tiny(tmp_path, sft__steps=0, rl__steps=1, eval__every=0, report__samples_per_step=8))
    assert caplog.text.count("the tokenizer failed on 1 of") == 2 and "this id is too large" in caplog.text
    assert len(list(intact_rows(tmp_path / "run" / "samples.jsonl"))) == 7
    results = read_json(tmp_path / "run" / "summary.json")["eval"]
    assert [results[role]["dynamic"]["no_verdict"] for role in ("before", "after")] == [1, 0]
