"""One order of programs on all devices, whichever threads start them.

A program on several devices is started on one after the other, and its collectives wait until all have reached them.
Two threads could start two programs in different orders on two devices, which then wait for each other for ever.
"""

import contextlib
import threading

from jax.sharding import Mesh

_starting = threading.Lock()


def in_order(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Around the call of a program with collectives: one thread at a time. With one device, of no effect.

    Calls return when the program has been started, so this does not make one program wait for another.
    """
    return contextlib.nullcontext() if mesh is None or mesh.size == 1 else _starting
