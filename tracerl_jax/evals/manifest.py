"""What determines the results of an evaluation, as a JSON document to compare with a later one.

Files of the model folder are told apart by their content, all of it: a time stamp changes when a folder is copied to
another machine, and need not when a training run replaces its weights; reading them once more takes no longer than
loading them, which then finds them in the page cache. What only orders sums (slots, commits, drafts, devices) is left
out, as it is allowed to change.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tracerl_jax
from tracerl_jax.data.prompts import Problem
from tracerl_jax.data.tasks import SOURCE, Task
from tracerl_jax.files import plain
from tracerl_jax.interop.folders import TOKENIZER_FILES
from tracerl_jax.rewards import settings
from tracerl_jax.rollout.options import SamplingOptions

MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES)
PACKAGES = ("jax", "jaxlib", "math-verify", "sympy", "tokenizers", "transformers")
DIGEST_LENGTH = 32  # hexadecimal digits


def make_manifest(
    model: str | os.PathLike,
    dtype: str,
    tasks: Mapping[str, tuple[Task, Sequence[Problem], int]],
    strategies: Mapping[str, SamplingOptions],
    cache: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`tasks`: name -> (task, its problems, answers per problem); `cache`: settings of one that is not exact."""
    return {
        "model": {"files": digest_files(model), "dtype": dtype, **(cache or {})},
        "tasks": {
            name: {
                "problems": len(problems),
                "rows": digest_problems(problems),
                "template": task.template,
                "rewards": task.rewards,
                "accuracy_reward": task.accuracy_reward,
                "samples": samples,
            }
            for name, (task, problems, samples) in tasks.items()
        },
        "strategies": {name: dataclasses.asdict(options) for name, options in strategies.items()},
        "grading": {k: v for k, v in dataclasses.asdict(settings.current()).items() if k != "workers"},
        "versions": {"tracerl_jax": tracerl_jax.__version__} | {name: version(name) for name in PACKAGES},
    }


def digest_files(folder: str | os.PathLike) -> dict[str, str]:
    """{name: digest of the content} of weights, config and tokenizer."""
    paths = sorted({path for pattern in MODEL_FILES for path in Path(folder).glob(pattern) if path.is_file()})
    with ThreadPoolExecutor() as threads:  # hashing releases the interpreter's lock
        return {path.name: digest for path, digest in zip(paths, threads.map(_digest_file, paths), strict=True)}


def digest_problems(problems: Sequence[Problem]) -> str:
    """Of prompts and rows, without the file they come from."""
    digest = hashlib.sha256()
    for problem in problems:
        columns = {name: value for name, value in problem.columns.items() if name != SOURCE}
        row = plain([problem.index, problem.prompt_ids, columns])
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:DIGEST_LENGTH]


def _digest_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGEST_LENGTH]
