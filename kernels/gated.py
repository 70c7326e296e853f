"""Gated activation: one kernel forward, one backward, which computes the activation anew from `gate_up`.

SiLU and the tanh form of GELU are both x·σ(s): s is x for SiLU and 2·√(2/π)·(x + 0.044715·x³) for GELU, because
(1 + tanh(s/2))/2 = σ(s). That does not cancel for negative x, as 1 + tanh does. The activation is rounded before its product
with `up`, as in transformers' modules.
"""

import math
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rto_fast.kernels.common import EXACT, LOG2E, cdiv, rows_of

CUBIC = tl.constexpr(0.044715)
SLOPE = tl.constexpr(2.0 * math.sqrt(2.0 / math.pi))
SQRT_HALF = tl.constexpr(math.sqrt(0.5))
INV_SQRT_2PI = tl.constexpr(1.0 / math.sqrt(2.0 * math.pi))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """(activation of x, its derivative), float32."""
    if ACTIVATION == "gelu":
        probability = 0.5 * (1.0 + tl.erf(x * SQRT_HALF))
        density = INV_SQRT_2PI * tl.exp2(x * x * (-0.5 * LOG2E))
        return x * probability, probability + x * density
    else:
        s = x
        slope = 1.0
        if ACTIVATION == "gelu_tanh":
            s = SLOPE * (x + CUBIC * (x * x * x))
            slope = SLOPE * (1.0 + 3.0 * CUBIC * (x * x))
        exp = tl.exp2(s * -LOG2E)
        sigmoid = tl.div_rn(1.0, 1.0 + exp)
        complement = tl.where(sigmoid == 0.0, 1.0, exp * sigmoid)  # 1 − σ without its cancellation; ∞·0 would be NaN
        return tl.div_rn(x, 1.0 + exp), sigmoid + x * (complement * sigmoid) * slope


@triton.jit
def gated_kernel(gate_up_ptr, out_ptr, stride_gate_up, num_cols, ACTIVATION: tl.constexpr, BLOCK_I: tl.constexpr):
    pid_t = tl.program_id(0).to(tl.int64)
    offs_i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask_i = offs_i < num_cols
    gate_up_ptr += pid_t * stride_gate_up
    gate = tl.load(gate_up_ptr + offs_i, mask=mask_i, other=0.0)
    up = tl.load(gate_up_ptr + num_cols + offs_i, mask=mask_i, other=0.0)
    activation, _ = activate(gate.to(tl.float32), ACTIVATION)
    out = activation.to(gate.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + pid_t * num_cols + offs_i, out.to(gate.dtype), mask=mask_i)


@triton.jit
def gated_bwd_kernel(
    dout_ptr,
    gate_up_ptr,
    dgate_up_ptr,
    stride_dout,
    stride_gate_up,
    num_cols,
    ACTIVATION: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    pid_t = tl.program_id(0).to(tl.int64)
    offs_i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask_i = offs_i < num_cols
    gate_up_ptr += pid_t * stride_gate_up
    dout = tl.load(dout_ptr + pid_t * stride_dout + offs_i, mask=mask_i, other=0.0).to(tl.float32)
    gate = tl.load(gate_up_ptr + offs_i, mask=mask_i, other=0.0)
    up = tl.load(gate_up_ptr + num_cols + offs_i, mask=mask_i, other=0.0).to(tl.float32)
    activation, derivative = activate(gate.to(tl.float32), ACTIVATION)
    dup = dout * activation.to(gate.dtype).to(tl.float32)
    dgate_up_ptr += pid_t * (2 * num_cols)
    tl.store(dgate_up_ptr + offs_i, (dout * up * derivative).to(gate.dtype), mask=mask_i)
    tl.store(dgate_up_ptr + num_cols + offs_i, dup.to(gate.dtype), mask=mask_i)


@cache
def _tile(num_cols: int, itemsize: int) -> dict[str, Any]:
    """Block size and warps: each thread reads 128 bits of the gate and as many of `up`."""
    block_i = min(triton.next_power_of_2(num_cols), 1024)
    return {"BLOCK_I": block_i, "num_warps": max(block_i * itemsize // 512, 1)}


def _forward(gate_up: Tensor, activation: str) -> Tensor:
    num_rows, num_cols = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((num_rows, num_cols))
    if num_rows:
        tile = _tile(num_cols, gate_up.element_size())
        with torch.cuda.device_of(gate_up):
            gated_kernel[(num_rows, cdiv(num_cols, tile["BLOCK_I"]))](
                gate_up, out, gate_up.stride(0), num_cols, ACTIVATION=activation, **tile, **EXACT
            )
    return out


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        return _forward(gate_up, activation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        dout = rows_of(dout)
        num_rows, num_cols = dout.shape
        dgate_up = gate_up.new_empty((num_rows, 2 * num_cols))
        if num_rows:
            tile = _tile(num_cols, gate_up.element_size())
            with torch.cuda.device_of(gate_up):
                gated_bwd_kernel[(num_rows, cdiv(num_cols, tile["BLOCK_I"]))](
                    dout,
                    gate_up,
                    dgate_up,
                    dout.stride(0),
                    gate_up.stride(0),
                    num_cols,
                    ACTIVATION=ctx.activation,
                    **tile,
                    **EXACT,
                )
        return dgate_up, None


def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    """See `rto_fast.layer_ops.gated_activation`."""
    rows = rows_of(gate_up)
    needs_gradient = gate_up.requires_grad and torch.is_grad_enabled()
    out = _GatedActivation.apply(rows, activation) if needs_gradient else _forward(rows, activation)
    return out if gate_up.dim() == 2 else out.view(*gate_up.shape[:-1], -1)
