"""RMSNorm, with the residual sum before it: one kernel forward, two backward (one if the weight is frozen).

The forward pass rounds where transformers' modules round on a GPU, see `common.EXACT`:
- The mean is the sum times the float32 reciprocal of the size, as torch's CUDA kernel computes it.
- `tl.rsqrt` is rsqrt.approx, as CUDA's rsqrtf is.
The tile of a row, and so the order of its sum, follows from D alone: a row has the same bits in any batch, in decoding and
in training. The backward pass computes in float32 and rounds its results once.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rto_fast.kernels.common import EXACT, cdiv, rows_of
from rto_fast.kernels.weight_gradients import rows_per_program, sum_partials

TILE = 2048  # elements of a program's tile at least, so that small rows share the weight that a program loads


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    rstd_ptr,
    stride_x,
    stride_residual,
    num_rows,
    num_cols,
    reciprocal,
    eps,
    multiplier,
    UNIT_OFFSET: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Norm of residual + multiplier·x, or of `residual` if x is None."""
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    rows = offs_t.to(tl.int64)[:, None]
    mask_t = offs_t < num_rows
    mask_d = offs_d < num_cols
    mask = mask_t[:, None] & mask_d[None, :]
    z = tl.load(residual_ptr + rows * stride_residual + offs_d[None, :], mask=mask, other=0.0)
    # Arrives while the row is summed up.
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    if x_ptr is not None:
        x = tl.load(x_ptr + rows * stride_x + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        if multiplier is not None:
            x = (x * multiplier).to(z.dtype).to(tl.float32)
        z = (z.to(tl.float32) + x).to(z.dtype)
        tl.store(total_ptr + rows * num_cols + offs_d[None, :], z, mask=mask)
    wide = z.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, 1) * reciprocal + eps)
    normed = wide * rstd[:, None]
    out = normed * (1.0 + weight) if UNIT_OFFSET else normed.to(z.dtype).to(tl.float32) * weight
    tl.store(out_ptr + rows * num_cols + offs_d[None, :], out.to(z.dtype), mask=mask)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + offs_t, rstd, mask=mask_t)


@triton.jit(do_not_specialize=["num_rows", "rows_per_program"])
def rms_norm_bwd_kernel(
    dout_ptr,
    dtotal_ptr,
    total_ptr,
    weight_ptr,
    rstd_ptr,
    dresidual_ptr,
    dx_ptr,
    partials_ptr,
    stride_dout,
    stride_dtotal,
    stride_total,
    num_rows,
    rows_per_program,
    num_cols,
    reciprocal,
    multiplier,
    UNIT_OFFSET: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of the residual, of x if it has a multiplier, and the sum of the weight's gradient over a program's rows."""
    pid = tl.program_id(0)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < num_cols
    dweight = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    begin = pid * rows_per_program
    end = tl.minimum(begin + rows_per_program, num_rows)
    for start in range(begin, end, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        rows = offs_t.to(tl.int64)[:, None]
        mask_t = offs_t < end
        mask = mask_t[:, None] & mask_d[None, :]
        dout = tl.load(dout_ptr + rows * stride_dout + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        total = tl.load(total_ptr + rows * stride_total + offs_d[None, :], mask=mask, other=0.0)
        if dtotal_ptr is not None:  # is needed last, but loaded before the first is waited for
            dtotal = tl.load(dtotal_ptr + rows * stride_dtotal + offs_d[None, :], mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + offs_t, mask=mask_t, other=0.0)[:, None]
        # Again for each tile, from the L1 cache: in registers it would cost programs.
        weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
        normed = total.to(tl.float32) * rstd
        if partials_ptr is not None:
            dweight += dout * (normed if UNIT_OFFSET else normed.to(total.dtype).to(tl.float32))
        dnormed = dout * (1.0 + weight if UNIT_OFFSET else weight)
        mean = (tl.sum(dnormed * normed, 1) * reciprocal)[:, None]
        dz = (dnormed - normed * mean) * rstd
        if dtotal_ptr is not None:
            dz += dtotal.to(tl.float32)
        tl.store(dresidual_ptr + rows * num_cols + offs_d[None, :], dz.to(total.dtype), mask=mask)
        if dx_ptr is not None:
            tl.store(dx_ptr + rows * num_cols + offs_d[None, :], (dz * multiplier).to(total.dtype), mask=mask)
    if partials_ptr is not None:
        tl.store(partials_ptr + pid.to(tl.int64) * num_cols + offs_d, tl.sum(dweight, 0), mask=mask_d)


@cache
def _tile(num_cols: int, itemsize: int) -> dict[str, int]:
    """Block sizes and warps. Each thread has 32 bytes of a tile, two accesses of 128 bits, up to 16 warps."""
    block_d = triton.next_power_of_2(num_cols)
    block_t = min(max(TILE // block_d, 1), 32)
    num_warps = min(max(block_t * block_d * itemsize // 1024, 1), 16)
    return {"BLOCK_T": block_t, "BLOCK_D": block_d, "num_warps": num_warps}


def _forward(
    x: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    unit_offset: bool,
    multiplier: float | None,
    with_rstd: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(norm, sum, 1/√(mean square + eps) of each row); the sum is `residual` itself if x is None."""
    num_rows, num_cols = residual.shape
    out = torch.empty_like(residual, memory_format=torch.contiguous_format)
    total = residual if x is None else torch.empty_like(out)
    rstd = residual.new_empty(num_rows, dtype=torch.float32) if with_rstd else None
    if num_rows:
        tile = _tile(num_cols, residual.element_size())
        with torch.cuda.device_of(residual):
            rms_norm_kernel[(cdiv(num_rows, tile["BLOCK_T"]),)](
                x,
                residual,
                weight,
                out,
                None if x is None else total,
                rstd,
                num_cols if x is None else x.stride(0),
                residual.stride(0),
                num_rows,
                num_cols,
                1.0 / num_cols,
                eps,
                multiplier,
                UNIT_OFFSET=unit_offset,
                **tile,
                **EXACT,
            )
    return out, total, rstd


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor | None,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        unit_offset: bool,
        multiplier: float | None,
    ) -> Any:
        out, total, rstd = _forward(x, residual, weight, eps, unit_offset, multiplier, True)
        ctx.save_for_backward(total, rstd)
        # Not saved by autograd: gradient checkpointing would hand out a copy, which has no `main_grad`.
        ctx.weight, ctx.settings = weight, (unit_offset, multiplier)
        ctx.set_materialize_grads(False)
        return out if x is None else (out, total)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dtotal: Tensor | None = None) -> Any:
        total, rstd = ctx.saved_tensors
        unit_offset, multiplier = ctx.settings
        num_rows, num_cols = total.shape
        dout = torch.zeros_like(total) if dout is None else rows_of(dout)
        dtotal = dtotal if dtotal is None else rows_of(dtotal)
        dresidual = torch.empty_like(total, memory_format=torch.contiguous_format)
        dx = dresidual if multiplier is None else torch.empty_like(dresidual)
        tile = _tile(num_cols, total.element_size())
        rows = rows_per_program(num_rows, tile["BLOCK_T"])
        programs = cdiv(num_rows, rows)
        partials = None
        if ctx.needs_input_grad[2]:
            partials = total.new_empty((programs, 1, num_cols), dtype=torch.float32)
        if num_rows:
            with torch.cuda.device_of(total):
                rms_norm_bwd_kernel[(programs,)](
                    dout,
                    dtotal,
                    total,
                    ctx.weight,
                    rstd,
                    dresidual,
                    None if multiplier is None else dx,
                    partials,
                    dout.stride(0),
                    num_cols if dtotal is None else dtotal.stride(0),
                    total.stride(0),
                    num_rows,
                    rows,
                    num_cols,
                    1.0 / num_cols,
                    multiplier,
                    UNIT_OFFSET=unit_offset,
                    **tile,
                )
        dweight = None if partials is None else sum_partials(partials, [ctx.weight])[0]
        return dx if ctx.needs_input_grad[0] else None, dresidual, dweight, None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """See `rto_fast.layer_ops.rms_norm`."""
    rows, weight = rows_of(x), weight.contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out = _RMSNorm.apply(None, rows, weight, eps, unit_offset, None)
    else:
        out = _forward(None, rows, weight, eps, unit_offset, None, False)[0]
    return out if x.dim() == 2 else out.view(x.shape)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, unit_offset: bool = False, multiplier: float = 1.0
) -> tuple[Tensor, Tensor]:
    """See `rto_fast.layer_ops.add_rms_norm`."""
    settings = rows_of(x), rows_of(residual), weight.contiguous(), eps, unit_offset
    settings = *settings, None if multiplier == 1.0 else multiplier
    if torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad or weight.requires_grad):
        out, total = _RMSNorm.apply(*settings)
    else:
        out, total, _ = _forward(*settings, False)
    return (out, total) if x.dim() == 2 else (out.view(x.shape), total.view(x.shape))
