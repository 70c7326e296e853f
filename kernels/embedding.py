"""Rows of an embedding, with a gradient that is added up in a fixed order.

torch's own gradient does not repeat: from 2.11 on it adds by atomics where few ids come many times (as in a small
vocabulary), and up to 3,072 tokens its kernel overwrites ids that other warps still read (pytorch #187687). It also makes a
gradient of the whole vocabulary, where this one adds to the rows that were looked up.

Tokens are sorted by id, in the order of their places. A *chunk* is `CHUNK` tokens of this order. An id's tokens may go on
over chunks; each chunk after the first gives one partial sum. The program of an id's first token adds up the tokens of its
own chunk and then the partial sums, in order.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from rto_fast.kernels.common import cdiv, rows_of

CHUNK, ROWS = 64, 8  # tokens; a step of a sum loads 8 of them
BLOCK_D = 512


@triton.jit
def _sum_of_chunk(
    dout_ptr,
    ids_ptr,
    order_ptr,
    stride_dout,
    first,
    end,
    id_,
    offs_d,
    mask_d,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sum of the rows of tokens `first` … `end` of the order that have the id."""
    total = tl.zeros((BLOCK_D,), tl.float32)
    while tl.load(ids_ptr + first, mask=first < end, other=-1) == id_:
        offs = first + tl.arange(0, ROWS)
        mask = tl.load(ids_ptr + offs, mask=offs < end, other=-1) == id_
        rows = tl.load(order_ptr + offs, mask=mask, other=0)
        at = dout_ptr + rows[:, None] * stride_dout + offs_d[None, :]
        total += tl.sum(tl.load(at, mask=mask[:, None] & mask_d[None, :], other=0.0).to(tl.float32), 0)
        first += ROWS
    return total


@triton.jit(do_not_specialize=["num_tokens"])
def embedding_partials_kernel(
    dout_ptr,
    ids_ptr,
    order_ptr,
    partials_ptr,
    num_tokens,
    num_cols,
    stride_dout,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of the tokens at the beginnings of chunks whose id goes on from the chunk before: partials [chunks, D]."""
    chunk = tl.program_id(0) + 1
    first = chunk * CHUNK
    id_ = tl.load(ids_ptr + first)
    if id_ == tl.load(ids_ptr + first - 1):
        offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = offs_d < num_cols
        end = tl.minimum(first + CHUNK, num_tokens)
        total = _sum_of_chunk(dout_ptr, ids_ptr, order_ptr, stride_dout, first, end, id_, offs_d, mask_d, ROWS, BLOCK_D)
        tl.store(partials_ptr + chunk.to(tl.int64) * num_cols + offs_d, total, mask=mask_d)


@triton.jit(do_not_specialize=["num_tokens", "padding_idx"])
def embedding_bwd_kernel(
    dout_ptr,
    ids_ptr,
    order_ptr,
    partials_ptr,
    out_ptr,
    num_tokens,
    num_cols,
    padding_idx,
    stride_dout,
    stride_out,
    ADD: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes the sum of an id's tokens to its row of `out`, or with ADD adds it there. The id's first token does it."""
    first = tl.program_id(0)
    id_ = tl.load(ids_ptr + first)
    before = tl.load(ids_ptr + first - 1, mask=first > 0, other=-1)
    if (id_ != before) & (id_ != padding_idx):
        offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = offs_d < num_cols
        chunk = first // CHUNK + 1
        end = tl.minimum(chunk * CHUNK, num_tokens)
        total = _sum_of_chunk(dout_ptr, ids_ptr, order_ptr, stride_dout, first, end, id_, offs_d, mask_d, ROWS, BLOCK_D)
        while tl.load(ids_ptr + chunk * CHUNK, mask=chunk * CHUNK < num_tokens, other=-1) == id_:
            total += tl.load(partials_ptr + chunk.to(tl.int64) * num_cols + offs_d, mask=mask_d, other=0.0)
            chunk += 1
        at = out_ptr + id_ * stride_out + offs_d
        if ADD:
            total += tl.load(at, mask=mask_d, other=0.0)
        tl.store(at, total.to(out_ptr.dtype.element_ty), mask=mask_d)


def _add_gradient(dout: Tensor, input_ids: Tensor, padding_idx: int, out: Tensor, add: bool) -> None:
    """Writes the sums of the rows of dout [T, D] to the rows of `out` [V, D] of their ids, or adds them there."""
    ids, order = input_ids.sort(stable=True)
    tokens, columns = dout.shape
    chunks = cdiv(tokens, CHUNK)
    partials = torch.empty(chunks, columns, dtype=torch.float32, device=dout.device)
    blocks, sizes = cdiv(columns, BLOCK_D), {"CHUNK": CHUNK, "ROWS": ROWS, "BLOCK_D": BLOCK_D}
    with torch.cuda.device_of(dout):
        if chunks > 1:
            embedding_partials_kernel[(chunks - 1, blocks)](
                dout, ids, order, partials, tokens, columns, dout.stride(0), **sizes
            )
        embedding_bwd_kernel[(tokens, blocks)](
            dout,
            ids,
            order,
            partials,
            out,
            tokens,
            columns,
            padding_idx,
            dout.stride(0),
            out.stride(0),
            ADD=add,
            **sizes,
        )


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_ids: Tensor, weight: Tensor, padding_idx: int) -> Tensor:
        ctx.save_for_backward(input_ids)
        # Not saved by autograd: gradient checkpointing would hand out a copy, which has no `main_grad`.
        ctx.weight, ctx.size, ctx.padding_idx = weight, weight.shape, padding_idx
        return F.embedding(input_ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[None, Tensor | None, None]:
        ids, dout = ctx.saved_tensors[0].reshape(-1), rows_of(dout)
        main_grad = getattr(ctx.weight, "main_grad", None)
        out = dout.new_zeros(ctx.size) if main_grad is None else main_grad
        if len(ids):
            _add_gradient(dout, ids, ctx.padding_idx, out, add=main_grad is not None)
        return None, out if main_grad is None else None, None


def embedding(input_ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
    """See `rto_fast.kernels.layer_reference.embedding`."""
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return F.embedding(input_ids, weight)
    return _Embedding.apply(input_ids, weight, -1 if padding_idx is None else padding_idx % len(weight))
