"""Block enlargement 4 -> 8: traces decoded with blocks of 4, trained with blocks of 8 (arXiv 2509.06949, section 5.4).

    tracerl rl --config rl_block_enlargement --config.model.path=SDAR-4B-Chat ...          60 steps, rollout of 4
    tracerl rl --config rl_block_enlargement:8 --config.model.path=runs/rl_block_enlargement/hf ...   40 more, of 8
"""

from tracerl_jax.configs import rl_sdar_4b_math


def get_config(arg=None):
    config = rl_sdar_4b_math.get_config()
    if arg not in (None, "4", "8"):
        raise ValueError(f"the argument of this config is the block size of the rollout, 4 or 8, not {arg!r}")
    rollout_block = int(arg or 4)
    config.name = "rl_block_enlargement" if rollout_block == 4 else f"rl_block_enlargement_{rollout_block}"
    config.rollout.block_size = rollout_block
    config.rl.block_size = 8
    config.rl.steps = 60 if rollout_block == 4 else 40
    return config
