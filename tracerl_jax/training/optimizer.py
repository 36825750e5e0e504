"""AdamW with float32 moments for the whole run; schedules are indexed by optimizer updates."""

import jax
import optax

from tracerl_jax.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, total_updates: int) -> optax.Schedule:
    """Learning rate by update number: linear warm-up, then constant or a decay to `end_scale` of the peak."""
    peak, warmup = config.learning_rate, config.warmup_updates
    decay_updates = max(1, total_updates - warmup)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, decay_updates, alpha=config.end_scale)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, peak * config.end_scale, decay_updates)
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1)), after], [warmup])


def make_optimizer(config: OptimizerConfig, total_updates: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW; everything is decayed but norm scales and biases."""
    steps = [optax.clip_by_global_norm(config.max_grad_norm)] if config.max_grad_norm else []
    steps.append(
        optax.adamw(
            make_schedule(config, total_updates),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=_decayed,
        )
    )
    return optax.chain(*steps)


def _decayed(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)
