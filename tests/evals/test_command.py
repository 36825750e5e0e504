"""`tracerl eval` on a tiny model folder: results, going on after a stop, and what it says to mistakes."""

import errno
import json

import pytest
from eval_results import assert_same_results, rows_of

from tracerl_jax.data.jsonl import write_jsonl
from tracerl_jax.diffusion.trace import Trace
from tracerl_jax.evals import items as items_module
from tracerl_jax.launch.cli import main
from tracerl_jax.rollout.engine import Engine


def command(model_folder, *words):
    return ["eval", "--model", str(model_folder), "--max_tokens", "8", "--slots", "8", *map(str, words)]


ARITHMETIC = (
    "--tasks", "arithmetic", "--options", "arithmetic=digits=1,max_operands=4,test_count=6", "--samples", "4",
    "--strategies", "dynamic,static",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert main(command(model_folder, *ARITHMETIC, "--output", folder)) == 0
    return folder


def test_results(finished):
    results = json.loads((finished / "results.json").read_text())
    assert list(results) == ["arithmetic"] and list(results["arithmetic"]) == ["dynamic", "static"]
    for strategy, k in (("dynamic", 4), ("static", 1)):
        result = results["arithmetic"][strategy]
        assert (result["n"], result["samples"], result["starts"]) == (6, 6 * k, 1)
        assert 0 <= result["accuracy"] == result["scores"][f"avg@{k}"]["value"] <= 1
        assert 0 < result["decode_seconds"] <= result["wall_seconds"]
        assert result["tokens_per_second"] == pytest.approx(result["tokens"] / result["decode_seconds"])
    assert list(results["arithmetic"]["dynamic"]["scores"]) == ["avg@4", "pass@2", "pass@4", "maj@4"]
    assert results["arithmetic"]["static"]["tokens_per_step"] <= 1
    rows = rows_of(finished)
    assert len(rows) == 6 * 4 + 6
    for row in rows.values():
        Trace.from_row(row)
        assert 1 <= len(row["ids"]) <= 8 and len(row["text"]) <= len(row["ids"])


def test_table_and_several_tasks(model_folder, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"question": "1+1=", "ground_truth_answer": "99999999"}] * 3)
    words = ("--tasks", "arithmetic,math", "--path", f"math={path}", "--template", "plain", "--limit", 3,
             "--limit", "math=2", "--samples", "arithmetic=4", "--strategies", "dynamic")  # fmt: skip
    assert main(command(model_folder, *words)) == 0
    header, arithmetic, math = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header[:7] == ["task", "strategy", "problems", "k", "avg@k", "pass@k", "maj@k"]
    assert arithmetic[:4] == ["arithmetic", "dynamic", "3", "4"] and math[:4] == ["math", "dynamic", "2", "1"]
    assert math[4:9] == ["0.0", "±", "0.0", "-", "-"]  # of one answer there is no majority


def test_a_full_disk_and_a_torn_line_later_it_goes_on(model_folder, finished, tmp_path, monkeypatch, capsys):
    append, calls = items_module.append_jsonl, []

    def full(path, rows):
        calls.append(path)
        if len(calls) == 2:
            (tmp_path / "items" / "arithmetic.dynamic.jsonl").open("a").write('{"index": 5, "promp')
            with items_module.writing(path):
                raise OSError(errno.ENOSPC, "No space left on device")
        append(path, rows)

    again = command(model_folder, *ARITHMETIC, "--output", tmp_path)
    monkeypatch.setattr(items_module, "append_jsonl", full)
    assert main(again) == 2 and "disk full while writing" in capsys.readouterr().err
    monkeypatch.undo()
    path = tmp_path / "items" / "arithmetic.dynamic.jsonl"
    there = path.read_bytes().rpartition(b"\n")[0]
    assert there
    assert main(again) == 0
    assert path.read_bytes().startswith(there)
    assert_same_results(tmp_path, finished)
    results = json.loads((tmp_path / "results.json").read_text())["arithmetic"]
    times = json.loads((tmp_path / "times.json").read_text())["arithmetic"]
    assert results["dynamic"]["starts"] == 2 and results["static"]["starts"] == 1
    assert results["dynamic"]["wall_seconds"] == pytest.approx(sum(wall for _, wall in times["dynamic"]))


def test_what_is_finished_is_not_decoded_again(model_folder, finished, monkeypatch, capsys):
    before = (finished / "results.json").read_text()
    monkeypatch.delattr(Engine, "submit")
    assert main(command(model_folder, *ARITHMETIC, "--output", finished)) == 0
    assert (finished / "results.json").read_text() == before


def test_other_settings_are_refused(model_folder, finished, capsys):
    assert main(command(model_folder, *ARITHMETIC, "--seed", 1, "--output", finished)) == 2
    error = capsys.readouterr().err
    assert "strategies.dynamic.seed: 0 -> 1" in error and "--overwrite" in error and "Traceback" not in error


@pytest.mark.parametrize(
    "words, message",
    [
        (["--tasks", "arithmetic,arithmetic"], "--tasks names arithmetic twice"),
        (["--tasks", "gsm9k"], "unknown task 'gsm9k'; did you mean 'gsm8k'?"),
        (["--tasks", "gsm8k", "--path", "rows.jsonl"], "name the task too, as in --path gsm8k=rows.jsonl"),
        (["--tasks", "gsm8k", "--path", "math=rows.jsonl"], "math is none of --tasks gsm8k"),
        (["--tasks", "arithmetic", "--strategies", "dynamic,greedy"], "unknown evaluation strategy 'greedy'"),
        (["--tasks", "arithmetic", "--limit", "0"], "--limit 0: the value must be an integer of at least 1"),
        (["--tasks", "arithmetic", "--samples", "arithmetic=x"], "--samples arithmetic=x: the value must be"),
        (["--tasks", "arithmetic", "--options", "arithmetic=digits"], "digits= is not of the form NAME=INTEGER"),
        (["--tasks", "arithmetic", "--slots", "0"], "--slots is 0; it must be at least 1"),
        (["--tasks", "jsonl", "--path", "jsonl=ROWS"], "rows.jsonl:2: the prompt has 9 tokens, the limit is 8"),
    ],
)
def test_mistakes_are_one_line_and_status_2(model_folder, tmp_path, capsys, words, message):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"question": "1+1=", "ground_truth_answer": "2"}, {"question": "1" * 9, "response": "1"}])
    words = [word.replace("ROWS", str(path)) for word in words]
    assert main(["eval", "--model", str(model_folder), "--max_prompt_tokens", "8", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_prompt_that_is_too_long_is_named_before_the_weights_are_read(model_folder, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"question": "1+1=", "ground_truth_answer": "2"}])
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    words = ["--tasks", "jsonl", "--path", f"jsonl={path}", "--max_tokens", "100000000"]
    assert main(["eval", "--model", str(tmp_path), *words]) == 2
    assert "rows.jsonl:1: prompt of 4 tokens and max_tokens 100000000 reach position" in capsys.readouterr().err


def test_a_model_without_tokenizer(model_folder, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    assert main(["eval", "--model", str(tmp_path), "--tasks", "arithmetic"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
