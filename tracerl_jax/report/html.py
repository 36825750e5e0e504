"""Self-contained HTML pages: style, scripts and data in one file, readable from disk in any browser."""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from tracerl_jax.files import plain


def render_page(scripts: Sequence[str], data: Mapping[str, Any]) -> str:
    """The page whose `scripts` (files of this folder, run in this order) show `data`, which becomes their `DATA`."""
    # "</script>" or "<!--" inside the data would end the element that holds it.
    shown = json.dumps(_rounded(plain(data)), separators=(",", ":")).replace("<", "\\u003c")
    assets = files("tracerl_jax.report")
    page = assets.joinpath("page.html").read_text(encoding="utf-8")
    # The data goes last: it may contain anything, also what looks like a placeholder.
    for placeholder, text in (
        ("/*STYLE*/", assets.joinpath("page.css").read_text(encoding="utf-8")),
        ("/*SCRIPT*/", "\n".join(assets.joinpath(name).read_text(encoding="utf-8") for name in scripts)),
        ("/*DATA*/", shown),
    ):
        page = page.replace(placeholder, text, 1)
    return page


def _rounded(value):
    """Floats cut to six digits, half the size of the page."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
