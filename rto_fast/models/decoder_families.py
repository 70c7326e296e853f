"""What the decoder layers of a model consist of, as data: for the families that run our layers (`rto_fast.models.decoder`).

A model belongs to a family if transformers' class of its backbone does and nobody has changed its parts.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from rto_fast import layer_ops
from rto_fast.layer_ops import Activation
from rto_fast.models.joined_linear import has_hooks


@dataclass(frozen=True)
class Family:
    """How the layers of a family differ from Llama's, where their modules do not say it.

    Args:
        title: in messages.
        unit_offset: norms store their weight minus 1.
        softcap: attention is given `attn_logit_softcapping`. Gemma-3's layers have it, too, and do not use it.
        window: the owner of the `sliding_window` that attention is given: each layer's attention, or the configuration.
    """

    title: str
    unit_offset: bool = False
    softcap: bool = False
    window: Literal["attention", "config"] | None = None


FAMILIES = {
    "LlamaModel": Family("Llama"),
    "MistralModel": Family("Mistral", window="config"),
    "Qwen2Model": Family("Qwen2", window="attention"),
    "Qwen3Model": Family("Qwen3", window="attention"),
    "Gemma2Model": Family("Gemma-2", unit_offset=True, softcap=True, window="attention"),
    "Gemma3TextModel": Family("Gemma-3", unit_offset=True, window="attention"),
    "Phi3Model": Family("Phi-3", window="config"),
    "SmolLM3Model": Family("SmolLM3", window="attention"),
    "GraniteModel": Family("Granite"),
}


@dataclass(frozen=True)
class Norm:
    """An RMSNorm; see `rto_fast.layer_ops.rms_norm`."""

    module: Any
    eps: float
    unit_offset: bool

    def __call__(self, x: Tensor) -> Tensor:
        ops = layer_ops.implementation("rms_norm", x)
        return ops.rms_norm(x, self.module.weight, self.eps, self.unit_offset)

    def of_sum(self, x: Tensor, residual: Tensor, multiplier: float) -> tuple[Tensor, Tensor]:
        """See `rto_fast.layer_ops.add_rms_norm`."""
        ops = layer_ops.implementation("rms_norm", x)
        return ops.add_rms_norm(x, residual, self.module.weight, self.eps, self.unit_offset, multiplier)


@dataclass(frozen=True)
class AttentionSpec:
    """The attention of a layer, from the output of its projections to the input of the next one.

    `scale`, `window` and `softcap` are those of `rto_fast.layer_ops.packed_attention`.
    """

    layer: int  # its number, which the KV cache knows
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None
    query_norm: Norm | None
    key_norm: Norm | None

    @property
    def heads(self) -> list[int]:
        """The numbers of heads of queries, keys and values."""
        return [self.num_heads, self.num_kv_heads, self.num_kv_heads]

    @property
    def rotation(self) -> dict[str, Any]:
        """The keyword arguments of `rto_fast.layer_ops.rotary_embedding`."""
        options: dict[str, Any] = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads}
        if self.query_norm is not None and self.key_norm is not None:
            options |= {
                "query_norm": self.query_norm.module.weight,
                "key_norm": self.key_norm.module.weight,
                "eps": self.query_norm.eps,
                "unit_offset": self.query_norm.unit_offset,
            }
        return options

    def rotated(self, qkv: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of qkv [T, heads, head_dim], rotated by rope [T, 2, R]."""
        return layer_ops.implementation("rotary", qkv).rotary_embedding(qkv, rope, **self.rotation)


@dataclass(frozen=True)
class LayerSpec:
    """A decoder layer. Projections of one input are together in a list."""

    module: Any  # transformers' layer
    input_norm: Norm
    qkv: list[Any]
    attention: AttentionSpec
    rope: str | None  # its table of `rto_fast.models.rope.RopeTables`; None: nothing is rotated
    output: list[Any]
    attention_norm: Norm | None  # of the attention's output, before it is added
    mlp_norm: Norm
    gate_up: list[Any]
    activation: Activation
    down: list[Any]
    output_norm: Norm | None  # of the MLP's output, before it is added
    residual_multiplier: float


@dataclass(frozen=True)
class DecoderSpec:
    """A backbone."""

    family: Family
    embedding: Any
    embedding_multiplier: float
    layers: list[LayerSpec]
    norm: Norm
    rotary: Any
    rope_names: list[str]  # of its tables


def projections(layer: Any) -> list[list[Any]]:
    """The linear layers of transformers' decoder layer: qkv, output, gate and up, down. Those of one input are together."""
    attention, mlp = layer.self_attn, layer.mlp
    if hasattr(attention, "qkv_proj"):
        return [[attention.qkv_proj], [attention.o_proj], [mlp.gate_up_proj], [mlp.down_proj]]
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    return [qkv, [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]


def _owned(backbone: Any) -> Iterator[Any]:
    """The modules of a backbone's own classes whose work our layers do."""
    yield from (backbone, backbone.norm, backbone.rotary_emb)
    for layer in backbone.layers:
        attention = layer.self_attn
        yield from (layer, attention, layer.mlp)
        yield from (m for name, m in layer._modules.items() if name.endswith("layernorm"))
        yield from (m for name, m in attention._modules.items() if name in ("q_norm", "k_norm"))


def parts(backbone: Any) -> list[Any]:
    """All modules but activations whose work our layers do, or an empty list if the backbone is of no family."""
    if type(backbone).__name__ not in FAMILIES or not type(backbone).__module__.startswith("transformers.models."):
        return []
    linears = [linear for layer in backbone.layers for group in projections(layer) for linear in group]
    return [*_owned(backbone), *linears]


def reason_against(backbone: Any) -> str | None:
    """Why our layers would not compute what the backbone computes; None if they would."""
    found, home = parts(backbone), type(backbone).__module__
    if not found:
        return f"{type(backbone).__name__} is of no family that has ours"
    for module in found:
        kind = type(module)
        # Others, such as Liger, may have replaced a module,
        if kind.__module__ != home and kind is not nn.Linear and not _is_lora(module):
            return f"{kind.__name__} is not {home.rpartition('.')[2]}'s"
        # or have put hooks or another method on it, which our layers would not call.
        if has_hooks(module.__dict__):
            return f"{kind.__name__} has hooks"
        if "forward" in module.__dict__:
            return f"the forward method of {kind.__name__} was replaced"
    return _unlike_ours(backbone)


class Watch:
    """Tells in 0.1 ms whether a backbone without a `reason_against` it is still as it was: the same modules, no hooks."""

    def __init__(self, backbone: Any):
        found = [*parts(backbone), *(_activation_module(layer.mlp) for layer in backbone.layers), backbone.layers]
        self.attributes = [module.__dict__ for module in found]
        self.children = [(m._modules, list(m._modules.values())) for m in found if m._modules]

    def is_unchanged(self) -> bool:
        # Attributes are read from `__dict__`, because looking for a child as an attribute takes ten times as long.
        if any("forward" in attributes or has_hooks(attributes) for attributes in self.attributes):
            return False
        return all(list(modules.values()) == children for modules, children in self.children)


def _is_lora(module: Any) -> bool:
    return hasattr(module, "lora_A") and type(getattr(module, "base_layer", None)) is nn.Linear


def _unlike_ours(backbone: Any) -> str | None:
    """What the configuration asks for and our layers do not have; None if there is nothing."""
    for layer in backbone.layers:
        attention = layer.self_attn
        if not attention.is_causal:
            return "its attention is not causal"
        if getattr(attention, "attention_dropout", 0.0):
            return "its attention has dropout"
        if any(isinstance(module, nn.Dropout) and module.p for module in layer._modules.values()):
            return "it has dropout"
        if _activation(layer.mlp) is None:
            return f"its activation is {type(_activation_module(layer.mlp)).__name__}"
        if has_hooks(_activation_module(layer.mlp).__dict__):
            return "its activation has hooks"
    return None


def describe(backbone: Any) -> DecoderSpec:
    """What a backbone without a `reason_against` it consists of."""
    family = FAMILIES[type(backbone).__name__]
    types = getattr(backbone.config, "layer_types", None)
    by_type = types is not None and isinstance(backbone.rotary_emb.rope_type, dict)  # Gemma-3 has two kinds of RoPE
    names = [types[i] if types is not None and by_type else "" for i in range(len(backbone.layers))]
    return DecoderSpec(
        family,
        backbone.embed_tokens,
        getattr(backbone, "embedding_multiplier", 1.0),
        [_layer(layer, family, i, name) for i, (layer, name) in enumerate(zip(backbone.layers, names))],
        _norm(backbone.norm, family),
        backbone.rotary_emb,
        sorted(set(names)),
    )


def _layer(layer: Any, family: Family, number: int, rope: str) -> LayerSpec:
    qkv, output, gate_up, down = projections(layer)
    activation = _activation(layer.mlp)
    assert activation is not None  # else there is a `reason_against`
    four = hasattr(layer, "pre_feedforward_layernorm")  # Gemma's norms, before and after both blocks
    return LayerSpec(
        module=layer,
        input_norm=_norm(layer.input_layernorm, family),
        qkv=qkv,
        attention=_attention(layer.self_attn, family, number),
        rope=rope if getattr(layer.self_attn, "use_rope", True) else None,
        output=output,
        attention_norm=_norm(layer.post_attention_layernorm, family) if four else None,
        mlp_norm=_norm(layer.pre_feedforward_layernorm if four else layer.post_attention_layernorm, family),
        gate_up=gate_up,
        activation=activation,
        down=down,
        output_norm=_norm(layer.post_feedforward_layernorm, family) if four else None,
        residual_multiplier=getattr(layer, "residual_multiplier", 1.0),
    )


def _attention(attention: Any, family: Family, number: int) -> AttentionSpec:
    config, dim = attention.config, attention.head_dim
    owner = {"attention": attention, "config": config, None: None}[family.window]
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    query_norm, key_norm = (None if norm is None else _norm(norm, family) for norm in norms)
    return AttentionSpec(
        layer=number,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=dim,
        scale=attention.scaling,
        window=getattr(owner, "sliding_window", None),
        softcap=config.attn_logit_softcapping if family.softcap else None,
        query_norm=query_norm,
        key_norm=key_norm,
    )


def _norm(module: Any, family: Family) -> Norm:
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return Norm(module, eps, family.unit_offset)


def _activation_module(mlp: Any) -> Any:
    return mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn


def _activation(mlp: Any) -> Activation | None:
    module = _activation_module(mlp)
    name, function = type(module).__name__, getattr(module, "act", None)
    if name in ("SiLU", "SiLUActivation"):
        return "silu"
    if name in ("GELUTanh", "PytorchGELUTanh") and isinstance(function, functools.partial):
        return "gelu_tanh"
    return "gelu" if name == "GELUActivation" and function is F.gelu else None
