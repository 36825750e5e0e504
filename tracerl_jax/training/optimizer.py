"""AdamW with float32 moments for the whole run; schedules are indexed by optimizer updates."""

from collections.abc import Sequence

import jax
import optax

from tracerl_jax.config import OptimizerConfig
from tracerl_jax.errors import ConfigError

HOST = "pinned_host"  # JAX's name for memory of a host from which its devices copy


class Offloaded(optax.GradientTransformationExtraArgs):
    """An optimizer whose moments lie in the hosts' memory between updates (see `step.state_shardings`)."""


def check_offload(name: str, config: OptimizerConfig, devices: Sequence[jax.Device]) -> None:
    """Raises ConfigError where `config` of the section `name` needs memory that these devices cannot copy from."""
    if not config.offload:
        return
    kinds = sorted({memory.kind for device in devices for memory in device.addressable_memories()})
    if HOST not in kinds:
        raise ConfigError(f"{name}.offload is true, but the {devices[0].device_kind} devices here know only the memory "
                          f"{', '.join(kinds) or 'of their own'}, not {HOST}: set {name}.offload=false")


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
    """Clipping by the global norm, then AdamW; everything is decayed but norm scales and biases. `Offloaded` where the
    config says so."""
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
    chain = optax.chain(*steps)
    return Offloaded(*chain) if config.offload else chain


def _decayed(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)
