"""tracerl score: log-probs of recorded traces under a model, each token in the state in which it was revealed."""

import argparse

HELP = """Replay decoding traces under a model folder and write the log-prob of every completion token in the state in
which it was revealed: full vocabulary, at the trace's temperature (1 when greedy). For the weights that made a trace
these are its own log-probs up to rounding; the largest difference is printed where a row has them.

Input rows: prompt_ids, ids, step_map, block_size; optionally temperature (default 1), tail_ids, tail_step_map, as
`tracerl generate` writes them; of a full-attention model also canvas_len. Output rows: the same in the same order, with
`logprobs` set."""

EPILOG = """examples:
  tracerl generate --model SDAR-4B-Chat --prompts prompts.jsonl --output traces.jsonl
  tracerl score --model SDAR-4B-Chat --traces traces.jsonl --output scored.jsonl"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument
    flag("--model", required=True, metavar="DIR", help="Hugging Face folder; no tokenizer is needed")
    flag("--traces", required=True, metavar="IN.jsonl", help="rows to score")
    flag("--output", required=True, metavar="OUT.jsonl", help="appears when all rows are done")
    flag("--on_bad_row", choices=("fail", "skip"), default="fail", help="unusable rows (default: %(default)s)")
    flag("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and compute")
    flag("--tokens_per_batch", type=int, default=16384, help="of one forward, per device (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from tracerl_jax.data.jsonl import write_jsonl
    from tracerl_jax.errors import ConfigError
    from tracerl_jax.interop.hf_load import load_hf
    from tracerl_jax.parallel.mesh import make_mesh
    from tracerl_jax.rl.logprobs import score_traces

    if args.tokens_per_batch < 1:
        raise ConfigError(f"--tokens_per_batch is {args.tokens_per_batch}; it must be at least 1")
    model, params = load_hf(args.model, mesh=make_mesh(), dtype=args.dtype, overrides={"dtype": args.dtype})
    rows, traces = _read(args.traces, args.on_bad_row, model.config.vocab_size)
    scores = score_traces(model, params, traces, tokens_per_batch=args.tokens_per_batch)
    write_jsonl(args.output, ({**row, "logprobs": s} for row, s in zip(rows, scores, strict=True)))
    print(_summary(traces, scores))
    return 0


def _read(path: str, on_bad_row: str, vocab_size: int):
    """(rows, traces) of a file. Raises DataError naming file, line and field."""
    from tracerl_jax.data.jsonl import BadRows, read_jsonl
    from tracerl_jax.diffusion.trace import Trace
    from tracerl_jax.errors import DataError

    bad, rows, traces = BadRows(on_bad_row), [], []
    for line, row in read_jsonl(path, on_bad_row=on_bad_row):
        try:
            trace = Trace.from_row(row, f"{path}:{line}")
            for field in ("prompt_ids", "ids", "tail_ids"):
                if getattr(trace, field).max(initial=0) >= vocab_size:
                    raise DataError(f"{path}:{line}: field {field!r} holds ids beyond the model's {vocab_size}")
        except DataError as error:
            bad.add(str(error), "correct the row")
            continue
        rows.append(row)
        traces.append(trace)
    bad.report(len(rows))
    if not rows:
        raise DataError(f"{path}: holds no usable trace; write some with tracerl generate")
    return rows, traces


def _summary(traces, scores) -> str:
    import numpy as np

    tokens = np.concatenate(scores)
    gaps = np.abs(tokens - np.concatenate([t.logprobs for t in traces]))
    gaps = gaps[~np.isnan(gaps)]
    text = f"scored {len(traces)} traces, {len(tokens)} tokens"
    if len(tokens):
        text += f", mean log-prob {tokens.mean():.4f}"
    if len(gaps):
        text += f", largest difference to the recorded log-probs {gaps.max():.1e}"
    return text
