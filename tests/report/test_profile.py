import logging

import jax
import jax.numpy as jnp
import pytest

from tracerl_jax.config import ReportSection
from tracerl_jax.errors import ConfigError
from tracerl_jax.launch.cli import main
from tracerl_jax.report.profile import Profiler


def traces(folder):
    return sorted(folder.glob("**/*.xplane.pb"))


def test_steps_of_a_range_are_traced_once(tmp_path, caplog):
    profiler = Profiler(range(2, 4), tmp_path)
    with caplog.at_level(logging.INFO, "tracerl_jax"):
        for step in range(1, 6):
            profiler.at(step, jnp.zeros(3))
            jnp.ones(step) @ jnp.ones(step)
            assert bool(traces(tmp_path)) == (step > 3)
        profiler.close()
    assert len(traces(tmp_path)) == 1
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"profile of steps 2 to 3: {tmp_path}.") and f"xprof --logdir={tmp_path}" in message


def test_a_trace_ends_with_training(tmp_path, caplog):
    profiler = Profiler(range(7, 20), tmp_path)
    with caplog.at_level(logging.INFO, "tracerl_jax"):
        for step in (9, 10):  # a run that was continued at 9
            profiler.at(step)
        profiler.close()
        profiler.close()
    assert "profile of steps 9 to 10" in caplog.text and len(traces(tmp_path)) == 1


def test_a_trace_that_cannot_be_made_does_not_stop_training(tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("only one profile may be run at a time")

    monkeypatch.setattr(jax.profiler, "start_trace", fail)
    profiler = Profiler(range(1, 3), tmp_path)
    for step in (1, 2, 3):
        profiler.at(step)
    profiler.close()
    assert [record.getMessage() for record in caplog.records] == ["no profile (only one profile may be run at a time)"]


def test_steps_that_were_not_run_are_named_once(tmp_path, caplog):
    profiler = Profiler(range(5, 7), tmp_path)
    for step in (1, 2, 9):
        profiler.at(step)
    profiler.close()
    assert [record.getMessage() for record in caplog.records] == ["report.profile: none of the steps 5 to 6 was run"]


def test_the_config_names_steps():
    assert ReportSection(profile="10:3").profiled == range(10, 13)
    assert not ReportSection().profiled
    for text in ("10", "10:", "0:3", "3:0", "a:b", "-1:2", "10:3:1", ""):
        with pytest.raises(ConfigError, match="must be FIRST:COUNT, as in 10:3"):
            ReportSection(profile=text)


@pytest.mark.parametrize(
    ("command", "profile", "message"),
    [("rl", "3-5", "report.profile is '3-5', must be FIRST:COUNT"),
     ("rl", "60:2", "asks for steps 60 to 61, but there are 60"),
     ("sft", "5:1", "asks for steps 5 to 5, but there are 4")],
)  # fmt: skip
def test_the_flag_is_the_key_and_steps_that_will_not_come_are_refused(command, profile, message, tmp_path, capsys):
    flags = [f"--config.runs_dir={tmp_path}", "--config.rl.steps=60", "--config.sft.steps=4"]
    assert main([command, "--config", "demo", *flags, "--profile", profile]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
