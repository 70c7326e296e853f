"""What a decoder layer computes beside its GEMMs, in plain torch: norms, rotary embedding, gate, attention, LoRA.

The Triton kernels of the modules of the same names (`attention`, `adapters` and so on) are tested against it; a CPU runs it.
Each function rounds where transformers' modules round, but for LoRA, where PEFT rounds more.
"""

from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "gelu_tanh", "gelu"]


class AdapterInput(NamedTuple):
    """The a's of LoRA adapters of one input, which lie side by side: t[:, ranks] = scale · (x @ aᵀ)."""

    ranks: slice
    a: Tensor  # [R, K]
    scale: float


class AdapterOutput(NamedTuple):
    """The other half of an adapter: y[:, columns] += t[:, ranks] @ bᵀ."""

    columns: slice
    ranks: slice
    b: Tensor  # [N, R]
    scale: float  # that of its t


class _MainGrad(torch.autograd.Function):
    """A weight whose gradient is added to its `main_grad`."""

    @staticmethod
    def forward(ctx: Any, weight: Any) -> Tensor:
        ctx.main_grad = weight.main_grad
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        ctx.main_grad.add_(gradient)


def embedding(input_ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
    """The rows [..., D] of `weight` [V, D] that tokens [...] name.

    Args:
        padding_idx: a row without a gradient, or None.
    """
    return F.embedding(input_ids, weight, padding_idx)


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """See `rto_fast.layer_ops.rms_norm`."""
    if weight.requires_grad and hasattr(weight, "main_grad") and torch.is_grad_enabled():
        weight = _MainGrad.apply(weight)
    if x.dtype in (torch.float32, torch.float64):
        return F.rms_norm(x, x.shape[-1:], weight + 1.0 if unit_offset else weight, eps)  # one call instead of six
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True).add(eps))
    if unit_offset:
        return (normed * (1.0 + weight.float())).to(x.dtype)
    return (weight * normed.to(x.dtype)).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, unit_offset: bool = False, multiplier: float = 1.0
) -> tuple[Tensor, Tensor]:
    """See `rto_fast.layer_ops.add_rms_norm`."""
    total = residual + (x if multiplier == 1.0 else x * multiplier)
    return rms_norm(total, weight, eps, unit_offset), total


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotary embedding of the first R elements of x [T, heads, D] by rope [T, 2, R], cosines and sines.

    Both halves of the cosines are the same; the first half of the sines is negative. The halves (a, b) of what is
    rotated become (a·cos − b·sin, b·cos + a·sin). As in transformers, both products are rounded before they are added.
    `torch.addcmul` would round one of them together with the sum.
    """
    size = rope.shape[-1]
    if size < x.shape[-1]:
        return torch.cat([rotate(x[..., :size], rope), x[..., size:]], -1)
    return (x * rope[:, None, 0]).add_(x.roll(size // 2, -1).mul_(rope[:, None, 1]))


def rotary_embedding(
    qkv: Tensor,
    rope: Tensor | None,
    *,
    num_heads: int,
    num_kv_heads: int,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `rto_fast.layer_ops.rotary_embedding`."""
    both, value = qkv.split([num_heads + num_kv_heads, num_kv_heads], 1)
    if query_norm is not None and key_norm is not None:
        query, key = both.split([num_heads, num_kv_heads], 1)
        query, key = rms_norm(query, query_norm, eps, unit_offset), rms_norm(key, key_norm, eps, unit_offset)
        return (query, key, value) if rope is None else (rotate(query, rope), rotate(key, rope), value)
    query, key = (both if rope is None else rotate(both, rope)).split([num_heads, num_kv_heads], 1)
    return query, key, value


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
}


def gated_activation(gate_up: Tensor, activation: Activation) -> Tensor:
    """See `rto_fast.layer_ops.gated_activation`."""
    gate, up = gate_up.chunk(2, -1)
    return _ACTIVATIONS[activation](gate) * up


def repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Repeats the heads (dimension 1) of keys and values so that there are as many as of queries."""
    groups = query.shape[1] // key.shape[1]
    return (key, value) if groups == 1 else (key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))


def sdpa_causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of the last L of K positions.

    Args:
        query: [N, Hq, L, D].
        key, value: [N, Hkv, K, D].
        scaling: of query · key; None is 1/√D.
        window: each position sees the last `window` positions, itself among them; None is all.
        softcap: scores become softcap·tanh(scores / softcap).
    Returns:
        [N, Hq, L, D].
    """
    length, keys = query.shape[2], key.shape[2]
    mask = None
    if length != keys or (window and window < keys):
        # The mask of a long prompt is large, so no other tensor of its size has more than a byte an element.
        positions = torch.arange(keys, device=query.device)
        last = positions[keys - length :, None]
        mask = positions <= last
        if window:
            mask &= positions > last - window
    if softcap or (query.is_cuda and (mask is not None or query.dtype == torch.float32)):
        # No CUDA kernel takes fewer key heads with a mask or in float32: torch would hold all scores in memory.
        key, value = repeat_heads(query, key, value)
    if not softcap:
        gqa = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=gqa
        )
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def lengths(name: str, cu_seqlens: Tensor, tokens: int) -> list[int]:
    """The lengths of the sequences with these bounds, which a ValueError refuses if they are none."""
    bounds = cu_seqlens.tolist()
    found = [end - start for start, end in pairwise(bounds)]
    if bounds[0] or bounds[-1] != tokens or min(found, default=0) < 0:
        raise ValueError(f"{name}: expected bounds that rise from 0 to the {tokens} tokens")
    return found


def query_and_key_lengths(cu_seqlens: Tensor, queries: int, cu_seqlens_k: Tensor, keys: int) -> list[tuple[int, int]]:
    """The lengths of each sequence in queries and keys; see `lengths`."""
    found = list(zip(lengths("cu_seqlens", cu_seqlens, queries), lengths("cu_seqlens_k", cu_seqlens_k, keys)))
    if any(length > key_length for length, key_length in found):
        raise ValueError("cu_seqlens_k: expected as many keys as queries in each sequence, or more")
    return found


def packed_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of packed sequences, each to itself: [T, Hq, D]; the arguments are those of `packed_attention`."""
    # Neighbours of one length are one batch; prompts, which are sorted by length, profit most.
    runs = [(length, len(list(run))) for length, run in groupby(lengths("cu_seqlens", cu_seqlens, len(query)))]
    if not runs:
        return query.clone()
    # split, not slices: its backward is one concatenation, where each slice's would fill a gradient of all T tokens.
    pieces = zip(*(x.transpose(0, 1).split([n * length for length, n in runs], 1) for x in (query, key, value)))
    outputs = []
    for (length, count), piece in zip(runs, pieces):
        q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in piece)
        outputs.append(sdpa_causal(q, k, v, scaling, window, softcap).transpose(0, 1).flatten(1, 2))
    return torch.cat(outputs, 1).transpose(0, 1)


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
    if cu_seqlens_k is None:
        return packed_sdpa(query, key, value, cu_seqlens, scale, window, softcap)
    sizes = query_and_key_lengths(cu_seqlens, len(query), cu_seqlens_k, len(key))
    query_sizes, key_sizes = [size for size, _ in sizes], [size for _, size in sizes]
    pieces = zip(query.split(query_sizes), key.split(key_sizes), value.split(key_sizes))
    outputs = []
    for piece in pieces:
        q, k, v = (x.transpose(0, 1)[None] for x in piece)
        outputs.append(sdpa_causal(q, k, v, scale, window, softcap)[0].transpose(0, 1))
    return torch.cat(outputs) if outputs else query.clone()


def adapter_input(x: Tensor, runs: Sequence[AdapterInput], keeps: bool) -> Tensor:
    """The inner products of LoRA adapters of one input, for `add_adapters`.

    Args:
        x: [T, K].
        runs: cover the columns of the result in order.
        keeps: the result must be [T, ΣR] of the dtype of x, for the backward pass.
    """
    t = x.new_empty(x.shape[0], runs[-1].ranks.stop)
    for ranks, a, scale in runs:
        part = t[:, ranks]
        torch.addmm(part, x, a.t(), beta=0, alpha=scale, out=part)  # autocast changes the forms without `out`
    return t


def add_adapters(base: Tensor, t: Tensor, adapters: Sequence[AdapterOutput], out: Tensor) -> None:
    """Adds the outputs of LoRA adapters to those of linear layers, and rounds the sums once.

    Args:
        base: [T, N], float32 if the adapters have 16 bits; is overwritten.
        t: from `adapter_input`.
        adapters: in the order in which they are added.
        out: [T, N] of the adapters' dtype; may be the base.
    """
    for columns, ranks, b, _ in adapters:
        part = base[:, columns]
        torch.addmm(part, t[:, ranks].to(base.dtype), b.to(base.dtype).t(), out=part)
    if out is not base:
        out.copy_(base)
