"""Shared by tests of decoding: equal traces, and what is compiled meanwhile."""

import contextlib
import logging
import re
from collections.abc import Iterator

import jax
import numpy as np


def assert_same(one, two, atol=1e-5):
    """Traces of equal ids and steps, and of equal log-probs to `atol`."""
    for name in ("prompt_ids", "ids", "step_map", "tail_ids", "tail_step_map"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
    for name in ("logprobs", "behaviour_logprobs"):
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), atol=atol, err_msg=name)
    assert (one.denoise_forwards, one.stop_reason) == (two.denoise_forwards, two.stop_reason)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the programs compiled meanwhile."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.extend(re.findall(r"^Compiling (\S+)", record.getMessage()))
    logging.getLogger("jax").addHandler(handler)
    with jax.log_compiles():
        yield found
    logging.getLogger("jax").removeHandler(handler)
