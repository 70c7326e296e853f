"""Decode attention over a paged key-value cache: one query token a sequence, split over its keys (split-KV).

A layer's cache is two tensors [num_pages, num_kv_heads, page_size, head_dim]. The kernels take their addresses as an
int64 tensor [2] and read them on the device, so that a captured CUDA graph of the decode step stays valid when the
cache is freed and allocated again.

The arithmetic is that of `attention_forward.py`: the same blocks of keys, and splits that are merged in order. So a row has
the bits that training gives it, however many programs share the splits of a sequence. One program merges them in
registers; several store the state of each split, and `combine_splits_kernel` merges those.

The kernels are bound by memory: each key and value is read once. Query heads that share a key head are padded to the 16
rows of a tensor-core product, even MHA's single head. That is 16 FLOP a byte (16 bits), where an H200 can do 200. It
matters how many bytes are in flight: 5 MB, 40 KB an SM, cover the latency of memory. Blocks of 64 keys are 16 KB (heads of
128); while a program works on one of keys and one of values, the next two are copied to shared memory (LDGSTS, 128
bits). Three programs fit on an SM (two that store splits): 96 or 64 KB are in flight. By machine code 64 keys take as many
instructions and barriers as in two blocks of 32, with which the kernel had 90 % of an H200's bandwidth. So the predicted
times are those it had before, but for a few sequences of 1,024 keys, whose programs do 256 keys and not 128: 0.7 us more.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rto_fast.kernels import attention_forward
from rto_fast.kernels.attention_forward import (
    base_2,
    empty_state,
    fold_block,
    merge,
    normalise,
    product,
    soft_cap,
    sum_of_columns,
)
from rto_fast.kernels.common import EXACT, cdiv

MERGED_AT_ONCE = 4096  # elements of splits, in the registers of one warp


@triton.jit
def cache_pointers(addresses_ptr, dtype: tl.constexpr):
    """Base pointers of keys and values. The hint that they are aligned to 16 bytes gives accesses of 128 bits."""
    k_ptr = tl.load(addresses_ptr).to(tl.pointer_type(dtype))
    v_ptr = tl.load(addresses_ptr + 1).to(tl.pointer_type(dtype))
    return tl.multiple_of(k_ptr, 16), tl.multiple_of(v_ptr, 16)


@triton.jit
def store_kv_kernel(
    key_ptr,
    value_ptr,
    addresses_ptr,
    slots_ptr,
    stride_key_t,
    stride_key_h,
    stride_value_t,
    stride_value_h,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + pid_t)
    if slot >= 0:
        k_ptr, v_ptr = cache_pointers(addresses_ptr, key_ptr.dtype.element_ty)
        offs_h = tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
        offs_d = tl.arange(0, BLOCK_D)[None, :]
        mask = (offs_h < NUM_HEADS) & (offs_d < HEAD_DIM)
        key = tl.load(key_ptr + pid_t * stride_key_t + offs_h * stride_key_h + offs_d, mask=mask)
        value = tl.load(value_ptr + pid_t * stride_value_t + offs_h * stride_value_h + offs_d, mask=mask)
        rows = (slot // PAGE_SIZE * NUM_HEADS + offs_h) * PAGE_SIZE + slot % PAGE_SIZE
        tl.store(k_ptr + rows * HEAD_DIM + offs_d, key, mask=mask)
        tl.store(v_ptr + rows * HEAD_DIM + offs_d, value, mask=mask)


@triton.jit
def load_pages(tables_ptr, start, end, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page of the block of tokens at `start`, or of each of its tokens if a block may span pages."""
    if PAGE_SIZE % BLOCK_N == 0:
        return tl.load(tables_ptr + start // PAGE_SIZE, mask=start < end, other=0)
    else:
        offs_n = start + tl.arange(0, BLOCK_N)
        return tl.load(tables_ptr + offs_n // PAGE_SIZE, mask=offs_n < end, other=0)


@triton.jit
def block_offsets(
    pages,
    pid_h,
    num_heads,
    start,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Offsets of the keys (and values) of the block of tokens at `start`, int64 [BLOCK_N, BLOCK_D]."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    origins = (pages.to(tl.int64) * num_heads + pid_h) * (PAGE_SIZE * HEAD_DIM)
    if PAGE_SIZE % BLOCK_N == 0:
        # What differs between elements does not depend on the page, so the compiler moves it out of the loop.
        return (origins + start % PAGE_SIZE * HEAD_DIM) + (offs_n[:, None] * HEAD_DIM + offs_d)
    else:
        return (origins + (start + offs_n) % PAGE_SIZE * HEAD_DIM)[:, None] + offs_d


@triton.jit
def splits_of(length, window, SPLIT: tl.constexpr):
    """(first position in the window, first split with one, number of splits from there) of a sequence."""
    first = 0
    if window is not None:
        first = tl.maximum(length - window, 0)
    return first, first // SPLIT, tl.cdiv(length, SPLIT) - first // SPLIT


@triton.jit
def store_output(out_ptr, rows, total, acc, mask, HEAD_DIM: tl.constexpr):
    """An idle slot gives 0."""
    out = normalise(acc, tl.where(total == 0.0, 1.0, total)).to(out_ptr.dtype.element_ty)
    offs_d = tl.arange(0, acc.shape[1])[None, :]
    tl.store(out_ptr + rows[:, None] * HEAD_DIM + offs_d, out, mask=mask[:, None] & (offs_d < HEAD_DIM))


@triton.jit(do_not_specialize=["most_splits"])
def paged_attention_kernel(
    query_ptr,
    addresses_ptr,
    tables_ptr,
    lengths_ptr,
    out_ptr,
    state_ptr,
    stride_query_b,
    stride_query_h,
    stride_tables_b,
    most_splits,
    scale,
    cap,
    window,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
):
    pid_b = tl.program_id(0).to(tl.int64)
    pid_h = tl.program_id(1)
    pid_p = tl.program_id(2)
    num_heads = tl.num_programs(1)
    num_programs = tl.num_programs(2)
    offs_g = tl.arange(0, BLOCK_G)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    mask_q = (offs_g < GROUP)[:, None] & mask_d[None, :]

    # Programs get whole splits, as evenly as possible.
    length = tl.load(lengths_ptr + pid_b)
    first, first_split, num_splits = splits_of(length, window, SPLIT)
    begin = (first_split + num_splits * pid_p // num_programs) * SPLIT
    end = tl.minimum((first_split + num_splits * (pid_p + 1) // num_programs) * SPLIT, length)
    begin = tl.maximum(begin, first // BLOCK_N * BLOCK_N)

    m, s, acc = empty_state(BLOCK_G, BLOCK_D)
    all_m, all_acc = m, acc
    all_total = tl.zeros((BLOCK_G,), tl.float32)
    k_ptr, v_ptr = cache_pointers(addresses_ptr, query_ptr.dtype.element_ty)
    tables_ptr += pid_b * stride_tables_b
    offs_q = pid_b * stride_query_b + (pid_h * GROUP + offs_g)[:, None] * stride_query_h + offs_d[None, :]
    query = tl.load(query_ptr + offs_q, mask=mask_q & (begin < end), other=0.0)
    row = (pid_b * num_heads + pid_h) * GROUP + offs_g
    pages = load_pages(tables_ptr, begin, end, PAGE_SIZE, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        offs_kv = block_offsets(pages, pid_h, num_heads, start, HEAD_DIM, PAGE_SIZE, BLOCK_N, BLOCK_D)
        # Pages are looked up a block ahead, so that the addresses of copies that run ahead do not wait for them.
        pages = load_pages(tables_ptr, start + BLOCK_N, end, PAGE_SIZE, BLOCK_N)
        valid = start + offs_n < end
        if window is not None:
            valid = valid & (start + offs_n >= first)
        # Only tokens that are attended to are read. Others may be NaN, and 0·NaN is NaN; their pages may be freed.
        mask_kv = valid[:, None] & mask_d[None, :]
        key = tl.load(k_ptr + offs_kv, mask=mask_kv, other=0.0)
        value = tl.load(v_ptr + offs_kv, mask=mask_kv, other=0.0)
        x = product(query, tl.trans(key), key.dtype)
        if cap is not None:
            x, _ = soft_cap(x, scale, cap)
        x = tl.where(valid[None, :], x, float("-inf"))
        m, s, acc = fold_block(x, value, m, s, acc, 1.0 if cap is not None else scale)
        if (start + BLOCK_N) % SPLIT == 0 or start + BLOCK_N >= end:
            total = sum_of_columns(s)
            if state_ptr is None:
                all_m, all_total, all_acc = merge(all_m, all_total, all_acc, m, total, acc)
            else:
                at = row * most_splits + (start // SPLIT - first_split)
                tl.store(state_ptr + at * 2, m, mask=offs_g < GROUP)
                tl.store(state_ptr + at * 2 + 1, total, mask=offs_g < GROUP)
                tl.store(out_ptr + at[:, None] * HEAD_DIM + offs_d[None, :], acc, mask=mask_q)
            m, s, acc = empty_state(BLOCK_G, BLOCK_D)

    if state_ptr is None:
        store_output(out_ptr, row, all_total, all_acc, offs_g < GROUP, HEAD_DIM)


@triton.jit
def merge_in_order(m, total, acc, split_m, split_total, split_acc):
    """Merges one split [1] after the other into the state of a row: m and total [S], acc [S, D] of the splits."""
    if split_acc.shape[0] == 1:
        return merge(m, total, acc, split_m, split_total, split_acc)
    else:
        HALF: tl.constexpr = split_acc.shape[0] // 2
        first_m, second_m = tl.split(tl.trans(tl.reshape(split_m, (2, HALF))))
        first_total, second_total = tl.split(tl.trans(tl.reshape(split_total, (2, HALF))))
        halves = tl.permute(tl.reshape(split_acc, (2, HALF, split_acc.shape[1])), (1, 2, 0))
        first_acc, second_acc = tl.split(halves)
        m, total, acc = merge_in_order(m, total, acc, first_m, first_total, first_acc)
        return merge_in_order(m, total, acc, second_m, second_total, second_acc)


@triton.jit(do_not_specialize=["most_splits", "num_heads"])
def combine_splits_kernel(
    partials_ptr,
    state_ptr,
    lengths_ptr,
    out_ptr,
    num_heads,
    most_splits,
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Merges the splits of one query head in order. `BLOCK_S` are loaded at once: each wait costs as much as one for all."""
    row = tl.program_id(0).to(tl.int64)
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    _, _, num_splits = splits_of(tl.load(lengths_ptr + row // num_heads), window, SPLIT)
    m, _, acc = empty_state(1, BLOCK_D)
    total = tl.zeros((1,), tl.float32)
    for begin in range(0, num_splits, BLOCK_S):
        splits = row * most_splits + begin + offs_s
        mask = begin + offs_s < num_splits
        split_m = tl.load(state_ptr + splits * 2, mask=mask, other=float("-inf"))
        split_total = tl.load(state_ptr + splits * 2 + 1, mask=mask, other=0.0)
        offs = splits[:, None] * HEAD_DIM + offs_d[None, :]
        split_acc = tl.load(partials_ptr + offs, mask=mask[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
        m, total, acc = merge_in_order(m, total, acc, split_m, split_total, split_acc)
    store_output(out_ptr, row + tl.arange(0, 1), total, acc, tl.arange(0, 1) == 0, HEAD_DIM)


def _tiling(group: int, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Block sizes and launch options."""
    itemsize = dtype.itemsize
    block_d = max(16, triton.next_power_of_2(head_dim))
    # float32 products do not run on tensor cores, so they need no padding.
    block_g = triton.next_power_of_2(group) if itemsize == 4 else max(16, triton.next_power_of_2(group))
    return {
        "BLOCK_G": block_g,
        "BLOCK_N": attention_forward.block_keys(block_d, itemsize),
        "BLOCK_D": block_d,
        "SPLIT": attention_forward.SPLIT_KEYS,
        "num_warps": 4 if block_g <= 64 else 8,
        # Of keys and of values, one block is worked on and the others, up to 16 KB each, are in flight.
        "num_stages": 4 if block_d <= 64 else 3,
    }


def _most_splits(max_tokens: int, window: int | None) -> int:
    """Splits of the longest sequence, or of its window, which may begin and end within a split."""
    size = attention_forward.SPLIT_KEYS
    return cdiv(max_tokens, size) if window is None else min(cdiv(max_tokens, size), cdiv(window - 1, size) + 1)


def _num_programs(rows: int, most_splits: int, device: torch.device) -> int:
    """Programs for each row, a key head of a sequence: up to two an SM in all, as many as fit if they store splits.

    It follows from shapes only, because the host knows no lengths and a graph is captured only once.
    """
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    return max(1, min(2 * num_sms // rows, most_splits))


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def store_kv(key: Tensor, value: Tensor, addresses: Tensor, slots: Tensor, *, page_size: int) -> None:
    """Stores the keys and values of T tokens in a layer's cache.

    Args:
        key: [T, num_kv_heads, head_dim] of the cache's dtype, with any strides.
        value: like `key`.
        addresses: [2] int64, addresses of the cache's keys and values, both aligned to 16 bytes.
        slots: [T] int64, page·page_size + offset; a token with a negative slot is not stored.
        page_size: tokens of a page.
    """
    num_tokens, num_heads, head_dim = key.shape
    if not num_tokens:
        return
    key, value = _dense_rows(key), _dense_rows(value)
    block_h, block_d = triton.next_power_of_2(num_heads), triton.next_power_of_2(head_dim)
    num_warps = min(max(block_h * block_d * key.element_size() // 2048, 1), 8)  # 4 accesses of 128 bits a thread
    with torch.cuda.device_of(key):
        store_kv_kernel[(num_tokens,)](
            key,
            value,
            addresses,
            slots,
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            PAGE_SIZE=page_size,
            BLOCK_H=block_h,
            BLOCK_D=block_d,
            num_warps=num_warps,
        )


def paged_attention(
    query: Tensor,
    addresses: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    *,
    num_kv_heads: int,
    page_size: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    num_programs: int | None = None,
) -> Tensor:
    """Attention of one query token a sequence to the tokens its pages hold, itself included: [B, num_heads, head_dim].

    Tokens beyond the length or before the window are not read, nor are their pages. The weights are rounded to the
    cache's dtype, their sum is not. Nothing here waits for the device. The output of a sequence does not depend on
    other sequences, nor on `num_programs`, and has the bits that `packed_attention` gives the last position.

    Args:
        query: [B, num_heads, head_dim] of the cache's dtype, with any strides.
        addresses: [2] int64, as for `store_kv`.
        block_tables: [B, max_blocks] int32, the pages of each sequence in order.
        lengths: [B] int32, tokens of each sequence in the cache; 0 for an idle slot, whose output is 0.
        page_size: tokens of a page. A multiple of 64 needs one look-up a block, others need one a token.
        scale: scores are query·key·scale.
        window: only the last `window` tokens count; None for all.
        softcap: scores become softcap·tanh(scores/softcap); None for no cap.
        num_programs: programs that share the splits of a sequence; by default it follows from the shapes.
    """
    batch, num_heads, head_dim = query.shape
    group = num_heads // num_kv_heads
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if not batch:
        return out
    query = _dense_rows(query)
    tiling = _tiling(group, head_dim, query.dtype)
    most_splits = _most_splits(block_tables.shape[1] * page_size, window)
    if num_programs is None:
        num_programs = _num_programs(batch * num_kv_heads, most_splits, query.device)
    factor, cap = base_2(scale, softcap)
    partials, state = out, None
    if num_programs > 1:
        partials = torch.empty(batch, num_heads, most_splits, head_dim, dtype=torch.float32, device=query.device)
        state = torch.empty(batch, num_heads, most_splits, 2, dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        paged_attention_kernel[(batch, num_kv_heads, num_programs)](
            query,
            addresses,
            block_tables,
            lengths,
            partials,
            state,
            query.stride(0),
            query.stride(1),
            block_tables.stride(0),
            most_splits,
            factor,
            cap,
            window,
            GROUP=group,
            HEAD_DIM=head_dim,
            PAGE_SIZE=page_size,
            **tiling,
            **EXACT,
        )
        if num_programs > 1:
            combine_splits_kernel[(batch * num_heads,)](
                partials,
                state,
                lengths,
                out,
                num_heads,
                most_splits,
                window,
                HEAD_DIM=head_dim,
                BLOCK_S=min(triton.next_power_of_2(most_splits), MERGED_AT_ONCE // tiling["BLOCK_D"]),
                BLOCK_D=tiling["BLOCK_D"],
                SPLIT=tiling["SPLIT"],
                num_warps=1,
                **EXACT,
            )
    return out
