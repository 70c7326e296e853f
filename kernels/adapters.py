"""LoRA beside the GEMM of its base: y = round(base + Σ_r t_r·b_r) with t = round(scale · (x @ aᵀ)).

The base comes in float32, so that the sum is rounded once. A small update would vanish in the second rounding of a sum of
16-bit numbers, as it would in merged 16-bit weights.

The bits of a row depend on that row alone: x @ aᵀ is cut into splits of K, whose length follows from K alone. Each is summed
up in order, and so are the splits. With many rows one program walks all splits of its rows. With few rows, as in decoding,
each split has a program of its own, and the second kernel adds the splits up: t has few columns, so one program that reads
all of K would take ten times as long as the rest.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rto_fast.kernels.common import EXACT, INTERPRETED, cdiv
from rto_fast.kernels.layer_reference import AdapterInput, AdapterOutput

MAX_SPLITS, SPLIT_MULTIPLE = 8, 128  # the bits of t depend on both
WHOLE_PROGRAMS = 64  # if there are so many tiles of t, a program walks all splits of one
MAX_SPANS = 3  # of columns in one launch


@triton.jit(do_not_specialize=["num_rows"])
def adapter_input_kernel(
    x_ptr,
    a_ptr,
    out_ptr,
    num_rows,
    num_ranks,
    size,
    split,
    stride_x,
    stride_part,
    stride_out,
    scale,
    IN_PARTS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Writes scale · (x @ aᵀ), or with IN_PARTS the product of one split of K, without the scale, in float32."""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    # What lies past the end is read from the last row instead, and not written: no masks in the loop.
    x_ptrs = x_ptr + tl.minimum(offs_t, num_rows - 1)[:, None] * stride_x + offs_k[None, :]
    a_ptrs = a_ptr + tl.minimum(offs_r, num_ranks - 1)[:, None] * size + offs_k[None, :]
    begin = 0
    end = size
    if IN_PARTS:
        begin = tl.program_id(2) * split
        end = tl.minimum(begin + split, size)
    total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(begin, end, split):
        part = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        stop = tl.minimum(start + split, end)
        for k in range(start, stop, BLOCK_K):
            if EVEN_K:
                x = tl.load(x_ptrs + k)
                a = tl.load(a_ptrs + k)
            else:
                mask_k = offs_k[None, :] < stop - k
                x = tl.load(x_ptrs + k, mask=mask_k, other=0.0)
                a = tl.load(a_ptrs + k, mask=mask_k, other=0.0)
            if INTERPRETED:
                x = x.to(tl.float32)
                a = a.to(tl.float32)
            part = tl.dot(x, tl.trans(a), part, input_precision="ieee")
        total += part
    out_ptr += offs_t[:, None] * stride_out + offs_r[None, :]
    mask = (offs_t < num_rows)[:, None] & (offs_r < num_ranks)[None, :]
    if IN_PARTS:
        tl.store(out_ptr + tl.program_id(2) * stride_part, total, mask=mask)
    else:
        tl.store(out_ptr, (scale * total).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _of_span(tile, tiles_0, tiles_1, value_0, value_1, value_2):
    return tl.where(tile < tiles_0, value_0, tl.where(tile < tiles_1, value_1, value_2))


@triton.jit(do_not_specialize=["num_rows", "tiles_0", "tiles_1"])
def adapter_output_kernel(
    base_ptr,
    t_ptr,
    out_ptr,
    b_ptr_0,
    b_ptr_1,
    b_ptr_2,
    num_rows,
    tiles_0,
    tiles_1,
    column_0,
    column_1,
    column_2,
    column_3,
    rank_0,
    rank_1,
    rank_2,
    first_0,
    first_1,
    first_2,
    scale_0,
    scale_1,
    scale_2,
    stride_base,
    stride_part,
    stride_t,
    stride_out,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Rounds base + t @ bᵀ in up to three spans of columns, each with a b of its own or none (rank 0).

    Args:
        tiles_0, tiles_1: the first tile of columns of the second and of the third span.
        column_0 to column_3: bounds of the spans.
        first_0 to first_2: the first column of t that belongs to a span.
        PARTS: the number of splits if t is [PARTS, rows, ranks], of products without their scale; 0: t is ready.
    """
    tile = tl.program_id(0)
    offs_t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_r = tl.arange(0, BLOCK_R)
    b_ptr = _of_span(tile, tiles_0, tiles_1, b_ptr_0, b_ptr_1, b_ptr_2)
    rank = _of_span(tile, tiles_0, tiles_1, rank_0, rank_1, rank_2)
    first = _of_span(tile, tiles_0, tiles_1, first_0, first_1, first_2)
    begin = _of_span(tile, tiles_0, tiles_1, column_0, column_1, column_2)
    end = _of_span(tile, tiles_0, tiles_1, column_1, column_2, column_3)
    # Counted from the span's beginning: columns are rows of b.
    offs_n = (tile - _of_span(tile, tiles_0, tiles_1, 0, tiles_0, tiles_1)) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_t = offs_t < num_rows
    mask_n = offs_n < end - begin
    mask = mask_t[:, None] & mask_n[None, :]
    total = tl.load(base_ptr + offs_t[:, None] * stride_base + (begin + offs_n)[None, :], mask=mask, other=0.0)
    for r in range(0, rank, BLOCK_R):
        mask_r = offs_r < rank - r
        t_ptrs = t_ptr + offs_t[:, None] * stride_t + (first + r + offs_r)[None, :]
        mask_tr = mask_t[:, None] & mask_r[None, :]
        b = tl.load(b_ptr + offs_n[:, None] * rank + (r + offs_r)[None, :], mask=mask_n[:, None] & mask_r, other=0.0)
        if PARTS:
            t = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
            for part in tl.static_range(PARTS):
                t += tl.load(t_ptrs + part * stride_part, mask=mask_tr, other=0.0)
            t = (_of_span(tile, tiles_0, tiles_1, scale_0, scale_1, scale_2) * t).to(b_ptr_0.dtype.element_ty)
        else:
            t = tl.load(t_ptrs, mask=mask_tr, other=0.0)
        if INTERPRETED:
            t = t.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(t, tl.trans(b), total, input_precision="ieee")
    out_ptr += offs_t[:, None] * stride_out + (begin + offs_n)[None, :]
    tl.store(out_ptr, total.to(out_ptr.dtype.element_ty), mask=mask)


def split_of(size: int) -> int:
    """Elements of K in a split of x @ aᵀ."""
    return cdiv(cdiv(size, MAX_SPLITS), SPLIT_MULTIPLE) * SPLIT_MULTIPLE


def _power_of_two(ranks: int) -> int:
    return min(max(triton.next_power_of_2(ranks), 16), 64)


def _input_tile(num_rows: int, num_ranks: int, itemsize: int) -> dict[str, Any]:
    """Rows in as large tiles as leave enough programs. Float32 products do not run on tensor cores: smaller tiles."""
    if itemsize > 2:
        return {"BLOCK_T": 16, "BLOCK_R": min(_power_of_two(num_ranks), 32), "BLOCK_K": 32, "num_stages": 2}
    block_t = 16 if num_rows <= 2048 else 32 if num_rows <= 8192 else 64
    # By itself ptxas would spill in small tiles, to make room for programs that shared memory has no room for.
    options = {"num_stages": 3, "maxnreg": 255 if block_t == 16 else None}
    return {"BLOCK_T": block_t, "BLOCK_R": _power_of_two(num_ranks), "BLOCK_K": 128, **options}


def _output_tile(num_rows: int, rank: int, itemsize: int) -> dict[str, int]:
    if itemsize > 2:
        return {"BLOCK_T": 16, "BLOCK_N": 64, "BLOCK_R": 16}
    block_t, block_n = (16, 64) if num_rows <= 16 else (32, 64) if num_rows <= 256 else (64, 128)
    return {"BLOCK_T": block_t, "BLOCK_N": block_n, "BLOCK_R": _power_of_two(rank)}


def adapter_input(x: Tensor, runs: Sequence[AdapterInput], keeps: bool) -> Tensor:
    """See `rto_fast.kernels.layer_reference.adapter_input`.

    Without `keeps`, the result may be [splits, T, ΣR] float32: products that are neither added up nor scaled.
    """
    num_rows, size = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    num_ranks = runs[-1].ranks.stop
    split = split_of(size)
    tile = _input_tile(num_rows, max(run.a.shape[0] for run in runs), x.element_size())
    row_tiles = cdiv(num_rows, tile["BLOCK_T"])
    in_parts = not keeps and size > split and row_tiles < WHOLE_PROGRAMS
    parts = cdiv(size, split) if in_parts else 1
    t = x.new_empty((parts, num_rows, num_ranks), dtype=torch.float32 if in_parts else x.dtype)
    with torch.cuda.device_of(x):
        for ranks, a, scale in runs if num_rows else ():
            a = a.contiguous()
            adapter_input_kernel[(row_tiles, cdiv(a.shape[0], tile["BLOCK_R"]), parts)](
                x,
                a,
                t[:, :, ranks],
                num_rows,
                a.shape[0],
                size,
                split,
                x.stride(0),
                t.stride(0),
                num_ranks,
                float(scale),
                IN_PARTS=in_parts,
                EVEN_K=size % tile["BLOCK_K"] == 0,
                num_warps=4,
                **tile,
                **EXACT,
            )
    return t if in_parts else t[0]


class _Span(NamedTuple):
    """Neighbouring columns, with an adapter or without."""

    begin: int
    end: int
    adapter: AdapterOutput | None


def _rounds(adapters: Sequence[AdapterOutput], num_cols: int) -> list[list[_Span]]:
    """All columns as spans, as often as there are adapters of the same columns: these are added one after another."""
    rounds: list[list[_Span]] = []
    end = num_cols
    for adapter in adapters:
        if adapter.columns.start < end:
            rounds.append([])
            end = 0
        if adapter.columns.start > end:
            rounds[-1].append(_Span(end, adapter.columns.start, None))
        end = adapter.columns.stop
        rounds[-1].append(_Span(adapter.columns.start, end, adapter))
    for spans in rounds:
        if spans[-1].end < num_cols:
            spans.append(_Span(spans[-1].end, num_cols, None))
    return rounds


def add_adapters(base: Tensor, t: Tensor, adapters: Sequence[AdapterOutput], out: Tensor) -> None:
    """See `rto_fast.kernels.layer_reference.add_adapters`."""
    num_rows, num_cols = base.shape
    if not num_rows:
        return
    rounds = _rounds(adapters, num_cols)
    tile = _output_tile(num_rows, max(adapter.b.shape[1] for adapter in adapters), adapters[0].b.element_size())
    with torch.cuda.device_of(base):
        for number, spans in enumerate(rounds):
            target = out if number == len(rounds) - 1 else base
            for first in range(0, len(spans), MAX_SPANS):
                _add_spans(base, t, adapters[0].b, spans[first : first + MAX_SPANS], target, tile)


def _add_spans(
    base: Tensor, t: Tensor, like: Tensor, spans: Sequence[_Span], out: Tensor, tile: dict[str, int]
) -> None:
    """One launch. `like` is any b: a span without an adapter reads nothing of it."""
    bs, ranks, firsts, scales, tiles, columns = [], [], [], [], [0], [spans[0].begin]
    for span in [*spans, *[_Span(spans[-1].end, spans[-1].end, None)] * (MAX_SPANS - len(spans))]:
        adapter = span.adapter
        bs.append(like if adapter is None else adapter.b.contiguous())
        ranks.append(0 if adapter is None else adapter.b.shape[1])
        firsts.append(0 if adapter is None else adapter.ranks.start)
        scales.append(0.0 if adapter is None else float(adapter.scale))
        columns.append(span.end)
        tiles.append(tiles[-1] + cdiv(span.end - span.begin, tile["BLOCK_N"]))
    is_in_parts = t.dim() == 3
    adapter_output_kernel[(tiles[-1], cdiv(base.shape[0], tile["BLOCK_T"]))](
        base,
        t,
        out,
        *bs,
        base.shape[0],
        *tiles[1:-1],
        *columns,
        *ranks,
        *firsts,
        *scales,
        base.stride(0),
        t.stride(0) if is_in_parts else 0,
        t.shape[-1],
        out.stride(0),
        PARTS=t.shape[0] if is_in_parts else 0,
        num_warps=4,
        num_stages=1 if is_in_parts else 2,  # else copies of all parts would fill the shared memory
        **tile,
        **EXACT,
    )
