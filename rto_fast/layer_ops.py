"""The ops of a decoder layer between its GEMMs, with gradients: norms, rotary embedding, gated activation, attention.

All tensors are packed: T tokens of N sequences back to back.

- Implementation: CUDA tensors run the Triton kernels in `kernels/`, CPU tensors the plain torch of
  `kernels/layer_reference.py`; with TRITON_INTERPRET=1, CPU tensors run the Triton code in its interpreter. Decoding,
  prefill, scoring and training run the same kernels.
- Rounding: each op rounds where transformers' modules round. Gradients are computed in float32 and rounded once. Triton adds
  them up in a fixed order, so they are the same in every run.
- Errors: wrong shapes, dtypes, devices and numbers raise a ValueError that begins with the argument's name.

Gradients of weights (of norms) have the weight's dtype. If a weight has an attribute `main_grad`, a float32 tensor of its
shape, its gradient is added to that tensor instead, and autograd gets none: no 16-bit rounding, no kernel that collects it.
"""

from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor

from rto_fast.kernels import arguments, layer_reference
from rto_fast.kernels.arguments import check_first, check_numbers, check_tensor, float_dtypes
from rto_fast.kernels.layer_reference import Activation

__all__ = ["Activation", "add_rms_norm", "gated_activation", "packed_attention", "rms_norm", "rotary_embedding"]


_ACTIVATIONS = get_args(Activation)


def implementation(module: str, tensor: Tensor) -> ModuleType:
    """The module whose functions of the same names are the ops of a tensor: the Triton module of that name or the reference.

    They check nothing, for callers that make their arguments themselves, such as our decoder.
    """
    if not (tensor.is_cuda or (arguments.INTERPRET and tensor.device.type == "cpu")):
        return layer_reference
    # Not at the top, because CPU tensors need no Triton.
    import rto_fast.kernels.adapters
    import rto_fast.kernels.attention
    import rto_fast.kernels.embedding
    import rto_fast.kernels.gated
    import rto_fast.kernels.rms_norm
    import rto_fast.kernels.rotary

    return getattr(rto_fast.kernels, module)


def _check_norm(like: Tensor, size: int, **weights: Any) -> None:
    """Checks the weights of norms; they may have another float dtype than what is normed."""
    for name, weight in weights.items():
        check_tensor(name, weight, (size,), float_dtypes(like.device), like.device)


def _check_rows(x: Any) -> None:
    check_first("x", x)
    if not x.dim() or not x.shape[-1]:
        raise ValueError(f"x: expected shape [T, D] with D > 0, got {tuple(x.shape)}")


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """RMSNorm of the rows of x: x / √(mean(x²) + eps) · weight, computed in float32.

    Args:
        x: [T, D] float32, bfloat16 or float16.
        weight: [D].
        eps: is added to the mean square.
        unit_offset: Gemma's form: the weight is stored minus 1, and the product with it is not rounded before.
    Returns:
        [T, D] of x's dtype.
    """
    _check_rows(x)
    _check_norm(x, x.shape[-1], weight=weight)
    check_numbers(eps=eps)
    return implementation("rms_norm", x).rms_norm(x, weight, eps, unit_offset)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
    multiplier: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The sum of the residual stream with a block's output, and the norm that follows, in one kernel.

    Args:
        x: [T, D], the block's output.
        residual: [T, D] of the same dtype.
        weight, eps, unit_offset: see `rms_norm`.
        multiplier: of x (Granite).
    Returns:
        (norm of the sum, residual + multiplier · x), [T, D] each. Both have gradients.
    """
    _check_rows(x)
    check_tensor("residual", residual, x.shape, (x.dtype,), x.device)
    _check_norm(x, x.shape[-1], weight=weight)
    check_numbers(eps=eps, multiplier=multiplier)
    return implementation("rms_norm", x).add_rms_norm(x, residual, weight, eps, unit_offset, multiplier)


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
    """Rotary embedding of queries and keys (RoPE, arXiv 2104.09864), after the norms of heads if there are any.

    Args:
        qkv: [T, num_heads + 2·num_kv_heads, head_dim], queries, keys and values of each token.
        rope: [T, 2, R], cosines and sines of each token's position, with R ≤ head_dim even: the first R elements of a head
            are rotated. Of qkv's dtype. See `kernels/layer_reference.py::rotate`. None: nothing is rotated.
        query_norm, key_norm: [head_dim], weights of the RMSNorms of each head, or None.
        eps, unit_offset: of these norms, see `rms_norm`.
    Returns:
        query [T, num_heads, head_dim], key and value [T, num_kv_heads, head_dim].
    """
    check_first("qkv", qkv)
    check_numbers(num_heads=num_heads, num_kv_heads=num_kv_heads, eps=eps)
    num_rows = num_heads + 2 * num_kv_heads
    if qkv.dim() != 3 or qkv.shape[1] != num_rows or not qkv.shape[2]:
        raise ValueError(f"qkv: expected shape [T, {num_rows}, head_dim], got {tuple(qkv.shape)}")
    if rope is not None:
        size = rope.shape[-1] if isinstance(rope, Tensor) and rope.dim() else 0
        if not 0 < size <= qkv.shape[2] or size % 2:
            size = qkv.shape[2]  # what is expected
        check_tensor("rope", rope, (qkv.shape[0], 2, size), (qkv.dtype,), qkv.device)
    if query_norm is not None or key_norm is not None:
        _check_norm(qkv, qkv.shape[2], query_norm=query_norm, key_norm=key_norm)
    return implementation("rotary", qkv).rotary_embedding(
        qkv,
        rope,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        query_norm=query_norm,
        key_norm=key_norm,
        eps=eps,
        unit_offset=unit_offset,
    )


def gated_activation(gate_up: Tensor, activation: Activation = "silu") -> Tensor:
    """activation(gate) · up: SwiGLU or GeGLU (arXiv 2002.05202) of one GEMM's output.

    Args:
        gate_up: [T, 2·I], gate and up projection side by side.
        activation: of the gate: "silu", "gelu_tanh" (the approximation by tanh) or "gelu".
    Returns:
        [T, I].
    """
    check_first("gate_up", gate_up)
    if not gate_up.dim() or not gate_up.shape[-1] or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: expected shape [T, 2·I] with I > 0, got {tuple(gate_up.shape)}")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    return implementation("gated", gate_up).gated_activation(gate_up, activation)


def _check_attention(query: Any, key: Any, value: Any, cu_seqlens: Any, cu_seqlens_k: Any) -> None:
    check_first("query", query)
    if query.dim() != 3:
        raise ValueError(f"query: expected shape [T, num_heads, head_dim], got {tuple(query.shape)}")
    _, num_heads, head_dim = query.shape
    check_tensor("key", key, None, (query.dtype,), query.device)
    if key.dim() != 3 or key.shape[2] != head_dim or not key.shape[1] or num_heads % key.shape[1]:
        expected = f"[K, a divisor of {num_heads}, {head_dim}]"
        raise ValueError(f"key: expected shape {expected}, got {tuple(key.shape)}")
    check_tensor("value", value, key.shape, (query.dtype,), query.device)
    check_tensor("cu_seqlens", cu_seqlens, None, (torch.int32,), query.device)
    if cu_seqlens.dim() != 1 or not len(cu_seqlens):
        raise ValueError("cu_seqlens: expected a 1-d tensor of N+1 sequence bounds, the first of them 0")
    if cu_seqlens_k is None:
        check_tensor("key", key, (len(query), *key.shape[1:]), (query.dtype,), query.device)
    else:
        check_tensor("cu_seqlens_k", cu_seqlens_k, cu_seqlens.shape, (torch.int32,), query.device)
    if (
        arguments.INTERPRET and query.device.type == "cpu"
    ):  # kernels would read foreign memory; the reference checks itself
        bounds = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        layer_reference.query_and_key_lengths(cu_seqlens, len(query), bounds, len(key))


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
    """Causal attention within packed sequences.

    Args:
        query: [T, num_heads, head_dim]; float32, bfloat16 or float16. Triton takes a head_dim of at most 256.
        key, value: [K, num_kv_heads, head_dim] of the same dtype; num_heads is a multiple of num_kv_heads.
        cu_seqlens: [N + 1] int32, the bounds of the sequences in `query`, which rise from 0 to T. A sequence may be empty,
            so bounds that are repeated fill up a batch. Others raise a ValueError on a CPU; on CUDA they are not checked.
        max_seqlen: the length of the longest sequence in `query`, or a larger number. On CUDA, tokens beyond are undefined.
        scale: scores are query·key·scale; None is 1/√head_dim.
        window: each position sees the last `window` positions, itself among them; None is all.
        softcap: scores become softcap·tanh(scores / softcap).
        cu_seqlens_k: [N + 1] int32, the bounds of the sequences in `key`, whose last positions are those of `query`; there
            is no gradient then. None: as in `query`.
    Returns:
        [T, num_heads, head_dim]. A result depends on its own sequence alone, and so do, on CUDA, its bits.
    """
    _check_attention(query, key, value, cu_seqlens, cu_seqlens_k)
    check_numbers(max_seqlen=max_seqlen, scale=scale, window=window, softcap=softcap)
    return implementation("attention", query).packed_attention(
        query,
        key,
        value,
        cu_seqlens,
        max_seqlen,
        scale=scale,
        window=window,
        softcap=softcap,
        cu_seqlens_k=cu_seqlens_k,
    )
