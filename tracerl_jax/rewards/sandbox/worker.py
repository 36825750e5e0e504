"""A launcher of programs (see `inside`), as its parent sees it: a process that takes a job and gives a reply."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from tracerl_jax.rewards.sandbox import inside
from tracerl_jax.rewards.sandbox.inside.frames import read_frame, write_frame

# The modules of `inside` that a launcher needs, each after those it imports.
MODULES = ("frames", "isolation", "clock", "runtime", "supervise", "rpc", "examine", "program", "launcher")
PACKAGE = inside.__name__
START_SECONDS = 60.0
PYTHON = (sys.executable, "-P", "-s")

# Makes the modules from their source, so that a container needs nothing but Python; packages around them are empty.
BOOT = f"""
import json, os, sys, types
def read(size):
    data = b""
    while len(data) < size:
        data += os.read(0, size - len(data)) or sys.exit()
    return data
parts = {PACKAGE!r}.split(".")
for i in range(len(parts)):
    sys.modules[".".join(parts[:i + 1])] = package = types.ModuleType(parts[i])
    package.__path__ = []
for name, source in json.loads(read(int.from_bytes(read(8), "big"))):
    name = {PACKAGE!r} + "." + name
    sys.modules[name] = types.ModuleType(name)
    setattr(package, name.rpartition(".")[2], sys.modules[name])
    exec(compile(source, name, "exec"), sys.modules[name].__dict__)
program = sys.modules[{PACKAGE!r} + ".launcher"].serve()
if program is not None:
    program()
"""


class WorkerDied(Exception):
    pass


class Worker:
    """`command` starts a Python (default: this one) that takes what a `python` takes on its command line."""

    def __init__(self, settings: dict, command: Sequence[str] | None = None):
        folder = Path(inside.__file__).parent
        self.process = subprocess.Popen(
            [*(command or PYTHON), "-S", "-c", BOOT],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/", start_new_session=True,
            env=None if command else {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"},
        )  # fmt: skip
        self._scratch = settings["scratch"]
        try:
            for message in ([(name, (folder / f"{name}.py").read_text()) for name in MODULES], settings):
                write_frame(self.process.stdin.fileno(), message)
        except OSError:
            pass  # the first job will say what is wrong

    def run(self, job: dict, tests: dict | None, seconds: float) -> dict:
        """The reply to a job. Raises `WorkerDied`, with what the launcher had to say, when none comes in `seconds`."""
        timer = threading.Timer(seconds, self.process.kill)
        timer.daemon = True
        timer.start()
        try:
            for message in (job, tests):
                write_frame(self.process.stdin.fileno(), message)
            reply = read_frame(self.process.stdout.fileno())
        except (OSError, EOFError, ValueError) as error:
            raise WorkerDied(self.close() or f"no reply in {seconds:g} s ({error})") from error
        finally:
            timer.cancel()
        if not isinstance(reply, dict) or "status" not in reply:
            raise WorkerDied(f"an odd reply: {json.dumps(reply)[:200]}")
        return reply

    def close(self) -> str:
        """Ends the launcher, and with it whatever it has started; the last of what it wrote to its standard error."""
        self.process.kill()
        for folder in Path(self._scratch or "/").glob(f"program-{self.process.pid}-*"):
            shutil.rmtree(folder, ignore_errors=True)
        return self.process.communicate()[1].decode(errors="replace").strip()[-500:]
