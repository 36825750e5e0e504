"""Refuses a job whose processes differ: in their config, code, packages or devices. They would run different programs
and wait for each other, or train something that nobody asked for."""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import tracerl_jax
from tracerl_jax.errors import ConfigError
from tracerl_jax.files import plain
from tracerl_jax.parallel import distributed, peers
from tracerl_jax.report.run_dir import ABSENT, compare_configs

NESTED = ("kernels", "configs", "launch")  # of a checkout, beside the package

_REMEDIES = {
    "config": "start all processes with the same command",
    "code": "install the same version of tracerl_jax on all hosts",
    "jax": "install the same packages on all hosts",
    "python": "install the same Python on all hosts",
    "devices": "give all processes the same devices",
    "rows": "give all hosts the same rows, on a shared folder say",
    "weights": "give all hosts the same model folder, a shared one say",
}


def check_alike(config: Mapping[str, Any]) -> None:
    """Raises ConfigError naming two processes and what differs, in all of them. `config`: resolved, JSON-able."""
    if not distributed.is_job():
        return
    mine = json.dumps(facts(config), default=str)
    distributed.client().key_value_set(f"tracerl/facts/{distributed.process_index()}", mine)
    peers.from_lead(lambda: _compare(config))


def check_data(data: Mapping[str, Any]) -> None:
    """The same for what the processes have read; `data`: {"rows": {name: `digest`}, "weights": {..}}, as far as known.

    Waits for all processes."""
    everybody = peers.gather(dict(data))
    for index, found in enumerate(everybody):
        _refuse(everybody[0], found, index)


def digest(rows: Sequence[Any]) -> str:
    """Of dataclasses: their number and a hash of what is in them."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(plain(dataclasses.asdict(row)), sort_keys=True, default=str).encode() + b"\0")
    return f"{len(rows)} rows {found.hexdigest()[:16]}"


def facts(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "config": config,
        "code": f"{tracerl_jax.__version__} {source_digest()}",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
    }


def source_digest() -> str:
    """Of the package's source files: versions do not change with every edit."""
    root = Path(tracerl_jax.__file__).parent
    nested = [Path(place) / name for place in tracerl_jax.__path__ for name in NESTED]
    found = hashlib.sha256()
    for folder in dict.fromkeys((root, *(folder for folder in nested if folder.parent != root))):
        for path in sorted(folder.rglob("*.py")):
            found.update(path.relative_to(folder.parent).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def _compare(config: Mapping[str, Any]) -> None:
    expected = json.loads(json.dumps(facts(config), default=str))
    client, wait = distributed.client(), distributed.FOR_EVER_MS
    for index in range(1, distributed.process_count()):
        found = json.loads(client.blocking_key_value_get(f"tracerl/facts/{index}", wait))
        _refuse(expected, found, index)


def _refuse(expected: Mapping[str, Any], found: Mapping[str, Any], index: int) -> None:
    if differences := compare_configs(expected, found):
        lines = [f"  {key}: process 0 has {_show(a)}, process {index} has {_show(b)}"
                 for key, (a, b) in sorted(differences.items())]  # fmt: skip
        remedies = dict.fromkeys(_REMEDIES[key.partition(".")[0]] for key in sorted(differences))
        raise ConfigError("\n".join(["the processes of this job differ:", *lines, "; ".join(remedies)]))


def _show(value: Any) -> str:
    return value if value is ABSENT else json.dumps(value)
