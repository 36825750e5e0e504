"""The report page: one HTML file with everything inside, readable from disk, in any browser, at any stage of a run."""

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from tracerl_jax.errors import DataError
from tracerl_jax.files import plain, replacing
from tracerl_jax.report.charts import build_charts, collect_series
from tracerl_jax.report.run_dir import (
    CONFIG,
    METRICS,
    SAMPLES,
    SUMMARY,
    flatten,
    is_locked,
    read_json,
    read_jsonl,
)  # fmt: skip

SCRIPTS = ("common.js", "charts.js", "viewer.js", "page.js")

MAX_SAMPLES = 300
MAX_SAMPLE_BYTES = 16 * 2**20

# Of a sample the page needs these; ids of the prompt alone can be thousands.
SAMPLE_KEYS = (
    "step", "phase", "prompt", "text", "ids", "step_map", "logprobs", "tail_ids", "tail_step_map", "block_size",
    "reward", "rewards", "accuracy", "stop_reason", "ground_truth", "tokens", "prompt_tail", "tail_tokens",
)  # fmt: skip


def build_page(run_dir: str | Path) -> str:
    """The page of a run folder as HTML. Works on a run that is still going, or that has no samples or metrics yet.

    Raises DataError when `run_dir` is not a run folder.
    """
    run_dir = Path(run_dir)
    if not any((run_dir / name).exists() for name in (CONFIG, METRICS, SAMPLES, SUMMARY)):
        raise DataError(f"{run_dir} is not a run folder (no {CONFIG}, {METRICS}, {SAMPLES} or {SUMMARY} in it)")
    # "</script>" or "<!--" inside the data would end the element that holds it.
    data = json.dumps(_rounded(plain(_page_data(run_dir))), separators=(",", ":")).replace("<", "\\u003c")
    assets = files("tracerl_jax.report")
    page = assets.joinpath("page.html").read_text(encoding="utf-8")
    # The data goes last: it may contain anything, also what looks like a placeholder.
    for placeholder, text in (
        ("/*STYLE*/", assets.joinpath("page.css").read_text(encoding="utf-8")),
        ("/*SCRIPT*/", "\n".join(assets.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS)),
        ("/*DATA*/", data),
    ):
        page = page.replace(placeholder, text, 1)
    return page


def write_page(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Write the page to `output`, default <run_dir>/report.html, and return the path."""
    path = Path(output) if output is not None else Path(run_dir) / "report.html"
    page = build_page(run_dir)
    with replacing(path) as file:
        file.write(page)
    return path


def _page_data(run_dir: Path) -> dict[str, Any]:
    summary = read_json(run_dir / SUMMARY)
    rows = [row for row in read_jsonl(run_dir / METRICS) if isinstance(row.get("step"), int)]
    series = collect_series(rows)
    samples, total = _pick_samples(run_dir / SAMPLES)
    return {
        "name": run_dir.resolve().name,
        "path": str(run_dir),
        "made": datetime.now().isoformat(sep=" ", timespec="minutes"),
        "status": _status(run_dir, summary),
        "progress": {phase: max(r["step"] for r in rows if r.get("phase") == phase) for phase in _phases(rows)},
        "seconds": sum(value or 0.0 for name in series if name.endswith("seconds/total") for _, value in series[name]),
        "config": flatten(read_json(run_dir / CONFIG)),
        "eval": summary.get("eval", {}),
        "charts": build_charts(series),
        "skipped": [(step, value) for step, value in series.get("updates/skipped", []) if value],
        "samples": samples,
        "samples_total": total,
    }


def _phases(rows) -> list[str]:
    return list(dict.fromkeys(row["phase"] for row in rows if row.get("phase") in ("sft", "rl")))


def _status(run_dir: Path, summary: Mapping[str, Any]) -> str:
    """The status the run wrote; "running" only counts while a process holds the folder."""
    status = summary.get("status", "unknown")
    return "stopped" if status == "running" and not is_locked(run_dir) else status


def _pick_samples(path: Path) -> tuple[list[dict[str, Any]], int]:
    """At most MAX_SAMPLES rows and about MAX_SAMPLE_BYTES, spread evenly over the file, and how many it has."""
    if not path.exists():
        return [], 0
    total = sum(1 for _ in _lines(path))
    affordable = total * MAX_SAMPLE_BYTES // max(path.stat().st_size, 1)
    limit = min(total, MAX_SAMPLES, max(affordable, 1))
    picked = {round(i * (total - 1) / max(limit - 1, 1)) for i in range(limit)}
    rows = (json.loads(line) for i, line in enumerate(_lines(path)) if i in picked)
    return [_sample(row) for row in rows], total


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    shown = {key: row[key] for key in SAMPLE_KEYS if key in row}
    return {"ids": [], "step_map": [], **shown, "prompt_length": len(row.get("prompt_ids", ()))}


def _lines(path: Path) -> Iterator[bytes]:
    """Whole lines only: the last may be torn, or still being written."""
    with open(path, "rb") as file:
        yield from (line for line in file if line.endswith(b"\n") and line.startswith(b"{"))


def _rounded(value):
    """Floats cut to six digits, half the size of the page."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
