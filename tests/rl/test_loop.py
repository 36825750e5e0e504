"""The schedule of a step's updates, with a learner that only counts."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from tracerl_jax import config_io
from tracerl_jax.config import RunConfig
from tracerl_jax.report.metrics import PhaseTimer
from tracerl_jax.rl import loop
from tracerl_jax.training.step import UpdateResult


def config(**value):
    rl = {"steps": 7, "minibatches": 2, "epochs": 3}
    value = {"enabled": True} | value
    return config_io.from_dict(RunConfig, {"model": {"preset": "sdar_tiny"}, "rl": rl, "value": value})


class Counter:
    """Stands for a `Learner`; `calls` are the names of the methods that were called."""

    def __init__(self):
        self.calls = []

    def with_values(self, replays):
        self.calls.append("values")
        return replays

    def update_value(self, replays):
        return self._update("value")

    def update_policy(self, replays):
        return self._update("policy")

    def _update(self, name):
        self.calls.append(name)
        return UpdateResult(jnp.float32(0), jnp.float32(0), jnp.array(False), {}), None


def test_the_value_model_is_updated_every_nth_step_and_asked_at_every_step(monkeypatch):
    monkeypatch.setattr(loop, "plan_replays", lambda *_, **__: [["a"], ["b"]])
    monkeypatch.setattr(loop, "with_old_logprobs", lambda learner, replays, stale: (replays, {}))
    for name in ("value_metrics", "policy_metrics", "count_work"):
        monkeypatch.setattr(loop, name, lambda *_: {})
    model = SimpleNamespace(config=SimpleNamespace(block_size=4, mask_token_id=1))
    run = SimpleNamespace(config=config(train_every=3), model=model)
    guard = SimpleNamespace(check=lambda *_: None)
    for step in range(1, 8):
        learner = Counter()
        loop.update(run, learner, [], step, PhaseTimer(), guard)
        value = ["value"] * 2 if step in (3, 6) else []
        assert learner.calls == ["values", *value, "policy", "policy"]


@pytest.mark.parametrize(("every", "expected"), [(1, 7 * 6), (3, 2 * 6), (9, 0)])
def test_the_schedules_count_the_updates_of_each_model(every, expected):
    assert loop.policy_updates(config()) == 7 * 6
    assert loop.value_updates(config(train_every=every)) == expected
