"""The model that is trained, as rollout engines use it: with its own weights, in evaluation mode during a rollout."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Self, cast
from weakref import WeakKeyDictionary

import torch
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
from rto_fast.models.joined_linear import JoinedLinear
from rto_fast.models.model import Model, vocabulary_of, whole_weights
from rto_fast.models.placement import adapter_groups, lay_side_by_side, projection_groups
from rto_fast.models.precision import plain_layers, precise
from rto_fast.rollout.attention import PAGED, CacheView

_LOCKS: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()  # a rollout changes the model while it runs


class RolloutModel:
    """A Hugging Face causal LM, bare or inside DeepSpeed, DistributedDataParallel or PEFT.

    It runs the training weights and adapters; nothing is copied.
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

    def addresses(self) -> tuple[Any, ...]:
        """What CUDA graphs hold: addresses of weights and of tables of rotations, and which adapters run at which scale."""
        ropes = () if self.decoder is None else self.decoder.ropes.addresses()
        layers = (module for module in self.causal_lm.modules() if hasattr(module, "lora_A"))
        adapters = ((m.disable_adapters, m.merged, *m.active_adapters, *m.scaling.values()) for m in layers)
        return (*(p.data_ptr() for p in self.causal_lm.parameters()), *ropes, *adapters)

    def lay_side_by_side(self) -> None:
        """Moves the weights of projections of the same input next to each other, so that one GEMM can compute them."""
        if not self.is_zero3 and reason_against(self.causal_lm.base_model) is None:
            lay_side_by_side(projection_groups(self.causal_lm.base_model))
            lay_side_by_side(adapter_groups(self.causal_lm.base_model), ["weight"])

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
        """Adds paged attention and our decoder to `evaluating`; restores everything.

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
            if hasattr(linear, "lora_A"):
                raise ModelError(
                    f"{type(self.causal_lm).__name__}: its output layer has an adapter, which only transformers can run"
                )
            with _unwarned(self.causal_lm.base_model):
                decoder = decoder_of(self.causal_lm)
                try:
                    if decoder is not None:
                        self.longest, self.decoder = longest, decoder.with_linear(self._linear)
                        decoder.ropes.prepare(longest, self.causal_lm.get_input_embeddings().weight)
                    self.head = output_head(self.causal_lm)
                    yield self
                finally:
                    self.decoder = self.head = None  # else they would keep weights alive that are moved elsewhere

    def _linear(self, group: list[Any]) -> Linear:
        """Projections of one input, as training computes them; valid while the weights stay where they are."""
        return JoinedLinear(group).bound(self.kind[1])

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


@contextlib.contextmanager
def _unwarned(backbone: Any) -> Iterator[None]:
    """Skips the check for padding tokens that some models do in every forward pass; the host would wait for the device."""
    try:
        backbone.warn_if_padding_and_no_attention_mask = lambda *_, **__: None
        yield
    finally:
        vars(backbone).pop("warn_if_padding_and_no_attention_mask", None)
