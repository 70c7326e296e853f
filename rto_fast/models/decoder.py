"""Our decoder: one forward pass over packed tokens for decoding, prefill, scoring and training, forward and backward.

The weights are those of the transformers model. Between the GEMMs run the ops of `rto_fast.layer_ops`; projections of one
input are one GEMM. A *view* says how a layer attends: `Packed` for scoring and training, `rto_fast.rollout.attention` has
the others. A layer of Llama has nine kernels forward: four GEMMs, attention, RoPE, the gate and two norms, each with the
residual sum before it.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rto_fast import layer_ops
from rto_fast.models.decoder_families import (
    AttentionSpec,
    DecoderSpec,
    LayerSpec,
    Norm,
    Watch,
    describe,
    reason_against,
)
from rto_fast.models.joined_linear import JoinedLinear
from rto_fast.models.precision import runs_liger
from rto_fast.models.rope import RopeTables

Linear = Callable[[Tensor], Tensor]


class View(Protocol):
    """What the tokens of a pass attend to."""

    def attend(self, attention: AttentionSpec, qkv: Tensor, rope: Tensor | None) -> Tensor:
        """Rotates and attends: qkv [T, heads, head_dim], rope [T, 2, R] → [T, num_heads · head_dim]."""
        ...


class Packed:
    """Attention within packed sequences.

    Args:
        cu_seqlens: [N + 1] int32, bounds of the sequences.
        max_seqlen: tokens of the longest one, or a larger number.
    """

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int):
        self.cu_seqlens, self.max_seqlen = cu_seqlens, max_seqlen

    def attend(self, attention: AttentionSpec, qkv: Tensor, rope: Tensor | None) -> Tensor:
        query, key, value = attention.rotated(qkv, rope)
        return layer_ops.packed_attention(
            query,
            key,
            value,
            self.cu_seqlens,
            self.max_seqlen,
            scale=attention.scale,
            window=attention.window,
            softcap=attention.softcap,
        ).flatten(1)


class _Layer:
    """A decoder layer.

    Args:
        linear: makes a function of the linear layers of one input, which returns their outputs side by side.
    """

    def __init__(self, spec: LayerSpec, linear: Callable[[list[Any]], Linear]):
        self.spec = spec
        self.qkv, self.output = linear(spec.qkv), linear(spec.output)
        self.gate_up, self.down = linear(spec.gate_up), linear(spec.down)

    def __call__(self, x: Tensor, residual: Tensor, rope: dict[str, Tensor], view: View) -> tuple[Tensor, Tensor]:
        """From the normed input x [T, D] to the output of the MLP; the next norm adds the residual stream.

        Args:
            residual: [T, D], the residual stream at the layer's input.
        Returns:
            (the MLP's output, the residual stream before it).
        """
        spec = self.spec
        qkv = self.qkv(x).view(len(x), -1, spec.attention.head_dim)
        x = self.output(view.attend(spec.attention, qkv, None if spec.rope is None else rope[spec.rope]))
        if spec.attention_norm is not None:
            x = spec.attention_norm(x)
        x, residual = spec.mlp_norm.of_sum(x, residual, spec.residual_multiplier)
        gate_up = self.gate_up(x)
        x = self.down(layer_ops.implementation("gated", gate_up).gated_activation(gate_up, spec.activation))
        return (x if spec.output_norm is None else spec.output_norm(x)), residual

    def whole(self, residual: Tensor, rope: dict[str, Tensor], view: View) -> Tensor:
        """The residual stream [T, D] after the layer. A checkpoint keeps one tensor of this form, and two of the other."""
        x, residual = self(self.spec.input_norm(residual), residual, rope, view)
        multiplier = self.spec.residual_multiplier
        return residual + (x if multiplier == 1.0 else x * multiplier)

    @property
    def is_checkpointed(self) -> bool:
        """As transformers decides it."""
        module = self.spec.module
        return module.gradient_checkpointing and module.training and torch.is_grad_enabled()


class Decoder:
    """The layers of a model.

    Args:
        spec: what they consist of.
        ropes: the tables of the model.
        linear: see `_Layer`.
    """

    def __init__(self, spec: DecoderSpec, ropes: RopeTables, linear: Callable[[list[Any]], Linear] = JoinedLinear):
        self.spec, self.ropes = spec, ropes
        self.layers = [_Layer(layer, linear) for layer in spec.layers]
        self.norms: list[Norm] = [*(layer.input_norm for layer in spec.layers), spec.norm]

    def __call__(self, input_ids: Tensor, position_ids: Tensor, view: View, *, longest: int) -> Tensor:
        """The last hidden states of a pass, [T, D].

        Args:
            input_ids: [T] int64.
            position_ids: [T] int64.
            longest: the largest position plus 1, or a larger number. RoPE of a type that depends on the length of a
                sequence takes it for this length.
        """
        residual = self.spec.embedding(input_ids)
        if self.spec.embedding_multiplier != 1.0:
            residual = residual * self.spec.embedding_multiplier
        rope = self.ropes.rows(position_ids, longest, residual)
        if self.layers[0].is_checkpointed:
            for layer in self.layers:
                residual = checkpoint(layer.whole, residual, rope, view, use_reentrant=False, preserve_rng_state=False)
            return self.norms[-1](residual)
        x = self.norms[0](residual)
        for layer, next_norm in zip(self.layers, self.norms[1:]):
            x, residual = layer(x, residual, rope, view)
            x, residual = next_norm.of_sum(x, residual, layer.spec.residual_multiplier)
        return x

    def with_linear(self, linear: Callable[[list[Any]], Linear]) -> "Decoder":
        """The same layers and tables with other linear layers."""
        return Decoder(self.spec, self.ropes, linear)


class _Known:
    """What is known of a backbone. The backbone holds it, because hooks and parameters may lead from its parts back to it.

    A copy of the backbone begins anew.
    """

    def __init__(self) -> None:
        self.refused: str | None = None
        self.watch: Watch | None = None
        self.decoder: Decoder | None = None

    def __deepcopy__(self, memo: Any) -> "_Known":
        return _Known()

    def __reduce__(self) -> Any:
        return _Known, ()

    @classmethod
    def of(cls, backbone: nn.Module) -> "_Known":
        return backbone.__dict__.setdefault("_rto_fast_decoder", cls())


def _decoder_or_reason(model: PreTrainedModel) -> Decoder | str:
    backbone: Any = model.base_model
    known = _Known.of(backbone)
    if known.refused is not None:
        return known.refused
    if known.decoder is not None and known.watch is not None and known.watch.is_unchanged():
        return known.decoder
    reason = reason_against(backbone)
    if reason is not None:
        return reason
    spec = describe(backbone)
    known.watch, known.decoder = Watch(backbone), Decoder(spec, RopeTables(spec.rotary, spec.rope_names))
    return known.decoder


def decoder_of(model: PreTrainedModel) -> Decoder | None:
    """Our decoder of a model, which computes what the model's backbone computes; None if we have none.

    It follows what happens to the model: it is made anew if parts of the model were replaced, and there is none while
    somebody hooks them.

    Args:
        model: a transformers model or an `rto_fast.models.lora.Adapter`.
    """
    found = _decoder_or_reason(model)
    return None if isinstance(found, str) else found


def refuse(model: PreTrainedModel, reason: str) -> None:
    """Makes a model run transformers' layers from now on."""
    backbone: Any = model.base_model
    _Known.of(backbone).refused = reason


def layers_of(model: PreTrainedModel) -> str:
    """Which layers a model runs, for the log."""
    found = _decoder_or_reason(model)
    if isinstance(found, str):
        kernels = " with Liger's kernels" if runs_liger(model) else ""
        return f"transformers' layers{kernels}: {found}"
    return f"the fused decoder ({found.spec.family.title})"
