"""Sampling rounds and the curriculum with problems whose difficulty is known; no model."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from tracerl_jax.config import RunConfig
from tracerl_jax.config_io import from_dict
from tracerl_jax.data.curriculum import open_iterator
from tracerl_jax.data.prompts import Problem
from tracerl_jax.report.flops import Work
from tracerl_jax.report.metrics import PhaseTimer
from tracerl_jax.rl import rollouts
from tracerl_jax.rl.experience import Sample, select
from tracerl_jax.rl.rollouts import Rollouts, requests_of
from tracerl_jax.training.interrupt import StopSignal

COUNT = 40
NEVER, ALWAYS, SILENT = "never", "always", "silent"


def difficulty(index):
    """A fifth of the problems is never solved, a fifth always, a tenth gets no verdict, the others half of the time."""
    return {0: NEVER, 1: NEVER, 2: ALWAYS, 3: ALWAYS, 4: SILENT}.get(index % 10, "half")


class Engine:
    """Stands for an `Engine`: a trace knows what was asked for."""

    def __init__(self):
        self.asked = []

    def generate(self, requests):
        self.asked.append(len(requests))
        for request in requests:
            yield SimpleNamespace(problem=int(request.prompt_ids[0]), index=request.sample_index, ids=[1])


def judge_traces(run, problems, groups, traces):
    assert [trace.problem for trace in traces] == [problem.index for problem in problems]
    values = {NEVER: 0.0, ALWAYS: 1.0, SILENT: float("nan")}
    samples = []
    for number, trace in enumerate(traces):
        correct = values.get(difficulty(trace.problem), float(trace.index % 2))
        samples.append(
            Sample(run.train_problems[trace.problem], trace, "", groups[number], correct, {}, correct)
        )
    return samples


@pytest.fixture
def open_one(monkeypatch):
    monkeypatch.setattr(rollouts, "judge_traces", judge_traces)
    monkeypatch.setattr(rollouts, "completed", lambda engine, requests: [dict(enumerate(engine.generate(requests)))])
    monkeypatch.setattr(rollouts, "work_of", lambda run, traces: Work(len(traces), 0.0))

    def open_one(state=None, **rl):
        values = {
            "model": {"preset": "sdar_tiny"}, "rl": rl, "rollout": {"prompts_per_step": 6, "samples_per_prompt": 4}
        }
        config = from_dict(RunConfig, values)
        problems = [Problem(i, "", np.array([i], np.int32), {}) for i in range(COUNT)]
        run = SimpleNamespace(config=config, train_problems=problems, stop=StopSignal())
        iterator = open_iterator(COUNT, 3, config.rl)
        if state is not None:
            iterator.restore(json.loads(json.dumps(state)))
        return Rollouts(run, Engine(), iterator)

    return open_one


def take(one, step):
    return one.take(step, 0, PhaseTimer())


def test_one_round_takes_what_comes(open_one):
    one = open_one()
    experience = take(one, 1)
    assert len(experience.problems) == 6 and one.engine.asked == [24] and experience.sampling == {}


def test_rounds_fill_the_batch_with_as_many_problems_as_are_missing(open_one):
    one = open_one(sampling_rounds=10)
    for step in range(1, 5):
        one.engine.asked.clear()
        experience = take(one, step)
        kept = select(experience.samples, one.run.config.rl)
        assert len({sample.group for sample in kept}) == 6 and {difficulty(s.problem.index) for s in kept} == {"half"}
        # The samples of a problem are side by side, every problem a group of its own.
        assert [s.group for s in experience.samples] == [g for g in range(len(experience.problems)) for _ in range(4)]
        assert [s.problem.index for s in experience.samples[::4]] == experience.problems
        assert experience.sampling == {
            "sampling/rounds": len(one.engine.asked), "sampling/prompts": len(experience.problems)
        }
        missing = 6
        for asked, first in zip(one.engine.asked, np.cumsum([0, *one.engine.asked]), strict=False):
            assert asked == 4 * missing
            drawn = experience.problems[first // 4 : (first + asked) // 4]
            missing -= sum(difficulty(i) == "half" for i in drawn)


def test_rounds_end(open_one):
    one = open_one(sampling_rounds=2, accuracy_low=0.9, accuracy_high=0.95)  # nothing is ever kept
    assert len(take(one, 1).problems) == 12 and one.engine.asked == [24, 24]


def test_the_order_is_one_permutation_after_the_other_whatever_the_rounds_need(open_one):
    one, drawn = open_one(sampling_rounds=10), []
    while len(drawn) < 2 * COUNT:
        drawn += take(one, len(drawn) + 1).problems
    assert sorted(drawn[:COUNT]) == sorted(drawn[COUNT : 2 * COUNT]) == list(range(COUNT))


def test_a_problem_that_comes_twice_in_a_step_gets_other_samples(open_one):
    run = open_one().run
    requests = requests_of(run, [7, 8, 7], 1, before=[8])
    found = [(int(request.prompt_ids[0]), request.sample_index) for request in requests]
    assert found == [(7, 0), (7, 1), (7, 2), (7, 3), (8, 4), (8, 5), (8, 6), (8, 7), (7, 4), (7, 5), (7, 6), (7, 7)]


def test_the_curriculum_learns_which_problems_are_worth_it(open_one):
    one = open_one(curriculum="success_rate", curriculum_floor=0.01)
    for step in range(1, 41):
        experience = take(one, step)
    rates = one.iterator.state()["rates"]
    assert len(rates) >= 30 and {difficulty(int(i)) for i, rate in rates.items() if rate == 0.5} == {"half"}
    assert all(difficulty(int(i)) != SILENT for i in rates)
    assert experience.sampling["curriculum/seen_fraction"] == len(rates) / COUNT
    late = [i for step in range(41, 61) for i in take(one, step).problems]
    useful = np.mean([difficulty(i) in ("half", SILENT) for i in late])  # what is not known is tried again
    assert useful > 0.9


def test_rounds_do_not_draw_again_what_a_step_has_dropped(open_one):
    one = open_one(curriculum="success_rate", sampling_rounds=5, accuracy_low=0.9, accuracy_high=0.95)
    problems = take(one, 1).problems
    assert len(problems) == len(set(problems)) == 30


@pytest.mark.parametrize("curriculum", ["none", "success_rate"])
def test_going_on_from_a_saved_state_draws_the_same(open_one, curriculum):
    rl = {"curriculum": curriculum, "sampling_rounds": 3}
    whole = open_one(**rl)
    for step in (1, 2, 3):
        take(whole, step)
    resumed = open_one(state=whole.iterator.state(), **rl)
    for step in (4, 5, 6):
        one, other = take(whole, step), take(resumed, step)
        assert (one.problems, one.sampling) == (other.problems, other.sampling)
    assert whole.iterator.state() == resumed.iterator.state()
