import io
import json
import math
import sys
import threading
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from tracerl_jax.errors import ConfigError
from tracerl_jax.report.flops import Work
from tracerl_jax.report.metrics import (
    BackgroundWriter,
    ConsoleWriter,
    DelayedMetrics,
    JsonlWriter,
    MetricLog,
    PhaseTimer,
    describe,
    merge,
    open_log,
)
from tracerl_jax.report.run_dir import RunDir, intact_rows


class Recorder:
    def __init__(self):
        self.rows = []

    def write(self, step, metrics, phase):
        self.rows.append((step, metrics, phase))

    def close(self):
        self.rows.append("closed")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_merge_weights_parts_by_their_counts():
    parts = [{"loss": (jnp.float32(6.0), jnp.int32(3)), "kl": (1.0, 4)}, {"loss": (np.float32(2.0), 1)}]
    assert merge(parts) == {"loss": 2.0, "kl": 0.25}


def test_merge_of_nothing_counted_is_nan():
    assert math.isnan(merge([{"loss": (jnp.float32(0.0), jnp.float32(0.0))}])["loss"])


def test_delayed_metrics_arrive_one_step_late_and_merged():
    recorder = Recorder()
    delayed = DelayedMetrics(MetricLog([recorder], "rl"))
    delayed.write(1, {"reward": jnp.float32(0.5)}, [{"kl": (2.0, 2)}, {"kl": (4.0, 1)}])
    assert recorder.rows == []
    delayed.write(2, {"reward": 0.75})
    assert recorder.rows == [(1, {"reward": 0.5, "kl": 2.0}, "rl")]
    delayed.flush()
    delayed.flush()
    assert [row[0] for row in recorder.rows] == [1, 2]


def test_log_sends_plain_floats_to_every_writer_with_the_phase():
    first, second = Recorder(), Recorder()
    log = MetricLog([first, second], "sft")
    log.write(3, {"sft/loss": jnp.ones(())})
    log.write(3, {"eval/dynamic/accuracy": np.float32(0.5)}, phase="eval")
    log.close()
    assert first.rows == second.rows == [
        (3, {"sft/loss": 1.0}, "sft"), (3, {"eval/dynamic/accuracy": 0.5}, "eval"), "closed",
    ]  # fmt: skip
    assert type(first.rows[0][1]["sft/loss"]) is float


def test_jsonl_rows_are_strict_json(tmp_path):
    with RunDir(tmp_path) as run:
        writer = JsonlWriter(run)
        writer.write(1, {"policy/loss": math.nan, "policy/kl": math.inf, "reward": 0.5}, "rl")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {"step": 1, "phase": "rl", "policy/loss": None, "policy/kl": None, "reward": 0.5}


def test_console_prints_one_plain_line_per_row_when_not_a_terminal():
    stream = io.StringIO()
    console = ConsoleWriter("rl", total_steps=60, stream=stream)
    console.write(12, {"reward": 0.41, "accuracy": 0.625, "policy/kl": 1.2e-3, "seconds/total": 5.14, "x": 1.0}, "rl")
    evaluation = {"eval/dynamic/accuracy": 0.61, "eval/dynamic/no_verdict": 0, "eval/dynamic/tokens_per_step": 2.71}
    console.write(12, evaluation, "eval")
    console.close()
    assert stream.getvalue().splitlines() == [
        "rl 12/60 | reward 0.410 | accuracy 62.5% | kl 1.2e-03 | s 5.1",
        "eval 12 | dynamic accuracy 61.0% | dynamic tokens_per_step 2.71",
    ]


def test_console_shows_a_bar_on_a_terminal_that_starts_where_the_run_continues():
    stream = Terminal()
    console = ConsoleWriter("rl", total_steps=10, first_step=4, stream=stream)
    console.write(5, {"reward": 0.5}, "rl")
    console.write(5, {"eval/static/accuracy": 0.25}, "eval")
    console.write(6, {"reward": 0.75}, "rl")
    console.close()
    text = stream.getvalue()
    assert "4/10" in text and "6/10" in text and "reward 0.750" in text
    assert "eval 5 | static accuracy 25.0%\n" in text


def test_describe_shows_a_value_that_is_not_finite():
    assert describe({"sft/loss": math.nan, "sft/lr": 1e-3}, "sft") == "loss nan | lr 1.0e-03"


def test_phase_timer_adds_up_phases_and_starts_anew_each_step():
    timer = PhaseTimer()
    with timer.step(1):
        for _ in range(2):
            with timer("rollout"):
                time.sleep(0.02)
        with pytest.raises(ZeroDivisionError), timer("reward"):
            _ = 1 / 0
        time.sleep(0.02)
    seconds = timer.seconds()
    assert set(seconds) == {"seconds/rollout", "seconds/reward", "seconds/total"}
    assert 0.04 <= seconds["seconds/rollout"] <= seconds["seconds/total"] - 0.02
    with timer.step(2):
        pass
    assert set(timer.seconds()) == {"seconds/total"}


def test_phase_timer_adds_up_work_and_starts_anew_each_step():
    timer = PhaseTimer()
    with timer.step(1):
        timer.count("rollout", Work(3, 10.0))
        timer.count("rollout", Work(2, 5.0))
        timer.count("values", Work(1, None))
    assert timer.work == {"rollout": Work(5, 15.0), "values": Work(1, None)}
    timer.restart()
    assert timer.work == {}


class Blocked(Recorder):
    """Writes nothing before it is let."""

    def __init__(self):
        super().__init__()
        self.reached, self.let = threading.Event(), threading.Event()

    def write(self, step, metrics, phase):
        self.reached.set()
        self.let.wait()
        super().write(step, metrics, phase)


def test_a_writer_in_a_thread_gets_every_row_before_it_is_closed():
    recorder, made = Recorder(), []
    writer = BackgroundWriter("fine", lambda: made.append(threading.current_thread()) or recorder)
    for step in range(100):
        writer.write(step, {"reward": 0.5}, "rl")
    writer.close()
    assert recorder.rows == [*((step, {"reward": 0.5}, "rl") for step in range(100)), "closed"]
    assert made[0] is not threading.current_thread()


def test_a_writer_that_blocks_costs_its_own_rows_and_is_named_once(caplog):
    blocked, other = Blocked(), Recorder()
    log = MetricLog([BackgroundWriter("stuck", lambda: blocked, rows=2, seconds=0.01), other], "rl")
    log.write(0, {})
    blocked.reached.wait()
    for step in range(1, 50):
        log.write(step, {})
    log.close()
    assert len(other.rows) == 51  # and the end
    assert [record.getMessage() for record in caplog.records] == [
        "metric writer stuck is too slow: it does not get rows from step 3 on",
        "metric writer stuck is not done after 0 s and is left behind",
    ]
    blocked.let.set()


@pytest.mark.parametrize("where", ["open", "write", "close"])
def test_a_writer_that_fails_is_named_once_and_the_others_go_on(where, caplog):
    class Failing(Recorder):
        def write(self, step, metrics, phase):
            if where == "write" and step == 3:
                raise ValueError("no network")

        def close(self):
            if where == "close":
                raise ValueError("no network")

    def make():
        if where == "open":
            raise ValueError("no network")
        return Failing()

    other = Recorder()
    log = MetricLog([BackgroundWriter("lost", make, rows=10), other], "rl")
    for step in range(100):
        log.write(step, {"reward": 0.5})
    log.close()
    assert len(other.rows) == 101
    messages = [record.getMessage() for record in caplog.records if "failed" in record.getMessage()]
    assert messages == ["metric writer lost has failed and gets no more rows (ValueError: no network)"]


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_writer_names_its_extra(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)  # makes the import fail
    with RunDir(tmp_path) as run, pytest.raises(ConfigError, match=rf"pip install 'tracerl_jax\[{name}\]'"):
        open_log(run, "rl", writers=[name])


def test_an_unknown_writer_is_refused(tmp_path):
    with RunDir(tmp_path) as run, pytest.raises(ConfigError, match="'tensorbord'"):
        open_log(run, "rl", writers=["tensorbord"])


def test_tensorboard_gets_every_scalar_and_hides_events_after_the_checkpoint(tmp_path, monkeypatch):
    made = []

    class SummaryWriter:
        def __init__(self, logdir, purge_step):
            self.logdir, self.purge_step, self.scalars, self.closed = logdir, purge_step, [], False
            made.append(self)

        def add_scalar(self, *scalar):
            self.scalars.append(scalar)

        def close(self):
            self.closed = True

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    with RunDir(tmp_path) as run:
        log = open_log(run, "rl", first_step=3, writers=["tensorboard"])
        log.write(4, {"reward": 0.5, "policy/kl": 0.1})
        log.close()
    assert made[0].logdir == str(tmp_path / "tensorboard" / "rl") and made[0].purge_step == 4
    assert made[0].scalars == [("reward", 0.5, 4), ("policy/kl", 0.1, 4)] and made[0].closed
    assert [row["step"] for row in intact_rows(tmp_path / "metrics.jsonl")] == [4]


def test_wandb_continues_the_same_run(tmp_path, monkeypatch):
    calls, logged = [], []
    wandb_run = types.SimpleNamespace(
        log=logged.append, finish=lambda: logged.append("finished"), define_metric=lambda name, step_metric: None
    )
    fake = types.SimpleNamespace(init=lambda **arguments: calls.append(arguments) or wandb_run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (1, 2):
        with RunDir(tmp_path / "demo") as run:
            run.write_config({"seed": 3})
            log = open_log(run, "rl", writers=["wandb"])
            log.write(step, {"reward": 0.5})
            log.close()
    assert calls[0]["id"] == calls[1]["id"] and calls[0]["resume"] == "allow"
    assert calls[0]["name"] == "demo" and calls[0]["config"] == {"seed": 3}
    assert logged == [{"reward": 0.5, "step": 1}, "finished", {"reward": 0.5, "step": 2}, "finished"]
