"""Stops a run whose updates keep being skipped because loss or gradient is not finite."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tracerl_jax.errors import UserError
from tracerl_jax.training.step import UpdateResult

log = logging.getLogger(__name__)


class NonFiniteGuard:
    """Counts skipped updates of each model; after `limit` in a row saves the batch and raises UserError.

    `skipped_in_a_row` (by model name) is what the run was saved with.
    """

    def __init__(self, folder: Path, limit: int, skipped_in_a_row: Mapping[str, int]):
        self.folder, self.limit, self.skipped_in_a_row = folder, limit, dict(skipped_in_a_row)

    def check(self, result: UpdateResult, batch: Any, where: str, model: str = "policy") -> None:
        """Count an update. `batch` is a tree of the arrays it was computed from; `where` names it."""
        if not bool(result.skipped):
            self.skipped_in_a_row[model] = 0
            return
        count = self.skipped_in_a_row[model] = self.skipped_in_a_row.get(model, 0) + 1
        loss, norm = float(result.loss), float(result.grad_norm)
        where = f"{where}, {model}"
        log.warning("%s: loss %g, gradient norm %g: update skipped (%d in a row)", where, loss, norm, count)
        if count >= self.limit:
            evidence = self.folder / f"nonfinite-{where.replace(', ', '-').replace(' ', '-')}.npz"
            leaves = jax.tree_util.tree_leaves_with_path(batch)
            names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
            np.savez(evidence, **{name: np.asarray(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)})
            raise UserError(
                f"{where}: {count} updates in a row had a loss or gradient that is not finite; nothing was changed by "
                f"them. The last batch is in {evidence}. To go on from the last checkpoint with a lower learning rate "
                f"or --config.model.dtype=float32: `tracerl convert --from {self.folder} --to MODEL`, then a new run "
                "with --config.model.path=MODEL"
            )
