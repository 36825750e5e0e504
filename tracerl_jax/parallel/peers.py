"""What processes of a job tell each other, as Python objects. All of them make the same calls in the same order; alone,
a process talks to itself.

    from_lead(f)     process 0 calls f; its result, or its UserError, is everybody's       key-value store: small things
    gather(x)        the list of everybody's x, by process                                 devices: as large as memory
"""

import functools
import itertools
import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tracerl_jax.errors import UserError
from tracerl_jax.parallel import distributed

Value = TypeVar("Value")

_calls = itertools.count()
_CHUNK = 1 << 20  # bytes of a value in the store
_SMALLEST = 1 << 10  # bytes; what is gathered is as long as this, twice, four times ..: few programs
_TOGETHER = 1 << 28  # bytes, a power of two: of everybody's, on each device at a time
_told: list[str] = []  # keys of values that process 0 has put into the store


def from_lead(make: Callable[[], Value]) -> Value:
    """What `make` returns, or the UserError it raises, in process 0."""
    if not distributed.is_job():
        return make()
    key, client = f"tracerl/lead/{next(_calls)}", distributed.client()
    if distributed.is_lead():
        _told.append(key)
        error, result = None, None
        try:
            result = make()
        except UserError as raised:
            error = raised
        data = pickle.dumps((result, error and (type(error), str(error))))
        chunks = [data[i : i + _CHUNK] for i in range(0, len(data), _CHUNK)]
        for i, chunk in enumerate(chunks):
            client.key_value_set_bytes(f"{key}/{i}", chunk)
        client.key_value_set(f"{key}/count", str(len(chunks)))
        if error is not None:
            raise error
        return result
    count = int(client.blocking_key_value_get(f"{key}/count", distributed.FOR_EVER_MS))
    data = b"".join(client.blocking_key_value_get_bytes(f"{key}/{i}", distributed.FOR_EVER_MS) for i in range(count))
    result, error = pickle.loads(data)
    if error is not None:
        kind, message = error
        raise kind(message)
    return result


def gather(value: Value, within: float | None = None) -> list[Value]:
    """Everybody's `value`, by process. Waits for them all; raises TimeoutError when they have not come `within` so many
    seconds."""
    if not distributed.is_job():
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    meet(within)  # they may come minutes apart, which collectives of some devices do not like
    longest = max(_gather_sizes(len(data)))
    most = max(_SMALLEST, _TOGETHER >> (distributed.process_count() - 1).bit_length())
    rows: list[list[np.ndarray]] = [[] for _ in range(distributed.process_count())]
    for start in range(0, longest, most):
        piece = data[start : start + most]
        room = max(_SMALLEST, 1 << (min(most, longest - start) - 1).bit_length())
        for row, found in zip(rows, process_allgather(np.pad(piece, (0, room - len(piece)))), strict=True):
            row.append(found)
    return [pickle.loads(np.concatenate(row)) for row in rows]  # which ends where the pickle does


def _gather_sizes(size: int) -> list[int]:
    """In two halves: JAX has no integers of 64 bits here."""
    halves = process_allgather(np.array(divmod(size, 1 << 16), np.int32)).reshape(-1, 2)
    return [int(high) << 16 | int(low) for high, low in halves]


def meet(within: float | None = None) -> None:
    """Waits until everybody has come here; the devices do not notice. Raises TimeoutError as `gather` does."""
    if not distributed.is_job():
        return
    client, barrier = distributed.client(), f"tracerl/meet/{next(_calls)}"
    try:
        client.wait_at_barrier(barrier, distributed.FOR_EVER_MS if within is None else int(1000 * within))
    except jax.errors.JaxRuntimeError as error:
        if within is None:
            raise
        raise TimeoutError(f"not all processes came within {within:g} s") from error
    while _told:  # which everybody has read
        client.key_value_delete(_told.pop())


def connect(mesh: Mesh) -> None:
    """Has the devices along every combination of the mesh's axes talk to each other once. On CPUs, they must do so for
    the first time within 30 seconds; compiling, for which programs wait otherwise, may take longer."""
    if not distributed.is_job():
        return
    groups = [group for n in range(1, 1 + len(mesh.axis_names)) for group in itertools.combinations(mesh.axis_names, n)]

    everywhere = PartitionSpec(mesh.axis_names)
    own = NamedSharding(mesh, everywhere)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    def sums(x: jax.Array) -> jax.Array:
        return sum(jax.lax.psum(x, group) for group in groups)

    ones = jax.make_array_from_callback((mesh.size,), own, lambda index: np.ones(mesh.size, np.float32)[index])
    program = jax.jit(sums).lower(ones).compile()
    meet()
    program(ones).block_until_ready()
    gather(None)  # has groups of its own, which Orbax uses too


def ask_any(flag: bool) -> jax.Array:
    """[] bool, replicated: whether anybody's flag is set. Does not wait for the answer."""
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    own = NamedSharding(mesh, PartitionSpec("devices"))
    flags = jax.make_array_from_callback((mesh.size,), own, lambda index: np.full(mesh.size, flag)[index])
    return _any(mesh)(flags)


@functools.cache
def _any(mesh: Mesh) -> Any:
    return jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))


def own_share(items: Sequence[Value]) -> Sequence[Value]:
    """The items of this process: every n-th of n processes."""
    return items[distributed.process_index() :: distributed.process_count()]


def interleave(shares: Sequence[Sequence[Value]]) -> list[Value]:
    """The items that everybody's `own_share` came from, in their order."""
    return [share[i] for i in range(max(map(len, shares), default=0)) for share in shares if i < len(share)]
