"""Finished items of an evaluation (one judged answer to one problem each), in memory or in a results folder.

    DIR/
      manifest.json                    what determines the results: model files, rows, options, versions
      items/<task>.<strategy>.jsonl    finished items, in the order they finished
      items/<task>.<strategy>.process-<i>.jsonl     those of another process of a job, until they are exchanged
      times.json                       {task: {strategy: [[seconds decoding, seconds in all], ..]}}, one entry a start
      results.json                     {task: {strategy: EvalResult.summary() and .speed()}} of what is finished
      lock                             held by the process that writes the folder

Items are appended, all else is replaced as a whole: after a kill at any point the same command goes on behind the last
finished item. `times.json` lags behind by `CLOCK_SECONDS` and a chunk of decoding at most.
"""

import json
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tracerl_jax.errors import ConfigError, DataError
from tracerl_jax.files import append_jsonl, cut_torn_line, write_json, writing
from tracerl_jax.folder_lock import LOCK, FolderLock
from tracerl_jax.report.run_dir import Row, compare_configs, describe_changes, intact_rows, read_json

MANIFEST, TIMES, RESULTS, ITEMS = "manifest.json", "times.json", "results.json", "items"
CLOCK_SECONDS = 2.0


class Seconds(NamedTuple):
    """What one start of an evaluation took."""

    decode: float  # until the last answer was decoded, compilation included
    wall: float  # until the last one was judged


class Items:
    """Items of one task and strategy, and the time they took. `clock` and `add` may be called by different threads."""

    def __init__(self, rows: Sequence[Row] = (), seconds: Sequence[Seconds] = ()):
        self.rows = list(rows)
        self.seconds = list(seconds)  # one entry for every start that had something to do
        self._lock = threading.Lock()

    def begin(self) -> None:
        """A start."""
        self.seconds.append(Seconds(0.0, 0.0))

    def clock(self, **passed: float) -> None:
        """What the present start has taken so far: fields of `Seconds`."""
        with self._lock:
            self.seconds[-1] = self.seconds[-1]._replace(**passed)

    def add(self, rows: Sequence[Row]) -> None:
        self.rows += rows

    def receive(self, process: int, rows: Sequence[Row]) -> None:
        """What another process of the job has done."""
        self.rows += rows

    def end(self) -> None:
        """Nothing is left to do."""


class ShareOfItems(Items):
    """Items of a process that is not the lead of its job: on disk for the next start, should this one be killed."""

    def __init__(self, path: str | os.PathLike, task: str, strategy: str, process: int):
        self._path = _path_of(Path(path), task, strategy, process)
        super().__init__()

    def add(self, rows: Sequence[Row]) -> None:
        append_jsonl(self._path, rows)
        super().add(rows)


def _path_of(folder: Path, task: str, strategy: str, process: int | str = 0) -> Path:
    return folder / ITEMS / (f"{task}.{strategy}.process-{process}.jsonl" if process else f"{task}.{strategy}.jsonl")


class StoredItems(Items):
    """The same on disk."""

    def __init__(self, folder: "ResultsFolder", task: str, strategy: str):
        self._folder, self._task, self._strategy = folder, task, strategy
        self._path = _path_of(folder.path, task, strategy)
        self._written = -math.inf
        cut_torn_line(self._path)
        super().__init__(intact_rows(self._path), [Seconds(*pair) for pair in folder.times(task, strategy)])
        for path in sorted(self._path.parent.glob(_path_of(folder.path, task, strategy, "*").name)):
            self._take_over(path, list(intact_rows(path)))

    def clock(self, **passed: float) -> None:
        super().clock(**passed)
        with self._lock:
            if time.monotonic() - self._written >= CLOCK_SECONDS:
                self.end()

    def add(self, rows: Sequence[Row]) -> None:
        append_jsonl(self._path, rows)
        super().add(rows)

    def receive(self, process: int, rows: Sequence[Row]) -> None:
        self._take_over(_path_of(self._folder.path, self._task, self._strategy, process), rows)

    def _take_over(self, path: Path, rows: Sequence[Row]) -> None:
        """A kill may come behind the first line: what is in both files counts once."""
        known = {(row["index"], row["sample_index"]) for row in self.rows}
        self.add([row for row in rows if (row["index"], row["sample_index"]) not in known])
        path.unlink(missing_ok=True)

    def end(self) -> None:
        self._folder.write_times(self._task, self._strategy, self.seconds)
        self._written = time.monotonic()


class ResultsFolder:
    """A results folder opened for writing, created if needed. Use as a context manager.

    `manifest` is {"tasks": {name: ..}, "strategies": {name: ..}, ..}. A folder that holds items was made with the same
    one, but for tasks and strategies that are new: they are added. Raises ConfigError naming what differs, UserError
    when another process writes the folder, DataError for a folder of something else.
    `overwrite` forgets what is there.
    """

    def __init__(self, path: str | os.PathLike, manifest: Mapping[str, Any], overwrite: bool = False):
        self.path = Path(path)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            strangers = {entry.name for entry in self.path.glob("[!.]*")} - {MANIFEST, TIMES, RESULTS, ITEMS, LOCK}
            if strangers and not (self.path / MANIFEST).exists():
                raise DataError(
                    f"{self.path} is no folder of results (it holds {min(strangers)}): choose an empty or a new one"
                )
            self._lock = FolderLock(self.path, "results folder", "choose another folder")
        try:
            (self.path / ITEMS).mkdir(exist_ok=True)
            if overwrite:
                self._forget()
            self._write_manifest(json.loads(json.dumps(manifest)))
        except BaseException:
            self._lock.release()
            raise

    def items(self, task: str, strategy: str) -> StoredItems:
        return StoredItems(self, task, strategy)

    def times(self, task: str, strategy: str) -> list[list[float]]:
        return read_json(self.path / TIMES).get(task, {}).get(strategy, [])

    def write_times(self, task: str, strategy: str, seconds: Sequence[Seconds]) -> None:
        self._write_under(TIMES, task, strategy, seconds)

    def write_result(self, task: str, strategy: str, result: Mapping[str, Any]) -> None:
        self._write_under(RESULTS, task, strategy, result)

    def __enter__(self) -> "ResultsFolder":
        return self

    def __exit__(self, *error) -> None:
        self._lock.release()

    def _write_under(self, name: str, task: str, strategy: str, value: Any) -> None:
        document = read_json(self.path / name)
        document.setdefault(task, {})[strategy] = value
        write_json(self.path / name, document)

    def _write_manifest(self, new: dict[str, Any]) -> None:
        old = read_json(self.path / MANIFEST)
        if not any(path.stat().st_size for path in (self.path / ITEMS).iterdir()):
            self._forget()  # nothing in the folder depends on the old one
            old = {}
        if old:
            both = {key: {**old.get(key, {}), **new[key]} for key in ("tasks", "strategies")}
            known = {key: {**new[key], **old.get(key, {})} for key in both}
            if changes := compare_configs({**old, **known}, {**new, **both}):
                raise ConfigError(
                    f"{self.path} holds results of something else:\n{describe_changes(changes)}\n"
                    "Choose another folder, set these back to go on, or start anew with --overwrite."
                )
            new = {**new, **both}
        write_json(self.path / MANIFEST, new)

    def _forget(self) -> None:
        for path in (*(self.path / ITEMS).iterdir(), *(self.path / name for name in (MANIFEST, TIMES, RESULTS))):
            path.unlink(missing_ok=True)
