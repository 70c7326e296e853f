"""What a decode step computes besides GEMMs, attention and draw, in plain torch.

The kernels of `decode_layer` and `decode_step` are tested against it. CPU tensors run it, except `begin_step`, of which
a CPU needs less.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Like transformers' LlamaRMSNorm: computes in float32, and rounds to x's dtype before the product with the weight."""
    if x.dtype in (torch.float32, torch.float64):
        return F.rms_norm(x, x.shape[-1:], weight, eps)  # one call instead of six
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return weight * (wide * scale).to(x.dtype)


def add_rms_norm(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `rto_fast.kernels.decode_layer.add_rms_norm`."""
    if x is not None:
        residual += x
    return rms_norm(residual, weight, eps)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotary embedding of x [T, heads, D] by rope [T, 2, D], cosines and sines.

    Both halves of the cosines are the same; the first half of the sines is negative. The halves (a, b) of a head become
    (a·cos − b·sin, b·cos + a·sin). As in transformers, both products are rounded before they are added. `torch.addcmul`
    would round one of them together with the sum.
    """
    return (x * rope[:, None, 0]).add_(x.roll(x.shape[-1] // 2, -1).mul_(rope[:, None, 1]))


def begin_step(
    lengths: Tensor,
    active: Tensor,
    block_tables: Tensor,
    rows: Tensor,
    generated: Tensor,
    uniforms: Tensor,
    *,
    page_size: int,
    min_new_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `rto_fast.kernels.decode_step.begin_step`."""
    page = block_tables.gather(1, (lengths // page_size)[:, None])[:, 0].long()
    slots = torch.where(active, page * page_size + lengths % page_size, -1)
    kv_lengths = torch.where(active, lengths + 1, 0).int()
    return slots, kv_lengths, uniforms[rows, generated], generated >= min_new_tokens


def finish_step(
    drawn: tuple[Tensor, Tensor, Tensor],
    stop_ids: Tensor,
    rows: Tensor,
    generated: Tensor,
    active: Tensor,
    limits: Tensor,
    lengths: Tensor,
    input_ids: Tensor,
    tokens: Tensor,
    logps: Tensor,
    sampling_logps: Tensor,
    counts: Tensor,
    done: Tensor,
    *,
    grow: bool,
) -> None:
    """See `rto_fast.kernels.decode_step.finish_step`."""
    for results, values in zip((tokens, logps, sampling_logps), drawn):
        results.index_put_((rows, generated), values)
    input_ids.copy_(drawn[0])
    if grow:
        lengths += active
    generated += active
    # One comparison a stop token takes fewer calls than a table of all.
    ended = generated >= limits
    for stop_id in stop_ids:
        ended |= drawn[0] == stop_id
    counts.index_put_((rows,), generated)
    done.index_put_((rows,), ended)
    active &= ended.logical_not()
    rows.masked_fill_(ended, len(tokens) - 1)
