"""The judge of a program's functions: executes one test, which calls them through rpc.py.

The test is, as JSON: `test`, statements of which none may raise; `given`, trusted definitions of the problem (imports,
helper functions), executed before; `subjects`, names that are the program's whatever else they may be.
"""

import ast
import builtins
import importlib
import os
import sys

from tracerl_jax.rewards.sandbox.inside.clock import Overtime
from tracerl_jax.rewards.sandbox.inside.rpc import Peer
from tracerl_jax.rewards.sandbox.inside.supervise import Program

_BUILTINS = frozenset(dir(builtins))


def examine(program: Program, pipes: tuple[int, ...], test: dict) -> dict:
    """`status` is "passed" or "failed", with the reason in `detail`."""

    def wait(fd: int) -> None:
        program.clock.start()
        try:
            ready = program.wait((fd,)) if fd == replies else program.wait(writes=(fd,))
            if fd not in ready:
                raise EOFError("it ended")
        except Overtime as error:
            raise EOFError(str(error)) from None
        finally:
            program.clock.stop()

    requests, replies = pipes
    for fd in pipes:
        os.set_blocking(fd, False)
    peer = Peer(replies, requests, wait=wait, believes=test["own_equality"])
    reason, stage = "", "the program"
    try:
        peer.load()
        stage = "the test"
        exec(compile(test["test"], "test", "exec"), _namespace(test, peer))
    except BaseException as error:
        reason = f"{stage} raised {_describe(error)}"
    reason = peer.broken or reason  # whatever the test made of it
    return {"status": "failed" if reason else "passed", "detail": reason}


def _describe(error: BaseException) -> str:
    try:
        text = str(error)[:200]
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _namespace(test: dict, peer: Peer) -> dict:
    """Globals of a test. A name it uses and does not define means, in this order: a subject, which is the program's;
    what the problem gives; a module of the standard library, where it is used as one; the program's."""
    names = {"__name__": "test"}
    try:
        exec(compile(test["given"], "problem", "exec"), names)
    except Exception:
        pass  # what it should have defined is looked for in the program
    tree = ast.parse(test["test"])
    free, called, modules = _names(tree)
    subjects = {*test["subjects"], *called}
    for name in subjects | free - names.keys():
        if name in modules and name not in subjects:
            try:
                names[name] = importlib.import_module(name)
                continue
            except ImportError:
                pass
        try:
            names[name] = peer.name(name)
        except NameError:
            names.pop(name, None)
    return names


def _names(tree: ast.Module) -> tuple[set[str], set[str], set[str]]:
    """(names the test takes from elsewhere, those it hands to functions of its own as in `check(solve)`, those that can
    only be modules). Built-in names count only in a test that takes nothing else: `assert sum(10, 15) == 6`."""
    used, bound, bases = set(), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            bases.add(node.value.id)
    called = set()
    for statement in tree.body:
        call = statement.value if isinstance(statement, ast.Expr) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in bound:
            called |= {arg.id for arg in call.args if isinstance(arg, ast.Name)} - bound
    taken = used - bound - _BUILTINS
    return taken or (set() if called else used - bound), called, bases & sys.stdlib_module_names
