"""The backbone of Llama's family with fewer kernels and less Python; weights and results stay the model's.

Projections of the same input run as one GEMM, where their weights lie side by side in memory; on a GPU Liger's kernels
take RMSNorm, RoPE and SwiGLU, where it is installed. Other architectures run as transformers wrote them.
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn

# Embedding, decoder layers, norm; a layer is norm, attention with whole heads rotated, norm, gated MLP (Qwen3 also
# normalises heads).
FAMILY = {"LlamaModel", "Qwen2Model", "Qwen3Model", "MistralModel"}


def _siblings(layer):
    """Projections of the same input."""
    attention, mlp = layer.self_attn, layer.mlp
    return [attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]


def _layers(backbone):
    """The decoder layers, if the backbone is of the family and all its parts are what transformers made them."""
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
    # Nor where somebody wants to see a part's own forward: LoRA, hooks.
    bypassed += linears
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in bypassed):
        return []
    silu = all(type(layer.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation") for layer in backbone.layers)
    return list(backbone.layers) if silu and all(type(linear) is nn.Linear for linear in linears) else []


@torch.no_grad()
def lay_side_by_side(backbone):
    """Moves weights of projections of the same input into one buffer each. The parameters stay the objects they are,
    with the same values; where they share their memory with others (an optimizer's flat buffer) they are left alone."""
    for layer in _layers(backbone):
        for group in _siblings(layer):
            for name in ("weight", "bias"):
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


class _Joined:
    """Projections of the same input as one."""

    def __init__(self, linears):
        self.weight, self.bias = _joined([x.weight for x in linears]), None
        self.has_bias = linears[0].bias is not None
        if self.has_bias and all(x.bias is not None for x in linears):
            self.bias = _joined([x.bias for x in linears])

    @property
    def complete(self):
        return self.weight is not None and self.has_bias == (self.bias is not None)

    def __call__(self, x):
        return F.linear(x, self.weight, self.bias)


def _torch_norm(x, norm):
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(norm.variance_epsilon))
    return norm.weight * (wide * scale).to(x.dtype)


def _torch_rope(query, key, cos, sin):
    """[T, heads, D] each; cos and sin [1, T, D], whose halves are alike."""
    half = cos.shape[-1] // 2
    cos, sin = cos[0, :, None, :half], sin[0, :, None, :half]

    def rotate(x):
        a, b = x[..., :half], x[..., half:]
        return torch.cat((torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)), -1)

    return rotate(query), rotate(key)


def _torch_gated(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def _kernels(is_cuda):
    """(norm, rope, gated product): Liger's where they run."""
    if not (is_cuda and find_spec("liger_kernel")):
        return _torch_norm, _torch_rope, _torch_gated
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    def norm(x, module):
        return LigerRMSNormFunction.apply(x, module.weight, module.variance_epsilon)

    def rope(query, key, cos, sin):
        query, key, *_ = LigerRopeFunction.apply(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin)
        return query[0].transpose(0, 1), key[0].transpose(0, 1)

    return norm, rope, LigerFusedGateUpSiLUMulFunction.apply


def _layer_forward(layer, qkv, gate_up, kernels):
    norm, rope, gated = kernels
    attention, mlp = layer.self_attn, layer.mlp
    dim = attention.head_dim
    heads, kv_heads = attention.q_proj.out_features // dim, attention.k_proj.out_features // dim
    head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))

    def forward(hidden_states, position_embeddings, paged):
        x = qkv(norm(hidden_states, layer.input_layernorm)).view(-1, heads + 2 * kv_heads, dim)
        query, key, value = x.split((heads, kv_heads, kv_heads), 1)
        if head_norms[0] is not None:
            query, key = (norm(x, module) for x, module in zip((query, key), head_norms))
        query, key = rope(query, key, *position_embeddings)
        x = paged.attend(attention, query, key, value, attention.scaling, window, None)
        hidden_states = hidden_states + attention.o_proj(x.reshape(1, len(x), -1))
        x = gate_up(norm(hidden_states, layer.post_attention_layernorm))
        return hidden_states + mlp.down_proj(gated(x))

    return forward


def fused_backbone(backbone):
    """A function (input_ids [T], position_ids [T], paged) → last hidden states [T, D], good while the weights stay where
    they are; None where the backbone has to run as it is."""
    kernels, forwards = _kernels(next(backbone.parameters()).is_cuda), []
    for layer in _layers(backbone):
        qkv, gate_up = map(_Joined, _siblings(layer))
        if not (qkv.complete and gate_up.complete):
            return None
        forwards.append(_layer_forward(layer, qkv, gate_up, kernels))
    if not forwards:
        return None

    def forward(input_ids, position_ids, paged):
        x = backbone.embed_tokens(input_ids[None])
        position_embeddings = backbone.rotary_emb(x, position_ids[None])
        for layer in forwards:
            x = layer(x, position_embeddings, paged)
        return kernels[0](x, backbone.norm)[0]

    return forward
