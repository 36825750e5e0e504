"""JSON Lines in and out. A bad row is named by file and line, and either stops the reading or is skipped and counted.

The other sources of data/sources.py (an array, the hub, a package) are read too; there the "line" is the 1-based
position of the row.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

from tracerl_jax.data.sources import adapter_of, raw_rows
from tracerl_jax.errors import DataError
from tracerl_jax.files import replacing, to_line

logger = logging.getLogger(__name__)

ON_BAD_ROW = ("fail", "skip")
REASONS_SHOWN = 3


class BadRows:
    """What happens to a bad row: `add` raises `DataError`, or counts it for `report` when `on_bad_row="skip"`."""

    def __init__(self, on_bad_row: str):
        if on_bad_row not in ON_BAD_ROW:
            raise DataError(f"on_bad_row must be one of {', '.join(ON_BAD_ROW)}, not {on_bad_row!r}")
        self.on_bad_row = on_bad_row
        self.reasons: list[str] = []

    def add(self, reason: str, remedy: str) -> None:
        """`reason` reads "file:line: what is wrong"."""
        if self.on_bad_row == "fail":
            raise DataError(f"{reason}; {remedy}, or have such rows skipped with on_bad_row=skip")
        self.reasons.append(reason)

    def report(self, kept: int) -> None:
        """Logs one line when rows were skipped: how many, and the first reasons."""
        if self.reasons:
            shown = "; ".join(self.reasons[:REASONS_SHOWN])
            more = "; ..." if len(self.reasons) > REASONS_SHOWN else ""
            logger.warning("skipped %d bad rows, kept %d: %s%s", len(self.reasons), kept, shown, more)


def read_jsonl(
    path: str | os.PathLike,
    *,
    on_bad_row: str = "fail",
    required: Sequence[str] = (),
    check: Callable[[dict], str] = lambda row: "",
) -> Iterator[tuple[int, dict]]:
    """Yields (1-based line number, object) for every row of `path`, which may be any source of data/sources.py.

    A blank line, invalid UTF-8, text that is not JSON, a value that is not an object, an object without one of the
    `required` fields (absent or null), and one for which `check` says what is wrong are bad rows. Raises `DataError`
    for an unreadable file and, with `on_bad_row="fail"`, for the first bad row; with "skip" bad rows are left out, and
    how many is logged when the reading ends.
    """
    bad, adapt = BadRows(on_bad_row), adapter_of(str(path))
    kept = 0
    try:
        for line, text in raw_rows(str(path)):
            problem, row = _parse(text)
            if row is not None:
                try:
                    row = adapt(row)
                except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
                    bad.add(f"{path}:{line}: not as the data set was published ({error!r})", "correct the row")
                    continue
                if row is None:
                    continue  # of another part of the data set
                missing = [name for name in required if row.get(name) is None]
                has = f" (it has {', '.join(row) or 'no fields'})"
                problem = f"missing field {', '.join(map(repr, missing))}{has}" if missing else check(row)
            if problem:
                bad.add(f"{path}:{line}: {problem}", "correct the row")
                continue
            kept += 1
            yield line, row
    finally:  # also when the reader stops early
        bad.report(kept)


def _parse(raw: bytes | object) -> tuple[str, dict | None]:
    """(problem, None) or ("", row)."""
    value = raw
    if isinstance(raw, bytes):
        if not raw.strip():
            return "blank line", None
        try:
            value = json.loads(raw.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:  # ValueError covers JSON, UTF-8 and integers too long to convert
            return f"not JSON ({error})", None
    if not isinstance(value, dict):
        return f"not a JSON object but a {type(value).__name__}", None
    return "", value


def write_jsonl(path: str | os.PathLike, rows: Iterable[dict]) -> None:
    """Writes all rows or nothing, as `files.replacing` does; what JSON does not know is made `files.plain`."""
    with replacing(path) as file:
        file.writelines(to_line(row) for row in rows)
