"""Worker process of the `math` reward: (gold, prediction) in, the verdict of `algebra.same` out."""

import logging

from tracerl_jax.rewards import algebra
from tracerl_jax.rewards.worker_pool import serve

if __name__ == "__main__":
    logging.disable()
    serve(algebra.load, lambda pair: algebra.same(*pair))
