"""Where the samples of an RL step come from: decoded before its updates, or beside those of the step before.

    rl.overlap=none            | decode 1 | update 1 | decode 2 | update 2 | decode 3 | update 3 |

    rl.overlap=one_step_off    | decode 1 | update 1 | update 2 | update 3 |
                                          | decode 2 | decode 3 | decode 4 |        in a thread

Both lines of a column start with the same weights: those after update k-1 decode step k+1. The columns are barriers, so
what a sample is decoded with never depends on timing. At a barrier the samples of the next step are there and nobody
works: that is where a run is saved, the samples with it, and where it is evaluated. The last step decodes ahead too, so
that a run that is continued with more steps goes on as if it had never ended.

Where the filter of `select` drops groups, further problems are sampled in their place, in up to `rl.sampling_rounds`
rounds:

    round 1    prompts_per_step problems     decode, judge, count the groups that are kept
    round 2    as many as are missing        ..

The processes of a job share the requests of a round. Behind the gather all have the same list, and compute the same
from it: statistics of groups and filters are exact, and all make the same number of updates.

    process 0    decode 0, 2, 4, ..    judge them   |  gather  | 0, 1, 2, 3, ..    filter, advantages, packing, updates
    process 1    decode 1, 3, 5, ..    judge them   |          | 0, 1, 2, 3, ..    the same everywhere
"""

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tracerl_jax.data.curriculum import SuccessRateCurriculum
from tracerl_jax.data.iterator import PromptIterator
from tracerl_jax.data.prompts import Problem
from tracerl_jax.diffusion.trace import Trace
from tracerl_jax.parallel import distributed, peers
from tracerl_jax.report.flops import Work, rollout_work
from tracerl_jax.report.metrics import PhaseTimer
from tracerl_jax.rl.experience import Sample, judge, select
from tracerl_jax.rollout.engine import Engine
from tracerl_jax.rollout.options import Request
from tracerl_jax.rollout.stream import completed
from tracerl_jax.training.interrupt import together
from tracerl_jax.training.run import Run, rollout_options


@dataclass(frozen=True)
class Experience:
    """The judged samples of a step, those of a problem side by side."""

    problems: list[int]  # rows of `run.train_problems`
    samples: list[Sample]
    policy_updates: int  # that the policy that sampled them had had
    rollout_seconds: float
    reward_seconds: float
    work: Work  # of decoding, this process's share
    sampling: dict[str, float] = field(default_factory=dict)  # metrics: of the rounds, of what draws the problems

    @property
    def traces(self) -> list[Trace]:
        return [sample.trace for sample in self.samples]


_SAVED = ("problems", "policy_updates", "rollout_seconds", "reward_seconds", "sampling")  # beside the traces

Problems = PromptIterator | SuccessRateCurriculum  # what draws them


class Rollouts:
    """Experience for one step after the other, each by the policy of the step before (`rl.overlap=none`).

        experience = rollouts.take(step, updates, timer)
        rollouts.before_update(...)     the engine gives its memory to the updates
        rollouts.after_update(params)   or goes on with the new weights
    """

    def __init__(self, run: Run, engine: Engine, iterator: Problems):
        self.run, self.engine, self.iterator = run, engine, iterator

    def take(self, step: int, updates: int, timer: PhaseTimer) -> Experience:
        """Samples for this step; nothing has changed yet: may be interrupted. `updates`: that the policy has had."""
        return self._make(step, updates, timer, self.run.stop.check)

    def before_update(self, step: int, updates: int) -> None:
        self.engine.update_params(None)

    def after_update(self, params: Any, timer: PhaseTimer) -> None:
        with timer("sync"):
            self.engine.update_params(params)

    def ahead(self) -> dict | None:
        """What a checkpoint must hold besides the position of the iterator, JSON-able."""
        return None

    def metrics(self, experience: Experience, updates: int) -> dict[str, float]:
        return experience.sampling

    def close(self) -> None:
        pass

    def _decode(self, requests: Sequence[Request], check: Callable[[], None]) -> list[Trace]:
        """`check` is called before and after each chunk of forwards and may raise."""
        check()
        traces: dict[int, Trace] = {}
        for finished in completed(self.engine, requests):
            traces |= finished
            check()
        return [traces[index] for index in range(len(requests))]

    def _make(self, step: int, updates: int, timer: PhaseTimer, check: Callable[[], None]) -> Experience:
        """Rounds until enough groups are kept; draws problems and records how well they were solved."""
        config = self.run.config
        chosen: list[int] = []
        samples: list[Sample] = []
        rounds, decoding, judging, missing = 0, 0.0, 0.0, config.rollout.prompts_per_step
        work = Work(0, 0.0)
        while missing and rounds < config.rl.sampling_rounds:
            drawn = self.iterator.next(missing, avoid=chosen).tolist()
            requests = requests_of(self.run, drawn, step, before=chosen)
            judged, seconds, done = self._sample(drawn, requests, timer, check)
            decoding, judging, work = decoding + seconds[0], judging + seconds[1], work + done
            samples += [dataclasses.replace(sample, group=sample.group + len(chosen)) for sample in judged]
            chosen += drawn
            self.iterator.record(drawn, _success_rates(judged))
            kept = len({sample.group for sample in select(samples, config.rl)})
            rounds, missing = rounds + 1, max(0, config.rollout.prompts_per_step - kept)
        sampling = self.iterator.metrics()
        if config.rl.sampling_rounds > 1:
            sampling |= {"sampling/rounds": float(rounds), "sampling/prompts": float(len(chosen))}
        stage = config.rollout.at(step)
        if len(config.rollout.stages()) > 1:
            block_size = stage.block_size or self.run.model.config.block_size
            sampling |= {"rollout/max_tokens": float(stage.max_tokens), "rollout/block_size": float(block_size)}
        return Experience(chosen, samples, updates, decoding, judging, work, sampling)

    def _sample(
        self, drawn: list[int], requests: list[Request], timer: PhaseTimer, check: Callable[[], None]
    ) -> tuple[list[Sample], tuple[float, float], Work]:
        """The judged samples of a round, the seconds that decoding and judging took, of the slowest process, and what
        this one decoded."""
        k = self.run.config.rollout.samples_per_prompt
        groups = peers.own_share([group for group in range(len(drawn)) for _ in range(k)])
        problems = [self.run.train_problems[i] for i in drawn]

        def work() -> tuple[list[Sample], tuple[float, float]]:
            start = time.perf_counter()
            with timer("rollout"):
                traces = self._decode(peers.own_share(requests), check)
            decoded = time.perf_counter()
            with timer("reward"):
                samples = judge_traces(self.run, [problems[group] for group in groups], groups, traces)
            samples = [dataclasses.replace(sample, problem=None) for sample in samples]  # everybody has them
            return samples, (decoded - start, time.perf_counter() - decoded)

        shares, seconds = zip(*together(work, timer("exchange")), strict=True)
        samples = [dataclasses.replace(s, problem=problems[s.group]) for s in peers.interleave(shares)]
        mine = [sample.trace for sample in shares[distributed.process_index()]]
        return samples, tuple(map(max, zip(*seconds, strict=True))), work_of(self.run, mine)


class OneStepOff(Rollouts):
    """A thread decodes and judges the samples of step k+1 while step k updates (`rl.overlap=one_step_off`).

    `ahead`: what this method gave when the run was saved.
    """

    def __init__(self, run: Run, engine: Engine, iterator: Problems, params: Any, ahead: dict | None):
        super().__init__(run, engine, iterator)
        self._next = None if ahead is None else _restored(run, ahead)
        self._pending: Future[Experience] | None = None
        self._cancelled = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout")
        engine.update_params(params, own=True)

    def take(self, step: int, updates: int, timer: PhaseTimer) -> Experience:
        if self._next is None:  # the first step of a run
            return super().take(step, updates, timer)
        self.run.stop.check()
        experience, self._next = self._next, None
        return experience

    def before_update(self, step: int, updates: int) -> None:
        # The thread alone draws problems until `after_update`. The phases of the step's timer are this thread's.
        self._pending = self._thread.submit(self._make, step + 1, updates, PhaseTimer(), self._go_on)

    def after_update(self, params: Any, timer: PhaseTimer) -> None:
        """Raises what the thread raised."""
        with timer("wait"):
            self._next = self._pending.result()
        with timer("sync"):
            self.engine.update_params(params, own=True)

    def ahead(self) -> dict | None:
        if self._next is None:
            return None
        known = {name: getattr(self._next, name) for name in _SAVED}
        return known | {"traces": [trace.to_row() for trace in self._next.traces]}

    def metrics(self, experience: Experience, updates: int) -> dict[str, float]:
        return experience.sampling | {
            "overlap/staleness": float(updates - experience.policy_updates),
            "overlap/rollout_seconds": experience.rollout_seconds,
            "overlap/reward_seconds": experience.reward_seconds,
        }

    def close(self) -> None:
        """Waits for the thread, which stops at the end of its chunk of forwards."""
        self._cancelled.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _go_on(self) -> None:
        if self._cancelled.is_set():
            raise RuntimeError("the rollout was given up")  # nobody waits for it any more


def open_rollouts(
    run: Run, engine: Engine, iterator: Problems, params: Any, ahead: dict | None
) -> Rollouts:
    """By `rl.overlap`. `params` are the policy's, `ahead` is what `Rollouts.ahead` gave when the run was saved."""
    if run.config.rl.overlap == "none":
        return Rollouts(run, engine, iterator)
    return OneStepOff(run, engine, iterator, params, ahead)


def requests_of(run: Run, chosen: Sequence[int], step: int, before: Sequence[int] = ()) -> list[Request]:
    """What a step decodes for the chosen problems, the samples of a problem side by side. `before`: what it has
    decoded already."""
    section = run.config.rollout.at(step)
    # A problem that comes up again, in another step or in this one, must draw other noise.
    options = rollout_options(section, seed=(run.config.seed * 1_000_003 + step) % 2**32)
    times, requests = Counter(before), []
    for problem in chosen:
        first = times[problem] * section.samples_per_prompt
        times[problem] += 1
        prompt = run.train_problems[problem].prompt_ids
        requests += [Request(prompt, options, sample_index=first + i) for i in range(section.samples_per_prompt)]
    return requests


def judge_traces(
    run: Run, problems: Sequence[Problem], groups: Sequence[int], traces: Sequence[Trace]
) -> list[Sample]:
    """`problems`, `groups`: of each trace."""
    task = run.task
    return judge(
        problems, groups, traces, run.decode,
        rewards={task.accuracy_reward: 0.0, **task.rewards}, accuracy_reward=task.accuracy_reward,
        truncated_is_wrong=run.config.rollout.truncated_is_wrong,
        process=run.config.reward.process, pieces=run.pieces,
    )  # fmt: skip


def work_of(run: Run, traces: Sequence[Trace]) -> Work:
    return rollout_work(run.model.config, traces, run.config.rollout.cache)


def _restored(run: Run, ahead: dict) -> Experience:
    """The experience of a checkpoint, judged once more."""
    traces = [Trace.from_row(row, f"sample {i} of the checkpoint") for i, row in enumerate(ahead["traces"])]
    known = {name: ahead[name] for name in _SAVED if name in ahead}
    groups = [i // run.config.rollout.samples_per_prompt for i in range(len(traces))]
    problems = [run.train_problems[ahead["problems"][group]] for group in groups]
    return Experience(samples=judge_traces(run, problems, groups, traces), work=work_of(run, traces), **known)


def _success_rates(samples: Sequence[Sample]) -> list[float]:
    """Of every group, in their order; NaN where no sample has a verdict."""
    correct: dict[int, list[float]] = {}
    for sample in samples:
        correct.setdefault(sample.group, []).append(sample.correct)
    known = ([value for value in values if not np.isnan(value)] for values in correct.values())
    return [float(np.mean(values)) if values else float("nan") for values in known]
