"""The report page: one HTML file with everything inside, readable from disk, in any browser, at any stage of a run."""

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from tracerl_jax.errors import DataError
from tracerl_jax.files import replacing
from tracerl_jax.folder_lock import is_locked
from tracerl_jax.report.charts import build_charts, collect_series
from tracerl_jax.report.hosts import host_table
from tracerl_jax.report.html import render_page
from tracerl_jax.report.run_dir import (
    CONFIG,
    HOSTS,
    METRICS,
    SAMPLES,
    SUMMARY,
    flatten,
    intact_rows,
    read_json,
)  # fmt: skip
from tracerl_jax.report.samples import pick, shown_sample

SCRIPTS = ("common.js", "charts.js", "samples.js", "viewer.js", "page.js")

def build_page(run_dir: str | Path) -> str:
    """The page of a run folder as HTML. Works on a run that is still going, or that has no samples or metrics yet.

    Raises DataError when `run_dir` is not a run folder.
    """
    run_dir = Path(run_dir)
    if not any((run_dir / name).exists() for name in (CONFIG, METRICS, SAMPLES, SUMMARY)):
        raise DataError(f"{run_dir} is not a run folder (no {CONFIG}, {METRICS}, {SAMPLES} or {SUMMARY} in it)")
    return render_page(SCRIPTS, _page_data(run_dir))


def write_page(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Write the page to `output`, default <run_dir>/report.html, and return the path."""
    path = Path(output) if output is not None else Path(run_dir) / "report.html"
    page = build_page(run_dir)
    with replacing(path) as file:
        file.write(page)
    return path


def _page_data(run_dir: Path) -> dict[str, Any]:
    summary = read_json(run_dir / SUMMARY)
    rows = [row for row in intact_rows(run_dir / METRICS) if isinstance(row.get("step"), int)]
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
        "hosts": host_table(intact_rows(run_dir / HOSTS)),
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
    """What `pick` leaves of the rows of a file, as the page shows them, and how many it has."""
    if not path.exists():
        return [], 0
    total = sum(1 for _ in _lines(path))
    picked = pick(total, path.stat().st_size)
    rows = (json.loads(line) for i, line in enumerate(_lines(path)) if i in picked)
    return [shown_sample(row) for row in rows], total


def _lines(path: Path) -> Iterator[bytes]:
    """Whole lines only: the last may be torn, or still being written."""
    with open(path, "rb") as file:
        yield from (line for line in file if line.endswith(b"\n") and line.startswith(b"{"))
