"""Tasks by name: rows, defaults, and how wrong names and rows are reported."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tracerl_jax.data.rows import load_rows
from tracerl_jax.data.tasks import TASKS, load_task
from tracerl_jax.data.templates import kind_of
from tracerl_jax.errors import ConfigError, DataError
from tracerl_jax.rewards import score

GSM8K = Path(__file__).with_name("gsm8k_sample.jsonl")  # rows 1-20 of the GSM8K training split (MIT)

NINE = {"size": 9, "min_blanks": 40, "max_blanks": 50}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_arithmetic():
    task = load_task("arithmetic", options={"train_count": 100, "test_count": 30, "max_operands": 4}, eval_limit=20)
    assert (len(task.train), len(task.test)) == (100, 20)
    assert (task.rewards, task.accuracy_reward, task.template) == ({"exact_match": 1.0}, "exact_match", "plain")
    assert set(task.train[0]) == {"question", "ground_truth_answer", "response", "_kind"}
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
    task = load_task("jsonl", path=path, rewards={"ascii_share": 2.0}, template="Q: {question}")
    assert (task.rewards, task.accuracy_reward, task.template) == ({"ascii_share": 2.0}, "ascii_share", "Q: {question}")
    with pytest.raises(DataError, match=r"any.jsonl:1: missing field 'ground_truth_answer'"):
        load_task("jsonl", path=path, rewards={"exact_match": 1.0})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "gsm8"}, r"unknown task 'gsm8'; did you mean 'gsm8k'\? tasks: arithmetic, countdown, sudoku, "),
        ({"name": "jsonl"}, r"task jsonl reads files: set its path"),
        ({"name": "jsonl", "path": "default"}, "task jsonl has no source of its own for path"),
        ({"name": "aime24", "path": "default"}, "task aime24 has no source of its own for path"),
        ({"name": "gsm8k", "path": GSM8K, "template": "chatt"}, r"unknown template 'chatt'; did you mean 'chat'\?"),
        ({"name": "sudoku", "options": {"size": 5}}, "sudoku needs size 4 or 9, got 5"),
        ({"name": "sudoku", "options": {"max_blanks": 17}}, "max_blanks <= 16, got 6 and 17"),
        ({"name": "countdown", "options": {"largest": 2}}, "countdown needs largest >= 5"),
        ({"name": "countdown", "options": {"min_numbers": 5}}, "2 <= min_numbers <= max_numbers <= 8, got 5 and 4"),
        ({"name": "countdown", "options": {"size": 5}}, "unknown countdown options size; known: train_count, "),
        ({"name": "reasoning_gym"}, "unknown task 'reasoning_gym'; tasks: .* reasoning_gym:GENERATOR"),
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


def test_options_are_rows_with_a_letter(tmp_path):
    good = {"question": "q\nA. 1\nB. 2", "ground_truth_answer": "B"}
    path = write(tmp_path / "rows.jsonl", good, {"question": "q", "ground_truth_answer": "2"})
    with pytest.raises(DataError, match=r"rows.jsonl:2: field 'ground_truth_answer' must be the letter of an option"):
        load_task("option", path=path)
    task = load_task("option", path=path, on_bad_row="skip")
    assert [kind_of(row) for row in task.train] == ["option"] and task.rewards == {"option": 1.0}


@pytest.mark.parametrize("name, options", [("countdown", {"max_numbers": 6}), ("sudoku", {}), ("sudoku", NINE)])
def test_puzzles_make_rows_whose_responses_are_right(name, options):
    counts = {"train_count": 60, "test_count": 20}
    task, again = (load_task(name, options=options | counts, eval_limit=10) for _ in range(2))
    assert (len(task.train), len(task.test)) == (60, 10) and task == again
    assert load_task(name, options=options | counts | {"seed": 1}).train != task.train
    questions = [row["question"] for row in task.train + task.test]
    assert len(set(questions)) == 70
    rows = task.train + task.test
    result = score(task.rewards, questions, [row["response"] for row in rows], rows)
    assert result.total.tolist() == [1.0] * 70, result.details
    assert {kind_of(row) for row in rows} == {"verbatim"}


def test_generators_of_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    task = load_task("reasoning_gym:mini_sudoku", options={"train_count": 8, "test_count": 4})
    assert (len(task.train), len(task.test)) == (8, 4) and task.rewards == {"reasoning_gym": 1.0}
    assert not {row["question"] for row in task.train} & {row["question"] for row in task.test}
    texts = [f"So <answer>\n{row['ground_truth_answer']}\n</answer>" for row in task.train]
    columns = [*task.train, task.train[0], {}]
    result = score(task.rewards, [""] * 10, [*texts, "<answer>1</answer>", "x"], columns)
    assert result.total[:8].tolist() == [1.0] * 8 and result.total[8] < 1 and np.isnan(result.total[9])
    with pytest.raises(ConfigError, match=r"reasoning-gym has no generator 'minisudoku'; it has .*mini_sudoku"):
        load_task("reasoning_gym:minisudoku")
    with pytest.raises(ConfigError, match="unknown reasoning_gym:mini_sudoku options generator; known: train_count"):
        load_task("reasoning_gym:mini_sudoku", options={"generator": 1})


def test_a_scorer_that_raises_judges_wrong_answers_wrong():
    pytest.importorskip("reasoning_gym")
    task = load_task("reasoning_gym:prime_factorization", options={"train_count": 1, "test_count": 1})
    result = score(task.rewards, [""], ["<answer>seven</answer>"], task.train)
    assert result.total.tolist() == [0.0]


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"need the package reasoning-gym .*pip install 'tracerl_jax\[tasks\]'"):
        load_task("reasoning_gym:mini_sudoku")


def test_every_task_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()
    for name, spec in TASKS.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| `{name}` "))
        assert f"`{spec.reward}`" in line
        for source in (spec.train, spec.test):
            assert source is None or f"`{source}`" in line


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
