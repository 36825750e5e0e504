"""The folder of a run: config, metrics, samples, summary. Survives kill -9 at any point.

    runs/<name>/
      config.json     resolved config the run was made with
      metrics.jsonl   one row per step and phase
      samples.jsonl   one row per kept sample (report/samples.py)
      summary.json    evaluation before and after, status
      lock            held (fcntl) by the process that writes the folder

Whole files are replaced atomically. JSONL files are appended to, so that a kill can tear no more than the last line:
readers skip such a line and the next writer removes it. A number that is not finite is written as null.
"""

import contextlib
import errno
import fcntl
import fnmatch
import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tracerl_jax.errors import ConfigError, DataError, UserError
from tracerl_jax.files import ENCODING, replacing, to_line, write_json, writing

Row = dict[str, Any]

PHASES = ("sft", "rl")  # in the order of a run; rows of phase "eval" stand between theirs
CONFIG, METRICS, SAMPLES, SUMMARY, LOCK = "config.json", "metrics.jsonl", "samples.jsonl", "summary.json", "lock"

# Keys of an existing run that may change (shell patterns): how long it goes on, how often it looks at itself, and how
# the work is laid out on devices, or how a judge is reached, which leaves the objective as it was.
CHANGEABLE = (
    "name", "runs_dir", "rl.steps", "sft.steps", "eval.every", "checkpoint.*", "report.*", "sft.log_every",
    "rl.max_skipped_updates", "mesh.*", "model.remat", "model.attention", "rollout.tensor", "rollout.slots_per_device",
    "*.rows_per_device", "*.row_length", "reward.model.tokens_per_device", "reward.judge.url",
    "reward.judge.*_variable", "reward.judge.*_seconds", "reward.judge.retries", "reward.judge.concurrency",
    "reward.judge.requests_per_minute", "reward.judge.cache", "reward.judge.offline",
)  # fmt: skip


class RunDir:
    """A run folder opened for writing by this process, created if needed.

    Raises UserError when another process holds it. Use as a context manager (or call `close`): once `write_config` has
    accepted the config, the status in summary.json is "running", in the end "finished", "interrupted"
    (KeyboardInterrupt) or "failed". Opening a folder with a config it refuses leaves the status alone.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path / LOCK)
        for name in (METRICS, SAMPLES):
            with writing(self.path / name):
                _cut_torn_line(self.path / name)
        self._running = False

    @property
    def config(self) -> Row:
        """The config the run was made with; {} before `write_config`."""
        return read_json(self.path / CONFIG)

    def write_config(
        self,
        config: Mapping[str, Any],
        changeable: Sequence[str] = CHANGEABLE,
        complete: Callable[[Row], Mapping[str, Any]] = dict,
    ) -> dict[str, tuple]:
        """Store the resolved config of a new run, or hold an existing run to it.

        Returns the accepted changes {dotted key: (old, new)}. `changeable` are shell patterns of dotted keys.
        `complete` gives a stored config the keys that it lacks because an earlier version wrote it. Raises ConfigError
        with a diff when any other key differs.
        """
        new = json.loads(json.dumps(config, default=str))  # as a reader will see it: tuples are lists
        changes = {}
        if (self.path / CONFIG).exists():
            changes = compare_configs(complete(self.config), new)
            refused = {k: v for k, v in changes.items() if not any(fnmatch.fnmatch(k, p) for p in changeable)}
            if refused:
                raise ConfigError(
                    f"run folder {self.path} was made with another config:\n{_diff(refused)}\n"
                    "Start a new run (--config.name=NEW_NAME), or set these keys back to continue this one.\n"
                    f"Keys of an existing run that may change: {', '.join(changeable)}"
                )
        write_json(self.path / CONFIG, new)
        self.update_summary({"status": "running"})
        self._running = True
        return changes

    def forget_config(self) -> None:
        """Make `write_config` take any config: for a folder that holds nothing the old one has brought about."""
        (self.path / CONFIG).unlink(missing_ok=True)

    def append_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._append(METRICS, rows)

    def append_samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._append(SAMPLES, rows)

    def truncate_after(self, step: int, phase: str) -> None:
        """Drop what was written after the checkpoint of `step` of `phase` that the run continues from.

        Rows stand in the order of time: the first one from after the checkpoint goes, and everything behind it.

            sft 1, sft 2, eval 0, rl 1, eval 1, rl 2, eval 2
            ------ truncate_after(1, "rl") ---|
            truncate_after(2, "sft") --|
        """
        last = (PHASES.index(phase), step)
        for name in (METRICS, SAMPLES):
            with replacing(self.path / name) as file:
                for row in read_jsonl(self.path / name):
                    if row["phase"] in PHASES and (PHASES.index(row["phase"]), row["step"]) > last:
                        break
                    file.write(to_line(row))

    def update_summary(self, update: Mapping[str, Any]) -> None:
        """Merge `update` into summary.json, nested dicts key by key."""
        write_json(self.path / SUMMARY, _merged(read_json(self.path / SUMMARY), update))

    def close(self, status: str = "finished") -> None:
        if self._lock.closed:
            return
        try:
            if self._running:
                self.update_summary({"status": status})
        finally:
            self._lock.close()
            _held.discard((self.path / LOCK).resolve())

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(self, kind: type | None, error, traceback) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.close("finished" if kind is None else "interrupted" if interrupted else "failed")

    def _append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(to_line(row) for row in rows)
        with writing(self.path / name), open(self.path / name, "a", **ENCODING) as file:
            file.write(text)


def read_json(path: Path) -> Row:
    """A JSON object, {} when the file is missing. Raises DataError when it cannot be read as one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}): repair it, or start a run with another name") from error


def read_jsonl(path: Path) -> Iterator[Row]:
    """Rows of a JSONL file, none when it is missing; lines that are not JSON objects (torn by a kill) are left out."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    yield row


def is_locked(path: str | os.PathLike) -> bool:
    """Whether a process, maybe this one, is writing the run folder `path` now."""
    path = Path(path) / LOCK
    if path.resolve() in _held:  # closing any handle of the file would release this process's own lock
        return True
    try:
        with open(path, "r+") as file:
            return not _try_lock(file)
    except OSError:  # no lock file, or a folder that may only be read
        return False


def compare_configs(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple]:
    """{dotted key: (old value, new value)} of the leaves that differ; a missing leaf is `ABSENT`."""
    old, new = flatten(old), flatten(new)
    pairs = {key: (old.get(key, ABSENT), new.get(key, ABSENT)) for key in old | new}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


ABSENT = "(absent)"


def flatten(config: Mapping[str, Any], prefix: str = "") -> Row:
    """Nested dicts as {dotted key: leaf}; an empty dict is a leaf."""
    flat = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


_held: set[Path] = set()  # lock files of this process


def _lock(path: Path):
    # POSIX locks, unlike flock, are not inherited by forked workers: one that outlives a killed run blocks nothing.
    file = open(path, "a+")  # stays open as long as the lock is held
    if not _try_lock(file):
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise UserError(
            f"run folder {path.parent} is in use by {holder}: wait for it, stop it, or choose another run name"
        )
    _held.add(path.resolve())
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def _try_lock(file) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # some network file systems have no locks at all
    return True


def _cut_torn_line(path: Path) -> None:
    """Remove bytes after the last newline, which a killed writer leaves."""
    if not path.exists():
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


def _merged(old: Mapping[str, Any], update: Mapping[str, Any]) -> Row:
    merged = dict(old)
    for key, value in update.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _diff(changes: Mapping[str, tuple]) -> str:
    show = {key: [value if value is ABSENT else json.dumps(value) for value in pair] for key, pair in changes.items()}
    return "\n".join(f"  {key}: {old} -> {new}" for key, (old, new) in show.items())
