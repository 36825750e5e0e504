"""The program in a completion, and what a code task's row says about the program's beginning."""

import ast
import re
import textwrap

_PYTHON_FENCE = re.compile(r"```(?:python3?|py)[ \t]*\n")
_BARE_BLOCK = re.compile(r"```[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def extract_program(completion: str, prefix: str = "") -> str:
    """The last ```python block (the end may be missing), else the last block, else the whole text; dedented.

    `prefix` is what the completion continues: prose and an open block, or the first lines of a program. When the block
    does not contain them, the imports and helper functions of the prefix are put before it.
    """
    text = completion if completion.startswith(prefix) else prefix + completion  # a trained prefix is part of it
    program, start = _code(text), _code(prefix)
    if start.strip() and start not in program and "from __future__" not in program:
        return f"{preamble(prefix)}\n{textwrap.dedent(program)}"
    return textwrap.dedent(program)


def preamble(prefix: str) -> str:
    """What a prefix defines completely: its code without the function or class at its end, which is to be written."""
    try:
        body = ast.parse(_code(prefix)).body
    except (SyntaxError, ValueError):
        return ""
    if body and isinstance(body[-1], ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        body = body[:-1]
    return ast.unparse(ast.Module(body, type_ignores=[]))


def _code(text: str) -> str:
    opened = _PYTHON_FENCE.split(text)
    if len(opened) > 1:
        return opened[-1].partition("```")[0]
    blocks = _BARE_BLOCK.findall(text)
    return blocks[-1] if blocks else text
