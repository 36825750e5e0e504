"""tracerl eval: quality and speed of a model folder on tasks."""

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from tracerl_jax.errors import ConfigError, DataError, UserError

HELP = """Decode the problems of tasks with a model folder, judge the answers, and report accuracy with standard errors,
tokens per denoise step and per forward, and speed. dynamic reveals what is more confident than the threshold, at
temperature 1; static is greedy, one token per step, one answer per problem.

With --output every finished answer is kept, and the same command goes on where it was stopped or killed. Flags that
take TASK=VALUE may be repeated, once for a task."""

EPILOG = """examples:
  tracerl eval --model runs/demo/hf --tasks arithmetic
  tracerl eval --model SDAR-4B-Chat --tasks gsm8k,math500 --path gsm8k=gsm8k_test.jsonl --path math500=math500.jsonl \\
      --samples 4 --max_tokens 1024 --output results/sdar-4b
  tracerl eval --model runs/demo/hf --tasks arithmetic --options arithmetic=digits=3 --strategies static"""

LOG_SECONDS = 30  # between progress lines when stderr is no terminal

logger = logging.getLogger("tracerl_jax.launch.eval")

SCORES = ("avg", "pass", "maj")
COLUMNS = (  # heading, key of the result, format
    ("tokens/step", "tokens_per_step", "{:.2f}"),
    ("tokens/forward", "tokens_per_forward", "{:.2f}"),
    ("length", "response_length", "{:.1f}"),
    ("truncated", "truncated_fraction", "{:.1%}"),
    ("tokens/s", "tokens_per_second", "{:.0f}"),
    ("seconds", "wall_seconds", "{:.0f}"),
    ("no verdict", "no_verdict", "{}"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from tracerl_jax.launch.common import add_engine_flags, add_reward_settings

    flag = parser.add_argument
    flag("--model", required=True, metavar="DIR", help="Hugging Face folder with weights and tokenizer")
    flag("--tasks", required=True, help="comma-separated, such as gsm8k,math500,humaneval (all: docs/tasks.md)")
    flag("--path", action="append", metavar="TASK=SOURCE", help="held-out rows: file, hub:.. or package:..")
    flag("--options", action="append", metavar="TASK=K=V,..", help="e.g. arithmetic=max_operands=4,digits=3")
    flag("--template", help="plain, chat, sdar, dream, llada, .., or a text with {question} (default: each task's own)")
    flag("--strategies", default="dynamic,static", help="comma-separated (default: %(default)s)")
    flag("--limit", action="append", metavar="[TASK=]N", help="only the first N problems")
    flag("--samples", action="append", metavar="[TASK=]K", help="answers per problem (default: 1; greedy: always 1)")
    flag("--max_tokens", type=int, default=256, help="completion limit (default: %(default)s)")
    flag("--max_prompt_tokens", type=int, default=1024, help="longer prompts are bad rows (default: %(default)s)")
    flag("--block_size", type=int, help="default: the model's")
    flag("--threshold", type=float, default=0.9, help="of dynamic (default: %(default)s)")
    flag("--temperature", type=float, default=1.0, help="of dynamic (default: %(default)s)")
    flag("--seed", type=int, default=0, help="of dynamic (default: %(default)s)")
    add_engine_flags(flag)
    flag("--on_bad_row", choices=("fail", "skip"), default="fail", help="unusable rows (default: %(default)s)")
    flag("--output", metavar="DIR", help="folder for results.json, every answer, and what is needed to go on")
    flag("--overwrite", action="store_true", help="forget what is in --output")
    add_reward_settings(parser)


def run(args: argparse.Namespace) -> int:
    from tracerl_jax.evals.items import Items, ResultsFolder, ShareOfItems
    from tracerl_jax.evals.manifest import make_manifest
    from tracerl_jax.evals.runner import evaluate, protocol, samples_of
    from tracerl_jax.interop.tokenizer import decode
    from tracerl_jax.launch.common import apply_reward_settings, engine_config
    from tracerl_jax.parallel.distributed import is_lead, process_index
    from tracerl_jax.parallel.facts import check_alike
    from tracerl_jax.rewards import start_rewards
    from tracerl_jax.rollout.folder import load_weights, open_engine

    _require_positive(args, "max_tokens", "max_prompt_tokens", "slots")
    check_alike({name: value for name, value in vars(args).items() if name != "overrides"}
                | {"overrides": list(args.overrides)})  # fmt: skip
    apply_reward_settings(args)
    samples = _per_task(args, "samples", 1, _positive)
    strategies = {
        name: protocol(
            name, max_tokens=args.max_tokens, block_size=args.block_size, threshold=args.threshold,
            temperature=args.temperature, seed=args.seed,
        )
        for name in args.strategies.split(",")
    }  # fmt: skip
    tasks = _load_tasks(args)
    start_rewards({name for task in tasks.values() for name in (task.accuracy_reward, *task.rewards)})
    # All requests are checked before the weights are read, which may take minutes.
    engine, tokenizer = open_engine(args.model, engine_config(args), args.dtype)
    if tokenizer is None:
        raise ConfigError(f"{args.model}: has no tokenizer, which evaluation needs; put its files into the folder")
    problems = {name: _problems(args, task, engine, tokenizer, strategies.values()) for name, task in tasks.items()}

    results: dict[str, dict[str, Any]] = {name: {} for name in tasks}
    with contextlib.ExitStack() as stack:
        folder = None
        if args.output and is_lead():
            described = {name: (task, problems[name], samples[name]) for name, task in tasks.items()}
            manifest = make_manifest(args.model, args.dtype, described, strategies)
            folder = stack.enter_context(ResultsFolder(args.output, manifest, args.overwrite))
        load_weights(engine, args.model)
        for name, task in tasks.items():
            for strategy, options in strategies.items():
                items = Items()
                if folder:
                    items = folder.items(name, strategy)
                elif args.output:
                    items = ShareOfItems(args.output, name, strategy, process_index())
                total = len(problems[name]) * samples_of(options, samples[name])
                result = evaluate(
                    engine, problems[name], task.rewards, task.accuracy_reward, options=options,
                    samples_per_prompt=samples[name], decode=lambda ids: decode(tokenizer, ids), items=items,
                    watch=_progress(f"{name} {strategy}", len(items.rows), total) if is_lead() else iter,
                )  # fmt: skip
                results[name][strategy] = result.summary() | result.speed()
                if folder:
                    folder.write_result(name, strategy, results[name][strategy])
    if is_lead():
        print(_table(results))
    if args.output and is_lead():
        print(f"results and answers: {args.output}")
    return 0


def _load_tasks(args: argparse.Namespace) -> dict[str, Any]:
    """The tasks by name. Raises ConfigError for one that is named twice or cannot be loaded."""
    from tracerl_jax.data.tasks import load_task

    names = args.tasks.split(",")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"--tasks names {twice[0]} twice; name every task once")
    paths = _per_task(args, "path", None, str)
    limits = _per_task(args, "limit", None, _positive)
    options = _per_task(args, "options", {}, _parse_options)
    return {
        name: load_task(
            name, eval_path=paths[name], template=args.template, eval_limit=limits[name], on_bad_row=args.on_bad_row,
            options=options[name],
        )
        for name in names
    }  # fmt: skip


def _problems(args: argparse.Namespace, task, engine, tokenizer, strategies: Iterable) -> list:
    """The task's held-out rows as prompts, none of which the engine will refuse."""
    from tracerl_jax.data.jsonl import BadRows
    from tracerl_jax.data.prompts import encode_prompts
    from tracerl_jax.data.tasks import SOURCE
    from tracerl_jax.rollout.options import Request

    problems = encode_prompts(
        task.test, tokenizer, task.template, args.max_prompt_tokens, on_bad_row=args.on_bad_row
    )
    kept, bad = [], BadRows(args.on_bad_row)
    for problem in problems:
        where = problem.columns.get(SOURCE) or f"{task.name}, row {problem.index + 1}"
        try:
            for options in strategies:
                engine.check(Request(problem.prompt_ids, options), where)
        except UserError as error:
            bad.add(str(error), "correct it")
        else:
            kept.append(problem)
    bad.report(len(kept))
    if not kept:
        raise DataError(f"{task.name}: the model can take none of the {len(problems)} problems")
    return kept


Value = TypeVar("Value")


def _per_task(
    args: argparse.Namespace, flag: str, default: Value, convert: Callable[[str], Value]
) -> dict[str, Value]:
    """{task: value} of a flag given as TASK=VALUE, once for a task; a number alone counts for all tasks.

    `convert` raises ValueError saying what is wrong with the value.
    """
    tasks = args.tasks.split(",")
    values = dict.fromkeys(tasks, default)
    for word in getattr(args, flag) or ():
        task, equals, text = word.partition("=")
        chosen = [task]
        if not equals and word.isdecimal():
            chosen, text = tasks, word
        elif not equals:
            raise ConfigError(f"--{flag} {word}: name the task too, as in --{flag} {tasks[0]}={word}")
        elif task not in tasks:
            raise ConfigError(f"--{flag} {word}: {task} is none of --tasks {args.tasks}")
        try:
            values |= dict.fromkeys(chosen, convert(text))
        except ValueError as error:
            raise ConfigError(f"--{flag} {word}: {error}") from None
    return values


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("the value must be an integer of at least 1")
    return int(text)


def _parse_options(text: str) -> dict[str, int]:
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    for key, _, value in pairs:
        if not value.isdecimal():
            raise ValueError(f"{key}={value} is not of the form NAME=INTEGER, such as digits=3")
    return {key.strip(): int(value) for key, _, value in pairs}


def _require_positive(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}; it must be at least 1")


def _progress(name: str, done: int, total: int) -> Callable[[Iterable], Iterator]:
    """A bar on a terminal, a line now and then elsewhere. `done` answers were there before."""

    def watch(answers: Iterable) -> Iterator:
        if done:
            logger.info("%s: going on behind %d of %d answers", name, done, total)
        if sys.stderr.isatty():
            from tqdm import tqdm

            yield from tqdm(answers, desc=name, initial=done, total=total, unit="answer", dynamic_ncols=True)
            return
        last = time.monotonic()
        for count, answer in enumerate(answers, start=done + 1):
            yield answer
            if count == total or time.monotonic() - last > LOG_SECONDS:
                last = time.monotonic()
                logger.info("%s: %d of %d answers", name, count, total)

    return watch


def _table(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """A line per task and strategy; scores in percent, with their standard errors."""
    headings = [f"{score}@k" for score in SCORES] + [heading for heading, _, _ in COLUMNS]
    rows = [["task", "strategy", "problems", "k", *headings]]
    for task, by_strategy in results.items():
        for strategy, result in by_strategy.items():
            k = result["samples"] // result["n"]
            scores = [_shown(result["scores"].get(f"{score}@{k}")) for score in SCORES]
            values = [form.format(result[key]) for _, key, form in COLUMNS]
            rows.append([task, strategy, str(result["n"]), str(k), *scores, *values])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _shown(score: Mapping[str, float | None] | None) -> str:
    if score is None or score["value"] is None:
        return "-"
    error = "" if score["stderr"] is None else f" \N{PLUS-MINUS SIGN} {100 * score['stderr']:.1f}"
    return f"{100 * score['value']:.1f}{error}"
