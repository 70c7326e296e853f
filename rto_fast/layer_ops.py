"""The ops of a decoder layer between its GEMMs, with gradients: norms, rotary embedding, gated activation, attention.

All tensors are packed: T tokens of N sequences back to back. CUDA tensors run the Triton kernels in `kernels/`, CPU tensors
the plain torch of `kernels/layer_reference.py`; with TRITON_INTERPRET=1, CPU tensors run the Triton code in its
interpreter. Decoding, prefill, scoring and training run the same kernels. Each op rounds where transformers' modules round.

Gradients of weights (of norms) have the weight's dtype. If a weight has an attribute `main_grad`, a float32 tensor of its
shape, its gradient is added to that tensor instead, and autograd gets none: no 16-bit rounding, no kernel that collects it.
"""

from types import ModuleType

from torch import Tensor

from rto_fast.kernels import layer_reference
from rto_fast.kernels.layer_reference import Activation

__all__ = ["Activation", "add_rms_norm", "gated_activation", "packed_attention", "rms_norm", "rotary_embedding"]


def _implementation(module: str, tensor: Tensor) -> ModuleType:
    """The Triton module of that name for CUDA tensors, the reference otherwise."""
    return layer_reference


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """RMSNorm of the rows of x: x / √(mean(x²) + eps) · weight, computed in float32.

    Args:
        x: [T, D] float32, bfloat16 or float16.
        weight: [D] of the same dtype.
        eps: is added to the mean square.
        unit_offset: Gemma's form: the weight is stored minus 1, and the product with it is not rounded before.
    Returns:
        [T, D] of x's dtype.
    """
    return _implementation("rms_norm", x).rms_norm(x, weight, eps, unit_offset)


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
    return _implementation("rms_norm", x).add_rms_norm(x, residual, weight, eps, unit_offset, multiplier)


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
            are rotated. See `kernels/layer_reference.py::rotate`. None: nothing is rotated.
        query_norm, key_norm: [head_dim], weights of the RMSNorms of each head, or None.
        eps, unit_offset: of these norms, see `rms_norm`.
    Returns:
        query [T, num_heads, head_dim], key and value [T, num_kv_heads, head_dim].
    """
    return _implementation("rotary", qkv).rotary_embedding(
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
    return _implementation("gated", gate_up).gated_activation(gate_up, activation)


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
        query: [T, num_heads, head_dim].
        key, value: [K, num_kv_heads, head_dim]; num_heads is a multiple of num_kv_heads.
        cu_seqlens: [N + 1] int32, the bounds of the sequences in `query`.
        max_seqlen: the length of the longest sequence in `query`, or a larger number.
        scale: scores are query·key·scale; None is 1/√head_dim.
        window: each position sees the last `window` positions, itself among them; None is all.
        softcap: scores become softcap·tanh(scores / softcap).
        cu_seqlens_k: [N + 1] int32, the bounds of the sequences in `key`, whose last positions are those of `query`; there
            is no gradient then. None: as in `query`.
    Returns:
        [T, num_heads, head_dim].
    """
    return _implementation("attention", query).packed_attention(
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
