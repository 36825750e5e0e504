"""Whole runs so small that compiling is most of what they take: two layers of width 16, sums of two digits.

python tiny_runs.py CONFIG.json module:function:3     one that kills itself (SIGKILL) behind the third call
python tiny_runs.py CONFIG.json 1.5                   or 1.5 seconds after its start
"""

import contextlib
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tracerl_jax import config_io
from tracerl_jax.config import RunConfig
from tracerl_jax.models import PRESETS
from tracerl_jax.parallel.mesh import make_mesh
from tracerl_jax.report.run_dir import intact_rows
from tracerl_jax.rewards import register_reward
from tracerl_jax.training import run as run_module

PRESETS["tiny_run"] = PRESETS["sdar_tiny"].replace(
    width=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32
)
for _family in ("dream", "llada"):  # full attention; Dream's logits are shifted
    PRESETS[f"tiny_{_family}"] = PRESETS[f"{_family}_demo"].replace(
        width=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32, block_size=4
    )
# Everything that has a state of its own: two models, a frozen reference, several updates a step.
FULL = {"value__enabled": True, "rl__kl_to": "reference", "rl__minibatches": 2, "rl__epochs": 2}
TIMES = ("seconds/", "_seconds", "per_second", "chips/", "hosts/")  # metrics that differ between equal runs

BASE = {
    "model": {"preset": "tiny_run"},
    "task": {
        "rewards": {"tiny_high": 1.0},
        "options": {"min_operands": 2, "max_operands": 2, "digits": 1, "train_count": 24, "test_count": 4},
    },
    "sft": {
        "steps": 4, "sequences_per_update": 4, "row_length": 256, "rows_per_device": 1, "log_every": 1,
        "mask_low": 0.6,
        "optimizer": {"learning_rate": 1e-2, "schedule": "cosine", "warmup_updates": 2},
    },
    "rollout": {
        "prompts_per_step": 2, "samples_per_prompt": 4, "slots_per_device": 8, "max_tokens": 8,
        "truncated_is_wrong": False,
    },
    "rl": {
        "steps": 6, "row_length": 256, "rows_per_device": 1, "accuracy_low": 0.0, "accuracy_high": 1.0,
        "optimizer": {"learning_rate": 1e-2},
    },
    "eval": {"every": 2, "strategies": ["dynamic"]},
    "checkpoint": {"every": 2, "sft_every": 2},
    "report": {"samples_per_step": 3},
}  # fmt: skip


@register_reward("tiny_high")
def high_digits(prompts, completions, **columns):
    """Digits above 4: differs inside nearly every group of a model that knows nothing, so nearly every step updates."""
    return [sum(c in "56789" for c in text) / 8 for text in completions]


@register_reward("tiny_shy")
def shy(prompts, completions, **columns):
    """The same without a verdict on texts that contain a 7."""
    values = high_digits(prompts, completions)
    return [None if "7" in text else value for text, value in zip(completions, values, strict=True)]


@register_reward("tiny_odd")
def odd_only(prompts, completions, *, ground_truth_answer, **columns):
    """The same for problems with an odd answer; the others' groups all agree, so that they are dropped."""
    values = high_digits(prompts, completions)
    return [value * (int(gold) % 2) for value, gold in zip(values, ground_truth_answer, strict=True)]


@register_reward("tiny_flat")
def flat(prompts, completions, **columns):
    return [1.0] * len(completions)


@contextlib.contextmanager
def quick(compiled: str | Path) -> Iterator[None]:
    """Runs use one device, are compiled without optimisations, and find programs of earlier runs in `compiled`."""
    options = {
        "jax_compilation_cache_dir": str(compiled),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "make_mesh", lambda *sizes: make_mesh(*sizes, devices=jax.devices()[:1]))
        for name, value in options.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it remembers where it looked
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def tiny(runs_dir: str | Path, **changes) -> RunConfig:
    """`changes` replace dotted keys, dots spelled as two underscores: rl__steps=3."""
    return config_io.from_dict(RunConfig, tiny_values(runs_dir, **changes))


def tiny_values(runs_dir: str | Path, **changes) -> dict:
    values = json.loads(json.dumps(BASE)) | {"runs_dir": str(runs_dir)}
    for key, value in changes.items():
        *groups, name = key.split("__")
        functools.reduce(lambda group, part: group.setdefault(part, {}), groups, values)[name] = value
    return values


def config_file(path: Path, **changes) -> str:
    """The same as a file for `--config`."""
    values = tiny_values(path.parent, **changes)
    path.write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config(arg=None):\n    return ConfigDict({values!r})\n"
    )
    return str(path)


def run_and_die(runs_dir: Path, compiled: Path, moment: str, **changes) -> bool:
    """A run in a process of its own that kills itself at `moment` (see the top); False when it ended before."""
    config = runs_dir / "config.json"
    config.write_text(json.dumps(tiny_values(runs_dir, **changes)))
    command = [sys.executable, __file__, str(config), str(compiled), moment]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode in (0, -signal.SIGKILL), process.stderr
    return process.returncode != 0


def metric_rows(run: Path) -> list[dict]:
    """metrics.jsonl without what measures time."""
    return [
        {name: value for name, value in row.items() if not any(t in name for t in TIMES)}
        for row in intact_rows(run / "metrics.jsonl")
    ]


def newest_checkpoint(run: Path) -> int:
    return max(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())


def saved_state(run: Path) -> tuple[dict[str, np.ndarray], dict]:
    """(leaves of every array item of the newest checkpoint by path, position of the run)"""
    folder = (run / "checkpoints" / str(newest_checkpoint(run))).absolute()
    leaves = {}
    for item in ("params", "value", "train"):
        if (folder / item).exists():
            tree = read_whatever_saved_it(folder / item)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                leaves[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return leaves, json.loads((folder / "data" / "metadata").read_text())


def read_whatever_saved_it(folder: Path) -> Any:
    """The arrays of a checkpoint's item on the host, also of a job whose devices are not here."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        known = checkpointer.metadata(folder).item_metadata.tree
        to_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), known)
        return checkpointer.restore(folder, restore_args=to_host)


def assert_same_run(run: Path, expected: Path) -> None:
    """Parameters, optimizer states, position, metrics, samples, summary and exported model are the same bit for bit."""
    assert metric_rows(run) == metric_rows(expected)
    assert (run / "samples.jsonl").read_text() == (expected / "samples.jsonl").read_text()
    state, position = saved_state(run)
    expected_state, expected_position = saved_state(expected)
    assert position == expected_position
    assert state.keys() == expected_state.keys()
    for name, leaf in state.items():
        assert leaf.tobytes() == expected_state[name].tobytes(), name
    summaries = [json.loads((path / "summary.json").read_text())["eval"] for path in (run, expected)]
    assert summaries[0] == summaries[1]
    weights = [(path / "hf" / "model.safetensors").read_bytes() for path in (run, expected)]
    assert weights[0] == weights[1]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def call_behind(moment: str, act: Callable[[], None]) -> None:
    """Has `act` called when the n-th call of a function or method returns: "module:function:n"."""
    module, name, number = moment.split(":")
    owner = importlib.import_module(module)
    *path, name = name.split(".")
    owner = functools.reduce(getattr, path, owner)
    original, calls = getattr(owner, name), []

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(name)
        if len(calls) == int(number):
            act()
        return result

    setattr(owner, name, wrapped)


def main(config: str, compiled: str, moment: str) -> None:
    from tracerl_jax.training.pipeline import train

    if ":" in moment:
        call_behind(moment, _die)
    else:
        threading.Timer(float(moment), _die).start()
    with quick(compiled):
        train(config_io.from_dict(RunConfig, json.loads(Path(config).read_text())))


if __name__ == "__main__":
    main(*sys.argv[1:])
