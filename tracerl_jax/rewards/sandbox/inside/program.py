"""What the process of a program under test does, after everything around it is in place."""

import io
import sys
import types

from tracerl_jax.rewards.sandbox.inside.rpc import Peer

REQUESTS, REPLIES = 3, 4  # file descriptors of a program whose functions are called
OUR_FRAMES = 20  # at most, below the program's own on the stack


def run_script(source: str) -> None:
    """Runs `source` as a script; the interpreter ends as after any script."""
    _prepare()
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.argv = ["program.py"]
    exec(compile(source, "program.py", "exec"), main.__dict__)


def serve_functions(source: str) -> None:
    """Executes `source` in a module of its own when asked to, and does what the tests ask of it."""
    _prepare()
    module = types.ModuleType("program")
    sys.modules["program"] = module
    Peer(REQUESTS, REPLIES).serve(
        load=lambda: exec(compile(source, "program.py", "exec"), module.__dict__), names=module.__dict__
    )


def _prepare() -> None:
    sys.setrecursionlimit(sys.getrecursionlimit() + OUR_FRAMES)
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(open(1, "wb", closefd=False), encoding="utf-8")
    sys.stderr = sys.__stderr__ = io.TextIOWrapper(
        open(2, "wb", closefd=False), encoding="utf-8", errors="backslashreplace", line_buffering=True
    )
