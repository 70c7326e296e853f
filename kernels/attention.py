"""Causal attention within packed sequences, with its gradient: the autograd function around the kernels of
`attention_forward.py` and `attention_backward.py`."""

from typing import Any

import torch
from torch import Tensor

from rto_fast.kernels.attention_backward import attention_backward
from rto_fast.kernels.attention_forward import attention_forward


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        ctx.options = max_seqlen, scale, window, softcap
        out, lse = attention_forward(query, key, value, cu_seqlens, cu_seqlens, *ctx.options)
        ctx.save_for_backward(query, key, value, out, lse, cu_seqlens)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return (*attention_backward(*grads, *ctx.saved_tensors, *ctx.options), None, None, None, None, None)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """See `rto_fast.layer_ops.packed_attention`."""
    if query.shape[2] > 256:
        raise ValueError(f"query: expected a head_dim of at most 256, got {query.shape[2]}")
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens_k is None:
        return _PackedAttention.apply(query, key, value, cu_seqlens, max_seqlen, scale, window, softcap)
    query, key, value = query.detach(), key.detach(), value.detach()
    return attention_forward(query, key, value, cu_seqlens, cu_seqlens_k, max_seqlen, scale, window, softcap)[0]
