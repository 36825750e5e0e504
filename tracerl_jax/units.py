"""Sizes as people read them."""

GIB = 2**30


def format_bytes(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"
