"""Log-probabilities and entropies of labels from logits, in one read of the logits.

The kernels are bound by memory: the forward pass reads 2TV bytes (bf16), the backward pass reads and writes them. One
program owns a row, so that its state stays in registers. If there are too few rows to keep the GPU busy, a row is split
over several programs, and a second launch adds up their states in a fixed order.

A label outside of its row is not read, and finding one beforehand would take a host sync. Its log-prob is NaN, and so
is the row's maximum in the state that the backward pass takes, which makes the gradient NaN.

Rows whose length is not a multiple of 16 bytes (GPT-2's 50257 columns) are loaded element by element. That takes 9.3
instead of 8.7 instructions an element in the forward pass and 17 instead of 11 in the backward pass (sm_90), where an
H200's HBM leaves time for 14 and 27. So no head of the row is split off to align the rest. The linear ops pad their
buffers.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rto_fast.kernels.common import EXACT, LOG2E
from rto_fast.kernels.row_softmax import finish_row, fold_row, load_label, merge_states, row_block, write_gradient

# Each of 132 SMs holds 8 programs of 4 warps, or 4 of 8 (64 registers). Twice as many keep the loss of the last wave
# small.
MIN_PROGRAMS = 2048
# The most elements of a forward tile: 4 warps for 16-bit logits, 8 for float32. On an H200, 8192 rows of bfloat16
# logits of Llama-3-8B, Qwen3-0.6B and Gemma3-270M take .491, .587 and .966 ms so, and .526, .616 and 1.021 ms with
# twice of both.
FORWARD_BLOCK = 4096


@triton.jit(do_not_specialize=["rows_per_batch", "num_tokens"])
def token_logps_fwd_kernel(
    x_ptr,
    bias_ptr,
    labels_ptr,
    rows_ptr,
    logps_ptr,
    entropy_ptr,
    state_ptr,
    stride_x_b,
    stride_x_t,
    rows_per_batch,
    num_tokens,
    num_cols,
    scale,
    cap,
    ignore_index,
    WITH_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Row i of x holds the logits of token `rows[i]`, or of token i without rows."""
    pid_t = tl.program_id(0).to(tl.int64)
    token = pid_t
    if rows_ptr is not None:
        token = tl.load(rows_ptr + pid_t)
    label = tl.load(labels_ptr + token)
    logp = 0.0
    entropy = 0.0
    m = 0.0
    log2_s = 0.0
    if label != ignore_index:
        x_ptr += pid_t // rows_per_batch * stride_x_b + pid_t % rows_per_batch * stride_x_t
        z_label, is_label = load_label(x_ptr, bias_ptr, label, num_cols, cap)
        m, s, u = fold_row(x_ptr, bias_ptr, 0, num_cols, scale, cap, WITH_ENTROPY, BLOCK_V)
        logp, entropy, log2_s = finish_row(z_label, m, s, u, scale)
        m = tl.where(is_label, m, float("nan"))
    tl.store(logps_ptr + token, logp)
    tl.store(state_ptr + token, m)
    tl.store(state_ptr + num_tokens + token, log2_s)
    if WITH_ENTROPY:
        tl.store(entropy_ptr + token, entropy)


@triton.jit(do_not_specialize=["rows_per_batch", "num_rows"])
def partial_state_kernel(
    x_ptr,
    labels_ptr,
    partials_ptr,
    stride_x_b,
    stride_x_t,
    rows_per_batch,
    num_rows,
    num_cols,
    split_cols,
    scale,
    ignore_index,
    WITH_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Stores the state (m, s, u) of one split of a row's columns in partials [splits, 3, R]."""
    pid_t = tl.program_id(0).to(tl.int64)
    pid_s = tl.program_id(1)
    if tl.load(labels_ptr + pid_t) != ignore_index:
        x_ptr += pid_t // rows_per_batch * stride_x_b + pid_t % rows_per_batch * stride_x_t
        begin = pid_s * split_cols
        m, s, u = fold_row(
            x_ptr, None, begin, tl.minimum(begin + split_cols, num_cols), scale, None, WITH_ENTROPY, BLOCK_V
        )
        partials_ptr += pid_s.to(tl.int64) * 3 * num_rows + pid_t
        tl.store(partials_ptr, m)
        tl.store(partials_ptr + num_rows, s)
        tl.store(partials_ptr + 2 * num_rows, u)


@triton.jit(do_not_specialize=["rows_per_batch", "num_rows", "num_splits"])
def combine_states_kernel(
    x_ptr,
    labels_ptr,
    partials_ptr,
    logps_ptr,
    entropy_ptr,
    state_ptr,
    stride_x_b,
    stride_x_t,
    rows_per_batch,
    num_rows,
    num_cols,
    num_splits,
    scale,
    ignore_index,
    WITH_ENTROPY: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Adds up the states of the splits of BLOCK_T rows in order."""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < num_rows
    label = tl.load(labels_ptr + offs_t, mask=mask_t, other=ignore_index)
    valid = mask_t & (label != ignore_index)
    is_label = valid & (label >= 0) & (label < num_cols)
    x_ptr += offs_t // rows_per_batch * stride_x_b + offs_t % rows_per_batch * stride_x_t
    z_label = tl.load(x_ptr + label, mask=is_label, other=float("nan")).to(tl.float32)
    m = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    s = tl.zeros((BLOCK_T,), tl.float32)
    u = tl.zeros((BLOCK_T,), tl.float32)
    partials_ptr += offs_t
    for _ in range(num_splits):
        split_m = tl.load(partials_ptr, mask=valid, other=0.0)
        split_s = tl.load(partials_ptr + num_rows, mask=valid, other=1.0)
        split_u = tl.load(partials_ptr + 2 * num_rows, mask=valid, other=0.0)
        m, s, u = merge_states(m, s, u, split_m, split_s, split_u, scale, WITH_ENTROPY)
        partials_ptr += 3 * num_rows
    logp, entropy, log2_s = finish_row(z_label, m, s, u, scale)
    m = tl.where(is_label, m, float("nan"))
    tl.store(logps_ptr + offs_t, tl.where(valid, logp, 0.0), mask=mask_t)
    tl.store(state_ptr + offs_t, tl.where(valid, m, 0.0), mask=mask_t)
    tl.store(state_ptr + num_rows + offs_t, tl.where(valid, log2_s, 0.0), mask=mask_t)
    if WITH_ENTROPY:
        tl.store(entropy_ptr + offs_t, tl.where(valid, entropy, 0.0), mask=mask_t)


@triton.jit(do_not_specialize=["rows_per_batch", "num_rows"])
def token_logps_bwd_kernel(
    x_ptr,
    dx_ptr,
    labels_ptr,
    state_ptr,
    entropy_ptr,
    dlogps_ptr,
    dentropy_ptr,
    stride_x_b,
    stride_x_t,
    stride_dx_b,
    stride_dx_t,
    rows_per_batch,
    num_rows,
    num_cols,
    split_cols,
    scale,
    ignore_index,
    BLOCK_V: tl.constexpr,
):
    """dx may be x: every element is written by the thread that read it."""
    pid_t = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + pid_t)
    dlogp = tl.where(label == ignore_index, 0.0, tl.load(dlogps_ptr + pid_t))
    m = tl.load(state_ptr + pid_t)
    log2_s = tl.load(state_ptr + num_rows + pid_t)
    entropy = 0.0
    dentropy = 0.0
    if dentropy_ptr is not None:
        entropy = tl.load(entropy_ptr + pid_t)
        dentropy = tl.where(label == ignore_index, 0.0, tl.load(dentropy_ptr + pid_t))
    x_ptr += pid_t // rows_per_batch * stride_x_b + pid_t % rows_per_batch * stride_x_t
    dx_ptr += pid_t // rows_per_batch * stride_dx_b + pid_t % rows_per_batch * stride_dx_t
    begin = tl.program_id(1) * split_cols
    write_gradient(
        x_ptr,
        dx_ptr,
        None,
        begin,
        tl.minimum(begin + split_cols, num_cols),
        label.to(tl.int32),
        m,
        log2_s,
        entropy,
        dlogp,
        dentropy,
        scale,
        None,
        dentropy_ptr is not None,
        BLOCK_V,
    )


def _splits(num_rows: int, num_cols: int, block_v: int) -> tuple[int, int]:
    """(number of splits of a row, columns of each); a split consists of whole tiles."""
    wanted = max(1, MIN_PROGRAMS // num_rows)
    split_cols = triton.cdiv(triton.cdiv(num_cols, wanted), block_v) * block_v
    return triton.cdiv(num_cols, split_cols), split_cols


@torch.library.custom_op("rto_fast::token_logps_fwd", mutates_args=())
def token_logps_fwd(
    logits: Tensor, labels: Tensor, temperature: float, ignore_index: int, with_entropy: bool, inplace_backward: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [B, T, V], labels [B·T] → logps [B·T], entropy [B·T or 0], state [2, B·T] = (max, log2 of the sum)."""
    batches, rows_per_batch, num_cols = logits.shape
    num_rows = batches * rows_per_batch
    labels = labels.contiguous()
    logps, state = logits.new_empty(num_rows, dtype=torch.float32), logits.new_empty(2, num_rows, dtype=torch.float32)
    entropy = torch.empty_like(logps) if with_entropy else logps.new_empty(0)
    if not num_rows:
        return logps, entropy, state
    block_v, num_warps = row_block(min(num_cols, FORWARD_BLOCK), logits.element_size())
    splits, split_cols = _splits(num_rows, num_cols, block_v)
    scale = LOG2E.value / temperature
    with torch.cuda.device_of(logits):
        if splits > 1:
            partials = logps.new_empty(splits, 3, num_rows)
            partial_state_kernel[(num_rows, splits)](
                logits,
                labels,
                partials,
                logits.stride(0),
                logits.stride(1),
                rows_per_batch,
                num_rows,
                num_cols,
                split_cols,
                scale,
                ignore_index,
                WITH_ENTROPY=with_entropy,
                BLOCK_V=block_v,
                num_warps=num_warps,
                **EXACT,
            )
            combine_states_kernel[(triton.cdiv(num_rows, 128),)](
                logits,
                labels,
                partials,
                logps,
                entropy,
                state,
                logits.stride(0),
                logits.stride(1),
                rows_per_batch,
                num_rows,
                num_cols,
                splits,
                scale,
                ignore_index,
                WITH_ENTROPY=with_entropy,
                BLOCK_T=128,
                num_warps=4,
                **EXACT,
            )
        else:
            token_logps_fwd_kernel[(num_rows,)](
                logits,
                None,
                labels,
                None,
                logps,
                entropy,
                state,
                logits.stride(0),
                logits.stride(1),
                rows_per_batch,
                num_rows,
                num_cols,
                scale,
                None,
                ignore_index,
                WITH_ENTROPY=with_entropy,
                BLOCK_V=block_v,
                num_warps=num_warps,
                **EXACT,
            )
    return logps, entropy, state


@token_logps_fwd.register_fake
def _(
    logits: Tensor, labels: Tensor, temperature: float, ignore_index: int, with_entropy: bool, inplace_backward: bool
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = logits.shape[0] * logits.shape[1]
    logps = logits.new_empty(num_rows, dtype=torch.float32)
    return logps, logps.new_empty(num_rows if with_entropy else 0), logps.new_empty(2, num_rows)


def _launch_bwd(
    dlogps: Tensor,
    dentropy: Tensor | None,
    logits: Tensor,
    dlogits: Tensor,
    labels: Tensor,
    state: Tensor,
    entropy: Tensor,
    temperature: float,
    ignore_index: int,
) -> None:
    batches, rows_per_batch, num_cols = logits.shape
    num_rows = batches * rows_per_batch
    if not num_rows:
        return
    # More than 16 elements a thread would cost occupancy, because all are live at once.
    block_v, num_warps = row_block(num_cols, 4)
    splits, split_cols = _splits(num_rows, num_cols, block_v)
    with torch.cuda.device_of(logits):
        token_logps_bwd_kernel[(num_rows, splits)](
            logits,
            dlogits,
            labels.contiguous(),
            state,
            entropy,
            dlogps.contiguous(),
            None if dentropy is None else dentropy.contiguous(),
            logits.stride(0),
            logits.stride(1),
            dlogits.stride(0),
            dlogits.stride(1),
            rows_per_batch,
            num_rows,
            num_cols,
            split_cols,
            LOG2E.value / temperature,
            ignore_index,
            BLOCK_V=block_v,
            num_warps=num_warps,
        )


@torch.library.custom_op("rto_fast::token_logps_bwd", mutates_args=())
def token_logps_bwd(
    dlogps: Tensor,
    dentropy: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    state: Tensor,
    entropy: Tensor,
    temperature: float,
    ignore_index: int,
) -> Tensor:
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _launch_bwd(dlogps, dentropy, logits, dlogits, labels, state, entropy, temperature, ignore_index)
    return dlogits


@token_logps_bwd.register_fake
def _(
    dlogps: Tensor,
    dentropy: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    state: Tensor,
    entropy: Tensor,
    temperature: float,
    ignore_index: int,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("rto_fast::token_logps_bwd_", mutates_args=("logits",))
def token_logps_bwd_(
    dlogps: Tensor,
    dentropy: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    state: Tensor,
    entropy: Tensor,
    temperature: float,
    ignore_index: int,
) -> None:
    _launch_bwd(dlogps, dentropy, logits, logits, labels, state, entropy, temperature, ignore_index)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, *ctx.settings = inputs
    _, entropy, state = output
    ctx.save_for_backward(logits, labels, state, entropy)
    ctx.mark_non_differentiable(state)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dlogps: Tensor | None, dentropy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    logits, labels, state, entropy = ctx.saved_tensors
    temperature, ignore_index, with_entropy, inplace_backward = ctx.settings
    dlogps = torch.zeros_like(state[0]) if dlogps is None else dlogps
    dentropy = dentropy if with_entropy else None
    op = token_logps_bwd_ if inplace_backward else token_logps_bwd
    dlogits = op(dlogps, dentropy, logits, labels, state, entropy, temperature, ignore_index)
    return logits if inplace_backward else dlogits, None, None, None, None, None


token_logps_fwd.register_autograd(_backward, setup_context=_setup_context)


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `rto_fast.ops.token_logps`. Rows may have any stride, so `logits[:, :-1]` of [B, T, V] is not copied."""
    x = logits if logits.stride(-1) == 1 else logits.contiguous()
    x = x if x.dim() == 3 else x.unsqueeze(0) if x.dim() == 2 else x.reshape(1, -1, x.shape[-1])
    logps, entropy, _ = token_logps_fwd(
        x, labels.reshape(-1), temperature, ignore_index, return_entropy, inplace_backward
    )
    logps = logps.view(labels.shape)
    return (logps, entropy.view(labels.shape)) if return_entropy else logps
