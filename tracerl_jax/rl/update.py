"""The updates of one RL step: which states are replayed, their old log-probs and values, value and policy update."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tracerl_jax.config import RLSection, ValueSection
from tracerl_jax.diffusion.corruption import draw_masks, sample_rng
from tracerl_jax.diffusion.packing import PackedRows, pack
from tracerl_jax.diffusion.replay import ReplayItem, item_of_trace, masking_item, shrunk_steps
from tracerl_jax.models import Model
from tracerl_jax.parallel.order import in_order
from tracerl_jax.parallel.place import fetch, put
from tracerl_jax.parallel.sharding import param_shardings, row_shards
from tracerl_jax.rewards.steps import rewards_of_tokens
from tracerl_jax.rl.advantages import trace_gae, whiten
from tracerl_jax.rl.experience import Sample
from tracerl_jax.rl.importance import importance_ratios, truncate
from tracerl_jax.rl.logprobs import packed_logprobs, packed_values
from tracerl_jax.rl.objectives import loss_weights, policy_loss, value_loss
from tracerl_jax.training.step import (
    TrainState,
    Updater,
    UpdateResult,
    abstract_state,
    init_state,
    put_batch,
    sharded_abstract_params,
)


@dataclass(frozen=True, eq=False)
class Replay:
    """A sample, one choice of its states to replay, and the numbers its response tokens are trained with ([r] each)."""

    sample: Sample
    item: ReplayItem
    old_logp: np.ndarray | None = None
    reference_logp: np.ndarray | None = None
    old_values: np.ndarray | None = None
    returns: np.ndarray | None = None
    advantages: np.ndarray | float = 0.0


def plan_replays(
    samples: Sequence[Sample], config: RLSection, *, mask_id: int, block_size: int, seed: int, step: int
) -> list[list[Replay]]:
    """One list of replays per optimizer update: `epochs` passes in a new order each, cut into `minibatches`.

    Samples are never split between updates; `coupled` puts a masked response and its complement into the same update.
    An update whose random masks hide nothing is left out. `block_size`: of the objective, for block-causal models.
    """
    updates = []
    for epoch in range(config.epochs):
        order = sample_rng(seed, step, epoch).permutation(len(samples))
        for part in np.array_split(order, config.minibatches):
            replays = [
                Replay(samples[i], item)
                for i in part
                for item in _items(samples[i], config, mask_id, block_size, (seed, step, epoch, int(i)))
            ]
            if replays:
                updates.append(replays)
    return updates


def _items(
    sample: Sample, config: RLSection, mask_id: int, block_size: int, counters: tuple[int, ...]
) -> list[ReplayItem]:
    trace = sample.trace
    if config.method == "tracerl":
        return [item_of_trace(trace, mask_id=mask_id, block_size=block_size, shrink=config.shrink)]
    if trace.canvas_len:  # of a full-attention model, to which everything is one block
        block_size = trace.canvas_len
    masked, _ = draw_masks(
        sample_rng(*counters), len(trace.prompt_ids), len(trace.ids),
        block_size=block_size, low=config.mask_low, high=config.mask_high,
    )  # fmt: skip
    views = [masked, ~masked] if config.method == "coupled" else [masked]
    return [
        masking_item(trace.prompt_ids, trace.ids, view, block_size=block_size, mask_id=mask_id)
        for view in views
        if view.any()
    ]


class Learner:
    """Policy, optional value model and optional frozen reference, with the jitted programs that train them.

    State is in `policy`, `value` (TrainStates) and `reference` (parameters); everything else is fixed.
    `before_micro_batch` is called before each one of every phase, and may raise: the phase is then given up, and what
    it was to train is as it was.
    """

    def __init__(
        self,
        model: Model,
        config: RLSection,
        value_config: ValueSection,
        policy_optimizer: optax.GradientTransformation,
        value_optimizer: optax.GradientTransformation,
    ):
        self.model, self.config, self.value_config = model, config, value_config
        self.policy_optimizer, self.value_optimizer = policy_optimizer, value_optimizer
        self.rows_per_micro_batch = config.rows_per_device * row_shards(model.mesh)
        self.value_model = Model(model.config, head="value", mesh=model.mesh)
        self.policy: TrainState | None = None
        self.value: TrainState | None = None
        self.reference: Any = None
        self.before_micro_batch: Callable[[], None] = lambda: None
        self._score = jax.jit(partial(packed_logprobs, model))
        self._value = jax.jit(lambda params, rows, trunk: packed_values(self.value_model, merged(params, trunk), rows))
        self._policy_updater = Updater(self._policy_objective, policy_optimizer, model.mesh)
        self._value_updater = Updater(self._value_objective, value_optimizer, model.mesh)

    def start(self, params: Any, value_params: Any) -> None:
        """Fresh optimizers. `params` are donated; `value_params` are ignored unless the value model is enabled."""
        if self.config.kl_to == "reference":
            self.reference = jax.tree.map(jnp.copy, params)
        self.policy = init_state(params, self.policy_optimizer)
        self.value = init_state(value_params, self.value_optimizer) if self.value_config.enabled else None

    def trees(self) -> dict[str, Any]:
        """What a checkpoint holds: `params`, `train` and, with a value model, `value`."""
        trees = {"params": self.policy.params, "train": {"policy": self.policy._replace(params=())}}
        if self.value is not None:
            trees["value"] = self.value.params
            trees["train"]["value"] = self.value._replace(params=())
        return trees

    def load(self, trees: dict[str, Any]) -> None:
        """Inverse of `trees`; the reference is the caller's to set."""
        self.policy = trees["train"]["policy"]._replace(params=trees["params"])
        if self.value_config.enabled:
            self.value = trees["train"]["value"]._replace(params=trees["value"])

    def abstract_trees(self) -> dict[str, Any]:
        """`trees` as ShapeDtypeStructs with shardings."""
        policy = abstract_state(sharded_abstract_params(self.model), self.policy_optimizer)
        trees = {"params": policy.params, "train": {"policy": policy._replace(params=())}}
        if self.value_config.enabled:
            params = sharded_abstract_params(self.value_model)
            params = {"value_head": params["value_head"]} if self.value_config.shared_trunk else params
            value = abstract_state(params, self.value_optimizer)
            trees["value"] = value.params
            trees["train"]["value"] = value._replace(params=())
        return trees

    def initial_value_params(self, policy_params: Any) -> Any:
        """A value model that starts from the policy's backbone (a copy) with a zero head, or the head alone."""
        head = {"value_head": {"kernel": np.zeros((self.model.config.width, 1), self.model.config.param_dtype)}}
        shardings = param_shardings(self.value_model, self.model.mesh) if self.model.mesh is not None else None
        head = put(head, shardings and {"value_head": shardings["value_head"]})
        if self.value_config.shared_trunk:
            return head
        return {**{k: jax.tree.map(jnp.copy, v) for k, v in policy_params.items() if k != "lm_head"}, **head}

    def traced(self, policy_batch: dict, value_batch: dict | None = None) -> dict[str, jax.stages.Traced]:
        """The programs of a step's training for micro-batches of these shapes and shardings; nothing runs.

        "replay" (old log-probs), "policy gradient", "policy apply"; with a value model also "values",
        "value gradient" and "value apply".
        """
        trees = self.abstract_trees()
        policy = trees["train"]["policy"]._replace(params=trees["params"])
        programs = {"replay": self._score.trace(policy.params, policy_batch["rows"], policy_batch["temperature"])}
        if value_batch is not None:
            value = trees["train"]["value"]._replace(params=trees["value"])
            trunk = policy.params if self.value_config.shared_trunk else None
            programs["values"] = self._value.trace(value.params, value_batch["rows"], trunk)
            updates = self._value_updater.traced(value, value_batch, trunk)
            programs |= {f"value {name}": program for name, program in updates.items()}
        updates = self._policy_updater.traced(policy, policy_batch)
        return programs | {f"policy {name}": program for name, program in updates.items()}

    # Forward passes over all replays of a step, before anything is updated.

    def as_sampled(self, replays: Sequence[Replay]) -> list[Replay]:
        """Of the first samples that fit into a micro-batch (at least one, but for those that fit into no row) the very
        states in which their tokens were drawn."""
        room, chosen = self.rows_per_micro_batch * self.config.row_length // 2, []
        for sample in dict.fromkeys(replay.sample for replay in replays):
            item = item_of_trace(sample.trace, mask_id=self.model.config.mask_token_id)
            if item.row_tokens > self.row_lengths[-1]:
                continue
            room -= item.size
            if room < 0 and chosen:
                break
            chosen.append(Replay(sample, item))
        return chosen

    def logprobs(self, params: Any, replays: Sequence[Replay]) -> list[np.ndarray]:
        """Log-probs of every replay's targets [r] under `params`, at the sampling temperature; 0 elsewhere."""

        def batch_logprobs(rows, temperature):
            return self._score(params, rows, temperature)[0]

        return self._forward(replays, batch_logprobs, [r.sample.trace.temperature for r in replays])

    def importance_ratios(self, replays: Sequence[Replay]) -> list[np.ndarray]:
        """Of every replay's tokens [r], see rl/importance.py. The replays have their old log-probs."""
        level = self.config.importance_sampling
        return [importance_ratios(r.old_logp, r.sample.trace.behaviour_logprobs, level) for r in replays]

    def values(self, replays: Sequence[Replay]) -> list[np.ndarray]:
        """Values of every replay's targets [r]; 0 elsewhere."""
        return self._forward(replays, lambda rows: self._value(self.value.params, rows, self._trunk()))

    def _forward(self, replays: Sequence[Replay], function, *columns) -> list[np.ndarray]:
        rows = self._pack(replays)
        parts = micro_batches(
            rows, {str(i): rows.gather(column) for i, column in enumerate(columns)}, self.rows_per_micro_batch
        )
        outputs = []
        for part in self._watched(parts):
            part = put_batch(part, self.model.mesh)
            with in_order(self.model.mesh):
                outputs.append(function(part["rows"], *(part[str(i)] for i in range(len(columns)))))
        return rows.scatter(np.concatenate(fetch(outputs))[: rows.shape[0]])

    def _watched(self, batches: Sequence[dict]) -> Iterator[dict]:
        for batch in batches:
            self.before_micro_batch()
            yield batch

    def _pack(self, replays: Sequence[Replay]) -> PackedRows:
        return pack([r.item for r in replays], row_length=self.row_lengths)

    @property
    def row_lengths(self) -> list[int]:
        """Longer responses get longer rows."""
        return [self.config.row_length * 2**k for k in range(5)]

    def _trunk(self) -> Any:
        return self.policy.params if self.value_config.shared_trunk else None

    # Advantages

    def with_values(self, replays: Sequence[Replay]) -> list[Replay]:
        """Old values, returns and per-token advantages by GAE over the trace steps of each replay."""
        config, gae = self.config, []
        values = self.values(replays)
        for replay, value in zip(replays, values, strict=True):
            trace = replay.sample.trace
            steps = shrunk_steps(len(trace.prompt_ids), trace.step_map, replay.item.block_size, config.shrink)
            every = np.ones(len(trace.ids), bool)
            sample = replay.sample
            rewards = rewards_of_tokens(steps, sample.steps) if sample.steps else sample.advantage
            gae.append(trace_gae(steps, value, rewards, every, self.value_config.gamma, self.value_config.lam))
        advantages = [a for _, a in gae]
        if self.value_config.whiten:
            advantages = whiten(advantages, [np.ones(len(a), bool) for a in advantages])
        return [
            replace(replay, old_values=value, returns=returns, advantages=advantage)
            for replay, value, (returns, _), advantage in zip(replays, values, gae, advantages, strict=True)
        ]

    # Updates

    def _policy_objective(self, params, batch):
        config = self.config
        logp, entropy = packed_logprobs(self.model, params, batch["rows"], batch["temperature"])
        total, metrics = policy_loss(
            logp, batch["old_logp"], batch["advantages"], batch["weights"],
            clip_low=config.clip_low, clip_high=config.clip_high,
            kl_coef=config.kl_coef, kl_estimator=config.kl_estimator,
            reference_logp=batch.get("reference_logp"), behaviour_weights=batch.get("importance"),
        )  # fmt: skip
        live = batch["weights"] != 0
        metrics["entropy"] = (jnp.sum(jnp.where(live, entropy, 0.0)), jnp.sum(live).astype(jnp.float32))
        s1, e1, s2, e2 = jnp.moveaxis(batch["rows"].intervals, -1, 0)
        used = (s1 < e1) | (s2 < e2)  # padding sees nothing
        metrics["packing_efficiency"] = (jnp.sum(used).astype(jnp.float32), jnp.float32(used.size))
        return total, metrics

    def _value_objective(self, params, batch, trunk):
        values = packed_values(self.value_model, merged(params, trunk), batch["rows"])
        return value_loss(
            values, batch["old_values"], batch["returns"], batch["weights"], clip=self.value_config.clip
        )

    def policy_batches(self, replays: Sequence[Replay]) -> tuple[list[dict], float]:
        """Micro-batches of a policy update and its denominator."""
        columns = {
            "temperature": [r.sample.trace.temperature for r in replays],
            "old_logp": [r.old_logp for r in replays],
            "advantages": [r.advantages for r in replays],
        }
        if self.config.kl_to == "reference":
            columns["reference_logp"] = [r.reference_logp for r in replays]
        if self.config.importance_sampling != "none":
            cap = self.config.importance_cap
            columns["importance"] = [truncate(ratios, cap) for ratios in self.importance_ratios(replays)]
        return self._batches(replays, columns)

    def update_policy(self, replays: Sequence[Replay]) -> tuple[UpdateResult, dict]:
        """One policy update; also returns its last micro-batch, evidence should it not be finite."""
        batches, denominator = self.policy_batches(replays)
        self.policy, result = self._policy_updater.update(self.policy, self._watched(batches), denominator)
        return result, batches[-1]

    def value_batches(self, replays: Sequence[Replay]) -> tuple[list[dict], float]:
        """Micro-batches of a value update and its denominator."""
        columns = {"old_values": [r.old_values for r in replays], "returns": [r.returns for r in replays]}
        return self._batches(replays, columns)

    def update_value(self, replays: Sequence[Replay]) -> tuple[UpdateResult, dict]:
        """One value update; returns the same as `update_policy`."""
        batches, denominator = self.value_batches(replays)
        self.value, result = self._value_updater.update(self.value, self._watched(batches), denominator, self._trunk())
        return result, batches[-1]

    def _batches(self, replays: Sequence[Replay], columns: dict[str, list]) -> tuple[list[dict], float]:
        """Micro-batches of packed rows with per-target numbers, and the denominator of the whole update."""
        config = self.config
        rows = self._pack(replays)
        # The two views of `coupled` are one response.
        _, response = np.unique([id(r.sample) for r in replays], return_inverse=True)
        longest = max(len(r.sample.trace.ids) for r in replays)
        weights, denominator = loss_weights(
            config.normaliser,
            np.bincount(response, [len(r.item.target_ids) for r in replays]),
            length=longest if config.normaliser == "reference" else config.normaliser_constant,
            rounds=sum(len(np.unique(r.item.target_round)) for r in replays),
        )
        gathered = {name: rows.gather(column) for name, column in columns.items()}
        gathered["weights"] = rows.gather(list(weights[response])) * rows.target_weight
        return micro_batches(rows, gathered, self.rows_per_micro_batch), denominator


def merged(value_params: Any, trunk: Any) -> Any:
    """Parameters of the value model; with a shared trunk its head on the policy's features, which get no gradient."""
    return value_params if trunk is None else {**jax.lax.stop_gradient(trunk), **value_params}


def micro_batches(rows: PackedRows, columns: dict[str, np.ndarray], n: int) -> list[dict[str, Any]]:
    """Cut packed rows and [N,P] numbers into micro-batches of n rows, the last one filled with padding."""
    parts = rows.split(n)
    missing = len(parts) * n - rows.shape[0]
    padded = {name: np.pad(column, ((0, missing), (0, 0))) for name, column in columns.items()}
    return [
        {"rows": part, **{name: column[i * n : (i + 1) * n] for name, column in padded.items()}}
        for i, part in enumerate(parts)
    ]
