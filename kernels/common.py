"""Shared by the log-prob kernels: the softmax state of a row of logits, and its gradient.

The state of a row is (m, s, u) with m = max z, t = (z - m)·log2(e)/temperature, s = Σ 2^t and u = Σ 2^t·t. It is in
base 2 because the hardware has ex2 and lg2. With u, entropy = ln s - u/s (base e) needs no second pass and does not
cancel as lse - E[z] does. `scale` is log2(e)/temperature, and `cap` is the softcap or None.
"""

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
# Below this 2^t is 0 in float32. t is clamped to it as a factor, because 0·t must not become 0·(-inf).
MIN_LOG2 = tl.constexpr(-200.0)
# Launch options of kernels that must round as transformers' modules do, one operation after the other. A product that is
# added to something is rounded first. The compiler would contract both into one fused multiply-add, even if the product
# is cast to 16 bits in between: it narrows the product to 16 bits, then contracts.
EXACT = {"enable_fp_fusion": False}


def row_block(num_cols: int, itemsize: int) -> tuple[int, int]:
    """(BLOCK_V, num_warps) for rows of elements of `itemsize` bytes; each thread loads 64 bytes, 4 times 128 bits.

    There are at most 8 warps. With 16, Triton 3.6 spills registers, and an SM holds fewer threads.
    """
    block_v = min(max(triton.next_power_of_2(num_cols), 128), 16384 // itemsize)
    return block_v, max(1, block_v * itemsize // 2048)


@triton.jit
def load_logits(x_ptr, bias_ptr, offs_v, num_cols, cap, MASKED: tl.constexpr):
    """(logits of one tile in float32, -inf past the end; their derivative with respect to what was loaded)."""
    mask_v = offs_v < num_cols
    if MASKED:
        z = tl.load(x_ptr + offs_v, mask=mask_v, other=float("-inf")).to(tl.float32)
    else:
        z = tl.load(x_ptr + offs_v).to(tl.float32)
    if bias_ptr is not None:
        if MASKED:
            z += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
        else:
            z += tl.load(bias_ptr + offs_v).to(tl.float32)
    derivative = 1.0
    if cap is not None:
        # tanh from ex2: absolute error 1e-7, where tanh.approx has 5e-4. e^2x overflows to inf and gives 1.
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(z * (2.0 * LOG2E / cap)))
        derivative = 1.0 - tanh * tanh
        z = cap * tanh
        if MASKED:
            z = tl.where(mask_v, z, float("-inf"))
    return z, derivative


@triton.jit
def fold_tile(z, m, s, u, scale, WITH_ENTROPY: tl.constexpr):
    new_m = tl.maximum(m, tl.max(z, 0))
    # While all is -inf, measure from 0: -inf - -inf would be NaN. A NaN logit reaches s through t, while max drops it.
    origin = tl.where(new_m == float("-inf"), 0.0, new_m)
    t = (z - origin) * scale
    exp = tl.exp2(t)
    shift = (m - origin) * scale
    rescale = tl.exp2(shift)
    if WITH_ENTROPY:
        u = rescale * (u + tl.maximum(shift, MIN_LOG2) * s) + tl.sum(exp * tl.maximum(t, MIN_LOG2), 0)
    s = rescale * s + tl.sum(exp, 0)
    return new_m, s, u


@triton.jit
def fold_row(x_ptr, bias_ptr, begin, end, scale, cap, WITH_ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr):
    """The state of columns [begin, end). Whole tiles have no mask, because its selects cost an instruction a word."""
    m = float("-inf")
    s = 0.0
    u = 0.0
    offs_v = tl.arange(0, BLOCK_V)
    tail = begin + (end - begin) // BLOCK_V * BLOCK_V
    for start in range(begin, tail, BLOCK_V):
        z, _ = load_logits(x_ptr, bias_ptr, start + offs_v, end, cap, False)
        m, s, u = fold_tile(z, m, s, u, scale, WITH_ENTROPY)
    if tail < end:
        z, _ = load_logits(x_ptr, bias_ptr, tail + offs_v, end, cap, True)
        m, s, u = fold_tile(z, m, s, u, scale, WITH_ENTROPY)
    return m, s, u


@triton.jit
def finish_row(z_label, m, s, u, scale):
    """(logp, entropy, log2 s). z - m is taken first, because near p = 1 the difference with lse would cancel."""
    log2_s = tl.log2(s)
    return ((z_label - m) * scale - log2_s) * LN2, (log2_s - u / s) * LN2, log2_s


@triton.jit
def logits_gradient(
    z, derivative, offs_v, label, m, log2_s, entropy, dlogp, dentropy, scale, WITH_ENTROPY: tl.constexpr
):
    """Gradient of dlogp·logp[label] + dentropy·entropy in one tile of logits; 1 - p is taken in float32."""
    log2_p = (z - m) * scale - log2_s
    p = tl.exp2(log2_p)
    gradient = dlogp * (tl.where(offs_v == label, 1.0, 0.0) - p)
    if WITH_ENTROPY:
        gradient -= dentropy * p * (tl.maximum(log2_p, MIN_LOG2) * LN2 + entropy)
    return gradient * (scale * LN2) * derivative


@triton.jit
def _write_gradient_tile(
    x_ptr,
    dx_ptr,
    bias_ptr,
    offs_v,
    end,
    label,
    m,
    log2_s,
    entropy,
    dlogp,
    dentropy,
    scale,
    cap,
    WITH_ENTROPY: tl.constexpr,
    MASKED: tl.constexpr,
):
    z, derivative = load_logits(x_ptr, bias_ptr, offs_v, end, cap, MASKED)
    dz = logits_gradient(z, derivative, offs_v, label, m, log2_s, entropy, dlogp, dentropy, scale, WITH_ENTROPY)
    if x_ptr.dtype != dx_ptr.dtype:
        tl.debug_barrier()  # gradients may overwrite their own tile's logits (see gradient_view): read all first
    if MASKED:
        tl.store(dx_ptr + offs_v, dz.to(dx_ptr.dtype.element_ty), mask=offs_v < end)
    else:
        tl.store(dx_ptr + offs_v, dz.to(dx_ptr.dtype.element_ty))


@triton.jit
def write_gradient(
    x_ptr,
    dx_ptr,
    bias_ptr,
    begin,
    end,
    label,
    m,
    log2_s,
    entropy,
    dlogp,
    dentropy,
    scale,
    cap,
    WITH_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Writes the gradient of columns [begin, end) of a row, last tile first, since that is still in L2. All NaN if m is."""
    offs_v = tl.arange(0, BLOCK_V)
    tail = begin + (end - begin) // BLOCK_V * BLOCK_V
    if (dlogp == 0.0) & (dentropy == 0.0) & (m == m):
        zeros = tl.zeros((BLOCK_V,), dx_ptr.dtype.element_ty)
        for start in range(begin, tail, BLOCK_V):
            tl.store(dx_ptr + start + offs_v, zeros)
        tl.store(dx_ptr + tail + offs_v, zeros, mask=tail + offs_v < end)
    else:
        if tail < end:
            _write_gradient_tile(
                x_ptr,
                dx_ptr,
                bias_ptr,
                tail + offs_v,
                end,
                label,
                m,
                log2_s,
                entropy,
                dlogp,
                dentropy,
                scale,
                cap,
                WITH_ENTROPY,
                True,
            )
        for done in range(0, tail - begin, BLOCK_V):
            _write_gradient_tile(
                x_ptr,
                dx_ptr,
                bias_ptr,
                tail - BLOCK_V - done + offs_v,
                end,
                label,
                m,
                log2_s,
                entropy,
                dlogp,
                dentropy,
                scale,
                cap,
                WITH_ENTROPY,
                False,
            )


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


def logits_buffer(num_rows: int, num_cols: int, like: torch.Tensor) -> torch.Tensor:
    """Uninitialised float32 logits [rows, columns]; columns are padded, so that every row is aligned to 128 bits."""
    return torch.empty(num_rows, triton.cdiv(num_cols, 128) * 128, dtype=torch.float32, device=like.device)


def gradient_view(buffer: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The part of a logits_buffer to which `write_gradient` writes the gradients.

    16-bit gradients take the upper half of their own row. Tiles are written from the last to the first: the gradients
    of columns [i, j) overwrite the logits of columns [(W + i)/2, (W + j)/2) of W, which are at or above i, so already
    read.
    """
    return buffer if dtype == torch.float32 else buffer.view(dtype)[:, buffer.shape[1] :]


def autocast_operands(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
    """The operands of a linear layer, in autocast's dtype if autocast is on."""
    device_type = tensors[0].device.type
    if torch.is_autocast_enabled(device_type):
        return [t.to(torch.get_autocast_dtype(device_type)) for t in tensors]
    return tensors
