"""tracerl serve as a process: what it says, and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys

import httpx
import pytest

from tracerl_jax.launch.cli import main


@pytest.fixture
def launch(folder, tmp_path):
    """Starts `tracerl serve` with flags and returns (process, url, path of stderr)."""
    started = []

    def launch(*flags, **environment):
        errors = tmp_path / "stderr"
        command = [sys.executable, "-m", "tracerl_jax", "serve", "--model", str(folder), "--port", "0", "--slots", "4"]
        process = subprocess.Popen(
            [*command, "--no_warm_up", *flags], stdout=subprocess.PIPE, stderr=errors.open("w"), text=True,
            env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | environment,
        )  # fmt: skip
        started.append(process)
        line = process.stdout.readline()
        assert line, errors.read_text()
        return process, "http://127.0.0.1:" + re.search(r"serving tiny at http://[\d.]+:(\d+)", line)[1], errors

    yield launch
    for process in started:
        process.kill()
        process.wait()


LONG = {"prompt": "abc", "max_tokens": 1500, "ignore_eos": True, "stream": True, "return_step_map": True}


def test_sigterm_finishes_what_runs_and_refuses_the_rest(launch):
    process, url, errors = launch("--host", "0.0.0.0")
    assert "no API key is set" in errors.read_text()
    assert re.search(r"tiny: memory: weights [\d.]+ MiB, cache [\d.]+ MiB, .*4 slots of 2048", errors.read_text())
    with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=120) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        process.send_signal(signal.SIGTERM)
        while (refused := httpx.post(f"{url}/v1/completions", json=LONG, timeout=60)).status_code == 200:
            pass
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
        assert httpx.get(f"{url}/health").json()["status"] == "stopping"
        *events, done = [line for line in [first, *lines] if line]
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert done == "data: [DONE]" and sum(len(choice["token_ids"]) for choice in choices) == 1500
    assert process.wait(30) == 0


def test_what_is_not_done_in_time_is_cut_and_the_exit_status_is_still_0(launch):
    process, url, errors = launch("--drain_seconds", "0.1", TRACERL_API_KEY="secret")
    assert "no API key" not in errors.read_text()
    assert httpx.get(f"{url}/v1/models").status_code == 401
    headers = {"Authorization": "Bearer secret"}
    with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=120, headers=headers) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        *_, error, done = [line for line in lines if line]
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "stopping" and done == "data: [DONE]"
    assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max_queue", "-1"), "max_queue is -1"),
        (("--max_samples", "1000"), "lower it or raise max_queue"),
        (("--max_length", "5000"), "the model ends at 2048"),
        (("--block_sizes", "0"), "must be at least 1"),
        (("--forwards_per_chunk", "0"), "forwards_per_chunk is 0"),
        (("--top_p", "0"), "top_p is 0"),
        (("--port", "99999"), "port is 99999"),
        (("--host", "no.such.host.invalid"), "choose another --host or --port"),
    ],
)
def test_a_bad_flag_is_named_before_anything_is_loaded(folder, capsys, flags, message):
    assert main(["serve", "--model", str(folder), "--host", "127.0.0.1", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_tokenizer_is_refused(tmp_path, folder, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert main(["serve", "--model", str(tmp_path)]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
