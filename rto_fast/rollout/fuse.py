"""The backbone of Llama's family with fewer kernels and less Python; weights and results stay the model's.

Projections of the same input run as one GEMM, if their weights lie side by side in memory. On a GPU a layer has nine
kernels: four GEMMs, attention, two residual sums with their norms, head norms with RoPE and the cache's stores, SwiGLU.
Other architectures run as transformers wrote them.
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn

from rto_fast.kernels import decode_reference
from rto_fast.rollout.attention import runs_triton

# Embedding, decoder layers, norm; a layer is norm, attention with whole heads rotated, norm, gated MLP (Qwen3 also
# normalises heads).
FAMILY = {"LlamaModel", "Qwen2Model", "Qwen3Model", "MistralModel"}


def _siblings(layer):
    """Projections of the same input."""
    attention, mlp = layer.self_attn, layer.mlp
    return [attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]


def fusible_layers(backbone, merged=()):
    """The decoder layers, if the backbone is of the family and all its parts are what transformers made them, but for
    projections in `merged`, whose weights are known."""
    if type(backbone).__name__ not in FAMILY or not type(backbone).__module__.startswith("transformers."):
        return []
    bypassed = [backbone, backbone.norm]
    for layer in backbone.layers:
        norms = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
        bypassed += [layer, layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm]
        bypassed += [norm for norm in norms if norm is not None]
    # Not what others put in its place, Liger's layers say.
    if any(type(module).__module__ != type(backbone).__module__ for module in bypassed):
        return []
    linears = [linear for layer in backbone.layers for group in _siblings(layer) for linear in group]
    # Nor where somebody wants to see a part's own forward: hooks, other adapters than LoRA.
    plain = [linear for linear in linears if linear not in merged]
    if any(m._forward_hooks or m._forward_pre_hooks for m in bypassed + linears):
        return []
    if any("forward" in vars(m) for m in bypassed + plain):
        return []
    silu = all(type(layer.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation") for layer in backbone.layers)
    return list(backbone.layers) if silu and all(type(linear) is nn.Linear for linear in plain) else []


def sibling_groups(backbone, merged=()):
    """Lists of projections of the same input: what one GEMM can compute."""
    return [group for layer in fusible_layers(backbone, merged) for group in _siblings(layer)]


@torch.inference_mode(False)
@torch.no_grad()
def lay_side_by_side(groups, names=("weight", "bias")):
    """Moves weights of projections of the same input into one buffer a group. The parameters stay the objects they are,
    with the same values; where they share their memory with others (an optimizer's flat buffer) they are left alone."""
    for group in groups:
        for name in names:
            tensors = [getattr(linear, name) for linear in group]
            if any(t is None or t.untyped_storage().nbytes() != t.nbytes for t in tensors):
                continue
            for tensor, part in zip(tensors, torch.cat(tensors).split([len(t) for t in tensors])):
                tensor.data = part


def _joined(tensors):
    """One view of tensors that lie side by side, stacked along the first dimension; None where they do not."""
    end = tensors[0].data_ptr()
    for tensor in tensors:
        # Neighbours by chance are in different storages, which no view spans.
        shared = tensor.untyped_storage().data_ptr() == tensors[0].untyped_storage().data_ptr()
        if not shared or tensor.data_ptr() != end or not tensor.is_contiguous() or tensor.dtype != tensors[0].dtype:
            return None
        end += tensor.nbytes
    shape = (sum(map(len, tensors)), *tensors[0].shape[1:])
    return tensors[0].detach().as_strided(shape, tensors[0].stride())


def _projection(linears, merged):
    """A function of x: what all of `linears` make of it, side by side."""
    weights, biases = [merged.get(linear, linear.weight) for linear in linears], [linear.bias for linear in linears]
    weight, bias = _joined(weights), None if None in biases else _joined(biases)
    if weight is not None and (bias is None) == all(b is None for b in biases):
        return lambda x: F.linear(x, weight, bias)
    return lambda x: torch.cat([F.linear(x, w, b) for w, b in zip(weights, biases)], -1)


class _Torch:
    """What a layer does between its GEMMs and its attention."""

    @staticmethod
    def add_norm(x, residual, norm):
        """Norm of residual + x, [T, D] each; `residual` becomes the sum. x may be None."""
        return decode_reference.add_rms_norm(x, residual, norm.weight, norm.variance_epsilon)

    @staticmethod
    def rotate(attention, qkv, heads, rope, paged):
        """Queries, keys and values of [T, all heads, head_dim], rotated by [T, 2, head_dim]; the latter two stored."""
        query, key, value = qkv.split(heads, 1)
        if norms := _head_norms(attention):
            query, key = (
                decode_reference.rms_norm(x, n.weight, n.variance_epsilon) for x, n in zip((query, key), norms)
            )
            query, key = decode_reference.rotate(query, rope), decode_reference.rotate(key, rope)
        else:
            query, key = decode_reference.rotate(qkv[:, : heads[0] + heads[1]], rope).split(heads[:2], 1)
        paged.store(attention.layer_idx, key, value)
        return query, key, value

    @staticmethod
    def gated(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)


class _Triton:
    """The same in one kernel each. Of SwiGLU it is Liger's, where that is installed; its norms and RoPE would take a layer
    four kernels and two copies more."""

    def __init__(self):
        self.gated = _Torch.gated
        if find_spec("liger_kernel"):
            from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

            self.gated = LigerFusedGateUpSiLUMulFunction.apply

    @staticmethod
    def add_norm(x, residual, norm):
        from rto_fast.kernels import decode_layer

        return decode_layer.add_rms_norm(x, residual, norm.weight, norm.variance_epsilon)

    @staticmethod
    def rotate(attention, qkv, heads, rope, paged):
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


def _head_norms(attention):
    """Qwen3's norms of queries and keys, or None."""
    return (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None


def rope_table(backbone, layers, longest, table):
    """[positions, 2, head_dim], cosines and sines (see `decode_reference.rotate`) of at least `longest` positions, as the
    backbone's own module gives them; `table` itself if it is long enough: CUDA graphs hold its address. None of a backbone
    that cannot be fused.

    Args:
        layers: of `fusible_layers`.
    """
    if not layers:
        return None
    weight, head_dim = backbone.embed_tokens.weight, layers[0].self_attn.head_dim
    if table is not None and len(table) >= longest and (table.device, table.dtype) == (weight.device, weight.dtype):
        return table
    positions = torch.arange(1 << (longest - 1).bit_length(), device=weight.device)
    cos, sin = backbone.rotary_emb(weight[:1, None], positions[None])
    if cos.shape[-1] != head_dim:  # only a part of a head is rotated
        return None
    half = sin[0, :, : head_dim // 2]
    return torch.stack([cos[0], torch.cat([-half, half], -1)], 1)


def _layer_forward(layer, next_norm, qkv, gate_up, kernels):
    """(x normed, residual [T, D], rope, paged) → the same of the next layer, whose first norm is `next_norm`."""
    attention, mlp = layer.self_attn, layer.mlp
    dim = attention.head_dim
    kv_heads = attention.k_proj.out_features // dim
    heads = [attention.q_proj.out_features // dim, kv_heads, kv_heads]
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))

    def forward(x, residual, rope, paged):
        query, key, value = kernels.rotate(attention, qkv(x).view(len(x), -1, dim), heads, rope, paged)
        x = paged.attend(attention, query, key, value, attention.scaling, window, None)
        x = kernels.add_norm(attention.o_proj(x.reshape(len(x), -1)), residual, layer.post_attention_layernorm)
        return kernels.add_norm(mlp.down_proj(kernels.gated(gate_up(x))), residual, next_norm)

    return forward


def fused_backbone(backbone, layers, table, merged):
    """A function (input_ids [T], position_ids [T], paged) → last hidden states [T, D], good while the weights stay where
    they are; None where the backbone has to run as it is.

    Args:
        layers: of `fusible_layers`. table: of `rope_table`. merged: {projection: its weight}, where that is not
            `projection.weight`.
    """
    if table is None:
        return None
    forwards = []
    kernels = _Triton() if runs_triton(table) else _Torch()
    norms = [*(layer.input_layernorm for layer in layers), backbone.norm]
    for layer, next_norm in zip(layers, norms[1:]):
        qkv, gate_up = (_projection(group, merged) for group in _siblings(layer))
        forwards.append(_layer_forward(layer, next_norm, qkv, gate_up, kernels))

    def forward(input_ids, position_ids, paged):
        residual, rope = backbone.embed_tokens(input_ids), table[position_ids]
        x = kernels.add_norm(None, residual, norms[0])
        for layer in forwards:
            x = layer(x, residual, rope, paged)
        return x

    return forward
