"""Settings and rewards for one test."""

import pytest

from tracerl_jax.config import RewardSection
from tracerl_jax.config_io import from_dict
from tracerl_jax.rewards import register_reward, registry, settings


@pytest.fixture
def configure():
    """configure(judge={"votes": 3}) sets keys of `reward`."""
    yield lambda **values: settings.configure(from_dict(RewardSection, values))
    settings.configure(RewardSection())


@pytest.fixture
def define(monkeypatch):
    """Registers rewards for one test only."""
    monkeypatch.setattr(registry, "_REWARDS", dict(registry._REWARDS))
    return lambda name, function, **kwargs: register_reward(name, **kwargs)(function)
