"""Whole runs: what they leave behind, going on after every kind of stop, and the variants of the method."""

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_runs
from tiny_runs import FULL, assert_same_run, config_file, metric_rows, run_and_die, saved_state, tiny

from tracerl_jax.errors import ConfigError, UserError
from tracerl_jax.interop.hf_load import load_hf, stored_dtype
from tracerl_jax.interop.hf_save import save_hf
from tracerl_jax.interop.names import leaves_by_path
from tracerl_jax.interop.native import load_run
from tracerl_jax.launch.cli import main
from tracerl_jax.parallel import watchdog
from tracerl_jax.report.run_dir import intact_rows, read_json
from tracerl_jax.rollout import stream
from tracerl_jax.training import run as run_module
from tracerl_jax.training.pipeline import train

pytestmark = pytest.mark.usefixtures("quick")


def test_what_a_run_leaves(whole):
    summary = read_json(whole / "summary.json")
    assert summary["status"] == "finished"
    assert summary["eval"].keys() == {"before", "after"}
    for results in summary["eval"].values():
        assert results.keys() == {"dynamic"}
        assert {"accuracy", "tokens_per_step", "n"} <= results["dynamic"].keys()
        assert results["dynamic"]["n"] == 4
    assert [(row["phase"], row["step"]) for row in metric_rows(whole)] == [
        *(("sft", step) for step in (1, 2, 3, 4)), ("eval", 0),
        ("rl", 1), ("rl", 2), ("eval", 2), ("rl", 3), ("rl", 4), ("eval", 4), ("rl", 5), ("rl", 6), ("eval", 6),
    ]  # fmt: skip
    samples = list(intact_rows(whole / "samples.jsonl"))
    assert [row["step"] for row in samples] == sorted([1, 2, 3, 4, 5, 6] * 3)
    assert "<html" in (whole / "report.html").read_text()


def test_the_first_wait_for_other_processes_has_a_limit_of_time(tmp_path, monkeypatch):
    """Where a network is wrong, devices hang when they talk to each other for the first time."""
    phases, met = [], []

    @contextlib.contextmanager
    def phase(name):
        phases.append(name)
        yield
        phases.remove(name)

    def connect(mesh):
        met.append(list(phases))
        raise UserError("enough")

    monkeypatch.setattr(watchdog, "phase", phase)
    monkeypatch.setattr(run_module, "connect", connect)
    with pytest.raises(UserError, match="enough"):
        train(tiny(tmp_path))
    assert met == [["start"]]


def test_a_limit_for_a_phase_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"names rolout, which is no phase; there are between, start, export, save"):
        train(tiny(tmp_path, faults__phase_timeout={"start": 60.0, "rolout": 900.0}))


def test_every_step_of_it_updates_both_models(whole):
    rows = [row for row in metric_rows(whole) if row["phase"] == "rl"]
    assert all(row["updates/skipped"] == 0 and row["policy/grad_norm"] > 0 for row in rows)
    assert all(row["value/grad_norm"] > 0 for row in rows)
    assert rows[-1]["policy/kl_reference"] > rows[0]["policy/kl_reference"]  # the policy has left it
    leaves, position = saved_state(whole)
    assert leaves["train['policy']['updates']"] == leaves["train['value']['updates']"] == 6 * 4
    assert position["data"] == {"epoch": 0, "position": 12, "seed": 0}


def test_every_row_says_how_fast_it_was(whole):
    rows = list(intact_rows(whole / "metrics.jsonl"))
    phases = {"rollout", "values", "update_value", "update_policy", "total"}
    for row in rows:
        speeds = {name.split("/")[1] for name in row if name.startswith("chips/") and row[name] > 0}
        assert speeds == {"rl": phases | {"replay"}, "sft": {"total"}, "eval": set()}[row["phase"]]
        assert not any(name.startswith("hosts/") for name in row)
        if jax.default_backend() == "cpu":
            assert not any("mfu" in name or "hbm" in name for name in row)
    row = [row for row in rows if row["phase"] == "sft"][-1]
    assert row["sft/tokens_per_second"] == pytest.approx(row["chips/total/tokens_per_second"])
    assert row["seconds/total"] >= row["seconds/pack"] + row["seconds/update"]


def test_the_exported_folder_is_the_last_checkpoint(whole, tmp_path):
    model, params = load_run(whole)
    for folder in (whole / "hf", tmp_path / "converted"):
        if not folder.exists():
            assert main(["convert", "--from", str(whole), "--to", str(folder), "--check"]) == 0
        exported, loaded = load_hf(folder)
        assert exported.config == model.config
        for (name, leaf), (_, expected) in zip(
            sorted(leaves_by_path(loaded).items()), sorted(leaves_by_path(params).items()), strict=True
        ):
            assert np.array_equal(leaf, expected), name


def test_the_exported_dtype_is_that_of_the_folder_the_run_started_from(whole, tmp_path):
    model, params = load_hf(whole / "hf")
    save_hf(tmp_path / "start", model, params, source=whole / "hf", dtype="bfloat16")
    config = tiny(tmp_path, model__preset=None, model__path=str(tmp_path / "start"))
    with run_module.Run(config) as run:
        shutil.rmtree(tmp_path / "start")  # no longer needed
        assert stored_dtype(run.export(params)) == "bfloat16"


def interrupt(monkeypatch, number: int, trace: int) -> None:
    """Send ourselves a signal when trace number `trace` from now on comes out of a rollout or an evaluation."""
    original, seen = stream.step, []

    def step(engine, running):
        finished = original(engine, running)
        before = len(seen)
        seen.extend(finished)
        if before < trace <= len(seen):
            os.kill(os.getpid(), number)
        return finished

    monkeypatch.setattr(stream, "step", step)


def interrupt_sft(monkeypatch, number: int, update: int) -> None:
    from tracerl_jax.sft import loop

    original = loop.make_items

    def make_items(*args, **kwargs):
        if kwargs["update"] == update:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "make_items", make_items)


def interrupt_update(monkeypatch, number: int, update: int) -> None:
    from tracerl_jax.rl.update import Learner

    original, seen = Learner.update_policy, []

    def update_policy(*args):
        seen.append(args)
        if len(seen) == update:
            os.kill(os.getpid(), number)
        return original(*args)

    monkeypatch.setattr(Learner, "update_policy", update_policy)


def test_signals_save_and_the_same_command_goes_on_to_the_same_bits(whole, tmp_path, capsys):
    """Stops in the warm-up, in the evaluation at its end, in two rollouts and in the evaluation between them; in a step
    whose start is saved, which is given up, and in one whose start is not."""
    config = config_file(tmp_path / "config.py", **FULL)
    command = ["rl", "--config", config, "--config.name=stopped run"]
    run = tmp_path / "stopped run"
    # traces of a step: 8; of an evaluation: 4; policy updates of a step: 4
    stops = [
        (lambda p: interrupt_sft(p, signal.SIGTERM, 3), {"phase": "sft", "sft_step": 3, "rl_step": 0}),
        (lambda p: interrupt(p, signal.SIGINT, 2), {"phase": "sft", "sft_step": 4, "rl_step": 0}),
        (lambda p: interrupt(p, signal.SIGINT, 4 + 8 + 1), {"phase": "rl", "sft_step": 4, "rl_step": 1}),
        (lambda p: interrupt(p, signal.SIGTERM, 8 + 2), {"phase": "rl", "sft_step": 4, "rl_step": 2}),
        (lambda p: interrupt(p, signal.SIGINT, 4 + 8 + 1), {"phase": "rl", "sft_step": 4, "rl_step": 3}),
        (lambda p: interrupt_update(p, signal.SIGTERM, 2), {"phase": "rl", "sft_step": 4, "rl_step": 3}),
        (lambda p: interrupt_update(p, signal.SIGTERM, 2 * 4 + 2), {"phase": "rl", "sft_step": 4, "rl_step": 6}),
    ]
    for prepare, expected in stops:
        with pytest.MonkeyPatch.context() as patch:
            prepare(patch)
            assert main(command) == 130
        assert saved_state(run)[1].items() >= expected.items()
        assert read_json(run / "summary.json")["status"] == "interrupted"
        assert f"tracerl rl --config {config} '--config.name=stopped run'" in capsys.readouterr().err
    assert main(command) == 0
    assert_same_run(run, whole)


def test_killed_at_several_moments_a_run_ends_with_the_same_bits(whole, compiled, tmp_path):
    """While a checkpoint of the warm-up is written; between two updates of RL, before its first checkpoint."""
    for moment in (
        "tracerl_jax.training.checkpoint:Checkpointer.save:1",
        "tracerl_jax.rl.update:Learner.update_policy:6",
    ):
        assert run_and_die(tmp_path, compiled, moment, **FULL)
    assert read_json(tmp_path / "run" / "summary.json")["status"] == "running"
    train(tiny(tmp_path, **FULL))
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_with_the_same_bits(whole, compiled, tmp_path):
    delays = np.random.default_rng(0).uniform(4, 20, size=15)
    killed = [run_and_die(tmp_path, compiled, f"{delay}", **FULL) for delay in delays]
    assert sum(killed) >= 5
    train(tiny(tmp_path, **FULL))
    assert_same_run(tmp_path / "run", whole)


def copy_of(run: Path, tmp_path: Path) -> Path:
    """What is left of a run that was killed before it wrote its results."""
    copy = tmp_path / run.name
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("hf", "report.html"))
    return copy


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_gives_the_same_bits(whole, tmp_path, caplog):
    run = copy_of(whole, tmp_path)
    newest = tiny_runs.newest_checkpoint(run)
    biggest = max((run / "checkpoints" / str(newest)).rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    biggest.write_bytes(biggest.read_bytes()[:-7])
    train(tiny(tmp_path, **FULL))
    assert f"checkpoint {run.absolute() / 'checkpoints' / str(newest)} is damaged" in caplog.text
    assert (run / f"damaged-checkpoint-{newest}").is_dir()
    assert_same_run(run, whole)


def test_more_steps_continue_a_finished_run(whole, tmp_path):
    """Three steps, then six: the same as six at once, but for the evaluation after the third. The profile of some of
    them changes nothing."""
    train(tiny(tmp_path, **FULL, rl__steps=3))
    assert read_json(tmp_path / "run" / "summary.json")["eval"].keys() == {"before", "after"}
    train(tiny(tmp_path, **FULL, report__profile="5:2"))
    assert len(list((tmp_path / "run" / "profile").glob("**/*.xplane.pb"))) == 1
    path = tmp_path / "run" / "metrics.jsonl"
    rows = [row for row in intact_rows(path) if (row["phase"], row["step"]) != ("eval", 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert_same_run(tmp_path / "run", whole)


def test_a_finished_run_only_tells_its_results(whole, tmp_path, monkeypatch):
    run = copy_of(whole, tmp_path)
    # Nothing can be decoded, so nothing is evaluated or trained.
    monkeypatch.setattr(stream, "step", None)
    train(tiny(tmp_path, **FULL))
    assert_same_run(run, whole)


SHARED = FULL | {
    "sft__steps": 0, "rl__steps": 2, "value__shared_trunk": True, "value__whiten": True,
    "rl__advantage": "leave_one_out", "rl__old_logprobs": "recompute", "checkpoint__every": 1, "eval__every": 0,
}  # fmt: skip


@pytest.mark.slow
def test_shared_trunk_without_warm_up_goes_on_to_the_same_bits(tmp_path):
    train(tiny(tmp_path, **SHARED, name="whole"))
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, signal.SIGINT, 4 + 8 + 1)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(tmp_path, **SHARED))
    leaves, position = saved_state(tmp_path / "run")
    assert position["rl_step"] == 1
    assert [name for name in leaves if name.startswith("value")] == ["value['value_head']['kernel']"]
    assert np.any(leaves["value['value_head']['kernel']"])
    train(tiny(tmp_path, **SHARED))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


SHORT = {"sft__steps": 0, "rl__steps": 1, "eval__strategies": [], "rl__old_logprobs": "recompute"}


@pytest.mark.parametrize(
    "changes",
    [
        {"rl__method": "coupled"},
        {"rl__block_size": 8},
        pytest.param(
            {"model__dtype": "bfloat16", "rollout__top_k": 5, "rollout__kv_dtype": "int8",
             "rl__importance_sampling": "token"}, marks=pytest.mark.slow,
        ),
        {"model__preset": "tiny_dream", "rollout__first_token": True, "rollout__cache": "dual", "rl__shrink": 2,
         "rl__importance_sampling": "token"},
        pytest.param({"model__preset": "tiny_llada", "rl__method": "coupled"}, marks=pytest.mark.slow),
        pytest.param({"rl__method": "random_masking", "rl__epochs": 2}, marks=pytest.mark.slow),
        pytest.param({"rl__shrink": 2, "rl__normaliser": "constant"}, marks=pytest.mark.slow),
    ],
    ids=["coupled", "block_enlargement", "bfloat16", "dream", "llada_coupled", "random_masking", "shrink"],
)
def test_variants_update(tmp_path, changes):
    config = tiny(tmp_path, **SHORT | changes)
    train(config)
    row = next(row for row in metric_rows(tmp_path / "run") if row["phase"] == "rl")
    assert row["updates/skipped"] == 0 and row["policy/grad_norm"] > 0
    if config.rl.epochs == 1:  # the old log-probs are those of the very states that are replayed
        assert row["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    if config.rollout.cache != "none":
        assert row["replay/logprob_gap_max"] > 1e-3 and row["importance/ratio_max"] > 1 + 1e-3
    with run_module.Run(config) as run:
        initial = run.initial_params()
    _, after = load_run(tmp_path / "run")
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), initial, after)
    assert all(jax.tree.leaves(moved)), moved


@pytest.mark.slow
def test_unrolled_layers_give_the_same_run(tmp_path):
    """model.scan_layers=false: the same samples, weights equal to rounding."""
    for name, scan in (("scanned", True), ("unrolled", False)):
        train(tiny(tmp_path, **SHORT, name=name, model__scan_layers=scan))
    runs = [tmp_path / "scanned", tmp_path / "unrolled"]
    texts = [[row["ids"] for row in intact_rows(run / "samples.jsonl")] for run in runs]
    assert texts[0] == texts[1]
    expected, params = (load_run(run)[1] for run in runs)
    # AdamW's first step is 0.01 times the sign of the gradient: rounding may flip those that are all but zero.
    close = jax.tree.map(lambda a, b: np.mean(np.abs(a - b) < 1e-5), params, expected)
    assert min(jax.tree.leaves(close)) > 0.99, close


def test_value_model_needs_the_states_of_a_trace():
    for method in ("random_masking", "coupled"):
        with pytest.raises(ConfigError, match=r"value\.enabled needs the states of a trace: set rl\.method=tracerl"):
            tiny(".", rl__method=method, rl__old_logprobs="recompute", value__enabled=True)


@pytest.mark.slow
def test_trace_sft_learns_the_order_of_its_rows(tmp_path):
    """sft.method=trace on rows with step maps, the result of `tracerl sft` as a Hugging Face folder."""
    rows = [{"prompt": f"{a}+1=", "response": f"{a + 1}", "step_map": [1]} for a in range(1, 9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_file(
        tmp_path / "config.py", sft__method="trace", sft__path=str(tmp_path / "rows.jsonl"), sft__steps=30,
        sft__sequences_per_update=8, sft__log_every=10, eval__strategies=["static"],
    )  # fmt: skip
    assert main(["sft", "--config", config]) == 0
    run = tmp_path / "run"
    losses = [row["sft/loss"] for row in metric_rows(run) if row["phase"] == "sft"]
    assert losses[-1] < 0.7 * losses[0]
    assert read_json(run / "summary.json")["eval"].keys() == {"before", "after"}
    rows = metric_rows(run)
    assert [row["step"] for row in rows if "sft/eval/static/accuracy" in row] == [0, 30]
    load_hf(run / "hf")


def test_sft_of_a_run_that_is_past_it_is_refused(whole, tmp_path, capsys):
    copy_of(whole, tmp_path)
    config = config_file(tmp_path / "config.py", **FULL)
    assert main(["sft", "--config", config]) == 2
    assert "past its supervised training, at RL step 6: go on with `tracerl rl`" in capsys.readouterr().err


def test_a_run_cut_short_summarises_where_it_ends(whole, tmp_path):
    """Step 6 was evaluated on the way to step 8, so that its metric row is there."""
    run = copy_of(whole, tmp_path)
    summary = read_json(run / "summary.json")
    after = summary["eval"].pop("after")
    (run / "summary.json").write_text(json.dumps(summary | {"eval_moments": {}}))
    train(tiny(tmp_path, **FULL))
    assert read_json(run / "summary.json")["eval"]["after"] == after
    assert metric_rows(run) == metric_rows(whole)


@pytest.mark.parametrize("preset", ["tiny_llada", pytest.param("tiny_dream", marks=pytest.mark.slow)])
def test_replay_of_full_attention_is_the_rollout(tmp_path, preset):
    train(tiny(tmp_path, **SHORT | {"model__preset": preset, "value__enabled": True}))
    rows = [row for row in metric_rows(tmp_path / "run") if row["phase"] == "rl"]
    assert all(row["replay/logprob_gap_max"] < 1e-4 for row in rows)
    assert all(row["policy/grad_norm"] > 0 and row["value/grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize(("changes", "message"), [
    ({"rollout__max_tokens": 10}, "rollout: max_tokens 10 is no multiple of block_size 4"),
    ({"rollout__cache": "dual", "rollout__horizon": 3}, "rollout: horizon 3 is smaller than block_size 4"),
    ({"eval__max_tokens": 9}, r"eval \(dynamic\): max_tokens 9 is no multiple"),
    ({"rl__row_length": 8}, "rl.row_length is 8, but a full-attention model is trained on whole canvases"),
    ({"rl__block_size": 4}, "rl.block_size is for block-causal models"),
])  # fmt: skip
def test_decoding_that_cannot_work_is_refused_before_anything_runs(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(tiny(tmp_path, **{"model__preset": "tiny_llada"} | changes))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
