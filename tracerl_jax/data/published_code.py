"""Published programming tasks as rows of the code format: a prefix to begin with, and tests to pass."""

import ast
import base64
import io
import json
import pickle
import re
import zlib
from collections.abc import Sequence

TIME_LIMIT = 1.0  # seconds a test may take
COMPLETED = "Here is the completed code:\n```python\n"
# What LeetCode's own judge has imported when it runs a solution.
LEETCODE_IMPORTS = (
    "from typing import *\nfrom collections import *\nfrom functools import *\nfrom itertools import *\n"
    "from heapq import *\nfrom bisect import *\nfrom math import *\nimport string, re, random\n\n"
)


def humaneval_row(row: dict) -> dict:
    """prompt (imports, signature, docstring), test (defines `check`), entry_point."""
    return {
        "question": f"You need to complete this code:\n{row['prompt']}\n", "prefix": f"{COMPLETED}{row['prompt']}\n",
        "test_method": "function", "test_list": [f"{row['test']}\n\ncheck({row['entry_point']})"],
        "test_time_limit": TIME_LIMIT, "task_id": row["task_id"],
    }  # fmt: skip


def mbpp_row(row: dict) -> dict:
    """text (`prompt` in the sanitized config), code, test_list (assertions), test_setup_code or test_imports."""
    text, code = (row.get("text") or row["prompt"]).strip(), row["code"].replace("\r\n", "\n")
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or ())
    tests = [f"{setup}\n{test}".strip() for test in [*row["test_list"], *(row.get("challenge_test_list") or ())]]
    found = {
        "question": f"{text}\nYour code should pass the test:\n{row['test_list'][0]}\n", "test_method": "function",
        "test_list": tests, "test_time_limit": TIME_LIMIT, "task_id": row["task_id"],
    }  # fmt: skip
    signature = _signature(code, row["test_list"][0])
    if signature:
        found["prefix"] = f'{COMPLETED}{signature}\n    """ {text}\n    """\n'
    return found


def _signature(code: str, test: str) -> str:
    """`def f(x):` of the function that the test calls, or "" where the line would not stand alone."""
    for name in dict.fromkeys(re.findall(r"([A-Za-z_]\w*)\(", test)):
        match = re.search(rf"^def {re.escape(name)}\s*\(.*\)[^:]*:[ \t]*$", code, re.MULTILINE)
        if match is None:
            continue
        try:
            function = ast.parse(f"{match[0]}\n    pass").body[0]
        except SyntaxError:
            return ""
        plain = all(isinstance(d, ast.Constant) for d in function.args.defaults)
        return match[0].rstrip() if plain else ""  # other defaults need what stands above
    return ""


def livecodebench_row(row: dict) -> dict:
    """LiveCodeBench (question_content, starter_code, public_test_cases, private_test_cases, metadata), or the same
    inside LiveBench's coding tasks (turns, original_json)."""
    inner = row.get("original_json") or row
    inner = json.loads(inner) if isinstance(inner, str) else inner
    question = row["turns"][0] if row.get("turns") else inner["question_content"]
    tests = [*_test_cases(row["public_test_cases"]), *_test_cases(row.get("private_test_cases"))]
    if not tests:
        raise ValueError("it has no test")
    found = {
        "question": question, "test_time_limit": TIME_LIMIT,
        "task_id": row.get("question_id") or inner["question_id"],
    }  # fmt: skip
    if {test["testtype"] for test in tests} == {"stdin"}:
        return found | {
            "test_method": "stdio", "test_input": [test["input"] for test in tests],
            "test_output": [test["output"] for test in tests],
        }  # fmt: skip
    metadata = inner["metadata"]
    name = (json.loads(metadata) if isinstance(metadata, str) else metadata)["func_name"]
    return found | {
        "test_method": "function", "test_list": [_assertion(name, test) for test in tests],
        "prefix": f"{COMPLETED}{LEETCODE_IMPORTS}{inner['starter_code'].rstrip()}\n",
    }  # fmt: skip


def _assertion(name: str, test: dict) -> str:
    arguments = ", ".join(repr(json.loads(line)) for line in test["input"].splitlines() if line.strip())
    return f"assert Solution().{name}({arguments}) == {json.loads(test['output'])!r}"


def _test_cases(text: str | Sequence[dict] | None) -> Sequence[dict]:
    """A list of {input, output, testtype} as JSON, or that JSON pickled, compressed and encoded."""
    if not isinstance(text, str):
        return text or ()
    try:
        return json.loads(text)
    except ValueError:
        return json.loads(_PlainUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(text)))).load())


class _PlainUnpickler(pickle.Unpickler):
    """A pickle runs whatever code it names; this one reads texts only."""

    def find_class(self, module: str, name: str):
        raise ValueError(f"the pickled tests ask for {module}.{name}; only a text is read")
