"""The trace page: completions and how they were denoised, in one HTML file."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from tracerl_jax.diffusion.trace import Trace
from tracerl_jax.interop.tokenizer import decode
from tracerl_jax.report.html import render_page
from tracerl_jax.report.samples import pick, shown_sample, trace_row

SCRIPTS = ("common.js", "samples.js", "viewer.js", "trace_page.js")
TOKEN_BYTES = 50  # of a page, about


def trace_page(model: str, columns: Sequence[Mapping[str, Any]], traces: Sequence[Trace], tokenizer=None) -> str:
    """The page as HTML.

    Args:
        model: its name, the heading.
        columns: of every trace, `prompt` (else the text or ids of the prompt are shown) and `line`, if it has them.
        tokenizer: without one, ids are shown.
    """
    picked = pick(len(traces), TOKEN_BYTES * sum(len(trace.ids) for trace in traces))
    return render_page(SCRIPTS, {
        "name": model,
        "made": datetime.now().isoformat(sep=" ", timespec="minutes"),
        "samples": [_sample(columns[i], traces[i], tokenizer) for i in sorted(picked)],
        "samples_total": len(traces),
    })  # fmt: skip


def _sample(columns: Mapping[str, Any], trace: Trace, tokenizer) -> dict[str, Any]:
    def text(ids) -> str:
        return " ".join(map(str, ids)) if tokenizer is None else decode(tokenizer, ids)

    prompt = columns.get("prompt")
    if not isinstance(prompt, str):
        prompt = text(trace.prompt_ids.tolist())
    line = f"line {columns['line']}, " if "line" in columns else ""
    row = trace_row(trace, prompt, text(trace.ids.tolist()), tokenizer)
    return shown_sample(row | {"name": f"{line}sample {trace.sample_index + 1}"})
