"""PPO's clipped policy and value losses from per-token log-probs and values.

In both, the derivative of a token's loss is known as soon as the token is read, but the denominator only when all
tokens are. So the forward launch writes each token's derivative of the *unnormalised* loss and one column of partial
sums a block. A second launch of one program adds the columns in a fixed order, without atomics, so that results are
bitwise repeatable, and divides. The backward pass multiplies by a scalar that never leaves the device.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rto_fast.kernels.common import contiguous, num_items_tensor, ppo_terms, sum_row

BLOCK_T = 1024
NUM_WARPS = 4  # 8 tokens a thread, one load of 128 bits for bfloat16 and two for float32
BLOCK_P = 1024


@triton.jit
def _load_block(loss_mask_ptr, weights_ptr, offs_t, mask_t):
    """(whether a token counts, its weight), both 0 past the end."""
    valid = tl.load(loss_mask_ptr + offs_t, mask=mask_t, other=0) != 0
    weight = valid.to(tl.float32)
    if weights_ptr is not None:
        weight = tl.where(valid, tl.load(weights_ptr + offs_t, mask=mask_t, other=0.0).to(tl.float32), 0.0)
    return valid, weight


@triton.jit
def _load_valid(ptr, offs_t, mask_t, valid):
    """Selects after the load: with `valid`, which is read from memory, as its mask, it would be split into 32-bit loads."""
    return tl.where(valid, tl.load(ptr + offs_t, mask=mask_t, other=0.0).to(tl.float32), 0.0)


@triton.jit
def _store_partials(partials_ptr, pid_t, num_blocks, loss, metric_0, metric_1, weight):
    partials_ptr += pid_t
    tl.store(partials_ptr, tl.sum(loss * weight))
    tl.store(partials_ptr + num_blocks, tl.sum(metric_0 * weight))
    tl.store(partials_ptr + 2 * num_blocks, tl.sum(metric_1 * weight))
    tl.store(partials_ptr + 3 * num_blocks, tl.sum(weight))


@triton.jit
def _policy_block(
    logps_ptr,
    old_logps_ptr,
    advantages_ptr,
    loss_mask_ptr,
    weights_ptr,
    dlogps_ptr,
    partials_ptr,
    num_blocks,
    ratio_low,
    ratio_high,
    dual_clip,
    pid_t,
    offs_t,
    mask_t,
):
    valid, weight = _load_block(loss_mask_ptr, weights_ptr, offs_t, mask_t)
    logp = _load_valid(logps_ptr, offs_t, mask_t, valid)
    old_logp = _load_valid(old_logps_ptr, offs_t, mask_t, valid)
    advantage = _load_valid(advantages_ptr, offs_t, mask_t, valid)
    loss, dlogp, kl, is_clipped = ppo_terms(logp, old_logp, advantage, ratio_low, ratio_high, dual_clip)
    tl.store(dlogps_ptr + offs_t, dlogp * weight, mask=mask_t)
    _store_partials(partials_ptr, pid_t, num_blocks, loss, kl, is_clipped, weight)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def ppo_policy_fwd_kernel(
    logps_ptr,
    old_logps_ptr,
    advantages_ptr,
    loss_mask_ptr,
    weights_ptr,
    dlogps_ptr,
    partials_ptr,
    num_tokens,
    num_blocks,
    ratio_low,
    ratio_high,
    dual_clip,
    BLOCK_T: tl.constexpr,
):
    pid_t = tl.program_id(0).to(tl.int64)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    # A bound would split the accesses into single elements, so whole blocks have code without one.
    if (pid_t + 1) * BLOCK_T <= num_tokens:
        _policy_block(
            logps_ptr,
            old_logps_ptr,
            advantages_ptr,
            loss_mask_ptr,
            weights_ptr,
            dlogps_ptr,
            partials_ptr,
            num_blocks,
            ratio_low,
            ratio_high,
            dual_clip,
            pid_t,
            offs_t,
            tl.full((BLOCK_T,), True, tl.int1),
        )
    else:
        _policy_block(
            logps_ptr,
            old_logps_ptr,
            advantages_ptr,
            loss_mask_ptr,
            weights_ptr,
            dlogps_ptr,
            partials_ptr,
            num_blocks,
            ratio_low,
            ratio_high,
            dual_clip,
            pid_t,
            offs_t,
            offs_t < num_tokens,
        )


@triton.jit
def _value_block(
    values_ptr,
    old_values_ptr,
    returns_ptr,
    loss_mask_ptr,
    weights_ptr,
    dvalues_ptr,
    partials_ptr,
    num_blocks,
    value_clip_eps,
    pid_t,
    offs_t,
    mask_t,
):
    valid, weight = _load_block(loss_mask_ptr, weights_ptr, offs_t, mask_t)
    value = _load_valid(values_ptr, offs_t, mask_t, valid)
    target = _load_valid(returns_ptr, offs_t, mask_t, valid)
    error = value - target
    if value_clip_eps is None:
        loss = 0.5 * error * error
        is_clipped = tl.zeros_like(valid)
    else:
        old_value = _load_valid(old_values_ptr, offs_t, mask_t, valid)
        change = value - old_value
        error = tl.where(change == change, error, change)  # a NaN among the old values must reach the loss
        loss = 0.5 * error * error
        clipped_change = tl.where(change > 0.0, value_clip_eps, -value_clip_eps)
        clipped_error = old_value + clipped_change - target
        clipped_loss = 0.5 * clipped_error * clipped_error
        is_clipped = (tl.abs(change) > value_clip_eps) & (clipped_loss > loss)
        loss = tl.where(is_clipped, clipped_loss, loss)
    tl.store(dvalues_ptr + offs_t, tl.where(is_clipped, 0.0, error) * weight, mask=mask_t)
    clipped = is_clipped.to(tl.float32)
    _store_partials(partials_ptr, pid_t, num_blocks, loss, clipped, clipped, weight)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def ppo_value_fwd_kernel(
    values_ptr,
    old_values_ptr,
    returns_ptr,
    loss_mask_ptr,
    weights_ptr,
    dvalues_ptr,
    partials_ptr,
    num_tokens,
    num_blocks,
    value_clip_eps,
    BLOCK_T: tl.constexpr,
):
    pid_t = tl.program_id(0).to(tl.int64)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    if (pid_t + 1) * BLOCK_T <= num_tokens:  # as in ppo_policy_fwd_kernel
        _value_block(
            values_ptr,
            old_values_ptr,
            returns_ptr,
            loss_mask_ptr,
            weights_ptr,
            dvalues_ptr,
            partials_ptr,
            num_blocks,
            value_clip_eps,
            pid_t,
            offs_t,
            tl.full((BLOCK_T,), True, tl.int1),
        )
    else:
        _value_block(
            values_ptr,
            old_values_ptr,
            returns_ptr,
            loss_mask_ptr,
            weights_ptr,
            dvalues_ptr,
            partials_ptr,
            num_blocks,
            value_clip_eps,
            pid_t,
            offs_t,
            offs_t < num_tokens,
        )


@triton.jit(do_not_specialize=["num_blocks"])
def ppo_reduce_kernel(partials_ptr, num_items_ptr, loss_ptr, stats_ptr, num_blocks, BLOCK_P: tl.constexpr):
    if num_items_ptr is None:
        total = sum_row(partials_ptr, 3, num_blocks, BLOCK_P)
    else:
        total = tl.load(num_items_ptr)
    scale = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    tl.store(loss_ptr, sum_row(partials_ptr, 0, num_blocks, BLOCK_P) * scale)
    tl.store(stats_ptr + 0, sum_row(partials_ptr, 1, num_blocks, BLOCK_P) * scale)
    tl.store(stats_ptr + 1, sum_row(partials_ptr, 2, num_blocks, BLOCK_P) * scale)
    tl.store(stats_ptr + 2, scale)


def _forward(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    loss_mask: Tensor,
    weights: Tensor | None,
    num_items: Tensor | None,
    *constants: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches both kernels: (loss, [metric, metric, 1/denominator], d(unnormalised loss)/d(tensors[0])), all float32."""
    first = tensors[0]
    num_tokens = first.numel()
    num_blocks = triton.cdiv(num_tokens, BLOCK_T)
    partials = torch.empty(4, num_blocks, dtype=torch.float32, device=first.device)
    loss = torch.empty((), dtype=torch.float32, device=first.device)
    stats = torch.empty(3, dtype=torch.float32, device=first.device)
    derivative = torch.empty(first.shape, dtype=torch.float32, device=first.device)
    with torch.cuda.device_of(first):
        if num_blocks:
            kernel[(num_blocks,)](
                *contiguous(*tensors, loss_mask, weights),
                derivative,
                partials,
                num_tokens,
                num_blocks,
                *constants,
                BLOCK_T=BLOCK_T,
                num_warps=NUM_WARPS,
            )
        ppo_reduce_kernel[(1,)](partials, num_items, loss, stats, num_blocks, BLOCK_P=BLOCK_P, num_warps=NUM_WARPS)
    return loss, stats, derivative


@torch.library.custom_op("rto_fast::ppo_policy_loss", mutates_args=())
def _ppo_policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    weights: Tensor | None,
    num_items: Tensor | None,
    ratio_low: float,
    ratio_high: float,
    dual_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(
        ppo_policy_fwd_kernel,
        (logps, old_logps, advantages),
        loss_mask,
        weights,
        num_items,
        ratio_low,
        ratio_high,
        dual_clip,
    )


@torch.library.custom_op("rto_fast::ppo_value_loss", mutates_args=())
def _ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    loss_mask: Tensor,
    weights: Tensor | None,
    num_items: Tensor | None,
    value_clip_eps: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(ppo_value_fwd_kernel, (values, old_values, returns), loss_mask, weights, num_items, value_clip_eps)


def _fake(first: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    new = torch.empty((), dtype=torch.float32, device=first.device)
    return new, new.new_empty(3), new.new_empty(first.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtype, ctx.num_inputs = inputs[0].dtype, len(inputs)
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    stats, derivative = ctx.saved_tensors
    return (derivative * (grad_loss * stats[2])).to(ctx.dtype), *(None,) * (ctx.num_inputs - 1)


for _op in (_ppo_policy_loss, _ppo_value_loss):
    _op.register_fake(_fake)
    _op.register_autograd(_backward, setup_context=_setup_context)


def ppo_policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    clip_eps: float = 0.2,
    clip_eps_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See `rto_fast.ops.ppo_policy_loss`. Differentiable in `logps`."""
    high = clip_eps if clip_eps_high is None else clip_eps_high
    loss, stats, _ = _ppo_policy_loss(
        logps,
        old_logps,
        advantages,
        loss_mask,
        weights,
        num_items_tensor(num_items, logps.device),
        1.0 - clip_eps,
        1.0 + high,
        dual_clip,
    )
    approx_kl, clip_fraction, _ = stats.detach().unbind()
    return loss, {"policy_loss": loss.detach(), "approx_kl": approx_kl, "clip_fraction": clip_fraction}


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    loss_mask: Tensor,
    *,
    weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    value_clip_eps: float | None = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See `rto_fast.ops.ppo_value_loss`. Differentiable in `values`."""
    loss, stats, _ = _ppo_value_loss(
        values, old_values, returns, loss_mask, weights, num_items_tensor(num_items, values.device), value_clip_eps
    )
    return loss, {"value_loss": loss.detach(), "value_clip_fraction": stats[0].detach()}
