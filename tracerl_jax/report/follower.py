"""The run folder of a process that does not write it: in a job that is process 0's alone."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tracerl_jax.parallel.distributed import is_lead
from tracerl_jax.report.run_dir import Row, RunDir


class Follower:
    """A `RunDir` that writes nothing and knows no config."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.config: Row = {}

    def write_config(self, config: Mapping[str, Any], **options: Any) -> dict[str, tuple]:
        return {}

    def append_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        pass

    def append_samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        pass

    def append_hosts(self, rows: Iterable[Mapping[str, Any]]) -> None:
        pass

    def truncate_after(self, step: int, phase: str) -> None:
        pass

    def update_summary(self, update: Mapping[str, Any]) -> None:
        pass

    def __enter__(self) -> "Follower":
        return self

    def __exit__(self, *error: object) -> None:
        pass


def open_run_dir(path: str | os.PathLike) -> RunDir | Follower:
    return RunDir(path) if is_lead() else Follower(path)
