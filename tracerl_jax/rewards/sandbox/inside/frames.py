"""Messages on a pipe: eight bytes of length, then JSON. Reads take exactly one message, so that several processes can
take turns on one pipe."""

import json
import os

MAX_BYTES = 128 << 20


def read_frame(fd: int) -> object:
    """Raises `EOFError` when the other end is closed, `ValueError` for what is no message."""
    length = int.from_bytes(read_exactly(fd, 8), "big")
    if length > MAX_BYTES:
        raise ValueError(f"a message of {length} bytes")
    return json.loads(read_exactly(fd, length))


def write_frame(fd: int, message: object) -> None:
    """Raises `BrokenPipeError` when nobody reads."""
    data = json.dumps(message, check_circular=False).encode()
    data = memoryview(len(data).to_bytes(8, "big") + data)
    while data:
        data = data[os.write(fd, data) :]


def read_exactly(fd: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = os.read(fd, min(size - len(data), 1 << 20))
        if not piece:
            raise EOFError("the other end is closed")
        data += piece
    return bytes(data)
