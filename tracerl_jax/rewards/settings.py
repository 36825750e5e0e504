"""How rewards are computed here: set once from the config (or the flags of a command), read by the rewards."""

from collections.abc import Callable

from tracerl_jax.config import RewardSection

_current = RewardSection()
_listeners: list[Callable[[], None]] = []


def current() -> RewardSection:
    return _current


def configure(wanted: RewardSection) -> None:
    """Makes `wanted` the settings; what runs with other ones (worker processes) is stopped first."""
    global _current
    if wanted != _current:
        for stop in _listeners:
            stop()
        _current = wanted


def on_change(stop: Callable[[], None]) -> None:
    """Has `stop` called before the settings change."""
    _listeners.append(stop)
