"""Answers of a judge in a sqlite file, so that no question is paid for twice and a run can be judged again offline."""

import contextlib
import hashlib
import json
import logging
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tracerl_jax.errors import ConfigError
from tracerl_jax.rewards.judge_text import Answer

log = logging.getLogger(__name__)


class AnswerCache:
    """Answers by what was asked. Several processes may use the file at once; a kill loses no answer that was kept."""

    def __init__(self, connections: Sequence[sqlite3.Connection]):
        self._connections = connections

    def get(self, key: str) -> Answer | None:
        for connection in self._connections:
            row = connection.execute("SELECT text, cut FROM answers WHERE key = ?", (key,)).fetchone()
            if row is not None:
                return Answer(row[0], bool(row[1]))
        return None

    def put(self, key: str, answer: Answer) -> None:
        """A full disk costs the cached answer, not the verdict."""
        try:
            values = (key, answer.text, answer.cut)
            self._connections[0].execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", values)
        except sqlite3.Error as error:
            log.warning("judge: an answer could not be kept in the cache: %s", error)


@contextlib.contextmanager
def open_cache(*paths: str | None) -> Iterator[AnswerCache]:
    """The cache in these files, made when they are not there; answers are put into the first. None: one that ends with
    the block.

    Raises ConfigError for a file that cannot be used.
    """
    with contextlib.ExitStack() as stack:
        yield AnswerCache([stack.enter_context(contextlib.closing(_connect(path))) for path in paths])


def _connect(path: str | None) -> sqlite3.Connection:
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
    return connection


def request_key(body: Mapping[str, Any], vote: int) -> str:
    """Of a request (model, messages with the filled-in template, sampling options) and the number of its vote."""
    return hashlib.sha256(json.dumps([body, vote], sort_keys=True).encode()).hexdigest()
