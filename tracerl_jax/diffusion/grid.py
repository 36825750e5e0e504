"""The block grid: which block a position belongs to.

    position   0 1 2 3 4 5 6 7 8 9
    offset 0  [0 0 0 0|1 1 1 1|2 2 ...      the absolute grid, B = 4
    offset 2  [-1 -1|0 0 0 0|1 1 1 1 ...    shifted so that a block starts at position 2 (mod B)

The sampler always uses offset 0. `offset = p mod B` counts blocks from the start of the response behind a prompt of p
tokens, which is the reference's grid (`alignment="response"`). Every function takes ints and arrays alike.
"""


def block_of(position, block_size: int, offset=0):
    """Index of the block that holds `position`; -1 for the part-block before `offset`."""
    return (position - offset) // block_size


def block_start(block, block_size: int, offset=0):
    """First position of `block`."""
    return block * block_size + offset


def round_up(n, multiple: int):
    """Smallest multiple of `multiple` that is not below `n`."""
    return -(-n // multiple) * multiple
