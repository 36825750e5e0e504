"""Metric writers: one JSON line per step always, a console line or progress bar, TensorBoard and W&B by name.

    device (sum, count) pairs -> DelayedMetrics -> MetricLog -> JsonlWriter, ConsoleWriter
                                                             -> BackgroundWriter -> TensorboardWriter, WandbWriter

The names and what healthy values look like are in docs/metrics.md. In a multi-host run only process 0 opens a run
folder; the others use `MetricLog([], phase)`, which discards.
"""

import contextlib
import importlib
import logging
import math
import os
import queue
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TextIO

import jax
from tqdm import tqdm

from tracerl_jax.errors import ConfigError
from tracerl_jax.files import replacing
from tracerl_jax.parallel import watchdog
from tracerl_jax.report.flops import Work
from tracerl_jax.report.run_dir import RunDir

log = logging.getLogger(__name__)

Scalar = Any  # float, numpy scalar or 0-d device array
Pair = tuple[Scalar, Scalar]  # (sum, count)


class MetricWriter(Protocol):
    def write(self, step: int, metrics: Mapping[str, float], phase: str) -> None: ...

    def close(self) -> None: ...


def merge(parts: Sequence[Mapping[str, Pair]]) -> dict[str, float]:
    """Exact means over unequal parts: {name: sum of sums / sum of counts}; NaN where nothing was counted.

    Device scalars of all parts are fetched in one transfer and added in float64.
    """
    totals: dict[str, tuple[float, float]] = {}
    for part in jax.device_get(list(parts)):
        for name, (value, count) in part.items():
            value0, count0 = totals.get(name, (0.0, 0.0))
            totals[name] = (value0 + float(value), count0 + float(count))
    return {name: value / count if count else math.nan for name, (value, count) in totals.items()}


class MetricLog:
    """Sends rows to several writers. `phase` ("sft" or "rl") is the phase of a row that names none."""

    def __init__(self, writers: Sequence[MetricWriter], phase: str):
        self.writers = list(writers)
        self.phase = phase

    def write(self, step: int, metrics: Mapping[str, Scalar], phase: str | None = None) -> None:
        row = {name: float(value) for name, value in metrics.items()}
        for writer in self.writers:
            writer.write(step, row, phase or self.phase)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


class DelayedMetrics:
    """Keeps a step's device scalars until the next step has been dispatched: logging never stalls the device."""

    def __init__(self, log: MetricLog):
        self.log = log
        self._pending: tuple[int, dict[str, Scalar], list[Mapping[str, Pair]]] | None = None

    def write(self, step: int, metrics: Mapping[str, Scalar], parts: Sequence[Mapping[str, Pair]] = ()) -> None:
        """Queue `metrics` (scalars) and `parts` ((sum, count) pairs of each micro-batch, merged when fetched)."""
        previous, self._pending = self._pending, (step, dict(metrics), list(parts))
        self._send(previous)

    def flush(self) -> None:
        previous, self._pending = self._pending, None
        self._send(previous)

    def _send(self, queued) -> None:
        if queued is not None:
            step, metrics, parts = queued
            self.log.write(step, jax.device_get(metrics) | merge(parts))


class PhaseTimer:
    """Wall seconds per phase of a step, also visible in a profiler trace.

        with timer.step(7):
            with timer("rollout"): ...
            timer.count("rollout", Work(tokens, flops))
        timer.seconds() -> {"seconds/rollout": 3.1, "seconds/total": 3.2}

    Dispatch is asynchronous: device work counts to the phase that waits for its result.
    """

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self.work: dict[str, Work] = {}  # by phase, since the step began

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        self.restart()
        with jax.profiler.StepTraceAnnotation("step", step_num=step):
            yield

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with watchdog.phase(phase), jax.profiler.TraceAnnotation(phase):
                yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def count(self, phase: str, work: Work) -> None:
        self.work[phase] = self.work[phase] + work if phase in self.work else work

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase since the step began (one entered twice adds up) and of the whole step until now."""
        total = time.perf_counter() - self._start
        return {f"seconds/{phase}": value for phase, value in self._seconds.items()} | {"seconds/total": total}


class JsonlWriter:
    """Appends {"step", "phase", metric...} to the run's metrics.jsonl."""

    def __init__(self, run: RunDir):
        self.run = run

    def write(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        self.run.append_metrics([{"step": step, "phase": phase, **metrics}])

    def close(self) -> None:
        pass


# What the console shows: (metric, label, format). A figure that the row does not have is left out. Of an evaluation it
# shows these, for every strategy.
EVAL_FIGURES = ("accuracy", "tokens_per_step")
KEY_FIGURES = {
    "sft": (
        ("sft/loss", "loss", "{:.4f}"), ("sft/grad_norm", "grad", "{:.2f}"), ("sft/lr", "lr", "{:.1e}"),
        ("sft/tokens_per_second", "tok/s", "{:,.0f}"), ("chips/total/mfu", "mfu", "{:.1%}"),
    ),
    "rl": (
        ("reward", "reward", "{:.3f}"), ("accuracy", "accuracy", "{:.1%}"),
        ("response_length/mean", "length", "{:.0f}"), ("rollout/tokens_per_denoise_step", "tok/step", "{:.2f}"),
        ("policy/kl", "kl", "{:.1e}"), ("policy/clip_fraction", "clip", "{:.1%}"),
        ("value/explained_variance", "ev", "{:.2f}"), ("replay/logprob_gap_max", "gap", "{:.0e}"),
        ("updates/skipped", "skipped", "{:.0f}"), ("chips/total/mfu", "mfu", "{:.1%}"),
        ("seconds/total", "s", "{:.1f}"),
    ),
}  # fmt: skip


def describe(metrics: Mapping[str, float], phase: str) -> str:
    """The key figures of a row as one line of text, e.g. "reward 0.412 | accuracy 41.2% | tok/step 2.61"."""
    figures = KEY_FIGURES.get(phase) or [
        (name, name.removeprefix("eval/").replace("/", " "), "{:.1%}" if name.endswith("accuracy") else "{:.2f}")
        for name in metrics
        if name.rpartition("/")[2] in EVAL_FIGURES
    ]
    return " | ".join(f"{label} {form.format(metrics[name])}" for name, label, form in figures if name in metrics)


class ConsoleWriter:
    """A progress bar when `stream` is a terminal, one line per row elsewhere (logs, pipes, notebooks).

    The bar counts rows of the loop's own `phase`; rows of other phases (evaluation) are printed above it.
    """

    def __init__(self, phase: str, total_steps: int | None = None, first_step: int = 0, stream: TextIO | None = None):
        self.phase = phase
        self.total_steps = total_steps
        self.stream = stream or sys.stdout
        self._bar = None
        if self.stream.isatty():
            self._bar = tqdm(
                desc=phase, total=total_steps, initial=first_step, unit="step", file=self.stream, dynamic_ncols=True
            )

    def write(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        text = describe(metrics, phase)
        if self._bar is not None and phase == self.phase:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        total = f"/{self.total_steps}" if self.total_steps and phase == self.phase else ""
        line = f"{phase} {step}{total} | {text}"
        if self._bar is not None:
            self._bar.write(line, file=self.stream)
        else:
            print(line, file=self.stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class TensorboardWriter:
    """Event files in <run>/tensorboard/<phase>. Events after `first_step` (left by an interrupted run) are hidden."""

    def __init__(self, run: RunDir, phase: str, first_step: int = 0):
        import tensorboardX

        self._writer = tensorboardX.SummaryWriter(str(run.path / "tensorboard" / phase), purge_step=first_step + 1)

    def write(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """A W&B run that a resumed run folder continues: its id is kept in <run>/wandb_id.

    The project is $WANDB_PROJECT (default "tracerl_jax"); WANDB_MODE=offline works without network.
    """

    def __init__(self, run: RunDir):
        import wandb

        id_file = run.path / "wandb_id"
        if not id_file.exists():
            with replacing(id_file) as file:
                file.write(uuid.uuid4().hex[:12])
        self._wandb_run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "tracerl_jax"), name=run.path.name, id=id_file.read_text(),
            dir=str(run.path), config=run.config, resume="allow",
        )  # fmt: skip
        # Our step, not W&B's own counter, is the axis: evaluation and SFT rows repeat step numbers.
        self._wandb_run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        self._wandb_run.log({**metrics, "step": step})

    def close(self) -> None:
        self._wandb_run.finish()


class BackgroundWriter:
    """A writer in a thread of its own: one that is slow, waits for a network or fails neither holds training up nor
    stops it. What it misses is said once in the log; metrics.jsonl has every row.

    Args:
      name: for messages.
      make: opens the writer, in the thread.
      rows: that may wait for it; more are left out.
      seconds: that `close` waits for it.
    """

    def __init__(self, name: str, make: Callable[[], MetricWriter], rows: int = 1000, seconds: float = 15.0):
        self.name, self.seconds = name, seconds
        self._rows: queue.Queue[tuple | None] = queue.Queue(rows)
        self._left_out, self._closing = 0, threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make,), name=f"writer-{name}", daemon=True)
        self._thread.start()

    def write(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        try:
            self._rows.put_nowait((step, dict(metrics), phase))
        except queue.Full:
            self._left_out += 1
            if self._left_out == 1:
                log.warning("metric writer %s is too slow: it does not get rows from step %d on", self.name, step)

    def close(self) -> None:
        """Waits until every row is written, for `seconds` at most; then the thread is left to itself."""
        self._closing.set()
        with contextlib.suppress(queue.Full):
            self._rows.put_nowait(None)  # wakes the thread
        self._thread.join(self.seconds)
        if self._thread.is_alive():
            log.warning("metric writer %s is not done after %.0f s and is left behind", self.name, self.seconds)

    def _run(self, make: Callable[[], MetricWriter]) -> None:
        try:
            writer = make()
            with contextlib.closing(writer):
                for row in self._waiting():
                    writer.write(*row)
        except Exception as error:  # whatever a package of others raises
            log.warning("metric writer %s has failed and gets no more rows (%s: %s)", self.name, type(error).__name__,
                        error)  # fmt: skip
            for _ in self._waiting():  # nobody must find the queue full
                pass

    def _waiting(self) -> Iterator[tuple]:
        while not (self._closing.is_set() and self._rows.empty()):
            if (row := self._rows.get()) is not None:
                yield row


def open_log(
    run: RunDir, phase: str, *, total_steps: int | None = None, first_step: int = 0, writers: Sequence[str] = ()
) -> MetricLog:
    """The log of one loop: JSONL and console always, and each of `writers` ("tensorboard", "wandb") in a thread.

    `first_step` is the step of the checkpoint the loop continues from. Raises ConfigError for an unknown or
    missing writer.
    """
    opened: list[MetricWriter] = [JsonlWriter(run), ConsoleWriter(phase, total_steps, first_step)]
    makers = {
        "tensorboard": ("tensorboardX", lambda: TensorboardWriter(run, phase, first_step)),
        "wandb": ("wandb", lambda: WandbWriter(run)),
    }
    for name in writers:
        if name not in makers:
            raise ConfigError(f"unknown metric writer {name!r}: use {' or '.join(map(repr, makers))}")
        module, make = makers[name]
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"metric writer {name!r} needs the package {module}: pip install 'tracerl_jax[{name}]', "
                f"or leave {name!r} out of the writers"
            ) from error
        opened.append(BackgroundWriter(name, make))
    return MetricLog(opened, phase)
