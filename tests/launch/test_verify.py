"""tracerl verify: rows in, the same rows with reward and detail out."""

import json

import pytest

from tracerl_jax.launch import cli
from tracerl_jax.rewards import Verdict, register_reward, registry, settings

ROWS = [
    {"id": 7, "prediction": "so \\boxed{\\frac{2}{4}}", "ground_truth_answer": "1/2"},
    {"prediction": "The answer is 4", "ground_truth_answer": 5, "note": "ü"},
    {"prediction": "\\boxed{5}", "ground_truth_answer": "\\frac{1}{"},
    {"prediction": "\\frac{6}{8}", "ground_truth_answer": "3/4"},
    {"prediction": "so it is\n3/4", "ground_truth_answer": "3/4"},
]


@pytest.fixture
def verify(tmp_path, monkeypatch, capsys):
    """verify(rows, *flags) -> (status, stdout, stderr, graded rows or None)."""
    monkeypatch.setattr(cli, "set_up_logging", lambda: None)
    monkeypatch.setattr(registry, "_REWARDS", dict(registry._REWARDS))
    before = settings.current()

    def run(rows, *flags):
        source, target = tmp_path / "in.jsonl", tmp_path / "deep" / "out.jsonl"
        source.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        status = cli.main(["verify", "--input", str(source), "--output", str(target), *flags])
        shown = capsys.readouterr()
        graded = [json.loads(line) for line in target.read_text().splitlines()] if target.exists() else None
        return status, shown.out, shown.err, graded

    yield run
    settings.configure(before)


def test_rows_keep_their_columns_and_get_reward_and_detail(verify):
    status, out, _, graded = verify(ROWS, "--task", "math", "--config.reward.workers=1")
    assert status == 0
    assert graded == [
        {**ROWS[0], "reward": 1.0, "detail": "\\frac{2}{4} is 1/2 (by rules)"},
        {**ROWS[1], "reward": 0.0, "detail": "4 is not 5 (by rules)"},
        {**ROWS[2], "reward": None, "detail": "the reference answer \\frac{1}{ cannot be read as mathematics"},
        {**ROWS[3], "reward": 1.0, "detail": "\\frac{6}{8} is 3/4 (by rules)"},
        {**ROWS[4], "reward": 0.0, "detail": "no answer found"},
    ]
    assert out.startswith("math: mean 0.5000 over 4 answers, 1 without verdict, ") and out.endswith(" s\n")


def test_every_reward_goes_through(verify):
    rows = [{"prediction": "#5", "ground_truth_answer": "5"}]
    assert verify(rows, "--task", "arithmetic")[3][0]["reward"] == 1.0
    assert verify([{"prediction": "aé"}], "--reward", "ascii_share")[3] == [
        {"prediction": "aé", "reward": 0.5, "detail": ""}
    ]

    @register_reward("length_of_prompt")
    def length_of_prompt(prompts, completions, **columns):
        return [Verdict(len(prompt), f"level {level}") for prompt, level in zip(prompts, columns["level"], strict=True)]

    rows = [{"prediction": "x", "question": "four", "level": 2}, {"prediction": "x", "prompt": "six..."}]
    assert [(row["reward"], row["detail"]) for row in verify(rows, "--reward", "length_of_prompt")[3]] == [
        (4.0, "level 2"),
        (6.0, "level None"),
    ]


def test_reward_and_settings_of_a_config_file(verify, tmp_path):
    file = tmp_path / "my_run.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "from tracerl_jax.rewards import register_reward\n"
        "@register_reward('of_the_file')\n"
        "def f(prompts, completions, **columns): return [3.0 for _ in completions]\n"
        "def get_config():\n"
        "    return ConfigDict({'model': {'preset': 'demo'}, 'reward': {'answer_patterns': ('<(.*)>',)}})\n"
    )
    assert verify([{"prediction": ""}], "--reward", "of_the_file", "--config", str(file))[3][0]["reward"] == 3.0
    assert settings.current().answer_patterns == ("<(.*)>",) and not settings.current().bare_answers


BAD = [
    ('{"prediction": "5"}\n', "missing field 'ground_truth_answer' (it has prediction)"),
    ('{"ground_truth_answer": "5"}\n', "missing field 'prediction' (it has ground_truth_answer)"),
    ('{"prediction": 5, "ground_truth_answer": "5"}\n', "field 'prediction' must be a text, not 5"),
    ('{"prediction": "5", "ground_truth_answer": ["5"]}\n', "field 'ground_truth_answer' must be a number, or a text"),
    ("{\n", "not JSON"),
]


@pytest.mark.parametrize("row, problem", BAD)
def test_a_bad_row_is_named_and_nothing_is_written(verify, tmp_path, row, problem):
    status, out, error, graded = verify([ROWS[0], row], "--task", "math")
    assert (status, out, graded) == (2, "", None)
    assert f"{tmp_path}/in.jsonl:2: {problem}" in error and "on_bad_row=skip" in error


def test_bad_rows_can_be_skipped(verify, tmp_path):
    status, out, _, graded = verify([row for row, _ in BAD] + [ROWS[0]], "--task", "math", "--on_bad_row", "skip")
    assert status == 0 and [row["id"] for row in graded] == [7] and "over 1 answers, 0 without verdict" in out
    status, _, error, _ = verify([row for row, _ in BAD], "--task", "math", "--on_bad_row", "skip")
    assert status == 2 and "holds no usable row" in error


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--task", "maths"], "unknown task 'maths'; did you mean 'math'?"),
        (["--reward", "maths"], "unknown reward 'maths'; did you mean 'math'?"),
        (["--task", "math", "--reward", "math"], "not allowed with argument"),
        ([], "one of the arguments --task --reward is required"),
        (["--task", "math", "--config.reward.worker=1"], "did you mean --config.reward.workers?"),
        (["--task", "math", "--config.reward.workers=0"], "reward.workers is 0, must be at least 1"),
        (["--task", "math", "--config.reward.answer_patterns=('(',)"], "is no regular expression"),
    ],
)
def test_bad_flags(verify, flags, message):
    status, _, error, graded = verify(ROWS, *flags)
    assert status == 2 and message in error and graded is None


def test_a_reward_that_fails_is_named_and_gives_no_verdict(verify):
    @register_reward("broken")
    def broken(prompts, completions, **columns):
        raise OSError("the judge is down")

    status, out, _, graded = verify([{"prediction": "x"}], "--reward", "broken")
    assert status == 0 and graded[0]["reward"] is None and "the judge is down" in graded[0]["detail"]
    assert out.startswith("broken: no mean over 0 answers, 1 without verdict")
