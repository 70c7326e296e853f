"""Clipped PPO loss and all its gradients from hidden states, in one sweep over the tokens.

dL/dlogp of a token is known as soon as its own logp is. Forward and backward pass need the same logits, so these are
computed once, which takes 6TVD FLOPs instead of 8TVD. For each chunk of tokens: logits = mm; one program a row reduces
its logits to (logp, entropy), computes the loss terms and overwrites the logits with their gradient; dhidden = mm;
dweight += mm. The gradients are those of the unnormalised sum, so that float16 does not underflow by 1/num_items. The
backward pass multiplies them by upstream/num_items, a scalar that never leaves the device. No gradient scaler acts on
the sum, so a token whose |A·ratio·weight| exceeds 2^15 saturates in float16. Once the norm is clipped, that token
dominates its batch anyway. Tokens outside of the mask are dropped before the GEMMs: they are half of a batch or more
if it contains prompts. Which these are, the host has to know: a caller who does not say it (`rows`) waits for the
device.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rto_fast.kernels.common import (
    EXACT,
    LN2,
    LOG2E,
    autocast_operands,
    contiguous,
    equal_share,
    kept_rows,
    num_items_tensor,
    ppo_terms,
)
from rto_fast.kernels.gemm import gemm, linear
from rto_fast.kernels.row_softmax import (
    finish_row,
    fold_row,
    gradient_view,
    load_label,
    logits_buffer,
    row_block,
    write_gradient,
)

# Float32 logits of a chunk. Reading and writing dweight's float32 accumulator takes 735/C of the time of the dweight
# GEMM of a chunk of C tokens (H200), so chunks should be large: 2 GiB is C = 4096 at V = 128k (18 %) and 2048 at V =
# 262k. An 8B model's accumulator has that size too. A single chunk needs none, so it may be larger by the accumulator's
# size.
WORKSPACE_BYTES = 2 << 30


@triton.jit(do_not_specialize=["num_rows"])
def linear_ppo_kernel(
    x_ptr,
    dx_ptr,
    rows_ptr,
    labels_ptr,
    loss_mask_ptr,
    old_logps_ptr,
    advantages_ptr,
    weights_ptr,
    terms_ptr,
    stride_x_t,
    stride_dx_t,
    num_rows,
    num_cols,
    scale,
    cap,
    ratio_low,
    ratio_high,
    dual_clip,
    entropy_coef,
    BLOCK_V: tl.constexpr,
):
    """Overwrites a row of logits with its gradient (see gradient_view), and stores its weighted terms of the metrics."""
    pid_t = tl.program_id(0).to(tl.int64)
    token = tl.load(rows_ptr + pid_t)
    label = tl.load(labels_ptr + token)
    counts = tl.load(loss_mask_ptr + token) != 0
    weight = 1.0
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + token).to(tl.float32)
    weight = tl.where(counts, weight, 0.0)
    x_ptr += pid_t * stride_x_t
    # The log-prob of a label outside of the row is NaN, and so are the loss and the gradient.
    z_label, _ = load_label(x_ptr, None, label, num_cols, cap)
    m, s, u = fold_row(x_ptr, None, 0, num_cols, scale, cap, True, BLOCK_V)
    logp, entropy, log2_s = finish_row(z_label, m, s, u, scale)
    # A row outside of the mask is exactly 0, whatever its tensors hold: 0·NaN must not occur.
    m = tl.where(counts, m, 0.0)
    entropy = tl.where(counts, entropy, 0.0)
    loss, dlogp, kl, is_clipped = ppo_terms(
        tl.where(counts, logp, 0.0),
        tl.where(counts, tl.load(old_logps_ptr + token).to(tl.float32), 0.0),
        tl.where(counts, tl.load(advantages_ptr + token).to(tl.float32), 0.0),
        ratio_low,
        ratio_high,
        dual_clip,
    )
    tl.store(terms_ptr + pid_t, loss * weight)
    tl.store(terms_ptr + num_rows + pid_t, kl * weight)
    tl.store(terms_ptr + 2 * num_rows + pid_t, is_clipped * weight)
    tl.store(terms_ptr + 3 * num_rows + pid_t, entropy * weight)
    if dx_ptr is not None:
        dlogp *= weight
        if dx_ptr.dtype.element_ty == tl.float16:
            # -A·ratio reaches e^20·|A|, float16 65504; half of it leaves room for the entropy's term.
            limit = 32768.0 / (scale * LN2)
            dlogp = tl.where(tl.abs(dlogp) > limit, tl.where(dlogp > 0.0, limit, -limit), dlogp)
        dentropy = 0.0
        if entropy_coef is not None:
            dentropy = -entropy_coef * weight
        write_gradient(
            x_ptr,
            dx_ptr + pid_t * stride_dx_t,
            None,
            0,
            num_cols,
            label.to(tl.int32),
            m,
            log2_s,
            entropy,
            dlogp,
            dentropy,
            scale,
            cap,
            entropy_coef is not None,
            BLOCK_V,
        )


def rows_per_chunk(num_rows: int, vocab_size: int, hidden_size: int, need_dweight: bool) -> int:
    """Rows of a chunk, which is all of them or an equal share that fits the workspace."""
    largest = max(1, WORKSPACE_BYTES // (4 * vocab_size))
    if num_rows <= largest + (hidden_size if need_dweight else 0):
        return num_rows
    return min(largest, equal_share(num_rows, largest))


def _gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for float16, whose range unnormalised sums over tokens exceed. bfloat16 has the range of float32."""
    return torch.float32 if dtype == torch.float16 else dtype


@torch.library.custom_op("rto_fast::linear_ppo_sweep", mutates_args=())
def linear_ppo_sweep(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    rows: Tensor | None,
    weights: Tensor | None,
    num_items: Tensor | None,
    clip_eps: float,
    clip_eps_high: float,
    dual_clip: float | None,
    entropy_coef: float,
    temperature: float,
    softcap: float | None,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden_states [T, D], weight [V, D], rows [n], other tensors [T] → (loss, metrics [4], 1 / num_items, and the
    gradients of loss·num_items with respect to hidden_states and weight; those not needed are empty)."""
    rows, hidden = kept_rows(rows, loss_mask, False, hidden_states)
    num_rows, vocab_size, dtype = len(rows), len(weight), _gradient_dtype(hidden_states.dtype)
    labels, loss_mask, old_logps, advantages, weights = contiguous(labels, loss_mask, old_logps, advantages, weights)
    need_gradient = need_dhidden or need_dweight

    terms = hidden.new_zeros(4, num_rows, dtype=torch.float32)
    # In float32, because of the long sums over V; see `gemm`.
    dhidden = hidden.new_empty(num_rows if need_dhidden else 0, hidden.shape[1], dtype=torch.float32)
    chunk_rows = rows_per_chunk(num_rows, vocab_size, hidden.shape[1], need_dweight)
    # Sums over several chunks are rounded once, at the end. Without rows nothing is written, so the buffer must be
    # zero.
    new, sum_dtype = torch.empty if num_rows else torch.zeros, dtype if chunk_rows == num_rows else torch.float32
    dweight = new(weight.shape if need_dweight else 0, dtype=sum_dtype, device=weight.device)
    block_v, num_warps = row_block(vocab_size, 4)
    buffer = logits_buffer(chunk_rows, vocab_size, hidden)
    with torch.cuda.device_of(hidden):
        for first in range(0, num_rows, chunk_rows or 1):
            here = slice(first, first + chunk_rows)
            chunk = hidden[here]
            logits = buffer[: len(chunk), :vocab_size]
            dlogits = gradient_view(buffer, hidden.dtype)[: len(chunk), :vocab_size]
            linear(chunk, weight, out=logits)
            linear_ppo_kernel[(len(chunk),)](
                logits,
                dlogits if need_gradient else None,
                rows[here],
                labels,
                loss_mask,
                old_logps,
                advantages,
                weights,
                terms[:, here],
                logits.stride(0),
                dlogits.stride(0),
                num_rows,
                vocab_size,
                LOG2E.value / temperature,
                softcap,
                1.0 - clip_eps,
                1.0 + clip_eps_high,
                dual_clip,
                entropy_coef or None,
                BLOCK_V=block_v,
                num_warps=num_warps,
                **EXACT,
            )
            if need_dhidden:
                gemm(dlogits, weight, dhidden[here])
            if need_dweight:
                gemm(dlogits.t(), chunk, dweight, accumulate=first > 0)
    if need_dhidden and hidden is not hidden_states:
        dhidden = dhidden.new_zeros(hidden_states.shape).index_copy_(0, rows, dhidden)

    if num_items is None:
        num_items = (loss_mask if weights is None else weights.where(loss_mask, 0.0)).sum(dtype=torch.float32)
    inverse = torch.where(num_items == 0, 0.0, 1.0 / num_items)
    metrics = terms.sum(1) * inverse
    loss = metrics[0] - entropy_coef * metrics[3]
    return loss, metrics, inverse, dhidden, dweight.to(dtype)


@linear_ppo_sweep.register_fake
def _(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    rows: Tensor | None,
    weights: Tensor | None,
    num_items: Tensor | None,
    clip_eps: float,
    clip_eps_high: float | None,
    dual_clip: float | None,
    entropy_coef: float,
    temperature: float,
    softcap: float | None,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, ...]:
    loss, dtype = hidden_states.new_empty((), dtype=torch.float32), _gradient_dtype(hidden_states.dtype)
    dhidden = loss.new_empty(len(hidden_states) if need_dhidden else 0, hidden_states.shape[1])
    dweight = weight.new_empty(weight.shape if need_dweight else (0,), dtype=dtype)
    return loss, loss.new_empty(4), loss.new_empty(()), dhidden, dweight


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, metrics, inverse, dhidden, dweight = output
    ctx.save_for_backward(inverse, dhidden, dweight)
    ctx.mark_non_differentiable(metrics, inverse, dhidden, dweight)
    ctx.set_materialize_grads(False)
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.needed = inputs[-2:]


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    inverse, *gradients = ctx.saved_tensors
    if dloss is None:
        return (None,) * 17
    gradients = [
        (gradient * (dloss * inverse)).to(dtype) if needed else None
        for gradient, dtype, needed in zip(gradients, ctx.dtypes, ctx.needed)
    ]
    return *gradients, *(None,) * 15


linear_ppo_sweep.register_autograd(_backward, setup_context=_setup_context)


def linear_ppo_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    rows: Tensor | None = None,
    weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    clip_eps: float = 0.2,
    clip_eps_high: float | None = None,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See `rto_fast.ops.linear_ppo_loss`. Without `rows` it waits for the device, to count the tokens in the mask."""
    hidden, weight = autocast_operands(hidden_states.reshape(-1, hidden_states.shape[-1]), lm_head_weight)
    needs_grad = torch.is_grad_enabled()
    loss, metrics, *_ = linear_ppo_sweep(
        hidden,
        weight,
        labels.reshape(-1),
        old_logps.reshape(-1),
        advantages.reshape(-1),
        loss_mask.reshape(-1),
        rows,
        None if weights is None else weights.reshape(-1),
        num_items_tensor(num_items, hidden.device),
        clip_eps,
        clip_eps if clip_eps_high is None else clip_eps_high,
        dual_clip,
        entropy_coef,
        temperature,
        softcap,
        needs_grad and hidden.requires_grad,
        needs_grad and weight.requires_grad,
    )
    names = "policy_loss", "approx_kl", "clip_fraction", "entropy"
    return loss, dict(zip(names, metrics.detach().unbind()))
