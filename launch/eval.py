"""tracerl eval: accuracy and tokens per step of a model folder on a task."""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from tracerl_jax.errors import ConfigError

HELP = """Decode the problems of a task with a model folder, judge the answers, and report accuracy and tokens per
denoise step. dynamic reveals what is more confident than the threshold, at temperature 1; static is greedy, one token
per step."""

EPILOG = """examples:
  tracerl eval --model runs/demo/hf --task arithmetic
  tracerl eval --model SDAR-4B-Chat --task gsm8k --path gsm8k_test.jsonl --max_tokens 1024 --output out.json"""

LOG_SECONDS = 30  # between progress lines when stderr is no terminal

logger = logging.getLogger("tracerl_jax.launch.eval")

COLUMNS = (  # heading, key of the summary, format
    ("accuracy", "accuracy", "{:.1%}"),
    ("tokens/step", "tokens_per_step", "{:.2f}"),
    ("tokens/forward", "tokens_per_forward", "{:.2f}"),
    ("length", "response_length", "{:.1f}"),
    ("truncated", "truncated_fraction", "{:.1%}"),
    ("problems", "n", "{}"),
    ("no verdict", "no_verdict", "{}"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from tracerl_jax.launch.common import add_engine_flags

    flag = parser.add_argument
    flag("--model", required=True, metavar="DIR", help="Hugging Face folder with weights and tokenizer")
    flag("--task", required=True, help="arithmetic, gsm8k, math, math500 or jsonl")
    flag("--path", metavar="FILE", help="rows with question and ground_truth_answer, for tasks read from a file")
    flag("--options", default="", metavar="K=V,..", help="of the arithmetic task, e.g. max_operands=4,digits=3")
    flag("--template", help="plain, chat, math, math_think or a text with {question} (default: the task's)")
    flag("--strategies", default="dynamic,static", help="comma-separated (default: %(default)s)")
    flag("--limit", type=int, metavar="N", help="only the first N problems")
    flag("--samples", type=int, default=1, metavar="K", help="answers per problem (greedy: always 1)")
    flag("--max_tokens", type=int, default=256, help="completion limit (default: %(default)s)")
    flag("--max_prompt_tokens", type=int, default=1024, help="longer prompts are bad rows (default: %(default)s)")
    flag("--block_size", type=int, help="default: the model's")
    flag("--threshold", type=float, default=0.9, help="of dynamic (default: %(default)s)")
    flag("--temperature", type=float, default=1.0, help="of dynamic (default: %(default)s)")
    flag("--seed", type=int, default=0, help="of dynamic (default: %(default)s)")
    add_engine_flags(flag)
    flag("--on_bad_row", choices=("fail", "skip"), default="fail", help="unusable rows (default: %(default)s)")
    flag("--output", metavar="OUT.json", help='{"dynamic": {"accuracy": .., "tokens_per_step": .., "n": ..}, ..}')
    flag("--samples_output", metavar="S.jsonl", help="one row per answer: text, verdict, trace")


def run(args: argparse.Namespace) -> int:
    from tracerl_jax.data.jsonl import write_jsonl
    from tracerl_jax.data.prompts import encode_prompts
    from tracerl_jax.data.tasks import load_task
    from tracerl_jax.evals.runner import evaluate, protocol
    from tracerl_jax.files import write_json
    from tracerl_jax.interop.hf_load import load_hf
    from tracerl_jax.interop.tokenizer import decode, load_tokenizer, valid_vocab
    from tracerl_jax.launch.common import engine_config
    from tracerl_jax.parallel.mesh import make_mesh
    from tracerl_jax.rollout.engine import Engine

    _require_positive(args, "limit", "samples", "max_tokens", "max_prompt_tokens", "slots")
    strategies = {
        name: protocol(
            name, max_tokens=args.max_tokens, block_size=args.block_size, threshold=args.threshold,
            temperature=args.temperature, seed=args.seed,
        )
        for name in args.strategies.split(",")
    }  # fmt: skip
    task = load_task(
        args.task, eval_path=args.path, template=args.template, eval_limit=args.limit, on_bad_row=args.on_bad_row,
        options=_parse_options(args.options),
    )  # fmt: skip
    tokenizer = load_tokenizer(args.model)
    if tokenizer is None:
        raise ConfigError(f"{args.model}: has no tokenizer, which evaluation needs; put its files into the folder")
    problems = encode_prompts(
        task.test, tokenizer, task.template, args.max_prompt_tokens, on_bad_row=args.on_bad_row
    )
    model, params = load_hf(
        args.model, mesh=make_mesh(), dtype=args.dtype, overrides={"dtype": args.dtype}
    )
    valid = valid_vocab(tokenizer, model.config.vocab_size)
    engine = Engine(model, params, engine_config(args, valid_vocab=valid))

    results, records = {}, []
    for name, options in strategies.items():
        answers = len(problems) * (args.samples if options.temperature else 1)
        result = evaluate(
            engine, problems, task.rewards, task.accuracy_reward, options=options, samples_per_prompt=args.samples,
            decode=lambda ids: decode(tokenizer, ids), watch=_progress(name, answers),
        )  # fmt: skip
        results[name] = result.summary()
        records += [{"strategy": name, **record} for record in result.records]
    print(_table(results))
    if args.output:
        write_json(args.output, results)
    if args.samples_output:
        write_jsonl(args.samples_output, records)
    return 0


def _require_positive(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} is {value}; it must be at least 1")


def _parse_options(text: str) -> dict[str, int]:
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    for key, _, value in pairs:
        if not value.isdecimal():
            raise ConfigError(f"--options: {key}={value} is not of the form NAME=INTEGER, such as digits=3")
    return {key.strip(): int(value) for key, _, value in pairs}


def _progress(name: str, total: int) -> Callable[[Iterable], Iterator]:
    """A bar on a terminal, a line now and then elsewhere."""

    def watch(traces: Iterable) -> Iterator:
        if sys.stderr.isatty():
            from tqdm import tqdm

            yield from tqdm(traces, desc=name, total=total, unit="answer", dynamic_ncols=True)
            return
        last = time.monotonic()
        for done, trace in enumerate(traces, start=1):
            yield trace
            if done == total or time.monotonic() - last > LOG_SECONDS:
                last = time.monotonic()
                logger.info("%s: %d of %d answers", name, done, total)

    return watch


def _table(results: dict[str, dict]) -> str:
    rows = [["strategy", *(heading for heading, _, _ in COLUMNS)]]
    for name, result in results.items():
        values = [(result[key], form) for _, key, form in COLUMNS]
        rows.append([name, *("-" if value is None else form.format(value) for value, form in values)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
