"""Which problems come next: a seeded global order whose whole state is three integers."""

from collections.abc import Sequence

import numpy as np

from tracerl_jax.errors import DataError


class PromptIterator:
    """Endless batches of indices into `count` items, each item once per epoch, in a new order every epoch.

    The order depends on (seed, epoch) only, so it is the same for every number of hosts (each host takes its slice of
    the global batch) and for every batch size. A batch that crosses an epoch border goes on with the next order, so an
    item may occur twice in it.
    """

    def __init__(self, count: int, seed: int):
        if count < 1:
            raise DataError("there are no rows to draw prompts from")
        self.count = count
        self.seed = seed
        self._epoch = 0
        self._position = 0
        self._order = _epoch_order(count, seed, 0)

    def next(self, batch: int, avoid: Sequence[int] = ()) -> np.ndarray:
        """The next `batch` indices, int64 [batch]. `avoid` changes nothing here: an epoch repeats nothing anyway."""
        parts = []
        while batch > 0:
            if self._position == self.count:
                self._move_to(self._epoch + 1, 0)
            part = self._order[self._position : self._position + batch]
            self._position += len(part)
            batch -= len(part)
            parts.append(part)
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def record(self, indices: Sequence[int], rates: Sequence[float]) -> None:
        """How well the problems were solved: changes nothing here."""

    def metrics(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, int]:
        """Everything needed to continue: `{"epoch", "position", "seed"}`."""
        return {"epoch": self._epoch, "position": self._position, "seed": self.seed}

    def restore(self, state: dict[str, int]) -> None:
        """Continues at `state`. Raises `DataError` when the state cannot belong to this data."""
        if state["position"] > self.count:
            raise DataError(
                f"the saved data position is row {state['position']} of an epoch, but the data has {self.count} rows; "
                "resume with the same data file and limits"
            )
        self.seed = state["seed"]
        self._move_to(state["epoch"], state["position"])

    def _move_to(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        self._order = _epoch_order(self.count, self.seed, epoch)


def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation of `range(count)`. Sorting raw Philox words keeps it equal across numpy versions."""
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count)
    return np.argsort(words, kind="stable")
