import errno
import json
import subprocess
import sys

import pytest

from tracerl_jax import files
from tracerl_jax.errors import ConfigError, DataError, UserError
from tracerl_jax.folder_lock import is_locked
from tracerl_jax.report.run_dir import ABSENT, RunDir, compare_configs, intact_rows, read_json

CONFIG = {"seed": 0, "rl": {"steps": 10, "optimizer": {"learning_rate": 1e-6}}, "eval": {"strategies": ("dynamic",)}}


def steps(path):
    return [(row["phase"], row["step"]) for row in intact_rows(path)]


def test_config_is_stored_once_and_held_to(tmp_path):
    with RunDir(tmp_path / "runs" / "a") as run:
        assert run.write_config(CONFIG) == {}
        assert run.config["eval"] == {"strategies": ["dynamic"]}
    with RunDir(tmp_path / "runs" / "a") as run:
        assert run.write_config(CONFIG) == {}


def test_another_config_is_refused_with_a_diff_and_remedies(tmp_path):
    with RunDir(tmp_path) as run:
        run.write_config(CONFIG)
        other = {"seed": 0, "rl": {"steps": 20, "optimizer": {"learning_rate": 2e-6}, "clip": None}, "eval": {}}
        with pytest.raises(ConfigError) as error:
            run.write_config(other)
        assert run.config["rl"]["steps"] == 10
    lines = str(error.value).splitlines()
    assert str(tmp_path) in lines[0]
    assert set(lines[1:5]) == {
        "  rl.optimizer.learning_rate: 1e-06 -> 2e-06",
        "  rl.clip: (absent) -> null",
        '  eval.strategies: ["dynamic"] -> (absent)',
        "  eval: (absent) -> {}",
    }
    assert "--config.name=" in lines[5] and "rl.steps" in lines[6]


def test_keys_that_may_change_are_reported_and_stored(tmp_path):
    changed = json.loads(json.dumps(CONFIG)) | {"checkpoint": {"every": 5}}
    changed["rl"]["steps"] = 20
    with RunDir(tmp_path) as run:
        run.write_config(CONFIG)
        assert run.write_config(changed) == {"rl.steps": (10, 20), "checkpoint.every": (ABSENT, 5)}
        assert run.config["rl"]["steps"] == 20


def test_where_moments_lie_may_change(tmp_path):
    for offload in (False, True):
        with RunDir(tmp_path) as run:
            changed = run.write_config({"rl": {"optimizer": {"offload": offload, "b2": 0.999}}})
    assert changed == {"rl.optimizer.offload": (False, True)}


def test_how_a_judge_is_reached_may_change_and_what_it_is_asked_may_not(tmp_path):
    def config(**judge):
        return {"reward": {"judge": {"url": "a", "timeout_seconds": 1.0, "prompt": "?", **judge}}}

    with RunDir(tmp_path) as run:
        run.write_config(config())
        changes = run.write_config(config(url="b", timeout_seconds=2.0))
        assert changes.keys() == {"reward.judge.url", "reward.judge.timeout_seconds"}
        with pytest.raises(ConfigError, match=r'reward\.judge\.prompt: "\?" -> "!"'):
            run.write_config(config(url="b", timeout_seconds=2.0, prompt="!"))


def test_compare_configs_of_nested_and_leaf():
    assert compare_configs({"a": {"b": 1}}, {"a": 2}) == {"a.b": (1, ABSENT), "a": (ABSENT, 2)}


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with RunDir(tmp_path) as run, pytest.raises(DataError, match=r"config\.json is not valid JSON"):
        run.write_config(CONFIG)


@pytest.mark.parametrize(
    ("phase", "step", "kept"), [("rl", 2, 7), ("rl", 0, 4), ("sft", 5, 4), ("sft", 4, 1), ("sft", 0, 0), ("rl", 9, 9)]
)
def test_truncate_drops_everything_written_after_the_checkpoint(tmp_path, phase, step, kept):
    rows = [("sft", 1), ("sft", 5), ("eval", 5), ("eval", 0), ("rl", 1), ("rl", 2), ("eval", 2), ("rl", 3), ("eval", 3)]
    with RunDir(tmp_path) as run:
        for append in (run.append_metrics, run.append_samples):
            append({"step": step, "phase": phase} for phase, step in rows)
        run.truncate_after(step, phase)
    assert steps(tmp_path / "metrics.jsonl") == steps(tmp_path / "samples.jsonl") == rows[:kept]


def test_a_torn_last_line_is_ignored_by_readers_and_removed_by_the_next_writer(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "phase": "rl"}\n{"step": 2, "phase": "rl"}\n{"step": 3, "ph')
    assert steps(path) == [("rl", 1), ("rl", 2)]
    with RunDir(tmp_path) as run:
        run.append_metrics([{"step": 3, "phase": "rl"}])
        assert steps(path) == [("rl", 1), ("rl", 2), ("rl", 3)]


@pytest.mark.parametrize("content", ["", "torn", "x" * 200_000, '{"a": 1}\n' + "x" * 200_000])
def test_torn_line_of_any_length(tmp_path, content):
    path = tmp_path / "samples.jsonl"
    path.write_text(content)
    RunDir(tmp_path).close()
    assert path.read_text() == content[: content.rfind("\n") + 1]


def test_truncating_after_a_kill_keeps_whole_rows_only(tmp_path):
    with RunDir(tmp_path) as run:
        run.append_metrics([{"step": 1, "phase": "rl"}, {"step": 2, "phase": "rl"}])
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 3')
        run.truncate_after(1, "rl")
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "phase": "rl"}\n'


def test_summary_merges_and_keeps_the_status(tmp_path):
    with RunDir(tmp_path) as run:
        run.write_config(CONFIG)
        run.update_summary({"eval": {"before": {"dynamic": {"accuracy": 0.5}}}})
        run.update_summary({"eval": {"after": {"dynamic": {"accuracy": 0.75}}}})
        assert read_json(tmp_path / "summary.json")["status"] == "running"
    assert read_json(tmp_path / "summary.json") == {
        "status": "finished",
        "eval": {"before": {"dynamic": {"accuracy": 0.5}}, "after": {"dynamic": {"accuracy": 0.75}}},
    }


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "interrupted"), (ValueError, "failed")])
def test_status_tells_how_the_run_ended(tmp_path, error, status):
    with pytest.raises(error), RunDir(tmp_path) as run:
        run.write_config(CONFIG)
        raise error
    assert read_json(tmp_path / "summary.json")["status"] == status


def test_a_loop_may_close_with_its_own_status(tmp_path):
    with RunDir(tmp_path) as run:
        run.write_config(CONFIG)
        run.close("interrupted")
    assert read_json(tmp_path / "summary.json")["status"] == "interrupted"


def test_a_refused_config_leaves_the_status_of_the_run_alone(tmp_path):
    with RunDir(tmp_path) as run:
        run.write_config(CONFIG)
        run.close("interrupted")
    with pytest.raises(ConfigError), RunDir(tmp_path) as run:
        run.write_config({"seed": 1})
    assert read_json(tmp_path / "summary.json")["status"] == "interrupted"


HOLD = """
import sys
from tracerl_jax.report.run_dir import RunDir
run = RunDir(sys.argv[1])
print("held", flush=True)
input()
"""


def test_two_processes_cannot_share_a_folder_and_a_killed_one_holds_nothing(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        assert is_locked(tmp_path)
        with pytest.raises(UserError, match=f"in use by process {holder.pid} on .*another run name"):
            RunDir(tmp_path)
    finally:
        holder.kill()
        holder.communicate()
    assert not is_locked(tmp_path)
    with RunDir(tmp_path):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)


def test_disk_full_while_appending_names_the_file_and_the_remedy(tmp_path, monkeypatch):
    with RunDir(tmp_path) as run:

        def fail(*arguments, **options):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(files, "open", fail, raising=False)
            with pytest.raises(UserError, match=r"disk full while writing .*metrics\.jsonl.*last checkpoint"):
                run.append_metrics([{"step": 1}])


def test_disk_full_while_replacing_keeps_the_old_file(tmp_path, monkeypatch):
    with RunDir(tmp_path) as run:
        run.update_summary({"a": 1})

        def fail(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", fail)
            with pytest.raises(UserError, match=r"disk full while writing .*summary\.json"):
                run.update_summary({"a": 2})
        assert read_json(tmp_path / "summary.json")["a"] == 1


def test_a_path_that_cannot_be_a_folder_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose a place you can write to"):
        RunDir(tmp_path / "file")
