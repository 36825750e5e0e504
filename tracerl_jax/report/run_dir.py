"""The folder of a run: config, metrics, samples, summary. Survives kill -9 at any point.

    runs/<name>/
      config.json     resolved config the run was made with
      metrics.jsonl   one row per step and phase
      samples.jsonl   one row per kept sample (report/samples.py)
      hosts.jsonl     of several processes: seconds of every phase by process, one row per step (report/speed.py)
      summary.json    evaluation before and after, status
      lock            held (fcntl) by the process that writes the folder

Whole files are replaced atomically. JSONL files are appended to, so that a kill can tear no more than the last line:
readers skip such a line and the next writer removes it. A number that is not finite is written as null.
"""

import contextlib
import fnmatch
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tracerl_jax.errors import ConfigError, DataError
from tracerl_jax.files import append_jsonl, cut_torn_line, replacing, to_line, write_json, writing
from tracerl_jax.folder_lock import FolderLock

Row = dict[str, Any]

PHASES = ("sft", "rl")  # in the order of a run; rows of phase "eval" stand between theirs
CONFIG, METRICS, SAMPLES, SUMMARY = "config.json", "metrics.jsonl", "samples.jsonl", "summary.json"
HOSTS = "hosts.jsonl"

# Keys of an existing run that may change (shell patterns): how long it goes on, how often it looks at itself, and how
# the work is laid out on devices, or how a judge is reached, which leaves the objective as it was.
CHANGEABLE = (
    "name", "runs_dir", "rl.steps", "sft.steps", "eval.every", "checkpoint.*", "report.*", "faults.*",
    "sft.log_every", "rl.max_skipped_updates", "*.optimizer.offload", "mesh.*",
    "model.remat", "model.attention", "rollout.tensor", "rollout.slots_per_device",
    "*.rows_per_device", "*.row_length", "reward.model.tokens_per_device", "reward.judge.url",
    "reward.judge.*_variable", "reward.judge.*_seconds", "reward.judge.retries", "reward.judge.concurrency",
    "reward.judge.requests_per_minute", "reward.judge.cache", "reward.judge.offline",
)  # fmt: skip


class RunDir:
    """A run folder opened for writing by this process, created if needed.

    Raises UserError when another process holds it. Use as a context manager (or call
    `close`): once `write_config` has accepted the config, the status in summary.json is "running", in the end
    "finished", "interrupted" (KeyboardInterrupt) or "failed". Opening a folder with a config it refuses leaves the
    status alone.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.path, "run folder", "choose another run name")
        for name in (METRICS, SAMPLES, HOSTS):
            with writing(self.path / name):
                cut_torn_line(self.path / name)
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
                    f"run folder {self.path} was made with another config:\n{describe_changes(refused)}\n"
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
        append_jsonl(self.path / METRICS, rows)

    def append_samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        append_jsonl(self.path / SAMPLES, rows)

    def append_hosts(self, rows: Iterable[Mapping[str, Any]]) -> None:
        append_jsonl(self.path / HOSTS, rows)

    def truncate_after(self, step: int, phase: str) -> None:
        """Drop what was written after the checkpoint of `step` of `phase` that the run continues from.

        Rows stand in the order of time: the first one from after the checkpoint goes, and everything behind it.

            sft 1, sft 2, eval 0, rl 1, eval 1, rl 2, eval 2
            ------ truncate_after(1, "rl") ---|
            truncate_after(2, "sft") --|
        """
        last = (PHASES.index(phase), step)
        for name in (METRICS, SAMPLES, *((HOSTS,) if (self.path / HOSTS).exists() else ())):
            with replacing(self.path / name) as file:
                for row in intact_rows(self.path / name):
                    if row["phase"] in PHASES and (PHASES.index(row["phase"]), row["step"]) > last:
                        break
                    file.write(to_line(row))

    def update_summary(self, update: Mapping[str, Any]) -> None:
        """Merge `update` into summary.json, nested dicts key by key."""
        write_json(self.path / SUMMARY, _merged(read_json(self.path / SUMMARY), update))

    def close(self, status: str = "finished") -> None:
        if self._lock.released:
            return
        try:
            if self._running:
                self.update_summary({"status": status})
        finally:
            self._lock.release()

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(self, kind: type | None, error, traceback) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.close("finished" if kind is None else "interrupted" if interrupted else "failed")


def read_json(path: Path) -> Row:
    """A JSON object, {} when the file is missing. Raises DataError when it cannot be read as one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}): repair it, or start a run with another name") from error


def intact_rows(path: Path) -> Iterator[Row]:
    """Rows of a JSONL file, none when it is missing; lines that are not JSON objects (torn by a kill) are left out."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    yield row


def compare_configs(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple]:
    """{dotted key: (old value, new value)} of the leaves that differ; a missing leaf is `ABSENT`."""
    old, new = flatten(old), flatten(new)
    pairs = {key: (old.get(key, ABSENT), new.get(key, ABSENT)) for key in old | new}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


ABSENT = "(absent)"


def describe_changes(changes: Mapping[str, tuple]) -> str:
    """What `compare_configs` found, a line each: "  rl.steps: 10 -> 20"."""
    show = {key: [value if value is ABSENT else json.dumps(value) for value in pair] for key, pair in changes.items()}
    return "\n".join(f"  {key}: {old} -> {new}" for key, (old, new) in show.items())


def flatten(config: Mapping[str, Any], prefix: str = "") -> Row:
    """Nested dicts as {dotted key: leaf}; an empty dict is a leaf."""
    flat = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def _merged(old: Mapping[str, Any], update: Mapping[str, Any]) -> Row:
    merged = dict(old)
    for key, value in update.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
