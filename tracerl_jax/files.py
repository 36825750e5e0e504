"""Files that are there as a whole or not at all, and strict JSON."""

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from tracerl_jax.errors import UserError

# A lone surrogate, which a JSON escape may have brought in, has no UTF-8; its escape is JSON again.
ENCODING = {"encoding": "utf-8", "errors": "backslashreplace"}


def plain(value: Any) -> Any:
    """`value`, nested as it is, as strict JSON knows it: numpy to Python, NaN and infinities to None, keys to text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_line(row: Mapping[str, Any]) -> str:
    """One row of a JSONL file, made `plain`, with its newline."""
    return json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: str | os.PathLike, value: Mapping[str, Any]) -> None:
    """Replaces `path` by `value`, made `plain`, indented. Raises UserError like `replacing`."""
    with replacing(path) as file:
        json.dump(plain(value), file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def append_jsonl(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds lines to a JSONL file; a kill tears no more than the last one. Raises UserError like `replacing`."""
    text = "".join(to_line(row) for row in rows)
    with writing(path), open(path, "a", **ENCODING) as file:
        file.write(text)


def cut_torn_line(path: str | os.PathLike) -> None:
    """Removes the bytes after the last newline, which a killed writer leaves."""
    if not os.path.exists(path):
        return
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        file.truncate(end)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[TextIO]:
    """A file for the new content of `path`, whose folder is made if needed.

    Readers, and a kill at any point, see the old or the new content; an error in the block leaves the old one. One
    writer at a time. Raises UserError when the disk is full or the place cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.new")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "w", **ENCODING) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turns "disk full" and "not allowed" while writing `path` into a UserError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"disk full while writing {path}: free some space and repeat the command "
                "(a run continues from its last checkpoint)"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            raise UserError(f"cannot write {path} ({error.strerror}): choose a place you can write to") from error
        raise
