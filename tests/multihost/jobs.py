"""Jobs of real processes on this machine, which meet over loopback. As a script: one process of one.

python jobs.py COMMAND..       tracerl COMMAND.. with the rewards and presets of tiny_runs, compiled quickly

TEST_SPOIL=i                   process i finds a NaN in its part of the first policy update's advantages
TEST_UNREADABLE=i               process i cannot read its part of a checkpoint
TEST_DIE=module:function:n     it kills itself behind that call of the function, which may be a method: Class.method
TEST_STOP=module:function:n    the same with SIGTERM to itself; TEST_FREEZE: with SIGSTOP
TEST_PROCESS=i                 of the process that the three above are for
TEST_COMPILED=folder           compiled programs of earlier jobs; default: a folder of this session
"""

import functools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tracerl_jax.launch.launch import free_port

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent / "training"))


@dataclass
class Ended:
    status: int
    output: str  # stdout and stderr


class Job:
    """Processes that form one job, each with `devices` virtual devices. Use as a context manager: none is left behind.

    `command`: arguments of this interpreter. `own`: {process: further arguments}; `environment`: of all.
    """

    def __init__(
        self, folder: Path, processes: int, devices: int, command: Sequence[str], *,
        own: Mapping[int, Sequence[str]] = {}, environment: Mapping[str, str] = {},
    ):  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        address = f"127.0.0.1:{free_port()}"
        self._outputs = [folder / f"output-{i}.txt" for i in range(processes)]
        self.processes = []
        for i, output in enumerate(self._outputs):
            variables = os.environ | {
                "TRACERL_COORDINATOR": address, "TRACERL_PROCESSES": str(processes), "TRACERL_PROCESS_ID": str(i),
                "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                "PYTHONPATH": str(ROOT), "TEST_COMPILED": compiled(),
                **environment,
            }  # fmt: skip
            with output.open("w") as file:
                words = [sys.executable, *command, *own.get(i, ())]
                self.processes.append(subprocess.Popen(words, env=variables, stdout=file, stderr=subprocess.STDOUT))

    def wait(self, timeout: float = 1500) -> list[Ended]:
        statuses = [process.wait(timeout) for process in self.processes]
        return [Ended(status, path.read_text()) for status, path in zip(statuses, self._outputs, strict=True)]

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@functools.cache
def _folder_of_session() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="compiled-")


def compiled() -> str:
    return os.environ.get("TEST_COMPILED") or _folder_of_session().name


def tracerl(folder: Path, processes: int, devices: int, words: Sequence[str], **more) -> list[Ended]:
    """`tracerl WORDS..` as a job, to its end."""
    with Job(folder, processes, devices, [__file__, *words], **more) as job:
        return job.wait()


def succeed(ended: Sequence[Ended]) -> None:
    assert [process.status for process in ended] == [0] * len(ended), "\n".join(p.output[-4000:] for p in ended)


def _spoil() -> None:
    """NaN in the advantages of the first batch that has any."""
    import numpy as np

    from tracerl_jax.training import step

    put, spoiled = step.put, []

    def spoiling(batch, shardings):
        if "advantages" in batch and not spoiled:
            spoiled.append(True)
            batch = {**batch, "advantages": np.full_like(batch["advantages"], np.nan)}
        return put(batch, shardings)

    step.put = spoiling


def _lose_sight() -> None:
    from tracerl_jax.training.checkpoint import Checkpointer

    def read(self, step, abstract):
        raise ValueError("a chunk of my part is missing")

    Checkpointer._read = read


def _main() -> int:
    import jax
    import tiny_runs

    tiny_runs.PRESETS["one_layer"] = tiny_runs.PRESETS["tiny_run"].replace(num_layers=1, num_kv_heads=2)
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", os.environ["TEST_COMPILED"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    process = os.environ.get("TRACERL_PROCESS_ID")
    if os.environ.get("TEST_SPOIL") == process:
        _spoil()
    if os.environ.get("TEST_UNREADABLE") == process:
        _lose_sight()
    signals = {"TEST_DIE": signal.SIGKILL, "TEST_STOP": signal.SIGTERM, "TEST_FREEZE": signal.SIGSTOP}
    for variable, number in signals.items():
        if variable in os.environ and os.environ["TEST_PROCESS"] == process:
            tiny_runs.call_behind(os.environ[variable], lambda number=number: os.kill(os.getpid(), number))
    from tracerl_jax.launch.cli import main

    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(_main())
