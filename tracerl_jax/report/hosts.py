"""One table of what every process measured, and who is late.

Processes that run a collective wait for each other in it, so its phase takes all of them the same time, or those the
longest that wait for another. Late is said of phases of local work alone.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

LOCAL = ("rollout", "reward", "pack")  # phases in which a process works by itself, on its own samples
RATIO, STEPS = 1.5, 3  # so many times the median, in so many steps in a row, is late
SHARE = 0.05  # of the step's time; less is nobody's loss

Gather = Callable[[np.ndarray], Sequence[np.ndarray]]  # `peers.gather`


def by_host(values: Mapping[str, float], names: Sequence[str], gather: Gather) -> dict[str, np.ndarray]:
    """{name: [processes]} of all `names` that any process has a value for; NaN where it has none.

    All processes must give the same `names`, in the same order. Raises KeyError for a value without a name there.
    """
    if unknown := set(values) - set(names):
        raise KeyError(f"{sorted(unknown)} are not gathered: other processes would not expect them")
    table = np.array(gather(np.array([values.get(name, np.nan) for name in names])))
    return {name: column for name, column in zip(names, table.T, strict=True) if not np.isnan(column).all()}


def slowest(seconds: np.ndarray) -> tuple[int, float, float]:
    """(index of the slowest process, its seconds over the median's, its seconds above the median) of [processes].

    The median of an even number is the lower one: of two processes the other.
    """
    known = np.sort(seconds[~np.isnan(seconds)])
    index, median = int(np.nanargmax(seconds)), float(known[(len(known) - 1) // 2])
    ratio = float(known[-1]) / median if median > 0 else 1.0
    return index, ratio, float(known[-1]) - median


class Stragglers:
    """Who is the slowest in the same phase for several steps in a row."""

    def __init__(self, ratio: float = RATIO, steps: int = STEPS):
        self.ratio, self.steps = ratio, steps
        self._late: dict[str, tuple[int, int]] = {}  # phase -> (process, steps in a row)

    def look(self, seconds: Mapping[str, np.ndarray], total: float) -> list[str]:
        """Sentences about a step, `seconds` {phase: [processes]} of a step of `total` seconds: one when a process has
        been late for `steps` steps, then again each time that number has doubled."""
        said = []
        for phase, each in seconds.items():
            process, ratio, above = slowest(each)
            if ratio < self.ratio or above < SHARE * total:
                self._late.pop(phase, None)
                continue
            before, count = self._late.get(phase, (process, 0))
            count = count + 1 if before == process else 1
            self._late[phase] = (process, count)
            times, rest = divmod(count, self.steps)
            if not rest and times & (times - 1) == 0:
                said.append(
                    f"process {process} is {ratio:.1f}x slower than the median in {phase} for {count} steps in a row"
                )
        return said


SHOWN_STEPS, SHOWN_PROCESSES = 20, 16


def host_table(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of rows of hosts.jsonl: mean seconds of every phase by process over the last steps, the slowest in local work
    first; {} without rows.

    {"phase": of the rows, "steps": how many, "phases": names, "processes": in all, "rows": [index, seconds, ..]}
    """
    rows = list(rows)
    if not rows:
        return {}
    last = [row for row in rows if row["phase"] == rows[-1]["phase"]][-SHOWN_STEPS:]
    phases = list(dict.fromkeys(name for row in last for name in row["seconds"]))
    count = len(last[-1]["seconds"]["total"])
    # A run may be continued by more or fewer processes, and a phase that a step does not have takes no time.
    last = [row["seconds"] for row in last if len(row["seconds"]["total"]) == count]
    none = [0.0] * count
    means = np.mean([[[x or 0.0 for x in row.get(name, none)] for name in phases] for row in last], axis=0)
    work = sum((means[phases.index(name)] for name in LOCAL if name in phases), np.zeros(count))
    order = np.argsort(-work, kind="stable")[:SHOWN_PROCESSES]
    return {
        "phase": rows[-1]["phase"], "steps": len(last), "phases": phases,
        "processes": count, "rows": [[int(i), *means[:, i].tolist()] for i in order],
    }  # fmt: skip
