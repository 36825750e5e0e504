"""Configuration files and flags in, frozen dataclasses out. Knows no schema: any tree of frozen dataclasses will do.

Three layers, later ones win:

    defaults of the dataclasses  <  get_config() of a file  <  overrides "group.key=value"

A config file is Python with ``get_config(arg=None)`` returning an `ml_collections.ConfigDict` that holds a subset of
the schema's keys. Overrides are set on that ConfigDict before it is read, so a value the file derives with ``get_ref``
follows them. Every mistake is a `ConfigError` that names the file or the flag, the key and what was expected.
"""

import ast
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import json
import operator
import traceback
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from tracerl_jax.errors import ConfigError, UserError

Schema = TypeVar("Schema")

FLAG = "--config."


def load_config(schema: type[Schema], path: str | None, overrides: Sequence[str] = ()) -> Schema:
    """Read a config file, apply the overrides and return a checked instance of `schema`.

    Args:
        schema: frozen dataclass; nested dataclasses are groups. Its ``__post_init__`` may raise `ConfigError`.
        path: a file, or the bare name of one in ``tracerl_jax.configs``; ``path:arg`` calls ``get_config("arg")``.
            None: the schema's defaults.
        overrides: ``"group.key=value"``, optionally spelled as the flag ``"--config.group.key=value"``.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type, missing value, or a value the schema refuses.
    """
    file, config = _read_file(path) if path is not None else (Path("defaults"), ConfigDict())
    values = dict(_parse_override(schema, override) for override in overrides)
    for key, value in values.items():
        _set(config, key, value, schema, file)
    return _build(schema, config.to_dict(), None, "", _Origin(schema, str(file), tuple(values)))


def from_dict(schema: type[Schema], values: Mapping[str, Any], source: str = "config") -> Schema:
    """Inverse of `to_dict`; missing keys take the schema's defaults. `source` names the origin in errors."""
    return _build(schema, values, None, "", _Origin(schema, source))


def to_dict(instance: Any) -> dict[str, Any]:
    """Nested dict of JSON values (tuples become lists), in the order of the schema."""
    return json.loads(json.dumps(dataclasses.asdict(instance)))


class _NotSet:
    """The default of a field that has none; false, so that `default or None` is None."""

    def __bool__(self) -> bool:
        return False


NOT_SET = _NotSet()


def describe(schema: type) -> str:
    """Every key with its default, its type and its field's ``metadata["doc"]``, as text for ``--help``."""
    return "\n".join(_describe(schema, None, ""))


def keys_of(schema: type) -> list[str]:
    """Dotted names of all keys of a schema, groups left out."""
    return [key for key, group in _walk(schema) if group is None]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def installed_configs() -> dict[str, Path]:
    """Config files that can be named without a folder."""
    package = importlib.util.find_spec("tracerl_jax.configs")
    folders = [] if package is None else package.submodule_search_locations
    return {file.stem: file for folder in folders for file in sorted(Path(folder).glob("*.py"))}


def _read_file(path: str) -> tuple[Path, ConfigDict]:
    name, _, arg = path.partition(":")
    file = Path(name)
    if not file.is_file():
        installed = installed_configs()
        if name.removesuffix(".py") not in installed:
            close = _did_you_mean(file.stem, installed)
            raise ConfigError(f"no config file {name}{close or '.'} Give a path, or one of: {', '.join(installed)}")
        file = installed[name.removesuffix(".py")]
    spec = importlib.util.spec_from_file_location(f"_config_{file.stem}", file)
    if spec is None:
        raise ConfigError(f"{file}: a config file is Python and ends in .py")
    module = importlib.util.module_from_spec(spec)
    with _errors_of(file):
        spec.loader.exec_module(module)
    get_config = getattr(module, "get_config", None)
    if get_config is None:
        raise ConfigError(f"{file}: define get_config(arg=None) returning an ml_collections.ConfigDict")
    if arg and not inspect.signature(get_config).parameters:
        raise ConfigError(f"{file}: get_config() takes no argument, so ':{arg}' cannot be used")
    with _errors_of(file):
        config = get_config(arg) if arg else get_config()
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{file}: get_config() must return an ml_collections.ConfigDict, not {_name(type(config))}")
    return file, config


class _errors_of:
    """Turns what a config file raises into a `ConfigError` naming the file and its line."""

    def __init__(self, file: Path):
        self.file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: types.TracebackType | None) -> None:
        if not isinstance(error, Exception) or isinstance(error, UserError):
            return
        lines = [frame.lineno for frame in traceback.extract_tb(trace) if Path(frame.filename) == self.file]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else "?"
        raise ConfigError(f"{self.file}, line {line}: {_name(kind)}: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Schema: walking its keys


@functools.cache
def _hints(schema: type) -> dict[str, Any]:
    """Field name -> resolved type."""
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema) if field.init}


def _group(hint: Any) -> type | None:
    """The dataclass behind a hint (``Group`` or ``Group | None``), or None for a plain value."""
    for option in _options(hint):
        if dataclasses.is_dataclass(option):
            return option
    return None


def _options(hint: Any) -> tuple[Any, ...]:
    """Members of a union; the hint itself otherwise."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _walk(schema: type, prefix: str = "") -> Iterator[tuple[str, type | None]]:
    """(dotted key, group or None) of every field, groups before their members."""
    for name, hint in _hints(schema).items():
        group = _group(hint)
        yield prefix + name, group
        if group is not None:
            yield from _walk(group, f"{prefix}{name}.")


def _unknown(schema: type, key: str, flag: str = "") -> str:
    """Suggestion for a key the schema does not have: a near miss, or the same name in another group."""
    known = [name for name, _ in _walk(schema)]
    elsewhere = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    return _did_you_mean(key, known, elsewhere, flag)


def _did_you_mean(word: str, known: Iterable[str], sure: Sequence[str] = (), flag: str = "") -> str:
    close = sure or difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return "; did you mean " + " or ".join(flag + name for name in close[:3]) + "?" if close else ""


def _describe(schema: type, base: Any, prefix: str) -> Iterator[str]:
    for field in dataclasses.fields(schema):
        if not field.init:
            continue
        key, hint, doc = prefix + field.name, _hints(schema)[field.name], field.metadata.get("doc", "")
        default, group = _default(field, base), _group(hint)
        if group is not None:
            yield f"\n{key}: {doc}"
            yield from _describe(group, default or None, f"{key}.")
        else:
            shown = "(required)" if default is NOT_SET else f"= {_show(default)}"
            yield f"  {key} {shown}  [{_expected(hint)}]"
            if doc:
                yield f"      {doc}"


def _default(field: dataclasses.Field, base: Any) -> Any:
    """Default of a field: of the instance `base` where the enclosing group has one, else of the class."""
    if base is not None:
        return getattr(base, field.name)
    if field.default is not dataclasses.MISSING:
        return field.default
    return NOT_SET if field.default_factory is dataclasses.MISSING else field.default_factory()


# ---------------------------------------------------------------------------------------------------------------------
# Overrides: text to values


def _parse_override(schema: type, override: str) -> tuple[str, Any]:
    key, equals, text = override.removeprefix(FLAG).partition("=")
    if not equals:
        raise ConfigError(f"{FLAG}{key}: needs a value, as in {FLAG}{key}=VALUE")
    hint = _hint_of(schema, key)
    try:
        return key, _parse(text, hint)
    except ValueError:
        group = _group(hint)
        expected = f"one of its keys to be set: {', '.join(_hints(group))}" if group else _expected(hint)
        raise ConfigError(f"{FLAG}{key}: expected {expected}, got {text!r}") from None


def _hint_of(schema: type, key: str) -> Any:
    """Type of a dotted key. `key` may go one name into a dict field: ``weights.math``."""
    hint: Any = schema
    for name in key.split("."):
        group = _group(hint)
        if group is not None and name in _hints(group):
            hint = _hints(group)[name]
        elif typing.get_origin(hint) is dict and name:
            hint = typing.get_args(hint)[1]
        else:
            raise ConfigError(f"{FLAG}{key}: unknown key{_unknown(schema, key, FLAG)}")
    return hint


def _parse(text: str, hint: Any) -> Any:
    """Value written as `text` on a command line; ValueError when it does not fit."""
    for option in sorted(_options(hint), key=lambda option: option is not types.NoneType):  # "none" before str
        try:
            return _parse_as(text, option)
        except ValueError:
            continue
    raise ValueError(text)


def _parse_as(text: str, hint: Any) -> Any:
    """`_parse` for one member of a union. Entries of a dict keep their Python types; `_convert` checks them."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is str:
        return text
    if hint is bool:
        return _choose(text.lower(), {"true": True, "1": True, "false": False, "0": False})
    if hint is types.NoneType:
        return _choose(text.lower(), {"none": None})
    if hint in (int, float):
        return hint(text)
    if origin is typing.Literal:
        return _choose(text, {str(choice): choice for choice in args})
    if origin is tuple:
        items = _split_items(text)
        return tuple(_parse(item, of) for item, of in zip(items, _item_types(args, len(items)), strict=True))
    if origin is dict:
        values = _literal(text)
        if isinstance(values, dict):
            return values
    raise ValueError(text)


def _choose(text: str, choices: Mapping[str, Any]) -> Any:
    if text not in choices:
        raise ValueError(text)
    return choices[text]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except SyntaxError as error:
        raise ValueError(text) from error


def _split_items(text: str) -> list[str]:
    """``"(1, (2, 3))"`` -> ``["1", "(2, 3)"]``; the outer brackets may be left out."""
    text = text.strip()
    if text[:1] + text[-1:] in ("()", "[]"):
        text = text[1:-1]
    items, depth = [""], 0
    for char in text:
        depth += (char in "([") - (char in ")]")
        if char == "," and depth == 0:
            items.append("")
        else:
            items[-1] += char
    items = [item.strip() for item in items]
    if not items[-1]:  # "" is empty, and "1," is a tuple of one
        items.pop()
    return [item[1:-1] if len(item) > 1 and item[0] == item[-1] and item[0] in "'\"" else item for item in items]


def _set(config: ConfigDict, key: str, value: Any, schema: type, file: Path) -> None:
    """Set a dotted key on the file's ConfigDict, adding the groups that the file does not mention."""
    *groups, name = key.split(".")
    with config.unlocked(), config.ignore_type():
        for depth, group in enumerate(groups, start=1):
            if config.get(group) is None:
                config[group] = ConfigDict(_dict_default(schema, groups[:depth]))
            config = config[group]
            if not isinstance(config, ConfigDict):
                raise ConfigError(f"{file}: {'.'.join(groups[:depth])}: expected a group, got {config!r}")
        # A ConfigDict made above did not exist when the outer context managers opened all its siblings.
        with config.unlocked(), config.ignore_type():
            config[name] = value


def _dict_default(schema: type, names: Sequence[str]) -> dict[str, Any]:
    """Default of a dict field, which an override of one entry adds to; empty for a group."""
    base, default = None, None
    for name in names:
        field = next(field for field in dataclasses.fields(schema) if field.name == name)
        default = _default(field, base)
        schema, base = _group(_hints(schema)[name]), default or None
    return default if isinstance(default, dict) else {}


# ---------------------------------------------------------------------------------------------------------------------
# Values to dataclasses


@dataclasses.dataclass(frozen=True)
class _Origin:
    """Where values were written, for error messages: a file (or another source), and flags on top of it."""

    schema: type
    source: str
    flags: tuple[str, ...] = ()  # dotted keys

    def of(self, key: str) -> str:
        """The flag, or the source and the key, that a wrong value came from."""
        for flag in self.flags:
            if key == flag or key.startswith((f"{flag}.", f"{flag}[")):
                return f"{FLAG}{key}"
        return f"{self.source}: {key}" if key else self.source

    def of_group(self, prefix: str) -> str:
        """The source and every flag that set something below a group."""
        flags = [FLAG + flag for flag in self.flags if flag.startswith(prefix)]
        return self.source + (f" with {', '.join(flags)}" if flags else "")


def _build(schema: type, values: Mapping[str, Any], base: Any, prefix: str, origin: _Origin) -> Any:
    """Instance of `schema` from a nested dict; keys that are absent keep the value of `base`, if there is one."""
    hints = _hints(schema)
    for name in values:
        if name not in hints:
            key = prefix + name
            raise ConfigError(f"{origin.source}: unknown key {key}{_unknown(origin.schema, key)}")
    arguments = {}
    for field in dataclasses.fields(schema):
        name, key = field.name, prefix + field.name
        if name not in hints:
            continue
        default = _default(field, base)
        if name in values:
            arguments[name] = _convert(values[name], hints[name], default or None, key, origin)
        elif default is NOT_SET:
            raise ConfigError(f"{origin.source}: {key} has no value; add it, or pass {FLAG}{key}=VALUE")
        else:
            arguments[name] = default
    try:
        return schema(**arguments)
    except ConfigError as error:
        group = "" if prefix in str(error) else f"{prefix.removesuffix('.')}: "
        raise ConfigError(f"{origin.of_group(prefix)}: {group}{error}") from error


def _convert(value: Any, hint: Any, base: Any, key: str, origin: _Origin) -> Any:
    """Value checked against its type; ints become floats, lists become tuples, dicts become groups."""
    group = _group(hint)
    if group is not None and isinstance(value, Mapping):
        return _build(group, value, base, f"{key}.", origin)
    for option in _options(hint):
        try:
            return _convert_to(value, option, key, origin)
        except ValueError:
            continue
    if group is not None:
        raise ConfigError(f"{origin.of(key)}: expected a group with the keys {', '.join(_hints(group))}, got {value!r}")
    raise ConfigError(f"{origin.of(key)}: expected {_expected(hint)}, got {value!r} ({_name(type(value))})")


def _convert_to(value: Any, hint: Any, key: str, origin: _Origin) -> Any:
    """Convert for one member of a union; ValueError when the value does not fit."""
    kind, args = typing.get_origin(hint), typing.get_args(hint)
    if kind is typing.Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
    elif kind is tuple:
        if isinstance(value, list | tuple):
            types_of_items = _item_types(args, len(value))
            return tuple(
                _convert(item, of, None, f"{key}[{i}]", origin)
                for i, (item, of) in enumerate(zip(value, types_of_items, strict=True))
            )
    elif kind is dict:
        if isinstance(value, Mapping):
            return {str(name): _convert(item, args[1], None, f"{key}.{name}", origin) for name, item in value.items()}
    elif hint is int and not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    elif hint is float and not isinstance(value, bool | str):
        try:
            return float(value)
        except TypeError:
            pass
    elif hint in (bool, str, types.NoneType) and isinstance(value, hint):
        return value
    raise ValueError(value)


def _item_types(args: tuple[Any, ...], count: int) -> list[Any]:
    """Types of a tuple's items: ``tuple[T, ...]`` repeats, ``tuple[A, B]`` has a fixed length."""
    if len(args) == 2 and args[1] is Ellipsis:
        return [args[0]] * count
    if len(args) != count:
        raise ValueError(f"{count} items instead of {len(args)}")
    return list(args)


# ---------------------------------------------------------------------------------------------------------------------
# Words for messages


def _expected(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_expected(option) for option in args)
    if origin is typing.Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(str(choice) for choice in args)
    if origin is tuple:
        return "(" + ", ".join("..." if option is Ellipsis else _expected(option) for option in args) + ")"
    if origin is dict:
        return f"{{{_expected(args[0])}: {_expected(args[1])}}}"
    return "none" if hint is types.NoneType else _name(hint)


def _show(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _name(kind: type) -> str:
    return kind.__name__
