"""tracerl generate: complete prompts with a model folder and record how every token was revealed."""

import argparse
import dataclasses
import logging
from collections.abc import Iterator

logger = logging.getLogger("tracerl_jax.launch.generate")

HELP = """Complete the prompts of a JSONL file by block diffusion and write one row per completion, in input order:
ids, text (null when the folder has no tokenizer), step_map (denoise step of every token), logprobs, denoise_forwards,
stop_reason, and what `tracerl score` needs to replay them.

Input rows: `prompt` (text, put into the tokenizer's chat template as a user message) or `prompt_ids` (taken as they
are), and any of the decoding fields below, which override the flags: strategy, threshold, entropy_bound,
denoising_steps, block_size, max_tokens, temperature, top_k, top_p, seed, ignore_eos, confidence, stop_ids.

A completion depends on its prompt, options, seed and sample index, not on the batch."""

EPILOG = """examples:
  tracerl generate --model SDAR-4B-Chat --prompts prompts.jsonl --output traces.jsonl
  tracerl generate --model SDAR-4B-Chat --prompts p.jsonl --output t.jsonl --temperature 0 --strategy static
  echo '{"prompt_ids": [5, 6, 7], "max_tokens": 32}' > p.jsonl    # works without a tokenizer"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from tracerl_jax.diffusion.reveal import STRATEGIES
    from tracerl_jax.rollout.options import COMMITS, CONFIDENCES, SamplingOptions

    flag = parser.add_argument
    flag("--model", required=True, metavar="DIR", help="Hugging Face folder")
    flag("--prompts", required=True, metavar="IN.jsonl", help="rows to complete")
    flag("--output", required=True, metavar="OUT.jsonl", help="appears when all rows are done")
    flag("--num_samples", type=int, default=1, metavar="K", help="completions per prompt, as consecutive rows")
    flag("--raw", action="store_true", help="tokenize `prompt` as it is, without the chat template")
    flag("--slots", type=int, default=64, help="sequences decoded together (default: %(default)s)")
    flag("--commit", choices=COMMITS, default="auto", help="of finished blocks (default: %(default)s)")
    flag("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and compute")
    flag("--on_bad_row", choices=("fail", "skip"), default="fail", help="unusable rows (default: %(default)s)")

    flag = parser.add_argument_group("decoding, where a row does not say").add_argument
    flag("--strategy", help=f"{', '.join(STRATEGIES)} (default: %(default)s)")
    flag("--threshold", type=float, help="dynamic: reveal what is more confident (default: %(default)s)")
    flag("--entropy_bound", type=float, help="entropy_bounded: nats per step (default: %(default)s)")
    flag("--denoising_steps", type=int, help="per block (default: the block size)")
    flag("--block_size", type=int, help="default: the model's")
    flag("--max_tokens", type=int, help="completion limit (default: %(default)s)")
    flag("--temperature", type=float, help="0 is greedy (default: %(default)s)")
    flag("--top_k", type=int, help="0 is off (default: %(default)s)")
    flag("--top_p", type=float, help="1 is off (default: %(default)s)")
    flag("--seed", type=int, help="default: %(default)s")
    flag("--ignore_eos", action="store_true", help="do not stop at the model's stop ids")
    flag("--confidence", help=f"{' or '.join(CONFIDENCES)}, the reference's rule (default: %(default)s)")
    flag("--stop_ids", type=int, nargs="+", metavar="ID", help="stop at these too")
    parser.set_defaults(**dataclasses.asdict(SamplingOptions()))


def run(args: argparse.Namespace) -> int:
    import time

    from tqdm import tqdm

    from tracerl_jax.data.jsonl import write_jsonl
    from tracerl_jax.diffusion.trace import broken_traces, tokens_per_denoise_step
    from tracerl_jax.errors import ConfigError
    from tracerl_jax.interop.hf_load import load_hf
    from tracerl_jax.interop.tokenizer import decode, load_tokenizer, valid_vocab
    from tracerl_jax.parallel.mesh import make_mesh
    from tracerl_jax.rollout.engine import Engine, EngineConfig

    if args.num_samples < 1:
        raise ConfigError(f"--num_samples is {args.num_samples}; it must be at least 1")
    defaults = _options(vars(args))  # names a bad flag before the weights are read
    tokenizer = load_tokenizer(args.model)
    model, params = load_hf(args.model, mesh=make_mesh(), dtype=args.dtype, overrides={"dtype": args.dtype})
    valid = valid_vocab(tokenizer, model.config.vocab_size)
    engine = Engine(model, params, EngineConfig(args.slots, commit=args.commit, valid_vocab=valid))
    lines, requests = _read(args, defaults, engine, tokenizer)

    traces = []

    def rows() -> Iterator[dict]:
        for line, trace in zip(lines, tqdm(engine.generate(requests), total=len(requests), disable=None), strict=True):
            traces.append(trace)
            text = None if tokenizer is None else decode(tokenizer, trace.ids)
            yield {"line": line, "text": text, **trace.to_row()}

    started = time.monotonic()
    write_jsonl(args.output, rows())
    if broken := len(broken_traces(traces)):
        logger.warning("%d of %d completions mean nothing: the model gave NaN or infinite numbers", broken, len(traces))
    tokens = sum(len(trace.ids) for trace in traces)
    print(
        f"wrote {len(traces)} completions, {tokens} tokens, to {args.output}: "
        f"{tokens_per_denoise_step(traces):.2f} tokens per denoise step, {time.monotonic() - started:.1f} s"
    )
    return 0


def _options(values: dict):
    """SamplingOptions of the known keys that are not None."""
    from tracerl_jax.rollout.options import SamplingOptions

    names = [field.name for field in dataclasses.fields(SamplingOptions)]
    return SamplingOptions(**{name: values[name] for name in names if values.get(name) is not None})


def _read(args: argparse.Namespace, defaults, engine, tokenizer):
    """(lines, requests) of the prompts file, num_samples of each row. Raises DataError naming file and line."""
    from tracerl_jax.data.jsonl import BadRows, read_jsonl
    from tracerl_jax.errors import DataError, UserError
    from tracerl_jax.rollout.options import Request

    path = args.prompts
    bad, kept, lines, requests = BadRows(args.on_bad_row), 0, [], []
    for line, row in read_jsonl(path, on_bad_row=args.on_bad_row):
        try:
            options = _options({**dataclasses.asdict(defaults), **{k: v for k, v in row.items() if v is not None}})
            request = Request(_prompt_ids(row, tokenizer, args.raw), options)
            engine.check(request, "the row")
        except UserError as error:
            bad.add(f"{path}:{line}: {error}", "correct the row")
            continue
        kept += 1
        for sample in range(args.num_samples):
            lines.append(line)
            requests.append(dataclasses.replace(request, sample_index=sample))
    bad.report(kept)
    if not kept:
        raise DataError(f'{path}: holds no usable row; write rows such as {{"prompt": "What is 2+2?"}}')
    return lines, requests


def _prompt_ids(row: dict, tokenizer, raw: bool) -> list[int]:
    from tracerl_jax.errors import DataError
    from tracerl_jax.interop.tokenizer import render_chat

    ids = row.get("prompt_ids")
    if ids is not None:
        if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
            raise DataError("field 'prompt_ids' must be a list of integers")
        return ids
    text = row.get("prompt")
    if not isinstance(text, str):
        raise DataError(f"field 'prompt' (text) or 'prompt_ids' is needed; the row has {', '.join(row) or 'no fields'}")
    if tokenizer is None:
        raise DataError("field 'prompt' is text but the model folder has no tokenizer; give 'prompt_ids'")
    if not raw:
        if not tokenizer.chat_template:
            raise DataError("field 'prompt' needs a chat template, which the tokenizer does not have; use --raw")
        text = render_chat(tokenizer, [{"role": "user", "content": text}])
    return tokenizer(text, add_special_tokens=False)["input_ids"]
