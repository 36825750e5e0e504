"""Tasks by name: rows, defaults, and how wrong names and rows are reported."""

import json
from pathlib import Path

import pytest

from tracerl_jax.data.tasks import load_rows, load_task
from tracerl_jax.errors import ConfigError, DataError

GSM8K = Path(__file__).with_name("gsm8k_sample.jsonl")  # rows 1-20 of the GSM8K training split (MIT)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_arithmetic():
    task = load_task("arithmetic", options={"train_count": 100, "test_count": 30, "max_operands": 4}, eval_limit=20)
    assert (len(task.train), len(task.test)) == (100, 20)
    assert (task.rewards, task.accuracy_reward, task.template) == ({"exact_match": 1.0}, "exact_match", "plain")
    assert set(task.train[0]) == {"question", "ground_truth_answer", "response"}
    assert not {row["question"] for row in task.train} & {row["question"] for row in task.test}


def test_gsm8k_rows_end_in_the_boxed_answer():
    task = load_task("gsm8k", path=GSM8K, eval_path=GSM8K, train_limit=3)
    assert (len(task.train), len(task.test)) == (3, 20)
    assert (task.rewards, task.accuracy_reward, task.template) == ({"math": 1.0}, "math", "chat")
    row = task.train[0]
    assert row["question"].startswith("Natalia sold clips")
    assert row["response"].endswith("altogether in April and May.\nThe answer is $\\boxed{72}$.")
    assert row["_source"] == f"{GSM8K}:1"


def test_solutions_that_are_boxed_already_stay(tmp_path):
    path = write(tmp_path / "m.jsonl", {"question": "q", "ground_truth_answer": "2", "solution": "so \\boxed{2}."})
    assert load_task("math", path=path).train[0]["response"] == "so \\boxed{2}."
    path = write(tmp_path / "m.jsonl", {"question": "q", "ground_truth_answer": "2"})
    assert "response" not in load_task("math500", eval_path=path).test[0]


def test_any_file(tmp_path):
    path = write(
        tmp_path / "any.jsonl",
        {"prompt": "1+1=", "response": "2"},
        {"question": "2+2=", "ground_truth_answer": 4, "level": 1},
        {"prompt_ids": [1, 2], "ids": [3]},
    )
    task = load_task("jsonl", path=path)
    assert [row["question"] for row in task.train] == ["1+1=", "2+2=", None]
    assert task.train[1]["level"] == 1 and task.test == [] and task.template == "plain"


def test_overrides(tmp_path):
    path = write(tmp_path / "any.jsonl", {"question": "say hi"})
    with pytest.raises(DataError, match=r"any.jsonl:1: missing field 'ground_truth_answer' or 'response'"):
        load_task("jsonl", path=path)
    task = load_task("gsm8k", path=GSM8K, rewards={"exact_match": 0.5}, template="math")
    assert (task.rewards, task.accuracy_reward, task.template) == ({"exact_match": 0.5}, "math", "math")
    task = load_task("jsonl", path=path, rewards={"exact_match": 2.0}, template="Q: {question}")
    assert (task.rewards, task.accuracy_reward, task.template) == ({"exact_match": 2.0}, "exact_match", "Q: {question}")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "gsm8"}, r"unknown task 'gsm8'; did you mean 'gsm8k'\? tasks: arithmetic, gsm8k, math, "),
        ({"name": "gsm8k"}, r"task gsm8k reads files: set its path"),
        ({"name": "arithmetic", "path": "x.jsonl"}, "makes its own rows; use task jsonl"),
        ({"name": "arithmetic", "options": {"digit": 3}}, "unknown arithmetic options digit; known: min_operands, "),
        ({"name": "arithmetic", "options": {"test_count": 0}}, "train_count and test_count >= 1"),
        ({"name": "gsm8k", "path": GSM8K, "options": {"digits": 3}}, "task gsm8k takes no options"),
        ({"name": "gsm8k", "path": GSM8K, "rewards": {"exact": 1.0}}, "unknown reward 'exact'"),
    ],
)
def test_wrong_settings(arguments, message):
    with pytest.raises(ConfigError, match=message):
        load_task(**arguments)


def test_bad_rows(tmp_path, caplog):
    good = {"question": "q", "ground_truth_answer": "1"}
    path = write(tmp_path / "rows.jsonl", good, {"question": "  ", "ground_truth_answer": "1"}, {"question": "q"}, good)
    with pytest.raises(DataError, match=r"rows.jsonl:2: no text in field 'question'"):
        load_task("math", path=path)
    task = load_task("math", path=path, on_bad_row="skip")
    assert [row["_source"] for row in task.train] == [f"{path}:1", f"{path}:4"]
    assert "skipped 2 bad rows, kept 2" in caplog.text
    assert "rows.jsonl:3: missing field 'ground_truth_answer' (it has question)" in caplog.text


def test_no_rows(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    with pytest.raises(DataError, match=r"empty.jsonl: holds no usable row; each line must be"):
        load_rows(path)
