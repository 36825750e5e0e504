r"""Tasks by name: training and held-out rows, their rewards and their prompt template.

A row is a dict with `question` (or `prompt`), `ground_truth_answer` (for rewards) and `response` (for supervised
training), plus any columns of its own, which reach the reward functions. Rows read from a file also get
`_source` = "file:line", for messages.

| task         | rows                                          | template | rewards     |
|--------------|-----------------------------------------------|----------|-------------|
| arithmetic   | procedural (data/arithmetic.py), see `options`| plain    | exact_match |
| gsm8k        | file; response = solution + boxed answer      | chat     | math        |
| math         | file                                          | chat     | math        |
| math500      | file                                          | chat     | math        |
| jsonl        | any file; an answer or a response in each row | plain    | math        |
"""

import dataclasses
import difflib
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tracerl_jax.data.arithmetic import Difficulty, make_problems
from tracerl_jax.data.jsonl import read_jsonl
from tracerl_jax.errors import ConfigError, DataError
from tracerl_jax.rewards import get_reward

SOURCE = "_source"


@dataclass(frozen=True)
class Task:
    name: str
    train: list[dict]  # empty when no training file was given
    test: list[dict]  # empty when no held-out file was given
    rewards: dict[str, float]  # name -> weight, what training maximises
    accuracy_reward: str  # the reward whose mean is called accuracy; 1 is right
    template: str  # see data/prompts.py


@dataclass(frozen=True)
class ArithmeticOptions(Difficulty):
    """`options` of the arithmetic task."""

    train_count: int = 20_000
    test_count: int = 500
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if min(self.train_count, self.test_count) < 1:
            raise ConfigError(
                f"arithmetic needs train_count and test_count >= 1, got {self.train_count} and {self.test_count}"
            )


@dataclass(frozen=True)
class _FileTask:
    template: str
    reward: str
    answer_required: bool  # else a response will do
    boxed_solution: bool  # `solution` becomes the response, ending in the boxed answer


_FILE_TASKS = {
    "gsm8k": _FileTask("chat", "math", answer_required=True, boxed_solution=True),
    "math": _FileTask("chat", "math", answer_required=True, boxed_solution=True),
    "math500": _FileTask("chat", "math", answer_required=True, boxed_solution=True),
    "jsonl": _FileTask("plain", "math", answer_required=False, boxed_solution=False),
}
TASKS = ("arithmetic", *_FILE_TASKS)


def accuracy_reward(name: str) -> str:
    """Name of the reward that says whether an answer to task `name` is right. `ConfigError` for an unknown task."""
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"unknown task {name!r}; {hint}tasks: {', '.join(TASKS)}")
    return "exact_match" if name == "arithmetic" else _FILE_TASKS[name].reward


def load_task(
    name: str,
    *,
    path: str | os.PathLike | None = None,
    eval_path: str | os.PathLike | None = None,
    template: str | None = None,
    rewards: Mapping[str, float] | None = None,
    train_limit: int | None = None,
    eval_limit: int | None = None,
    options: Mapping[str, int] | None = None,
    on_bad_row: str = "fail",
) -> Task:
    """Reads or makes the rows of task `name`.

    `path` and `eval_path` are the training and held-out files; a task read from files needs at least one. The limits
    keep the first rows. `template` and `rewards` replace the task's own (for `jsonl` the first reward is then also the
    accuracy). `options` are the fields of `ArithmeticOptions`.
    Raises `ConfigError` for unknown names and unusable combinations, `DataError` for unusable files and rows.
    """
    accuracy_reward(name)
    for reward in rewards or {}:
        get_reward(reward)
    if name == "arithmetic":
        if path or eval_path:
            raise ConfigError("task arithmetic makes its own rows; use task jsonl to read a file")
        task = _arithmetic(options or {})
        train, test = task.train[:train_limit], task.test[:eval_limit]
        task = dataclasses.replace(task, train=train, test=test)
    else:
        if options:
            raise ConfigError(f"task {name} takes no options, got {', '.join(options)}")
        if not path and not eval_path:
            raise ConfigError(f"task {name} reads files: set its path (training rows) or eval_path (held-out rows)")
        task = _file_task(name, path, eval_path, train_limit, eval_limit, on_bad_row, rewards)
    return dataclasses.replace(
        task, template=template or task.template, rewards=dict(rewards) if rewards else task.rewards
    )


def _arithmetic(options: Mapping[str, int]) -> Task:
    known = [field.name for field in dataclasses.fields(ArithmeticOptions)]
    unknown = set(options) - set(known)
    if unknown:
        raise ConfigError(f"unknown arithmetic options {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    wanted = ArithmeticOptions(**options)
    return Task(
        name="arithmetic",
        train=make_problems(wanted.seed, wanted.train_count, "train", wanted),
        test=make_problems(wanted.seed, wanted.test_count, "test", wanted),
        rewards={accuracy_reward("arithmetic"): 1.0},
        accuracy_reward=accuracy_reward("arithmetic"),
        template="plain",
    )


def _file_task(name, path, eval_path, train_limit, eval_limit, on_bad_row, rewards) -> Task:
    kind = _FILE_TASKS[name]
    accuracy = next(iter(rewards)) if rewards and name == "jsonl" else kind.reward
    if kind.answer_required:
        needs = ("ground_truth_answer",)
    elif accuracy == kind.reward:
        needs = ("ground_truth_answer", "response", "ids")
    else:
        needs = ()  # a reward of the user's own knows what it needs

    def load(file, limit):
        rows = load_rows(file, one_of=needs, on_bad_row=on_bad_row, limit=limit) if file else []
        return [_with_response(row) for row in rows] if kind.boxed_solution else rows

    return Task(
        name=name,
        train=load(path, train_limit),
        test=load(eval_path, eval_limit),
        rewards={kind.reward: 1.0},
        accuracy_reward=accuracy,
        template=kind.template,
    )


def load_rows(
    path: str | os.PathLike, *, one_of: Sequence[str] = (), on_bad_row: str = "fail", limit: int | None = None
) -> list[dict]:
    """Rows of a JSONL (or JSON array) file or a data set `hub:NAME[:SPLIT]`, with `question` and `_source` set.

    Bad rows are those of `read_jsonl`, rows without a text in `question` or `prompt` (unless they are token ids, as
    `tracerl generate` writes them), and rows without any of the fields `one_of`. Raises `DataError` for them (or skips
    them), and when no row is left.
    """

    def check(row: dict) -> str:
        question = row.get("question", row.get("prompt"))
        if not (isinstance(question, str) and question.strip()) and row.get("prompt_ids") is None:
            return "no text in field 'question' (or 'prompt')"
        if one_of and all(row.get(field) is None for field in one_of):
            return f"missing field {' or '.join(map(repr, one_of))} (it has {', '.join(row)})"
        return ""

    lines = itertools.islice(read_jsonl(path, on_bad_row=on_bad_row, check=check), limit)
    rows = [{"question": row.get("prompt"), **row, SOURCE: f"{path}:{line}"} for line, row in lines]
    if not rows:
        example = '{"question": "1+1=", "ground_truth_answer": "2"}'
        raise DataError(f"{path}: holds no usable row; each line must be a JSON object such as {example}")
    return rows


def _with_response(row: dict) -> dict:
    """The row with `response`, where it has a solution; it ends in the boxed answer, as the prompt asks."""
    if "response" in row or not isinstance(row.get("solution"), str):
        return row
    solution = row["solution"]
    if "\\boxed" not in solution:
        solution += f"\nThe answer is $\\boxed{{{row['ground_truth_answer']}}}$."
    return {**row, "response": solution}
