"""Model folders on disk: the files that travel with the weights, and writing a folder all at once or not at all."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tracerl_jax.errors import CheckpointError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "*.tiktoken", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates",
)  # fmt: skip
COMPANIONS = (*TOKENIZER_FILES, "generation_config.json", "*.py", "LICENSE*", "NOTICE*")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; CheckpointError when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); fetch the file again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a JSON object; fetch the file again")
    return content


def copy_companions(source: str | os.PathLike, target: str | os.PathLike) -> list[str]:
    """Copies tokenizer, chat template, generation config, remote code and licence; returns the names copied."""
    found = sorted({path for pattern in COMPANIONS for path in Path(source).glob(pattern)})
    for path in found:
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, Path(target) / path.name)
    return [path.name for path in found]


@contextlib.contextmanager
def whole_folder(target: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes `target` when the block ends well, and disappears when it does not.

    It is made beside `target` (same disk) and renamed. What a killed process left behind is removed by the next one.

    Raises:
        CheckpointError: `target` is not empty and `overwrite` is off, or nothing can be written there.
    """
    target = Path(os.path.abspath(target))
    partial, replaced = (target.with_name(f".{target.name}.{state}") for state in ("partial", "replaced"))
    if replaced.exists() and not target.exists():  # killed between the two renames below
        replaced.rename(target)
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(
            f"{target}: already there and not empty; choose another folder, or overwrite it (--overwrite)"
        )
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
    except OSError as error:
        raise CheckpointError(
            f"{target}: cannot be written ({error}); make room or choose another folder, and run the command again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
