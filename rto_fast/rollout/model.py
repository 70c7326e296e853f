"""The model that is trained, as rollout engines use it: with its own weights, in evaluation mode during a rollout."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Self, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from rto_fast.batch import PackedBatch
from rto_fast.errors import ModelError, RolloutError
from rto_fast.kernels import gemm
from rto_fast.models.attention import PLAIN, attention_implementation
from rto_fast.models.context import context_of
from rto_fast.models.decoder import Decoder, Linear, decoder_of
from rto_fast.models.decoder_families import reason_against
from rto_fast.models.forward import packed_inputs
from rto_fast.models.head import output_head
from rto_fast.models.model import Model, vocabulary_of, whole_weights
from rto_fast.models.placement import joined, lay_side_by_side, projection_groups
from rto_fast.models.precision import plain_layers, precise
from rto_fast.rollout.attention import PAGED, CacheView

_LOCKS: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()  # a rollout changes the model while it runs


class RolloutModel:
    """A Hugging Face causal LM, bare or inside DeepSpeed, DistributedDataParallel or PEFT.

    Only LoRA's merged weights are copied, because a rollout needs each as one matrix. The training weights are not touched,
    because merging into them and undoing it would round them.
    """

    def __init__(self, model: Model | nn.Module):
        self.model = _unwrapped(model)
        self.is_zero3, self.adapter = self.model.is_zero3, self.model.adapter
        self.causal_lm: PreTrainedModel = self.adapter.base if self.adapter else self.model.module
        if self.causal_lm.get_output_embeddings() is None:
            raise ModelError(
                f"{type(self.causal_lm).__name__} has no output layer; rollouts need a causal language model"
            )
        self.config: PreTrainedConfig = self.causal_lm.config
        self.vocab_size = vocabulary_of(self.causal_lm)
        self.context = context_of(self.config)  # the longest sequence for which the model has positions, or None
        # The merged weight of each LoRA layer, at the same address in every rollout, and the weights of the other layers in
        # the same GEMM.
        self.merged: dict[nn.Module, Tensor] = {}
        self.decoder: Decoder | None = None  # while decoding, if there is one
        self.longest = 0  # tokens of the longest sequence possible, while decoding
        self.head: Any = None  # a `Head` while decoding

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def kind(self) -> tuple[torch.device, torch.dtype]:
        """Device and dtype, which a cache must have too."""
        return self.device, self.causal_lm.get_input_embeddings().weight.dtype

    @property
    def looks_at_sizes(self) -> bool:
        """Whether passes should have few sizes: our layers look at each new shape of a GEMM on a GPU before they use it."""
        return self.decoder is not None and self.device.type == "cuda"

    def addresses(self) -> tuple[int, ...]:
        """Addresses of the weights and of the tables of rotations, which CUDA graphs hold."""
        ropes = () if self.decoder is None else self.decoder.ropes.addresses()
        return (*(p.data_ptr() for p in self.causal_lm.parameters()), *ropes)

    def _groups(self) -> tuple[list[Any], list[list[Any]], list[list[Any]]]:
        """(LoRA layers, groups of projections of one input that contain one, groups that contain none).

        Groups are those of our decoder; there are none if the model does not run it.
        """
        adapted = [m for m in self.causal_lm.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
        backbone: Any = self.causal_lm.base_model
        groups = [] if reason_against(backbone, adapted) else projection_groups(backbone)
        mixed = [group for group in groups if not set(group).isdisjoint(adapted)]
        return adapted, mixed, [group for group in groups if group not in mixed]

    def lay_side_by_side(self) -> None:
        """Moves the weights of projections of the same input next to each other, so that one GEMM can compute them."""
        if not self.is_zero3:
            _, mixed, plain = self._groups()
            lay_side_by_side(plain)
            lay_side_by_side(mixed, ["bias"])  # decoding uses their merged weights

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[Self]:
        """Puts the model into evaluation mode with whole weights, whatever modes of torch the caller uses; restores it.

        Raises:
            RolloutError: another thread is using the model.
        """
        modes = [(module, module.training) for module in self.causal_lm.modules()]
        # ZeRO-3 would gather the weights once a layer and decode step; this gathers them once a rollout.
        gathered = whole_weights(self.causal_lm) if self.is_zero3 else contextlib.nullcontext()
        with contextlib.ExitStack() as stack:
            stack.enter_context(_alone(self.causal_lm))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())  # after inference_mode(False), which turns gradients on
            if self.device.type == "cuda":  # streams, events and graphs belong to the current device
                stack.enter_context(torch.cuda.device(self.device))
            if torch.amp.is_autocast_available(self.device.type):
                stack.enter_context(torch.autocast(self.device.type, enabled=False))
            stack.enter_context(gathered)
            try:
                self.causal_lm.eval()
                if self.adapter:
                    self.adapter.activate()
                yield self
            finally:
                for module, training in modes:
                    module.training = training

    @contextlib.contextmanager
    def decoding(self, longest: int) -> Iterator[Self]:
        """Adds paged attention, merged adapters and our decoder to `evaluating`; restores everything.

        Args:
            longest: tokens of the longest sequence possible.
        """
        # The gathered weights of ZeRO-3 run in our decoder, while training runs transformers' layers.
        layers = plain_layers(self.causal_lm) if self.is_zero3 else contextlib.nullcontext()
        with self.evaluating(), layers, attention_implementation(self.causal_lm, PAGED):
            if self.config._attn_implementation != PAGED:
                raise ModelError(f"{type(self.causal_lm).__name__} does not use transformers' attention interface")
            linear = self.causal_lm.get_output_embeddings()
            if linear._forward_hooks or linear._forward_pre_hooks:
                raise ModelError(f"{type(self.causal_lm).__name__}: hooks on its output layer would not run")
            with self._merged_lora(), _unwarned(self.causal_lm.base_model):
                decoder = decoder_of(self.causal_lm, exempt=self.merged)
                try:
                    if decoder is not None:
                        self.longest, self.decoder = longest, decoder.with_linear(self._linear)
                        decoder.ropes.prepare(longest, self.causal_lm.get_input_embeddings().weight)
                    self.head = output_head(self.causal_lm)
                    if linear in self.merged:
                        self.head = replace(self.head, weight=self.merged[linear])
                    yield self
                finally:
                    self.decoder = self.head = None  # else they would keep weights alive that are moved elsewhere

    def _linear(self, group: list[Any]) -> Linear:
        """Projections of one input, with LoRA on their merged weights; valid while the weights stay where they are."""
        weights, biases = [self.merged.get(m, m.weight) for m in group], [m.bias for m in group]
        weight, bias = joined(weights), None if None in biases else joined(biases)
        if weight is not None and (bias is None) == all(b is None for b in biases):
            return lambda x: gemm.linear(x, weight, bias)
        return lambda x: torch.cat([gemm.linear(x, w, b) for w, b in zip(weights, biases)], -1)

    def hidden(self, input_ids: Tensor, position_ids: Tensor, paged: CacheView) -> Tensor:
        """Last hidden states [T, D], while `decoding`."""
        if self.decoder is None:
            return self.backbone(input_ids, position_ids, paged)
        return self.decoder(input_ids, position_ids, paged, longest=self.longest)

    def backbone(self, input_ids: Tensor, position_ids: Tensor, paged: CacheView) -> Tensor:
        """Last hidden states [T, D], computed by transformers' own layers."""
        return self.causal_lm.base_model(
            input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False, paged=paged
        ).last_hidden_state[0]

    def packed_logits(self, batch: PackedBatch, dtype: torch.dtype | None = None) -> Tensor:
        """Logits [T, V] of the model's own forward pass, computed in `dtype` (by default that of the weights)."""
        with (
            self.evaluating(),
            attention_implementation(self.causal_lm, PLAIN),
            precise(self.causal_lm, dtype or self.kind[1]),
        ):
            return self.causal_lm(**packed_inputs(batch)).logits[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [T, V] float32, not yet divided or capped (see `Head`)."""
        weight, bias = self.head.weight, self.head.bias
        # In bfloat16, logits of 20 would have steps of an eighth. The losses compute the same product and add the bias to
        # it, too.
        logits = torch.empty(len(hidden), len(weight), dtype=torch.float32, device=hidden.device)
        gemm.linear(hidden, weight, out=logits)
        return logits if bias is None else logits.add_(bias)

    @contextlib.contextmanager
    def _merged_lora(self) -> Iterator[None]:
        """Runs layers with LoRA on their merged weights."""
        layers, groups, _ = self._groups()
        try:
            self._place(layers, groups)
            for linear, weight in self.merged.items():
                _merge(linear, weight)
            for layer in layers:
                layer.forward = _linear_forward(self.merged[layer], layer.base_layer.bias)
            yield
        finally:
            for layer in layers:
                vars(layer).pop("forward", None)

    def _place(self, layers: list[Any], groups: list[list[Any]]) -> None:
        """Allocates the merged weights of LoRA layers and of the others in their GEMMs, side by side for each GEMM."""
        for layer in layers:
            if type(layer.base_layer) is not nn.Linear:
                raise _not_plain(layer)
        grouped = {linear for group in groups for linear in group}
        for group in groups + [[layer] for layer in layers if layer not in grouped]:
            weight, merged = group[0].weight, self.merged.get(group[0])
            if merged is None or (merged.device, merged.dtype) != (weight.device, weight.dtype):
                sizes = [linear.out_features for linear in group]
                whole = weight.new_empty(sum(sizes), group[0].in_features)
                self.merged |= zip(group, whole.split(sizes))


def _unwrapped(model: Model | nn.Module) -> Model:
    """The model inside DeepSpeed, DistributedDataParallel or PEFT."""
    if isinstance(model, Model):
        return model
    engine = model if hasattr(model, "zero_optimization_stage") else None
    if isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    if hasattr(model, "get_base_model"):  # PEFT
        settings = getattr(model, "active_peft_config", None)
        if getattr(settings, "is_prompt_learning", False):
            raise ModelError(
                f"{type(settings).__name__}: responses would be sampled without the "
                "virtual tokens; merge them into the prompts, or train LoRA"
            )
        model = cast(Any, model).get_base_model()
    unwrapped = Model(cast(nn.Module, model))
    unwrapped.engine = engine
    return unwrapped


@contextlib.contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    lock = _LOCKS.setdefault(model, threading.Lock())
    if not lock.acquire(blocking=False):
        raise RolloutError(f"{type(model).__name__} is at work for another thread's rollout; one at a time")
    try:
        yield
    finally:
        lock.release()


@torch.no_grad()
def _merge(linear: Any, out: Tensor) -> None:
    """Writes to `out` the weight of a layer, with its active adapters if it has LoRA."""
    if not hasattr(linear, "lora_A"):
        out.copy_(linear.weight)
        return
    active = [] if linear.disable_adapters else [a for a in linear.active_adapters if a in linear.lora_A]
    if linear.merged or any(getattr(linear, "use_dora", {}).get(a) or linear.lora_bias.get(a) for a in active):
        raise _not_plain(linear)
    out.copy_(linear.base_layer.weight)
    for adapter in active:
        out += linear.get_delta_weight(adapter)


def _not_plain(layer: Any) -> ModelError:
    return ModelError(
        f"{type(layer).__name__} of {type(layer.base_layer).__name__}: only plain LoRA on linear layers, not "
        "merged, can be decoded natively"
    )


@contextlib.contextmanager
def _unwarned(backbone: Any) -> Iterator[None]:
    """Skips the check for padding tokens that some models do in every forward pass; the host would wait for the device."""
    try:
        backbone.warn_if_padding_and_no_attention_mask = lambda *_, **__: None
        yield
    finally:
        vars(backbone).pop("warn_if_padding_and_no_attention_mask", None)


def _linear_forward(weight: Tensor, bias: Tensor | None) -> Callable[..., Tensor]:
    return lambda x, *_, **__: F.linear(x, weight, bias)
