"""Timing that the benchmarks share."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax


class Seconds(NamedTuple):
    """Medians over the runs of one call."""

    wall: float
    processor: float  # of all cores; other work on the machine disturbs it less


def in_turn(calls: Mapping[str, Callable], repeats: int) -> dict[str, Seconds]:
    """Time calls that return arrays, one after the other, `repeats` times: a machine that slows down slows down all."""
    times: dict[str, list[Seconds]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            wall, processor = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            times[name].append(Seconds(time.perf_counter() - wall, time.process_time() - processor))
    return {name: Seconds(*map(statistics.median, zip(*found, strict=True))) for name, found in times.items()}
