"""One optimizer update out of micro-batches of any size.

A loss returns `(sum, metrics)`: a sum over targets, and metrics as `(sum, count)` pairs. Gradients of the sums are
added up over the micro-batches and divided by the denominator of the whole update, so accumulation is exact for unequal
micro-batches.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tracerl_jax.models import Model
from tracerl_jax.parallel.order import in_order
from tracerl_jax.parallel.place import put
from tracerl_jax.parallel.sharding import batch_sharding, param_shardings

Pairs = dict[str, tuple[jax.Array, jax.Array]]
LossFn = Callable[..., tuple[jax.Array, Pairs]]


class TrainState(NamedTuple):
    """Parameters, optimizer state and the number of updates that were applied (skipped ones do not count)."""

    params: Any
    opt_state: Any
    updates: jax.Array  # [] int32


class UpdateResult(NamedTuple):
    """What one update did; device scalars, fetch them when convenient."""

    loss: jax.Array  # [] f32, already divided by the denominator
    grad_norm: jax.Array  # [] f32, before clipping
    skipped: jax.Array  # [] bool: loss or gradient was not finite and nothing changed
    metrics: Pairs


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Optimizer state sharded like the parameters it belongs to."""
    return jax.jit(
        lambda p: TrainState(p, optimizer.init(p), jnp.zeros((), jnp.int32)),
        out_shardings=state_shardings(params, optimizer),
        donate_argnums=0,
    )(params)


def state_shardings(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """NamedSharding tree of a TrainState: moments like their parameter, counters replicated."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    sample = jax.tree.leaves(shardings)[0]
    replicated = NamedSharding(sample.mesh, PartitionSpec()) if isinstance(sample, NamedSharding) else sample
    opt_state = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        shardings,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(shardings, opt_state, replicated)


def sharded_abstract_params(model: Model) -> Any:
    """`model.abstract_params()` with the shardings of its mesh."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        model.abstract_params(),
        param_shardings(model, model.mesh),
    )


def abstract_state(abstract_params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes, dtypes and shardings of `init_state`, for restoring; `abstract_params` carry their shardings."""
    shapes = TrainState(
        abstract_params, jax.eval_shape(optimizer.init, abstract_params), jax.ShapeDtypeStruct((), jnp.int32)
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(abstract_params, optimizer),
    )


class Updater:
    """Jitted accumulation and application of gradients for one loss and one optimizer.

    `loss_fn(params, batch, *extra) -> (sum, metrics)`; `extra` are trees that get no gradient (a frozen trunk, say).
    """

    def __init__(self, loss_fn: LossFn, optimizer: optax.GradientTransformation, mesh: Mesh | None = None):
        self._mesh = mesh

        def gradient(params, batch, denominator, *extra):
            def scaled(p):
                total, metrics = loss_fn(p, batch, *extra)
                return total / denominator, metrics

            (loss, metrics), grads = jax.value_and_grad(scaled, has_aux=True)(params)
            return loss, metrics, grads

        def accumulate(params, sums, batch, denominator, *extra):
            return jax.tree.map(jnp.add, sums, gradient(params, batch, denominator, *extra))

        def apply(state, sums):
            loss, metrics, grads = sums
            grad_norm = optax.tree.norm(grads)
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            steps, opt_state = optimizer.update(grads, state.opt_state, state.params)
            updated = TrainState(optax.apply_updates(state.params, steps), opt_state, state.updates + 1)
            state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
            return state, UpdateResult(loss, grad_norm, ~finite, metrics)

        self._gradient_shapes = lambda *args: jax.eval_shape(gradient, *args)
        self._accumulate = jax.jit(accumulate, donate_argnums=1)
        self._apply = jax.jit(apply, donate_argnums=0)

    def update(
        self, state: TrainState, micro_batches: Iterable[Any], denominator: float, *extra: Any
    ) -> tuple[TrainState, UpdateResult]:
        """One update. `state` is donated. Micro-batches are trees of arrays whose first axis is N (packed rows)."""
        sums = None
        denominator = np.float32(denominator)
        for batch in micro_batches:
            batch = put_batch(batch, self._mesh)
            if sums is None:  # starting from zeros, so that the large program is compiled once and not twice
                sums = self._zeros(state.params, self._gradient_shapes(state.params, batch, denominator, *extra))
            with in_order(self._mesh):
                sums = self._accumulate(state.params, sums, batch, denominator, *extra)
        if sums is None:
            raise ValueError("an update needs at least one micro-batch")
        with in_order(self._mesh):
            return self._apply(state, sums)

    def traced(self, state: TrainState, batch: Any, *extra: Any) -> dict[str, jax.stages.Traced]:
        """The two programs of an update for arguments of these shapes and shardings; nothing runs."""
        everywhere = None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec())
        denominator = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
        shapes = self._gradient_shapes(state.params, batch, denominator, *extra)
        scalars = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes[:2])
        sums = (*scalars, state.params)
        return {
            "gradient": self._accumulate.trace(state.params, sums, batch, denominator, *extra),
            "apply": self._apply.trace(state, sums),
        }

    def _zeros(self, params: Any, shapes: Any) -> Any:
        """Zero sums where `accumulate` leaves its own: gradients with their parameters, loss and metrics everywhere."""
        everywhere = None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec())
        loss, metrics, _ = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=everywhere), shapes)
        return loss, metrics, jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype, device=p.sharding), params)


def put_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Host arrays to the devices, rows over the data and fsdp axes."""
    return put(batch, batch_sharding(mesh) if mesh is not None else None)
