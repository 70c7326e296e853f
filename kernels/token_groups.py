"""Tiles of a packed sequence that move four tokens, a group, in one access, wherever the sequence starts.

A tile is a matrix with a group in each row and a row for each thread. Groups are counted from the start of the tensors
and not of the sequence, so that a thread's access is one of 128 bits for float32, or of 64 bits for 16-bit types. If
sequences share a group, each of them reads it whole and writes its own tokens one by one.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(4)


@triton.jit
def split_columns(tile, ROWS: tl.constexpr):
    """The four columns of a tile [ROWS, GROUP]. They are registers of the same thread, so nothing is moved."""
    even, odd = tl.split(tl.reshape(tile, (ROWS, 2, 2)))
    column_0, column_2 = tl.split(even)
    column_1, column_3 = tl.split(odd)
    return column_0, column_1, column_2, column_3


@triton.jit
def join_columns(column_0, column_1, column_2, column_3, ROWS: tl.constexpr):
    tile = tl.join(tl.join(column_0, column_2), tl.join(column_1, column_3))
    return tl.reshape(tile, (ROWS, GROUP))


@triton.jit
def token_groups(groups, start, end, ROWS: tl.constexpr):
    """(first tokens [ROWS, 1], all tokens [ROWS, GROUP], which of them belong to the sequence, whether all of a group do
    [ROWS, 1]) of the last ROWS of the first `groups` groups, the last group first."""
    first_t = (groups - 1 - tl.arange(0, ROWS)[:, None]) * GROUP
    offs_t = first_t + tl.arange(0, GROUP)[None, :]
    return first_t, offs_t, (offs_t >= start) & (offs_t < end), (first_t >= start) & (first_t + GROUP <= end)


@triton.jit
def _pointers(ptr, first_t):
    """Adds in an order in which a thread's second to fourth address are constant distances from its first."""
    return ptr + first_t + tl.arange(0, GROUP)[None, :]


@triton.jit
def load_groups(ptr, first_t, wanted, is_whole):
    """Loads the groups in which a token is wanted; the other tokens of the tile are undefined. If the tensor's last group
    is not whole, only wanted tokens are loaded."""
    if is_whole:
        group_wanted = (
            tl.max(wanted.to(tl.int32), 1, keep_dims=True) != 0
        )  # one mask a group gives one access of 128 bits
        tile = tl.load(_pointers(ptr, first_t), mask=group_wanted)
    else:
        tile = tl.load(_pointers(ptr, first_t), mask=wanted)
    return tile


@triton.jit
def store_groups(ptr, first_t, tile, mask_t, group_whole):
    """Stores whole groups at once, and tokens of groups that other sequences share one by one."""
    tl.store(_pointers(ptr, first_t), tile, mask=group_whole)
    tl.store(_pointers(ptr, first_t), tile, mask=mask_t & (group_whole == 0))
