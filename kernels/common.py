"""What several kernels and their launchers share."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))
# The interpreter treats the bits of bfloat16 as integers. So there, and only there, operands of products are widened.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Launch options of kernels that must round as transformers' modules do, one operation after the other, or as each other.
# A product that is added to something is rounded first, unless it says tl.fma. The compiler would contract both into one
# fused multiply-add, even if the product is cast to 16 bits in between: it narrows the product to 16 bits, then contracts.
EXACT = {"enable_fp_fusion": False}


@triton.jit
def sum_row(partials_ptr, row, num_cols, BLOCK_N: tl.constexpr):
    """The sum of a row of the float32 matrix [..., num_cols], always in the same order."""
    offs_n = tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_N,), tl.float32)
    for done in range(0, num_cols, BLOCK_N):
        sums += tl.load(partials_ptr + row * num_cols + done + offs_n, mask=done + offs_n < num_cols, other=0.0)
    return tl.sum(sums)


@triton.jit
def ppo_terms(logp, old_logp, advantage, ratio_low, ratio_high, dual_clip):
    """(loss, dloss/dlogp, k3 estimate of KL, is clipped) of tokens. Uses selects, because min and max would drop NaN."""
    log_ratio = logp - old_logp
    is_clamped = (log_ratio > 20.0) | (log_ratio < -20.0)
    log_ratio = tl.where(is_clamped, tl.where(log_ratio > 0.0, 20.0, -20.0), log_ratio)
    ratio = tl.exp(log_ratio)
    loss = -advantage * ratio
    clipped_loss = -advantage * tl.where(ratio > ratio_high, ratio_high, tl.where(ratio < ratio_low, ratio_low, ratio))
    is_clipped = clipped_loss > loss
    dlogp = tl.where(is_clipped | is_clamped, 0.0, loss)  # d(-A·e^x)/dx is the unclipped loss itself
    loss = tl.where(is_clipped, clipped_loss, loss)
    if dual_clip is not None:
        is_bounded = (advantage < 0.0) & (loss > -dual_clip * advantage)
        loss = tl.where(is_bounded, -dual_clip * advantage, loss)
        dlogp = tl.where(is_bounded, 0.0, dlogp)
        is_clipped = is_clipped | is_bounded
    # e^x - 1 - x cancels where the policies are close, where KL matters most: there a Taylor series, exact to 1e-7.
    series = log_ratio * log_ratio * (0.5 + log_ratio * (1 / 6 + log_ratio * (1 / 24 + log_ratio * (1 / 120))))
    kl = tl.where(tl.abs(log_ratio) < 0.05, series, ratio - 1.0 - log_ratio)
    return loss, dlogp, kl, is_clipped.to(tl.float32)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. `triton.cdiv` takes microseconds on the host, because it looks for constexprs."""
    return -(-a // b)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x as rows [T, D] whose elements follow each other; copies only what strides cannot describe."""
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def contiguous(*tensors: torch.Tensor | None) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


def num_items_tensor(num_items: float | torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """A loss's denominator as a 0-d float32 tensor; a Python number gets there as a kernel argument, without a copy."""
    if num_items is None or isinstance(num_items, torch.Tensor):
        return None if num_items is None else num_items.to(device, torch.float32)
    return torch.full((), num_items, dtype=torch.float32, device=device)


def kept_rows(
    rows: torch.Tensor | None, values: torch.Tensor, ignored: int, hidden_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices, hidden states) of the rows whose value [T] is not `ignored`. Waits for the device if `rows` is None."""
    if rows is None:
        rows = (values != ignored).nonzero().squeeze(-1)
        if len(rows) == len(values):
            return rows, hidden_states
    # As many rows as tokens may hold one twice, where a batch is filled up.
    return rows, hidden_states.index_select(0, rows)


def equal_share(total: int, largest: int) -> int:
    """The length of the fewest equal parts of `total` that are at most `largest`, rounded up to a multiple of 128."""
    return triton.cdiv(triton.cdiv(total, triton.cdiv(total, largest)), 128) * 128


def autocast_operands(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
    """The operands of a linear layer, in autocast's dtype if autocast is on."""
    device_type = tensors[0].device.type
    if torch.is_autocast_enabled(device_type):
        return [t.to(torch.get_autocast_dtype(device_type)) for t in tensors]
    return tensors
