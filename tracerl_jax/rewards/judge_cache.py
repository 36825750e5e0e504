"""Answers of a judge in a sqlite file, so that no question is paid for twice and a run can be judged again offline."""

import contextlib
import hashlib
import json
import logging
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tracerl_jax.errors import ConfigError
from tracerl_jax.rewards.judge_text import Answer

log = logging.getLogger(__name__)


class AnswerCache:
    """Answers by what was asked. Several processes may use the file at once; a kill loses no answer that was kept."""

    def __init__(self, connection: sqlite3.Connection):
        self._connection = connection

    def get(self, key: str) -> Answer | None:
        row = self._connection.execute("SELECT text, cut FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else Answer(row[0], bool(row[1]))

    def put(self, key: str, answer: Answer) -> None:
        """A full disk costs the cached answer, not the verdict."""
        try:
            self._connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", (key, answer.text, answer.cut))
        except sqlite3.Error as error:
            log.warning("judge: an answer could not be kept in the cache: %s", error)


@contextlib.contextmanager
def open_cache(path: str | None) -> Iterator[AnswerCache]:
    """The cache in file `path`, made when it is not there; without a path one that ends with the block.

    Raises ConfigError for a file that cannot be used.
    """
    try:
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path or ":memory:", timeout=60, isolation_level=None)
        # Written without waiting for the disk: a crash of the machine may lose the last answers, never the file.
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT, cut INTEGER)")
    except (sqlite3.Error, OSError) as error:
        raise ConfigError(
            f"reward.judge.cache={path}: cannot be used as a sqlite file ({error}); name another file, on a local disk"
        ) from error
    with contextlib.closing(connection):
        yield AnswerCache(connection)


def request_key(body: Mapping[str, Any], vote: int) -> str:
    """Of a request (model, messages with the filled-in template, sampling options) and the number of its vote."""
    return hashlib.sha256(json.dumps([body, vote], sort_keys=True).encode()).hexdigest()
