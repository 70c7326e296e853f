"""The training model as the engine sees it: its own weights, in evaluation mode for the time of a rollout."""

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from rto_fast.batch import PackedBatch
from rto_fast.errors import ModelError, RolloutError
from rto_fast.models.attention import PACKED
from rto_fast.models.context import context_of
from rto_fast.models.loading import attention_implementation, output_head
from rto_fast.models.model import Model, vocabulary_of, whole_weights
from rto_fast.models.precision import precise
from rto_fast.rollout.attention import PAGED
from rto_fast.rollout.fuse import fused_backbone, fusible_layers, lay_side_by_side, rope_table, sibling_groups

_AT_WORK: WeakKeyDictionary = WeakKeyDictionary()  # model → lock: a rollout changes it, for its time


class RolloutModel:
    """A Hugging Face causal LM, bare or inside DeepSpeed, DistributedDataParallel or PEFT.

    Nothing is copied but LoRA's merged weights, which a rollout needs as one matrix; the training weights stay as they
    are, for a merge and its undoing would round them.
    """

    def __init__(self, model: Model | torch.nn.Module):
        self.model = _unwrapped(model)
        self.is_zero3, self.adapter = self.model.is_zero3, self.model.adapter
        self.causal_lm = self.adapter.base if self.adapter else self.model.module
        if self.causal_lm.get_output_embeddings() is None:
            raise ModelError(
                f"{type(self.causal_lm).__name__} has no output layer; rollouts need a causal language model"
            )
        # LoRA layer → its merged weight, at the same address in every rollout; also its neighbours' in a joint GEMM.
        self.merged = {}
        self.rope = None  # see `rope_table`
        self.fused: Callable | None = None
        self.head: Any = None  # `Head`, while decoding

    @property
    def config(self):
        return self.causal_lm.config

    @property
    def device(self):
        return self.model.device

    @property
    def kind(self):
        """What a cache must fit."""
        return self.device, self.causal_lm.get_input_embeddings().weight.dtype

    @property
    def vocab_size(self):
        return vocabulary_of(self.causal_lm)

    @property
    def context(self):
        """Longest sequence the model has positions for, or None."""
        return context_of(self.config)

    def addresses(self):
        """Where the weights and the table of rotations lie: CUDA graphs hold these."""
        rope = () if self.rope is None else (self.rope.data_ptr(),)
        return (*(p.data_ptr() for p in self.causal_lm.parameters()), *rope)

    def _groups(self):
        """(LoRA layers, groups of projections of which some are LoRA layers, groups of which none is)."""
        adapted = [m for m in self.causal_lm.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
        groups = sibling_groups(self.causal_lm.base_model, adapted)
        mixed = [group for group in groups if not set(group).isdisjoint(adapted)]
        return adapted, mixed, [group for group in groups if group not in mixed]

    def lay_side_by_side(self):
        """So that one GEMM can compute what takes the same input; nothing else changes."""
        if not self.is_zero3:
            _, mixed, plain = self._groups()
            lay_side_by_side(plain)
            lay_side_by_side(mixed, ["bias"])  # their weights are merged ones

    @contextlib.contextmanager
    def evaluating(self):
        """Evaluation mode and whole weights, as they were afterwards; whatever mode of torch the caller is in.

        Raises:
            RolloutError: another thread has the model at work.
        """
        modes = [(module, module.training) for module in self.causal_lm.modules()]
        # ZeRO-3 would gather once a layer and decode step; so it is once a rollout.
        gathered = whole_weights(self.causal_lm) if self.is_zero3 else contextlib.nullcontext()
        with contextlib.ExitStack() as stack:
            stack.enter_context(_alone(self.causal_lm))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())  # after it, for leaving inference mode turns gradients on
            if self.device.type == "cuda":  # streams, events and graphs are those of the current device
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
    def decoding(self, longest):
        """Evaluation mode, paged attention, merged adapters and fused layers; all restored whatever happens.

        Args:
            longest: tokens that a sequence can come to.
        """
        with self.evaluating(), attention_implementation(self.causal_lm, PAGED):
            if self.config._attn_implementation != PAGED:
                raise ModelError(f"{type(self.causal_lm).__name__} does not use transformers' attention interface")
            linear = self.causal_lm.get_output_embeddings()
            if linear._forward_hooks or linear._forward_pre_hooks:
                raise ModelError(f"{type(self.causal_lm).__name__}: hooks on its output layer would not run")
            with self._merged_lora(), _unwarned(self.causal_lm.base_model):
                backbone = self.causal_lm.base_model
                layers = fusible_layers(backbone, self.merged)
                self.rope = rope_table(backbone, layers, longest, self.rope)
                try:
                    self.fused = fused_backbone(backbone, layers, self.rope, self.merged)
                    self.head = output_head(self.causal_lm)
                    if linear in self.merged:
                        self.head = replace(self.head, weight=self.merged[linear])
                    yield self
                finally:
                    self.fused = self.head = None  # or they would hold weights that are moved elsewhere

    def hidden(self, input_ids, position_ids, paged):
        """Last hidden states, [T, D]."""
        return (self.fused or self.backbone)(input_ids, position_ids, paged)

    def backbone(self, input_ids, position_ids, paged):
        """The same, as transformers runs it."""
        return self.causal_lm.base_model(
            input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False, paged=paged
        ).last_hidden_state[0]

    def packed_logits(self, batch: PackedBatch, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[T, V] of a packed batch, from the model's own forward pass, computed in `dtype` (default: the weights')."""
        with (
            self.evaluating(),
            attention_implementation(self.causal_lm, PACKED),
            precise(self.causal_lm, dtype or self.kind[1]),
        ):
            return self.causal_lm(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                cu_seq_lens_q=batch.cu_seqlens,
                cu_seq_lens_k=batch.cu_seqlens,
                max_length_q=batch.max_seqlen,
                max_length_k=batch.max_seqlen,
                use_cache=False,
            ).logits[0]

    def logits(self, hidden):
        """[T, V] float32, not yet divided or capped (see `Head`)."""
        weight, bias = self.head.weight, self.head.bias
        if hidden.is_cuda and hidden.dtype != torch.float32:
            # Rounded to 16 bits, logits of 20 would have steps of an eighth.
            logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
            return logits if bias is None else logits.add_(bias)
        return F.linear(hidden.float(), weight.float(), None if bias is None else bias.float())

    @contextlib.contextmanager
    def _merged_lora(self):
        """Linear layers that LoRA adapts run on base weight + adapters, in one matrix of its own."""
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

    def _place(self, layers, groups):
        """Memory for merged weights, side by side where one GEMM is to read them: of LoRA layers and their neighbours."""
        for layer in layers:
            if type(layer.base_layer) is not torch.nn.Linear:
                raise _not_plain(layer)
        grouped = {linear for group in groups for linear in group}
        for group in groups + [[layer] for layer in layers if layer not in grouped]:
            weight, merged = group[0].weight, self.merged.get(group[0])
            if merged is None or (merged.device, merged.dtype) != (weight.device, weight.dtype):
                sizes = [linear.out_features for linear in group]
                whole = weight.new_empty(sum(sizes), group[0].in_features)
                self.merged |= zip(group, whole.split(sizes))


def _unwrapped(model: Model | torch.nn.Module) -> Model:
    """The model inside DeepSpeed, DistributedDataParallel or PEFT."""
    if isinstance(model, Model):
        return model
    engine = model if hasattr(model, "zero_optimization_stage") else None
    if isinstance(getattr(model, "module", None), torch.nn.Module):
        model = model.module
    if hasattr(model, "get_base_model"):  # PEFT
        settings = getattr(model, "active_peft_config", None)
        if getattr(settings, "is_prompt_learning", False):
            raise ModelError(
                f"{type(settings).__name__}: responses would be sampled without the "
                "virtual tokens; merge them into the prompts, or train LoRA"
            )
        model = cast(Any, model).get_base_model()
    unwrapped = Model(cast(torch.nn.Module, model))
    unwrapped.engine = engine
    return unwrapped


@contextlib.contextmanager
def _alone(model):
    lock = _AT_WORK.setdefault(model, threading.Lock())
    if not lock.acquire(blocking=False):
        raise RolloutError(f"{type(model).__name__} is at work for another thread's rollout; one at a time")
    try:
        yield
    finally:
        lock.release()


@torch.no_grad()
def _merge(linear, out):
    """Writes base weight + active adapters of a LoRA layer, or the weight of a plain one."""
    if not hasattr(linear, "lora_A"):
        out.copy_(linear.weight)
        return
    active = [] if linear.disable_adapters else [a for a in linear.active_adapters if a in linear.lora_A]
    if linear.merged or any(getattr(linear, "use_dora", {}).get(a) or linear.lora_bias.get(a) for a in active):
        raise _not_plain(linear)
    out.copy_(linear.base_layer.weight)
    for adapter in active:
        out += linear.get_delta_weight(adapter)


def _not_plain(layer):
    return ModelError(
        f"{type(layer).__name__} of {type(layer.base_layer).__name__}: only plain LoRA on linear layers, not "
        "merged, can be decoded natively"
    )


@contextlib.contextmanager
def _unwarned(backbone):
    """Without the look for padding tokens in every forward pass of some models: the host would wait for the device."""
    try:
        backbone.warn_if_padding_and_no_attention_mask = lambda *_, **__: None
        yield
    finally:
        vars(backbone).pop("warn_if_padding_and_no_attention_mask", None)


def _linear_forward(weight, bias):
    return lambda x, *_, **__: F.linear(x, weight, bias)
