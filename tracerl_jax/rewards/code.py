"""The rewards `code` (1 when a program passes all tests of its problem, else 0) and `code_share` (the share it passes).

The program is taken from the completion by programs.py and runs in the sandbox, once per test. A row says in
`test_method` how it is tested:

- "function": `test_list` (or `tests`, `test`) holds statements, one text per test, none of which may raise; with
  `entry_point`, a test may define `check(candidate)` instead, as HumanEval does.
- "stdio": the program reads `test_input[i]` and must print `test_output[i]`, compared word by word, and end with
  status 0.

`test_time_limit` is the CPU time of a test in seconds, `prefix` the beginning of the program, which the completion
continues. The rows of HumanEval (`prompt`, `test`, `entry_point`) and MBPP (`test_list`, `test_setup_code`,
`test_imports`) are read as they are. Without usable tests there is no verdict.
"""

import ast
import atexit
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tracerl_jax.errors import DataError
from tracerl_jax.rewards import settings
from tracerl_jax.rewards.programs import extract_program, preamble
from tracerl_jax.rewards.registry import Verdict, register_reward
from tracerl_jax.rewards.sandbox import Job, Reply, Sandbox

DEFAULT_SECONDS = 3.0  # what HumanEval's own harness gives


@dataclass(frozen=True)
class Problem:
    seconds: float  # CPU time of a test
    prefix: str = ""  # what the completion continues
    setup: str = ""  # put behind the program, whose classes it may use
    tests: tuple[str, ...] = ()  # statements, or
    cases: tuple[tuple[str, str], ...] = ()  # (input, output)
    given: str = ""  # definitions that the tests may trust
    entry_point: str | None = None


@dataclass(frozen=True)
class Graded:
    """`passed` has an entry per test; None when the sandbox could not tell, or the row has no usable tests."""

    passed: tuple[bool, ...] | None
    detail: str


_sandbox: Sandbox | None = None


def start() -> None:
    """Starts the sandbox, as the first batch would. Raises `ConfigError` when it cannot be as the settings ask."""
    global _sandbox
    if _sandbox is None:
        _sandbox = Sandbox(settings.current())
        atexit.register(stop)


def stop() -> None:
    """Ends the sandbox; the next batch starts it again, with the settings of then."""
    global _sandbox
    if _sandbox is not None:
        _sandbox.close()
        _sandbox = None
        atexit.unregister(stop)


settings.on_change(stop)


def check_problem(row: Mapping[str, object]) -> str:
    """What keeps a row from being used; "" when nothing does."""
    try:
        read_problem(row)
    except DataError as error:
        return str(error)
    return ""


@register_reward("code", start=start, check=check_problem)
def code_reward(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[object]) -> list[Verdict]:
    """1 for a program that passes all tests, else 0; see the module."""
    graded = grade(completions, _rows(columns, len(completions)))
    return [Verdict(None if one.passed is None else float(all(one.passed)), one.detail) for one in graded]


@register_reward("code_share", start=start, check=check_problem)
def code_share_reward(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[object]) -> list[Verdict]:
    """The share of tests that a program passes."""
    graded = grade(completions, _rows(columns, len(completions)))
    return [
        Verdict(None if one.passed is None else sum(one.passed) / len(one.passed), one.detail) for one in graded
    ]  # fmt: skip


def _rows(columns: Mapping[str, Sequence[object]], count: int) -> list[dict]:
    return [{name: values[i] for name, values in columns.items() if values[i] is not None} for i in range(count)]


def grade(completions: Sequence[str], rows: Sequence[Mapping[str, object]]) -> list[Graded]:
    """Runs the program of each completion on the tests of its row, in parallel; results in order."""
    problems: list[Problem | str] = []
    for row in rows:
        try:
            problems.append(read_problem(row))
        except DataError as error:
            problems.append(str(error))
    jobs = [
        _jobs(problem, completion) if isinstance(problem, Problem) else []
        for problem, completion in zip(problems, completions, strict=True)
    ]
    flat = [job for each in jobs for job in each]
    if flat:
        start()
    replies = iter(_sandbox.run(flat) if flat else ())
    return [
        _graded(problem, [next(replies) for _ in each]) if isinstance(problem, Problem) else Graded(None, problem)
        for problem, each in zip(problems, jobs, strict=True)
    ]


def _jobs(problem: Problem, completion: str) -> list[Job]:
    program = extract_program(completion, problem.prefix)
    if problem.setup:
        program = f"{program}\n{problem.setup}"
    if problem.cases:
        return [Job(program, problem.seconds, input=text) for text, _ in problem.cases]
    return [
        Job(
            program,
            problem.seconds,
            test={
                "test": test,
                "given": problem.given,
                "subjects": [problem.entry_point] if problem.entry_point else [],
                "own_equality": settings.current().own_equality,
            },
        )
        for test in problem.tests
    ]


def _graded(problem: Problem, replies: list[Reply]) -> Graded:
    broken = next((reply for reply in replies if reply.status == "broken"), None)
    if broken:
        return Graded(None, f"the sandbox does not work: {broken.detail}")
    reasons = [
        _case_failure(reply, problem.cases[i][1]) if problem.cases else _test_failure(reply)
        for i, reply in enumerate(replies)
    ]
    passed = tuple(not reason for reason in reasons)
    if all(passed):
        return Graded(passed, f"all {len(passed)} tests passed")
    first = passed.index(False)
    return Graded(passed, f"{sum(passed)} of {len(passed)} tests passed; test {first + 1}: {reasons[first]}")


def _test_failure(reply: Reply) -> str:
    return "" if reply.status == "passed" else reply.detail


def _case_failure(reply: Reply, expected: str) -> str:
    if reply.status != "done":
        return reply.detail
    if reply.exit != 0:
        return f"exit status {reply.exit} ({reply.detail})" if reply.detail else f"exit status {reply.exit}"
    return "" if reply.output.split() == expected.split() else "wrong output"


# ---- rows ----


def read_problem(row: Mapping[str, object]) -> Problem:
    """Raises `DataError` saying what is wrong with the row."""
    seconds = row.get("test_time_limit", DEFAULT_SECONDS)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise DataError(f"test_time_limit is {seconds!r}, must be a number of seconds above 0")
    method = row.get("test_method") or ("stdio" if row.get("test_input") is not None else "function")
    if method not in ("function", "stdio"):
        raise DataError(f"test_method is {method!r}, must be 'function' or 'stdio'")
    if method == "stdio":
        return Problem(seconds, prefix=_text(row, "prefix"), cases=_cases(row))
    entry_point = _text(row, "entry_point") or None
    prefix = _text(row, "prefix")
    if not prefix and entry_point and f"def {entry_point}" in _text(row, "prompt"):
        prefix = _text(row, "prompt")  # HumanEval
    return Problem(
        seconds,
        prefix=prefix,
        setup=_text(row, "test_setup_code"),
        tests=_tests(row, entry_point),
        given="\n".join([*_texts(row, "test_imports"), preamble(prefix)]),
        entry_point=entry_point,
    )


def _tests(row: Mapping[str, object], entry_point: str | None) -> tuple[str, ...]:
    name = next((name for name in ("test_list", "tests", "test") if row.get(name) is not None), None)
    if name is None:
        raise DataError("no tests: a function task needs test_list (or tests, or test)")
    tests = (_text(row, name),) if name == "test" and isinstance(row[name], str) else _texts(row, name)
    if not tests:
        raise DataError(f"{name} is empty")
    if entry_point:
        tests = tuple(f"{test}\ncheck({entry_point})" if _only_defines_check(test) else test for test in tests)
    for number, test in enumerate(tests, 1):
        try:
            ast.parse(test)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise DataError(f"test {number} of {name} is no Python: {error}") from error
    return tests


def _only_defines_check(test: str) -> bool:
    return "def check(" in test and not any(line.startswith("check(") for line in test.splitlines())


def _cases(row: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    inputs, outputs = _texts(row, "test_input"), _texts(row, "test_output")
    if not inputs or len(inputs) != len(outputs):
        raise DataError(
            f"test_input has {len(inputs)} texts and test_output {len(outputs)}: a stdio task needs as many, and one"
        )
    return tuple(zip(inputs, outputs, strict=True))


def _text(row: Mapping[str, object], name: str) -> str:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{name} is a {type(value).__name__}, must be a text")
    return value or ""


def _texts(row: Mapping[str, object], name: str) -> tuple[str, ...]:
    value = row.get(name)
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise DataError(f"{name} must be a list of texts")
    return tuple(value)
