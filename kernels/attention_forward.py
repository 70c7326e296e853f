"""The forward pass of causal attention within packed sequences.

A program does a tile of queries of one head and walks its keys in blocks of 64 (32 for heads of 256), counted from the
start of the sequence, as FlashAttention does (arXiv 2205.14135). Scores are in base 2, because the hardware has ex2.

The result of a row has the same bits in every tile of queries and number of warps, beside every neighbour and in every
packing, and `paged_attention.py`, which decodes, gives them too. `fold_block` and `merge` decide that:
- All tiles walk the same blocks of keys in the same order. A block that a row does not see leaves its state as it is.
- `SPLIT_KEYS` keys, counted from the start of the sequence, have a state of their own, which is then merged into that of
  the keys before. So programs that decode one sequence may share its splits: their number does not change the bits.
- Sums of weights are added up in an order that is written out (`halve_columns`), because `tl.sum` follows the layout of the
  tile: those of a block to 8 columns, which a thread has at hand, and these to one at the end. The products of tensor
  cores add up in one order, whatever the tile.
- A product that is added to something is written as `tl.fma`, and `EXACT` forbids the compiler to contract others.

Splits have 256 keys. Shorter ones keep more multiprocessors busy where few sequences are decoded, longer ones cost training
fewer merges, of 2 instructions an element of the output. Predicted for an H200: beside splits of 128 one sequence of 1,024
keys, 32 programs for 8 key heads, takes .7 us a layer more, 2 % of a step of Qwen3-0.6B (7 % with 512); the forward pass
of attention takes 3 to 5 % more for 2,048 tokens, under 0.5 % of a pass, and nothing up to 256. Registers are the same
with every length. Two states of 64 numbers a thread fit without spills on an H100 in the tiles that were there before; with
heads of more than 64 an A100 and a B200 take half as many rows (`fit_two_states`), predicted to cost them a third.

An earlier form, with a loop of its own for the diagonal, was measured on an H200: 387 TFLOP/s for 8 sequences of 2,048
tokens of Llama-3-8B's heads with tiles of 128 queries, 377 with tiles of 64; .151 ms for 36 sequences of 256 to 640 tokens
of Qwen3-0.6B's with tiles of 64, .179 with tiles of 128.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rto_fast.kernels.common import EXACT, INTERPRETED, LOG2E

# The columns in which the weights of a block are summed up. The bits of a result depend on it, and on `block_keys`.
SUM_COLUMNS = tl.constexpr(8)
SPLIT_KEYS = 256  # a multiple of every `block_keys`; bits of results depend on it too
MAX_SEQUENCES = 1 << 15  # of a launch; a grid may have 65,535 programs in its third dimension


@triton.jit
def _mask(first, end, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    mask = (first + tl.arange(0, BLOCK) < end)[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    return mask


@triton.jit
def load_rows(ptr, first, end, stride, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [first, first + BLOCK) of one head, [BLOCK, BLOCK_D], 0 from row `end` on; `first` is an int64."""
    # What differs between elements does not depend on `first`, so the compiler moves it out of a loop.
    offs = tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(ptr + first * stride + offs, mask=_mask(first, end, HEAD_DIM, BLOCK, BLOCK_D), other=0.0)


@triton.jit
def store_rows(ptr, rows, first, end, stride, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores what `load_rows` loads."""
    offs = tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]
    mask = _mask(first, end, HEAD_DIM, BLOCK, BLOCK_D)
    tl.store(ptr + first * stride + offs, rows.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def product(a, b, dtype: tl.constexpr, acc=None):
    """a @ b (+ acc) of operands that are rounded to `dtype`, accumulated in float32."""
    a = a.to(dtype)
    b = b.to(dtype)
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def soft_cap(dots, scale, cap):
    """(cap·tanh(scores / softcap), that tanh); `scale` is what converts products to the exponent of tanh (see `scales`)."""
    tanh = 1.0 - 2.0 / (1.0 + tl.exp2(dots * scale))
    return cap * tanh, tanh


@triton.jit
def weights(dots, lse, scale, cap):
    """(the weights 2^(score − lse), what the cap multiplies the gradients of scores with), for the backward pass."""
    if cap is None:
        return tl.exp2(tl.fma(dots, scale, -lse)), 1.0
    else:
        x, tanh = soft_cap(dots, scale, cap)
        return tl.exp2(x - lse), 1.0 - tanh * tanh


@triton.jit
def halve_columns(x, UNTIL: tl.constexpr):
    """Adds the right half of the columns of x to the left half, again and again, until there are `UNTIL`."""
    if x.shape[1] == UNTIL:
        return x
    else:
        left, right = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))
        return halve_columns(left + right, UNTIL)


@triton.jit
def fold_block(x, value, m, s, acc, scale):
    """Adds a block of keys to the state of a tile of queries.

    The state is (m, s, acc): the largest score of each query, the sums of its weights 2^(score − m) by column of a block,
    and the sum of its weighted values. The scores are scale·x, -inf where a query does not see a key.
    """
    new_m = tl.maximum(m, tl.max(x, 1) * scale)
    # While a row has seen nothing, it measures from 0: -inf - -inf would be NaN.
    origin = tl.where(new_m == float("-inf"), 0.0, new_m)
    rescale = tl.exp2(m - origin)[:, None]
    p = tl.exp2(tl.fma(x, scale, -origin[:, None]))
    return new_m, tl.fma(s, rescale, halve_columns(p, SUM_COLUMNS)), product(p, value, value.dtype, acc * rescale)


@triton.jit
def sum_of_columns(s):
    return tl.reshape(halve_columns(s, 1), (s.shape[0],))


@triton.jit
def empty_state(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The state of rows that have seen no key."""
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    return m, tl.zeros((ROWS, SUM_COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def merge(m, total, acc, split_m, split_total, split_acc):
    """Adds the state of a split to that of the keys before; `total` is the sum of a row's weights over all columns.

    A split that a row does not see leaves it as it is: it has weight 0, the others 2^0.
    """
    new_m = tl.maximum(m, split_m)
    origin = tl.where(new_m == float("-inf"), 0.0, new_m)
    rescale = tl.exp2(m - origin)
    weight = tl.exp2(split_m - origin)
    acc = tl.fma(acc, rescale[:, None], split_acc * weight[:, None])
    return new_m, tl.fma(total, rescale, split_total * weight), acc


@triton.jit
def normalise(acc, total):
    """The output. Reciprocals are rounded correctly, for a division may be another one in another kernel."""
    return acc * tl.div_rn(tl.full(total.shape, 1.0, tl.float32), total)[:, None]


@triton.jit
def visible(positions, keys, window):
    """Whether positions see keys."""
    if window is None:
        return keys <= positions
    else:
        return (keys <= positions) & (keys > positions - window)


@triton.jit
def key_ranges(first, end, window, BLOCK_N: tl.constexpr):
    """(begin, edge, full) of the keys that the positions [first, end) see, which end with key `end`.

    Blocks before `edge` are partly out of the window of some positions, those from `full` on partly after some. `begin`
    and `edge` are whole blocks, so is `full`, but it may be before `edge`.
    """
    begin = 0
    edge = 0
    if window is not None:
        begin = tl.maximum(first + 1 - window, 0) // BLOCK_N * BLOCK_N
        edge = tl.minimum(tl.cdiv(tl.maximum(end - window, 0), BLOCK_N) * BLOCK_N, end)
    return begin, edge, tl.maximum(first + 1, 0) // BLOCK_N * BLOCK_N


@triton.jit(do_not_specialize=["num_tokens"])
def attention_fwd_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    lse_ptr,
    cu_seqlens_ptr,
    cu_seqlens_k_ptr,
    stride_query_t,
    stride_query_h,
    stride_key_t,
    stride_key_h,
    stride_value_t,
    stride_value_h,
    num_tokens,
    scale,
    cap,
    window,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    MERGE_FIRST: tl.constexpr,
):
    """SPLIT: keys of a split, or None if no row sees more. MERGE_FIRST: merge before blocks, not after them."""
    pid_n = tl.program_id(2)
    pid_h = tl.program_id(1)
    num_heads = tl.num_programs(1)
    first = tl.load(cu_seqlens_ptr + pid_n)
    length = tl.load(cu_seqlens_ptr + pid_n + 1) - first
    begin_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # last tiles, which have most keys, first
    if begin_m >= length:
        return
    first_k = tl.load(cu_seqlens_k_ptr + pid_n)
    # The queries are the last positions of the sequence.
    offset = tl.load(cu_seqlens_k_ptr + pid_n + 1) - first_k - length
    first_m = (first + begin_m).to(tl.int64)
    end_m = (first + length).to(tl.int64)
    first_k = first_k.to(tl.int64)
    positions = offset + begin_m + tl.arange(0, BLOCK_M)

    end = offset + tl.minimum(begin_m + BLOCK_M, length)
    begin, edge, full = key_ranges(offset + begin_m, end, window, BLOCK_N)

    pid_kv = pid_h // GROUP
    query_ptr += pid_h.to(tl.int64) * stride_query_h
    key_ptr += pid_kv.to(tl.int64) * stride_key_h
    value_ptr += pid_kv.to(tl.int64) * stride_value_h
    query = load_rows(query_ptr, first_m, end_m, stride_query_t, HEAD_DIM, BLOCK_M, BLOCK_D)
    m, s, acc = empty_state(BLOCK_M, BLOCK_D)
    if SPLIT is not None:
        all_m, all_acc = m, acc
        total = tl.zeros((BLOCK_M,), tl.float32)
    # With heads of 256, addresses that are kept between blocks would not fit into an H100's registers.
    for start in tl.range(begin, end, BLOCK_N, disable_licm=MERGE_FIRST and BLOCK_D > 128):
        if SPLIT is not None and MERGE_FIRST:
            if start % SPLIT == 0 and start > begin:
                all_m, total, all_acc = merge(all_m, total, all_acc, m, sum_of_columns(s), acc)
                m, s, acc = empty_state(BLOCK_M, BLOCK_D)
        key = load_rows(key_ptr, first_k + start, first_k + end, stride_key_t, HEAD_DIM, BLOCK_N, BLOCK_D)
        value = load_rows(value_ptr, first_k + start, first_k + end, stride_value_t, HEAD_DIM, BLOCK_N, BLOCK_D)
        x = product(query, tl.trans(key), key.dtype)
        if cap is not None:
            x, _ = soft_cap(x, scale, cap)
        if start < edge or start >= full:
            x = tl.where(
                visible(positions[:, None], (start + tl.arange(0, BLOCK_N))[None, :], window), x, float("-inf")
            )
        m, s, acc = fold_block(x, value, m, s, acc, 1.0 if cap is not None else scale)
        if SPLIT is not None and not MERGE_FIRST:
            if (start + BLOCK_N) % SPLIT == 0 or start + BLOCK_N >= end:
                all_m, total, all_acc = merge(all_m, total, all_acc, m, sum_of_columns(s), acc)
                m, s, acc = empty_state(BLOCK_M, BLOCK_D)

    if SPLIT is None:
        total = sum_of_columns(s)
    elif MERGE_FIRST:
        m, total, acc = merge(all_m, total, all_acc, m, sum_of_columns(s), acc)
    else:
        m, acc = all_m, all_acc
    out = normalise(acc, total)
    store_rows(out_ptr + pid_h * HEAD_DIM, out, first_m, end_m, num_heads * HEAD_DIM, HEAD_DIM, BLOCK_M, BLOCK_D)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + pid_h.to(tl.int64) * num_tokens + offs_m, m + tl.log2(total), mask=offs_m < end_m)


def base_2(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """(scale, cap) of the kernels: one multiplication converts products to scores in base 2, or to the exponent of tanh."""
    if softcap is None:
        return scale * LOG2E.value, None
    return scale * 2 * LOG2E.value / softcap, softcap * LOG2E.value


def block_keys(block_d: int, itemsize: int) -> int:
    """Keys of a block. It follows from nothing else, because the bits of a result depend on it.

    Products in float32 do not run on tensor cores: larger tiles would be minutes of compilation, and spill registers.
    """
    return (64 if itemsize == 2 else 32) // (1 if block_d <= 128 else 2)


@cache
def architecture(device: torch.device) -> int:
    """90 for sm_90, an H100's; that is also what a CPU gets."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def rows_of_a_tile(block_d: int, itemsize: int, max_seqlen: int, device: torch.device) -> int:
    """Rows of a program's tile. Short sequences fill small tiles better; large tiles read less from L2."""
    if itemsize == 4:
        return 32
    if block_d > 128:
        return 64
    sm = architecture(device)
    # A B200's tensor cores want 128 rows, and Triton 3.7 spills registers with 64. Others with enough shared memory, 112 KB
    # for heads of 128, are an A100 and an H100.
    return 128 if sm // 10 == 10 or (max_seqlen > 1024 and sm in (80, 90)) else 64


def launch_options(query: Tensor, max_seqlen: int) -> tuple[int, dict[str, Any]]:
    """(rows of a tile; BLOCK_D, warps and stages). A warp has 16 rows, or 8 of heads of 256, which need more registers."""
    block_d, itemsize = max(16, triton.next_power_of_2(query.shape[2])), query.element_size()
    rows = rows_of_a_tile(block_d, itemsize, max_seqlen, query.device)
    narrow = itemsize == 2 and block_d <= 128
    return rows, {
        "BLOCK_D": block_d,
        "num_warps": rows // 16 if narrow else 8,
        "num_stages": 3 if narrow else 2,
        "maxnreg": 255 if itemsize == 4 else None,  # by itself ptxas would spill, to make room for more programs
    }


def fit_two_states(rows: int, options: dict[str, Any], query: Tensor) -> tuple[int, dict[str, Any]]:
    """`launch_options` for sequences of several splits, by which Triton 3.7 spills no registers.

    An H100 merges before a block, because after it ptxas would let each product wait for the one before. Elsewhere that
    would take more registers.
    """
    sm, is_wide = architecture(query.device) // 10, options["BLOCK_D"] > 128
    merge_first = sm == 9 and query.element_size() == 2
    if merge_first:
        options = options | {"num_stages": 3}
    elif query.element_size() == 2 and options["BLOCK_D"] > 64:
        rows, num_warps = (64, 8) if sm == 10 or is_wide else (32, 4)
        options = options | {"num_warps": num_warps}
    elif options["BLOCK_D"] > 64:
        options = options | {"num_stages": 1}
    return rows, options | {"SPLIT": SPLIT_KEYS, "MERGE_FIRST": merge_first}


def bounds_of_launches(cu_seqlens: Tensor) -> list[Tensor]:
    """The bounds of the sequences of each launch, nearly always of all of them."""
    if len(cu_seqlens) <= MAX_SEQUENCES + 1:
        return [cu_seqlens]
    return [cu_seqlens[first : first + MAX_SEQUENCES + 1] for first in range(0, len(cu_seqlens) - 1, MAX_SEQUENCES)]


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """(out [T, num_heads, head_dim], log-sum-exp of the scores in base 2 [num_heads, T] float32); see `packed_attention`."""
    num_tokens, num_heads, head_dim = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=query.device)
    if not num_tokens:
        return out, lse
    rows, options = launch_options(query, max_seqlen)
    if cu_seqlens_k is cu_seqlens and max_seqlen <= SPLIT_KEYS:
        options |= {"SPLIT": None, "MERGE_FIRST": False}
    else:
        rows, options = fit_two_states(rows, options, query)
    factor, cap = base_2(scale, softcap)
    tiles = triton.cdiv(max_seqlen, rows)
    with torch.cuda.device_of(query):
        for bounds, bounds_k in zip(bounds_of_launches(cu_seqlens), bounds_of_launches(cu_seqlens_k)):
            attention_fwd_kernel[(tiles, num_heads, len(bounds) - 1)](
                query,
                key,
                value,
                out,
                lse,
                bounds,
                bounds_k,
                query.stride(0),
                query.stride(1),
                key.stride(0),
                key.stride(1),
                value.stride(0),
                value.stride(1),
                num_tokens,
                factor,
                cap,
                window,
                GROUP=num_heads // key.shape[1],
                HEAD_DIM=head_dim,
                BLOCK_M=rows,
                BLOCK_N=block_keys(options["BLOCK_D"], query.element_size()),
                **options,
                **EXACT,
            )
    return out, lse
