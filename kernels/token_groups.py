"""Tiles of a packed sequence that move four tokens, a group, with one access, wherever the sequence starts.

A tile is a matrix with a group in each row and a row for each thread. Groups are counted from the start of the tensors,
not of the sequence, so a thread's access is one of 128 bits for float32, of 64 for 16-bit types. A group that sequences
share is read by each of them, and each writes its own tokens one by one.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(4)


@triton.jit
def split_columns(tile, ROWS: tl.constexpr):
    """The four columns of a tile [ROWS, GROUP]: registers of the same thread, nothing moves."""
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
    """Of the last ROWS of the first `groups` groups, the last one first: (first tokens [ROWS, 1], all tokens
    [ROWS, GROUP], which of these belong to the sequence, whether all of a group do [ROWS, 1])."""
    first_t = (groups - 1 - tl.arange(0, ROWS)[:, None]) * GROUP
    offs_t = first_t + tl.arange(0, GROUP)[None, :]
    return first_t, offs_t, (offs_t >= start) & (offs_t < end), (first_t >= start) & (first_t + GROUP <= end)


@triton.jit
def _pointers(ptr, first_t):
    """In this order of addition a thread's second to fourth address are constant distances from its first."""
    return ptr + first_t + tl.arange(0, GROUP)[None, :]


@triton.jit
def load_groups(ptr, first_t, wanted, is_whole):
    """The groups in which a token is wanted; the other tokens of the tile are undefined. Of the tensor's last group, if
    it is not a whole one, only wanted tokens are read."""
    if is_whole:
        group_wanted = tl.max(wanted.to(tl.int32), 1, keep_dims=True) != 0  # one mask a group: one access of 128 bits
        tile = tl.load(_pointers(ptr, first_t), mask=group_wanted)
    else:
        tile = tl.load(_pointers(ptr, first_t), mask=wanted)
    return tile


@triton.jit
def store_groups(ptr, first_t, tile, mask_t, group_whole):
    """Whole groups at once, tokens of a group that other sequences share one by one."""
    tl.store(_pointers(ptr, first_t), tile, mask=group_whole)
    tl.store(_pointers(ptr, first_t), tile, mask=mask_t & (group_whole == 0))
