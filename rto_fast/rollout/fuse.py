"""Backbones of the Llama family with fewer kernels and less Python; the weights and the results are those of the model.

Projections of the same input run as one GEMM, if their weights lie side by side in memory. On a GPU a layer has nine
kernels: four GEMMs, attention, two residual sums with their norms, head norms with RoPE and the stores to the cache, and
SwiGLU. Other architectures run as transformers implements them.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rto_fast.kernels import layer_reference
from rto_fast.models.placement import joined
from rto_fast.rollout.attention import CacheView, Scores, runs_triton

# These consist of embedding, decoder layers and norm. A layer is norm, attention that rotates whole heads (and in Qwen3
# normalises them), norm and gated MLP.
FAMILY = {"LlamaModel", "Qwen2Model", "Qwen3Model", "MistralModel"}


Projection = Callable[[Tensor], Tensor]
Layer = Callable[[Tensor, Tensor, Tensor, CacheView], Tensor]


def siblings(layer: Any) -> tuple[list[Any], list[Any]]:
    """The projections of a layer that have the same input, which one GEMM can compute: (query, key, value), (gate, up)."""
    attention, mlp = layer.self_attn, layer.mlp
    return [attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]


def fusible_layers(backbone: Any, merged: Collection[nn.Module] = ()) -> list[Any]:
    """The decoder layers if they can be fused, else an empty list.

    They can be fused if the backbone is of the family and nobody has changed its parts.

    Args:
        merged: projections with LoRA, which are exempt from this because their merged weights are known.
    """
    if type(backbone).__name__ not in FAMILY or not type(backbone).__module__.startswith("transformers."):
        return []
    bypassed = [backbone, backbone.norm]
    for layer in backbone.layers:
        norms = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
        bypassed += [layer, layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm]
        bypassed += [norm for norm in norms if norm is not None]
    # Others, such as Liger, may have replaced a module,
    if any(type(module).__module__ != type(backbone).__module__ for module in bypassed):
        return []
    linears = [linear for layer in backbone.layers for group in siblings(layer) for linear in group]
    # or have put hooks or adapters on its forward, which fused layers would not call.
    plain = [linear for linear in linears if linear not in merged]
    if any(m._forward_hooks or m._forward_pre_hooks for m in bypassed + linears):
        return []
    if any("forward" in vars(m) for m in bypassed + plain):
        return []
    silu = all(type(layer.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation") for layer in backbone.layers)
    return list(backbone.layers) if silu and all(type(linear) is nn.Linear for linear in plain) else []


def _projection(linears: list[Any], merged: Mapping[nn.Module, Tensor]) -> Callable[[Tensor], Tensor]:
    """A function that computes the outputs of all `linears` for x, side by side."""
    weights, biases = [merged.get(linear, linear.weight) for linear in linears], [linear.bias for linear in linears]
    weight, bias = joined(weights), None if None in biases else joined(biases)
    if weight is not None and (bias is None) == all(b is None for b in biases):
        return lambda x: F.linear(x, weight, bias)
    return lambda x: torch.cat([F.linear(x, w, b) for w, b in zip(weights, biases)], -1)


class _Torch:
    """What a layer computes between its GEMMs and its attention, in plain torch."""

    @staticmethod
    def add_norm(x: Tensor | None, residual: Tensor, norm: Any) -> Tensor:
        """Norm of residual + x, [T, D] each; `residual` becomes the sum. x may be None, for nothing to add."""
        if x is not None:
            residual += x
        return layer_reference.rms_norm(residual, norm.weight, norm.variance_epsilon)

    @staticmethod
    def rotate(attention: Any, qkv: Tensor, heads: list[int], rope: Tensor, paged: Any) -> Sequence[Tensor]:
        """Rotates the queries and keys of qkv [T, all heads, head_dim] by rope [T, 2, head_dim].

        Stores keys and values in the cache. Returns queries, keys and values.
        """
        query, key, value = qkv.split(heads, 1)
        if norms := _head_norms(attention):
            query, key = (
                layer_reference.rms_norm(x, n.weight, n.variance_epsilon) for x, n in zip((query, key), norms)
            )
            query, key = layer_reference.rotate(query, rope), layer_reference.rotate(key, rope)
        else:
            query, key = layer_reference.rotate(qkv[:, : heads[0] + heads[1]], rope).split(heads[:2], 1)
        paged.store(attention.layer_idx, key, value)
        return query, key, value

    @staticmethod
    def gated(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)


class _Triton:
    """The same, in one Triton kernel each.

    SwiGLU is Liger's kernel, if Liger is installed. Its norms and RoPE would cost a layer four more kernels and two copies.
    """

    def __init__(self) -> None:
        self.gated = _Torch.gated
        if find_spec("liger_kernel"):
            from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

            self.gated = LigerFusedGateUpSiLUMulFunction.apply

    @staticmethod
    def add_norm(x: Tensor | None, residual: Tensor, norm: Any) -> Tensor:
        from rto_fast.kernels import decode_layer

        return decode_layer.add_rms_norm(x, residual, norm.weight, norm.variance_epsilon)

    @staticmethod
    def rotate(attention: Any, qkv: Tensor, heads: list[int], rope: Tensor, paged: Any) -> Sequence[Tensor]:
        from rto_fast.kernels import decode_layer

        norms = _head_norms(attention)
        options = {}
        if norms:
            options = dict(query_norm=norms[0].weight, key_norm=norms[1].weight, eps=norms[0].variance_epsilon)
        decode_layer.rotate_and_store(
            qkv,
            rope,
            paged.cache.addresses[attention.layer_idx],
            paged.slot_mapping,
            num_heads=heads[0],
            num_kv_heads=heads[1],
            page_size=paged.cache.page_size,
            **options,
        )
        return qkv.split(heads, 1)


def _head_norms(attention: Any) -> tuple[Any, Any] | None:
    """Qwen3's norms of queries and keys, or None."""
    return (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None


def rope_table(backbone: Any, layers: list[Any], longest: int, table: Tensor | None) -> Tensor | None:
    """Cosines and sines of at least `longest` positions from the backbone's own module, [positions, 2, head_dim].

    `layer_reference.rotate` describes the layout. Returns None for a backbone that cannot be fused.

    Args:
        layers: those of `fusible_layers`.
        table: an earlier table. It is returned if it is long enough, because CUDA graphs hold its address.
    """
    if not layers:
        return None
    weight, head_dim = backbone.embed_tokens.weight, layers[0].self_attn.head_dim
    if table is not None and len(table) >= longest and (table.device, table.dtype) == (weight.device, weight.dtype):
        return table
    positions = torch.arange(1 << (longest - 1).bit_length(), device=weight.device)
    cos, sin = backbone.rotary_emb(weight[:1, None], positions[None])
    if cos.shape[-1] != head_dim:  # only a part of each head is rotated
        return None
    half = sin[0, :, : head_dim // 2]
    return torch.stack([cos[0], torch.cat([-half, half], -1)], 1)


def _layer_forward(layer: Any, next_norm: Any, qkv: Projection, gate_up: Projection, kernels: Any) -> Layer:
    """A function (normed x [T, D], residual [T, D], rope, paged) → normed x of the next layer, by its norm `next_norm`."""
    attention, mlp = layer.self_attn, layer.mlp
    dim = attention.head_dim
    kv_heads = attention.k_proj.out_features // dim
    heads = [attention.q_proj.out_features // dim, kv_heads, kv_heads]
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    scores = Scores(attention.scaling, window, None)

    def forward(x: Tensor, residual: Tensor, rope: Tensor, paged: Any) -> Tensor:
        query, key, value = kernels.rotate(attention, qkv(x).view(len(x), -1, dim), heads, rope, paged)
        x = paged.attend(attention, query, key, value, scores)
        x = kernels.add_norm(attention.o_proj(x.reshape(len(x), -1)), residual, layer.post_attention_layernorm)
        return kernels.add_norm(mlp.down_proj(kernels.gated(gate_up(x))), residual, next_norm)

    return forward


def fused_backbone(
    backbone: Any, layers: list[Any], table: Tensor | None, merged: Mapping[nn.Module, Tensor]
) -> Callable[..., Tensor] | None:
    """A function (input_ids [T], position_ids [T], paged) → last hidden states [T, D]; None if there is no `table`.

    The function holds the addresses of the weights, so it is valid only while these are not moved.

    Args:
        layers: those of `fusible_layers`.
        table: that of `rope_table`.
        merged: the merged weight of each projection with LoRA.
    """
    if table is None:
        return None
    forwards = []
    kernels = _Triton() if runs_triton(table) else _Torch()
    norms = [*(layer.input_layernorm for layer in layers), backbone.norm]
    for layer, next_norm in zip(layers, norms[1:]):
        qkv, gate_up = (_projection(group, merged) for group in siblings(layer))
        forwards.append(_layer_forward(layer, next_norm, qkv, gate_up, kernels))

    def forward(input_ids: Tensor, position_ids: Tensor, paged: Any) -> Tensor:
        residual, rope = backbone.embed_tokens(input_ids), table[position_ids]
        x = kernels.add_norm(None, residual, norms[0])
        for layer in forwards:
            x = layer(x, residual, rope, paged)
        return x

    return forward
