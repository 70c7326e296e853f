"""Compares our decoder with transformers' layers when a model is loaded; where they disagree, the model runs the latter."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rto_fast.batch import PackedBatch, pack_whole
from rto_fast.errors import error_text
from rto_fast.models.agreement import FACTOR, compare_values
from rto_fast.models.attention import PLAIN, attention_implementation
from rto_fast.models.checks import check_sequences
from rto_fast.models.decoder import Decoder, Packed, decoder_of, refuse
from rto_fast.models.decoder_families import LayerSpec
from rto_fast.models.forward import packed_inputs
from rto_fast.models.precision import higher_precision, precise
from rto_fast.system.notices import notify


def check_decoder(model: PreTrainedModel, name: str, *, gradients: bool) -> None:
    """Compares the hidden states of packed sequences, and the gradients of one layer of each kind.

    Our decoder and the model's own layers compute in the model's dtype, the truth is the latter in a higher precision. If
    our errors exceed `FACTOR` times theirs, or ours fails, a notice says so, and the model runs its own layers.

    Args:
        name: of the model in messages.
        gradients: whether the model is trained.
    """
    decoder = decoder_of(model)
    if decoder is None:
        return
    training = model.training
    try:
        model.eval()
        vocab_size = model.get_input_embeddings().weight.shape[0]
        batch = pack_whole(check_sequences(vocab_size, [12, 16, 20]), model.device)
        with attention_implementation(model, PLAIN):
            reason = _hidden_reason(model, decoder, batch)
            if reason is None and gradients:
                reason = next(filter(None, (_gradient_reason(model, decoder, i, batch) for i in _kinds(decoder))), None)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler or a library may raise anything
        reason = f"ours failed with {type(error).__name__}: {error_text(error)}"
    finally:
        model.train(training)
    if reason is not None:
        refuse(model, reason)
        notify("models", "decoder_differs", f"models: {name} runs transformers' layers: {reason}")


@torch.no_grad()
def _hidden_reason(model: PreTrainedModel, decoder: Decoder, batch: PackedBatch) -> str | None:
    dtype = next(model.parameters()).dtype

    def own() -> Tensor:
        return model.base_model(**packed_inputs(batch)).last_hidden_state[0].flatten()

    with precise(model, higher_precision(dtype)):
        truth = own()
    view = Packed(batch.cu_seqlens, batch.max_seqlen)
    ours = decoder(batch.input_ids, batch.position_ids, view, longest=batch.max_seqlen).flatten()
    found = compare_values(ours, own(), truth, dtype)
    if found.is_rounding or truth.isnan().any():  # of NaN the checks of the model tell more
        return None
    return f"the hidden states of ours differ by {found.error:.2g}, where rounding explains {found.limit:.2g}"


def _kinds(decoder: Decoder) -> Iterator[int]:
    """The number of the first layer of each kind."""
    seen = set()
    for number, layer in enumerate(decoder.spec.layers):
        attention = replace(layer.attention, layer=0, query_norm=None, key_norm=None)
        if (kind := (attention, layer.rope)) not in seen:
            seen.add(kind)
            yield number


def _gradient_reason(model: PreTrainedModel, decoder: Decoder, number: int, batch: PackedBatch) -> str | None:
    layer, spec = decoder.layers[number], decoder.spec.layers[number]
    with torch.no_grad():
        start = decoder.spec.embedding(batch.input_ids).detach()
        rope = decoder.ropes.rows(batch.position_ids, batch.max_seqlen, start)
    view = Packed(batch.cu_seqlens, batch.max_seqlen)
    named = [("its input", start), *((n, p) for n, p in spec.module.named_parameters() if p.requires_grad)]

    def gradients(run: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
        x = start.clone().requires_grad_()
        with precise(model, dtype), torch.enable_grad():
            out = run(x)
        towards = torch.linspace(-1.0, 1.0, out.numel(), device=out.device).view_as(out).to(out.dtype)
        return [g.double() for g in torch.autograd.grad(out, [x, *(p for _, p in named[1:])], towards)]

    def own_layer(x: Tensor) -> Tensor:
        return _own_layer(decoder, spec, x, batch)

    try:
        truth = gradients(own_layer, higher_precision(start.dtype))
    except RuntimeError:  # after ZeRO 3, DeepSpeed's `linear` is torch's and has no gradients in another precision
        return None
    own, ours = gradients(own_layer, start.dtype), gradients(lambda x: layer.whole(x, rope, view), start.dtype)
    errors, noises = ([_distance(g, t) for g, t in zip(found, truth)] for found in (ours, own))
    limit = FACTOR * (max(noises) + torch.finfo(torch.float32).eps)
    for (name, _), error in zip(named, errors):
        if not error <= limit:  # also if it is NaN
            what = f"the gradient of {name} in layer {number}"
            return f"{what} differs by {error:.2g} of its size, where rounding explains {limit:.2g}"
    return None


def _own_layer(decoder: Decoder, spec: LayerSpec, x: Tensor, batch: PackedBatch) -> Tensor:
    """transformers' layer: [T, D] → [T, D]."""
    inputs = packed_inputs(batch)
    inputs.pop("input_ids")
    name: list[Any] = [spec.rope or decoder.spec.rope_names[0]] if decoder.spec.rope_names != [""] else []
    with torch.no_grad():
        rope = decoder.spec.rotary(x[None], inputs["position_ids"], *name)
    out = spec.module(x[None], attention_mask=None, position_embeddings=rope, **inputs)
    return (out[0] if isinstance(out, tuple) else out)[0]


def _distance(gradient: Tensor, truth: Tensor) -> float:
    return ((gradient - truth).norm() / truth.norm().clamp(min=torch.finfo(truth.dtype).tiny)).item()
