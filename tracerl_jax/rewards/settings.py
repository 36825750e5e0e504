"""How rewards are computed here: set once from the config (or the flags of a command), read by the rewards."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tracerl_jax.config import RewardSection

if TYPE_CHECKING:
    from jax.sharding import Mesh  # worker processes of rewards spare themselves jax

_current = RewardSection()
_mesh: Mesh | None = None
_listeners: list[Callable[[], None]] = []


def current() -> RewardSection:
    return _current


def mesh() -> Mesh | None:
    """The devices that models of rewards are split over; None: the first one."""
    return _mesh


def configure(wanted: RewardSection, mesh: Mesh | None = None) -> None:
    """Makes these the settings; what runs with other ones (worker processes) is stopped first."""
    global _current, _mesh
    if (wanted, mesh) != (_current, _mesh):
        for stop in _listeners:
            stop()
        _current, _mesh = wanted, mesh


def on_change(stop: Callable[[], None]) -> None:
    """Has `stop` called before the settings change."""
    _listeners.append(stop)
