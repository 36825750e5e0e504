"""Problems drawn by how often they have been solved: what is neither too easy nor too hard comes up more often."""

from collections.abc import Sequence

import numpy as np

from tracerl_jax.config import RLSection
from tracerl_jax.data.iterator import PromptIterator
from tracerl_jax.errors import DataError

STREAM = 1 << 63  # apart from the keys of PromptIterator's epochs


class SuccessRateCurriculum:
    """Batches of indices into `count` problems, drawn by weight without replacement; the methods of `PromptIterator`.

    A problem's weight is floor + (1 - floor) * 4 p (1 - p) of its running success rate p: 1 where half of the responses
    are right, which is where a group says most, `floor` where all or none are. A problem not seen yet has weight 1.
    Success rates are exponential averages, which the first observation starts. Draws are a function of the seed, the
    number of draws before and the rates.
    """

    def __init__(self, count: int, seed: int, *, momentum: float, floor: float):
        if count < 1:
            raise DataError("there are no rows to draw prompts from")
        self.count, self.seed, self.momentum, self.floor = count, seed, momentum, floor
        self._draws = 0
        self._rates = np.full(count, np.nan)

    def next(self, batch: int, avoid: Sequence[int] = ()) -> np.ndarray:
        """`batch` indices, int64 [batch], all different up to `count`; those to `avoid` when no others are left."""
        parts = [np.zeros(0, np.int64)]
        while batch > 0:
            part = self._draw(avoid)[:batch]
            parts.append(part)
            batch -= len(part)
        return np.concatenate(parts)

    def record(self, indices: Sequence[int], rates: Sequence[float]) -> None:
        """Success rates of problems that were just tried, NaN where nothing is known."""
        for index, rate in zip(indices, rates, strict=True):
            if not np.isnan(rate):
                old = self._rates[index]
                self._rates[index] = rate if np.isnan(old) else self.momentum * old + (1 - self.momentum) * rate

    def metrics(self) -> dict[str, float]:
        seen = self._rates[~np.isnan(self._rates)]
        return {
            "curriculum/seen_fraction": len(seen) / self.count,
            "curriculum/success_rate": float(seen.mean()) if len(seen) else float("nan"),
            "curriculum/weight_mean": float(self._weights().mean()),
        }

    def state(self) -> dict:
        """Everything needed to continue, JSON-able."""
        seen = np.flatnonzero(~np.isnan(self._rates))
        return {"draws": self._draws, "seed": self.seed, "rates": {str(i): float(self._rates[i]) for i in seen}}

    def restore(self, state: dict) -> None:
        """Continues at `state`. Raises `DataError` when the state cannot belong to this data."""
        rates = {int(index): rate for index, rate in state["rates"].items()}
        if max(rates, default=0) >= self.count:
            raise DataError(
                f"the saved success rates are of {max(rates) + 1} rows or more, but the data has {self.count} rows; "
                "resume with the same data file and limits"
            )
        self.seed, self._draws = state["seed"], state["draws"]
        self._rates = np.full(self.count, np.nan)
        self._rates[list(rates)] = list(rates.values())

    def _weights(self) -> np.ndarray:
        p = np.where(np.isnan(self._rates), 0.5, self._rates)
        return self.floor + (1 - self.floor) * 4 * p * (1 - p)

    def _draw(self, avoid: Sequence[int]) -> np.ndarray:
        """All indices, the heaviest first more often than not: the order of log(u) / weight (Efraimidis, Spirakis)."""
        words = np.random.Philox(key=np.array([self.seed, STREAM + self._draws], np.uint64)).random_raw(self.count)
        self._draws += 1
        uniform = ((words >> np.uint64(11)) + 0.5) * 2.0**-53
        keys = np.log(uniform) / self._weights()
        keys[list(avoid)] -= 1e6
        return np.argsort(-keys, kind="stable")


def open_iterator(count: int, seed: int, config: RLSection) -> PromptIterator | SuccessRateCurriculum:
    """What draws the problems of RL."""
    if config.curriculum == "none":
        return PromptIterator(count, seed)
    return SuccessRateCurriculum(count, seed, momentum=config.curriculum_momentum, floor=config.curriculum_floor)
