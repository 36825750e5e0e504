"""tracerl generate: complete prompts with a model folder and record how every token was revealed."""

import argparse
import contextlib
import dataclasses
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence

logger = logging.getLogger("tracerl_jax.launch.generate")

HELP = """Complete a prompt, shown block by block as it is decoded, or the prompts of a JSONL file. A prompt as text
is put into the tokenizer's chat template as a user message.

Rows of the file: `prompt` (text) or `prompt_ids` (taken as they are), and any of the decoding fields below, which
override the flags: strategy, score, threshold, entropy_bound, denoising_steps, block_size, max_tokens, temperature,
top_k, top_p, seed, ignore_eos, confidence, first_token, pad_penalty, stop_ids. A field that looks like one of them
misspelt is refused.

Output rows, in input order: all columns of the input row, its line, ids, text (null when the folder has no tokenizer),
step_map (denoise step of every token), logprobs, denoise_forwards (denoise steps), forwards (those, less what drafts
save, and commits), stop_reason, and what `tracerl score` needs to replay them.

A completion depends on its prompt, options, seed and sample index, not on the batch."""

EPILOG = """examples:
  tracerl generate --model SDAR-4B-Chat --prompt "What is 12*34?" --temperature 0
  tracerl generate --model SDAR-4B-Chat --prompt "What is 12*34?" --num_samples 3 --trace page.html
  tracerl generate --model SDAR-4B-Chat --prompts prompts.jsonl --output traces.jsonl
  tracerl generate --model SDAR-4B-Chat --prompts p.jsonl --output t.jsonl --temperature 0 --strategy static
  echo '{"prompt_ids": [5, 6, 7], "max_tokens": 32}' > p.jsonl    # works without a tokenizer"""

STREAM_FORWARDS = 4  # until the terminal shows what is new


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from tracerl_jax.diffusion.sampling import CONFIDENCES
    from tracerl_jax.launch.common import add_decoding_flags, add_engine_flags
    from tracerl_jax.rollout.options import SamplingOptions

    flag = parser.add_argument
    flag("--model", required=True, metavar="DIR", help="Hugging Face folder")
    what = parser.add_mutually_exclusive_group(required=True).add_argument
    what("--prompt", metavar="TEXT", help="complete this on the terminal")
    what("--prompts", metavar="IN.jsonl", help="rows to complete")
    flag("--output", metavar="OUT.jsonl", help="of the rows; appears when all are done")
    flag("--trace", metavar="PAGE.html", help="also write a page that replays how every completion was denoised")
    flag("--num_samples", type=int, default=1, metavar="K", help="completions per prompt, one after the other")
    flag("--raw", action="store_true", help="tokenize the prompt as it is, without the chat template")
    add_engine_flags(flag)
    flag("--on_bad_row", choices=("fail", "skip"), default="fail", help="unusable rows (default: %(default)s)")

    flag = parser.add_argument_group("decoding, where a row does not say").add_argument
    add_decoding_flags(flag)
    flag("--seed", type=int, help="default: %(default)s")
    flag("--ignore_eos", action="store_true", help="do not stop at the model's stop ids")
    flag("--confidence", help=f"what scores come from: {', '.join(CONFIDENCES)} (default: %(default)s)")
    flag("--first_token", action="store_true", help="reveal a block's first token first, alone (Dream's sampler)")
    flag("--pad_penalty", type=float, help="how many times worse pad tokens count (default: %(default)s)")
    flag("--stop_ids", type=int, nargs="+", metavar="ID", help="stop at these too")
    parser.set_defaults(**dataclasses.asdict(SamplingOptions()))


def run(args: argparse.Namespace) -> int:
    import time

    from tracerl_jax.diffusion.trace import broken_traces
    from tracerl_jax.files import replacing, to_line
    from tracerl_jax.report.trace_page import trace_page
    from tracerl_jax.rollout.folder import load_weights

    _check_flags(args)
    engine, tokenizer = _engine(args)  # before the weights, which may take minutes: a bad row is named at once
    samples = [
        (row.columns, dataclasses.replace(row.request, sample_index=i))
        for row in _rows(args, engine, tokenizer)
        for i in range(args.num_samples)
    ]
    columns, requests = zip(*samples, strict=True)
    print(_memory(engine, requests), file=sys.stderr)
    with contextlib.ExitStack() as files:
        # Opened before anything is decoded: a place that cannot be written is named at once, too.
        output, page = (path and files.enter_context(replacing(path)) for path in (args.output, args.trace))
        load_weights(engine, args.model)
        started = time.monotonic()
        decode = _counted if args.prompt is None else _shown
        traces = decode(engine, requests, tokenizer)
        seconds = time.monotonic() - started
        if output:
            output.writelines(map(to_line, _records(columns, traces, tokenizer)))
        if page:
            page.write(trace_page(args.model, columns, traces, tokenizer))
    if broken := len(broken_traces(traces)):
        logger.warning("%d of %d completions mean nothing: the model gave NaN or infinite numbers", broken, len(traces))
    written = " and ".join(filter(None, (args.output, args.trace)))
    if written:
        print(f"wrote {len(traces)} completions to {written}", file=sys.stderr if args.prompt else sys.stdout)
    print(_summary(traces, seconds), file=sys.stderr)
    return 0


def _check_flags(args: argparse.Namespace) -> None:
    from tracerl_jax.errors import ConfigError

    if args.num_samples < 1:
        raise ConfigError(f"--num_samples is {args.num_samples}; it must be at least 1")
    if args.prompts and not (args.output or args.trace):
        raise ConfigError("--prompts needs --output OUT.jsonl, --trace PAGE.html, or both, to write to")


def _engine(args: argparse.Namespace):
    """(engine without weights, tokenizer or None)."""
    from tracerl_jax.errors import ConfigError
    from tracerl_jax.launch.common import engine_of_flags
    from tracerl_jax.rollout.folder import open_engine

    config = engine_of_flags(args)
    if args.prompt is not None:
        slots = min(args.slots, args.num_samples)
        config = dataclasses.replace(config, slots=slots, forwards_per_chunk=STREAM_FORWARDS)
    engine, tokenizer = open_engine(args.model, config, args.dtype)
    if args.prompt is not None and tokenizer is None:
        raise ConfigError(
            f"--prompt needs a tokenizer, and {args.model} has none; put its files into the folder, or give token "
            'ids: --prompts IN.jsonl with rows such as {"prompt_ids": [5, 6, 7]}'
        )
    return engine, tokenizer


def _rows(args: argparse.Namespace, engine, tokenizer) -> list:
    """`RequestRow`s of the prompt or the prompts file."""
    from tracerl_jax.rollout.engine import Request
    from tracerl_jax.rollout.request_rows import RequestRow, encode_prompt, options_of, read_requests

    defaults = options_of(vars(args))
    if args.prompt is None:
        return read_requests(args.prompts, defaults, engine, tokenizer, raw=args.raw, on_bad_row=args.on_bad_row)
    request = Request(encode_prompt(args.prompt, tokenizer, raw=args.raw), defaults)
    engine.check(request, "--prompt")
    return [RequestRow({"prompt": args.prompt}, request)]


def _memory(engine, requests: Sequence) -> str:
    from tracerl_jax.launch.common import describe_memory

    by_block: dict = {}  # those of one block size are decoded together
    for request in requests:
        by_block.setdefault(request.options.block_size, []).append(request)
    most = max((engine.memory_bytes(group) for group in by_block.values()), key=lambda size: sum(size.values()))
    return describe_memory(engine.model, most)


def _counted(engine, requests: Sequence, tokenizer) -> list:
    """Traces of all requests, with a progress bar on a terminal."""
    from tqdm import tqdm

    return list(tqdm(engine.generate(requests), total=len(requests), disable=None))


def _shown(engine, requests: Sequence, tokenizer) -> list:
    """Traces of all requests, whose text goes to stdout as it comes; of several, one after the other."""
    from tracerl_jax.interop.tokenizer import StreamDecoder
    from tracerl_jax.rollout.stream import stream

    count = len(requests)
    decoders, traces = [StreamDecoder(tokenizer) for _ in requests], [None] * count
    texts = [f"[sample {i + 1} of {count}]\n" if count > 1 else "" for i in range(count)]  # not shown yet
    shown = 0  # completions shown to their end; of those behind the next one the text waits
    for i, ids, trace in stream(engine, requests):
        texts[i] += decoders[i].push(ids)
        if trace is not None:
            traces[i] = trace
            texts[i] += decoders[i].finish() + ("\n\n" if i + 1 < count else "\n")
        while shown < count:
            print(texts[shown], end="", flush=True)
            texts[shown] = ""
            if traces[shown] is None:
                break
            shown += 1
    return traces


def _records(columns: Iterable[dict], traces: Iterable, tokenizer) -> Iterator[dict]:
    from tracerl_jax.interop.tokenizer import decode

    for row, trace in zip(columns, traces, strict=True):
        text = None if tokenizer is None else decode(tokenizer, trace.ids)
        yield {**row, "text": text, **trace.to_row()}


def _summary(traces: Sequence, seconds: float) -> str:
    from tracerl_jax.diffusion.trace import tokens_per_denoise_step

    tokens = sum(len(trace.ids) for trace in traces)
    steps, forwards = (sum(getattr(trace, name) for trace in traces) for name in ("denoise_forwards", "forwards"))
    return (
        f"{tokens} tokens, {steps} denoise steps ({tokens_per_denoise_step(traces):.2f} tokens per denoise step), "
        f"{forwards} forwards, {seconds:.1f} s"
    )
