"""Stops a run whose updates keep being skipped because loss or gradient is not finite."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tracerl_jax.diffusion.trace import Trace, broken_traces
from tracerl_jax.errors import UserError
from tracerl_jax.files import writing
from tracerl_jax.parallel.distributed import is_lead
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
        what = f"loss {float(result.loss):g}, gradient norm {float(result.grad_norm):g}: update skipped"
        self._count(model, f"{where}, {model}", what, batch)

    def check_rollout(self, traces: Sequence[Trace], where: str) -> None:
        """Count a step without usable group, in which no update is made, when the samples are worth nothing because the
        policy's numbers are not finite. Each of its steps is like that: nobody else would ever notice."""
        broken = broken_traces(traces)
        if broken:
            what = f"{len(broken)} of {len(traces)} samples have log-probs that are not finite"
            arrays = [{"ids": t.ids, "step_map": t.step_map, "logprobs": t.logprobs} for t in broken]
            self._count("policy", f"{where}, rollout", what, arrays)

    def _count(self, model: str, where: str, what: str, evidence: Any) -> None:
        count = self.skipped_in_a_row[model] = self.skipped_in_a_row.get(model, 0) + 1
        log.warning("%s: %s (%d in a row)", where, what, count)
        if count < self.limit:
            return
        path = self.folder / f"nonfinite-{where.replace(', ', '-').replace(' ', '-')}.npz"
        leaves = jax.tree_util.tree_leaves_with_path(evidence)
        names = [jax.tree_util.keystr(key, simple=True, separator=".") for key, _ in leaves]
        if is_lead():  # the processes of a job have the same evidence
            partial = path.with_name(f"partial-{path.name}")
            with writing(path):
                np.savez(partial, **{name: np.asarray(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)})
                partial.replace(path)
        raise UserError(
            f"{where}: {count} updates in a row had a loss, a gradient or samples that are not finite; nothing was "
            f"changed by them. The last batch is in {path}. To go on from the last checkpoint with a lower learning "
            f"rate or --config.model.dtype=float32: `tracerl convert --from {self.folder} --to MODEL` (--step N for "
            "an earlier one), then a new run with --config.model.path=MODEL"
        )
