"""Gradients of norm weights: row kernels write partial sums of fixed blocks of rows, one kernel adds them in a fixed order.

So they do not depend on which program ran first, nor on the GPU. With a `main_grad` (see `rto_fast.layer_ops`) they are
added to it in float32, else rounded once to the weight's dtype.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rto_fast.kernels.common import cdiv

# 64 bytes of a row of partials a program, so that a hidden size of 1024 has 64 programs; 256 rows are loaded at once.
BLOCK_P, BLOCK_D = 256, 16


@triton.jit
def _store_sum(out_ptr, offs_d, mask_d, total, ADD: tl.constexpr):
    if out_ptr is not None:
        if ADD:
            total += tl.load(out_ptr + offs_d, mask=mask_d, other=0.0)
        tl.store(out_ptr + offs_d, total.to(out_ptr.dtype.element_ty), mask=mask_d)


@triton.jit(do_not_specialize=["num_partials"])
def sum_partials_kernel(
    partials_ptr,
    first_ptr,
    second_ptr,
    num_partials,
    num_cols,
    ADD_FIRST: tl.constexpr,
    ADD_SECOND: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds up partials [num_partials, 1 or 2, num_cols], into `first` and `second`."""
    pid_w = tl.program_id(1)
    offs_p = tl.arange(0, BLOCK_P)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < num_cols
    stride = tl.num_programs(1) * num_cols
    partials_ptr += pid_w * num_cols + offs_p.to(tl.int64)[:, None] * stride + offs_d[None, :]
    sums = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in range(0, num_partials, BLOCK_P):
        sums += tl.load(partials_ptr, mask=(start + offs_p < num_partials)[:, None] & mask_d[None, :], other=0.0)
        partials_ptr += BLOCK_P * stride
    total = tl.sum(sums, 0)
    if pid_w == 0:
        _store_sum(first_ptr, offs_d, mask_d, total, ADD_FIRST)
    else:
        _store_sum(second_ptr, offs_d, mask_d, total, ADD_SECOND)


def rows_per_program(num_rows: int, block_t: int) -> int:
    """Rows of which one partial sum is made: whole tiles of `block_t` rows, from the number of rows alone.

    Up to 32k rows there are at most 1,024 partials. They are 3 to 6 % of a backward pass's bytes from 16k rows on. At
    least 4 rows share one.
    """
    rows = min(max(cdiv(num_rows, 1024), 4), 32)
    return cdiv(rows, block_t) * block_t


def sum_partials(partials: Tensor, weights: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of one or two weights [D] from partials [P, len(weights), D].

    A gradient is None where the weight is, and where it was added to the weight's `main_grad`.
    """
    num_partials, num_weights, num_cols = partials.shape
    sums: list[Any] = [None, None]
    gradients: list[Tensor | None] = [None] * num_weights
    adds = [False, False]
    for i, weight in enumerate(weights):
        if weight is not None:
            sums[i] = getattr(weight, "main_grad", None)
            adds[i] = sums[i] is not None
            if not adds[i]:
                sums[i] = gradients[i] = torch.empty_like(weight, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(partials):
        sum_partials_kernel[(cdiv(num_cols, BLOCK_D), num_weights)](
            partials,
            *sums,
            num_partials,
            num_cols,
            ADD_FIRST=adds[0],
            ADD_SECOND=adds[1],
            BLOCK_P=BLOCK_P,
            BLOCK_D=BLOCK_D,
            num_warps=8,
        )
    return gradients
