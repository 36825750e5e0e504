"""Messages on a pipe: eight bytes of length, then JSON. Reads take exactly one message, so that several processes can
take turns on one pipe.

`wait(fd)` is called where a descriptor that does not block would have.
"""

import json
import os
from collections.abc import Callable

MAX_BYTES = 128 << 20
PIECE = 1 << 20

Wait = Callable[[int], None]


def _no_wait(fd: int) -> None:
    raise BlockingIOError("nothing to read, or no room to write")


def read_frame(fd: int, wait: Wait = _no_wait) -> object:
    """Raises `EOFError` when the other end is closed, `ValueError` for what is no message."""
    length = int.from_bytes(_read(fd, 8, wait), "big")
    if length > MAX_BYTES:
        raise ValueError(f"a message of {length} bytes")
    return json.loads(_read(fd, length, wait))


def write_frame(fd: int, message: object, wait: Wait = _no_wait) -> None:
    """Raises `BrokenPipeError` when nobody reads."""
    data = json.dumps(message, check_circular=False).encode()
    left = memoryview(len(data).to_bytes(8, "big") + data)
    while left:
        try:
            left = left[os.write(fd, left[:PIECE]) :]
        except BlockingIOError:
            wait(fd)


def _read(fd: int, size: int, wait: Wait) -> bytes:
    data = bytearray()
    while len(data) < size:
        try:
            piece = os.read(fd, min(size - len(data), PIECE))
        except BlockingIOError:
            wait(fd)
            continue
        if not piece:
            raise EOFError("it has closed its end")
        data += piece
    return bytes(data)
