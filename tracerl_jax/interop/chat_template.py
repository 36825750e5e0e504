"""The published chat template for tokenizers that come without one."""

import os
from pathlib import Path

from tracerl_jax.interop.families import Family
from tracerl_jax.interop.folders import read_json

TEMPLATE_FILE = "chat_template.jinja"
_VOCABULARIES = ("tokenizer.json", "added_tokens.json", "tokenizer_config.json")


def add_chat_template(folder: str | os.PathLike, family: Family) -> bool:
    """Writes the family's chat template into a folder whose tokenizer has none, but all tokens the template writes."""
    folder = Path(folder)
    if family.chat_template is None or _has_template(folder):
        return False
    files = [folder / name for name in _VOCABULARIES if (folder / name).exists()]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    if not all(f'"{token}"' in text for token in family.chat_tokens):
        return False
    (folder / TEMPLATE_FILE).write_text(family.chat_template, encoding="utf-8")
    return True


def _has_template(folder: Path) -> bool:
    settings = folder / "tokenizer_config.json"
    inside = settings.exists() and read_json(settings).get("chat_template")
    return bool(inside) or any((folder / name).exists() for name in (TEMPLATE_FILE, "chat_template.json"))
