"""What the sections of the schema are made of: documented fields, and checks that name the key."""

from dataclasses import field

from tracerl_jax.errors import ConfigError


def _doc(default, text: str):
    """A field with its one-line explanation, shown by `--help`."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"doc": text})
    return field(default=default, metadata={"doc": text})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_positive(section, group: str, *names: str) -> None:
    """A field that is None is left to its default."""
    for name in names:
        value = getattr(section, name)
        _require(value is None or value >= 1, f"{group}.{name} is {value}, must be at least 1")


def _require_not_negative(section, group: str, *names: str) -> None:
    for name in names:
        _require(getattr(section, name) >= 0, f"{group}.{name} is {getattr(section, name)}, must not be negative")
