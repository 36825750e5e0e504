"""Schedules of lengths and block sizes: what holds when, what is refused, and what is compiled."""

import jax
import pytest
from engine_utils import compilations

from tracerl_jax.config import RolloutSection, RunConfig
from tracerl_jax.config_io import from_dict, load_config, to_dict
from tracerl_jax.errors import ConfigError
from tracerl_jax.models import PRESETS, Model
from tracerl_jax.rl.loop import make_learner
from tracerl_jax.rollout.engine import Engine, EngineConfig, Request
from tracerl_jax.training.run import rollout_options


def config(rollout, **rl):
    return from_dict(RunConfig, {"model": {"preset": "sdar_tiny"}, "rollout": rollout, "rl": rl})


def test_what_holds_at_a_step():
    section = RolloutSection(
        max_tokens=128, max_tokens_schedule={"10": 512, "3": 256}, block_size_schedule={"0": 4, "10": 8}
    )
    found = {step: (section.at(step).max_tokens, section.at(step).block_size) for step in (1, 2, 3, 9, 10, 999)}
    assert found == {1: (128, 4), 2: (128, 4), 3: (256, 4), 9: (256, 4), 10: (512, 8), 999: (512, 8)}
    assert [(s.max_tokens, s.block_size) for s in section.stages()] == [(128, 4), (256, 4), (512, 8)]
    assert section.longest == 512
    plain = RolloutSection(max_tokens=99)
    assert plain.stages() == [plain] and plain.at(7) == plain


def test_from_a_flag_to_json_and_back():
    flag = "rollout.max_tokens_schedule={0: 16, 100: 32}"
    wanted = load_config(RunConfig, "demo", [flag, "--config.rollout.block_size_schedule={1: 4}"])
    assert wanted.rollout.max_tokens_schedule == {"0": 16, "100": 32}
    assert from_dict(RunConfig, to_dict(wanted)) == wanted


@pytest.mark.parametrize(
    "rollout, rl, message",
    [
        ({"max_tokens_schedule": {"ten": 5}}, {}, r"max_tokens_schedule holds \{ten: 5\}; it must map RL steps"),
        ({"max_tokens_schedule": {"-1": 5}}, {}, "max_tokens_schedule"),
        ({"block_size_schedule": {"10": 0}}, {}, r"block_size_schedule holds \{10: 0\}"),
        ({"block_size_schedule": {"1": 4, "10": 8}}, {"block_size": 4}, "set rl.old_logprobs=recompute"),
        ({}, {"sampling_rounds": 0}, "rl.sampling_rounds is 0"),
        ({}, {"curriculum_floor": 0.0}, "rl.curriculum_floor is 0.0"),
        ({}, {"curriculum_momentum": 1.0}, "rl.curriculum_momentum is 1.0"),
    ],
)
def test_refusals(rollout, rl, message):
    with pytest.raises(ConfigError, match=message):
        config(rollout, **rl)


def test_the_largest_values_are_planned_and_normalise():
    wanted = config({"max_tokens": 64, "max_tokens_schedule": {"5": 256}, "block_size_schedule": {"9": 8}})
    heaviest = wanted.heaviest(model_block_size=4)
    assert (heaviest.rollout.max_tokens, heaviest.rollout.block_size) == (256, 8)
    assert heaviest.rollout.stages() == [heaviest.rollout]
    assert make_learner(Model(PRESETS["sdar_tiny"]), wanted).config.normaliser_constant == 256
    plain = config({"max_tokens": 64})
    assert plain.heaviest(model_block_size=4) is plain


def test_every_value_is_compiled_once():
    """Decoding goes through the stages of a schedule twice; the second time nothing is compiled."""
    section = RolloutSection(max_tokens=16, max_tokens_schedule={"2": 48}, block_size_schedule={"3": 8})
    model = Model(PRESETS["sdar_tiny"])
    engine = Engine(model, model.init(jax.random.key(0)), EngineConfig(slots=2))
    programs = []
    for step in (1, 2, 3, 1, 2, 3):
        options = rollout_options(section.at(step), seed=step)
        with compilations() as found:
            (trace,) = engine.generate([Request([5, 6, 7, 8, 9], options)])
        assert trace.block_size == (8 if step == 3 else 4) and len(trace.ids) <= section.at(step).max_tokens
        programs.append([name for name in found if "decode" in name])
    assert [len(found) for found in programs] == [1, 1, 1, 0, 0, 0], programs
