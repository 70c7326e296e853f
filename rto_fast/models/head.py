"""The output layer, and the linear ops of `rto_fast.ops` on its weight."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rto_fast.errors import ModelError

if TYPE_CHECKING:  # transformers takes seconds to import, and the layer needs only torch
    from transformers import PreTrainedModel

    from rto_fast.models.lora import Adapter


class OpLinear(nn.Linear):
    """A linear layer whose forward pass can be an op on its weight and bias:

        head(hidden_states, op=linear_ppo_loss, labels=labels, old_logps=old_logps, ...)

    ZeRO-3 gathers a weight, also one that is tied to the embedding, in hooks around the forward and the backward pass of
    its module. Reading `lm_head.weight` does not trigger them.
    """

    # nn.Linear's name for the first argument is `input`.
    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, op: Callable | None = None, args: tuple = (), **options: Any
    ) -> Any:
        if op is None:
            return super().forward(hidden_states)
        if self.bias is not None:
            options["bias"] = self.bias
        return op(hidden_states, self.weight, *args, **options)


@dataclass(frozen=True)
class Head:
    """How hidden states become logits: z = (h @ weight.T + bias) / divisor, or softcap·tanh(z / softcap)."""

    linear: nn.Linear  # the layer that the weight and the bias belong to
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    divisor: float  # Granite divides its logits, Cohere multiplies them
    softcap: float | None  # Gemma-2

    @classmethod
    def of(cls, linear: nn.Linear, divisor: float = 1.0, softcap: float | None = None) -> "Head":
        return cls(linear, linear.weight, getattr(linear, "bias", None), divisor, softcap)

    def logits(self, linear_output: Tensor) -> Tensor:
        """Returns the logits, from the output of the linear layer."""
        if self.softcap:
            return self.softcap * torch.tanh(linear_output / self.softcap)
        return linear_output / self.divisor

    def run(self, op: Callable, hidden: Tensor, *args: Any, temperature: float | None = None, **options: Any) -> Any:
        """Returns `op(hidden, weight, *args, bias=bias, **options)`, as a forward pass of an `OpLinear` if the layer is one.

        Args:
            op: a linear op of `rto_fast.ops`, or a function of the same form.
            hidden: [T, D].
            temperature: divides the logits, after `divisor` and `softcap`; None for a function that takes none of the three.
        """
        if temperature is not None:
            options |= {"temperature": temperature * self.divisor, "softcap": self.softcap}
        if isinstance(self.linear, OpLinear):
            return self.linear(hidden, op=op, args=args, **options)
        if self.bias is not None:
            options["bias"] = self.bias
        return op(hidden, self.weight, *args, **options)


def output_head(model: "PreTrainedModel") -> Head:
    """The head of a language model, from its output layer and its configuration.

    Raises:
        ModelError: the model has both a logit scale and a softcap.
    """
    config = model.config.get_text_config()
    divisor = getattr(config, "logits_scaling", None) or 1.0 / (getattr(config, "logit_scale", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap and divisor != 1.0:  # the divisor joins the temperature, which comes after the softcap
        raise ModelError(f"{type(model).__name__}: both a logit scale and a softcap; not supported")
    return Head.of(model.get_output_embeddings(), divisor, softcap)


def use_op_linear(model: "PreTrainedModel") -> OpLinear:
    """Replaces a model's output layer, or a scorer's head, by an `OpLinear` with the same parameters and names.

    It must be called before `deepspeed.initialize`.

    Returns:
        The new layer.
    Raises:
        ModelError: the layer is not a plain linear layer (it has an adapter or is quantised).
    """
    embeddings = model.get_output_embeddings()
    head = score_head(model) if embeddings is None else embeddings
    if type(head) is OpLinear:
        return head
    if type(head) is not nn.Linear:
        raise ModelError(f"{type(model).__name__}: its output layer is a {type(head).__name__}, not a torch.nn.Linear")
    layer = OpLinear(head.in_features, head.out_features, bias=False, device="meta").train(head.training)
    layer.weight, layer.bias = head.weight, head.bias
    # By name: a model's own code may have no `set_output_embeddings` that knows where its layer is.
    for name, part in list(model.named_modules(remove_duplicate=False)):
        if part is head:
            model.set_submodule(name, layer)
    return layer


def score_head(model: "PreTrainedModel | Adapter") -> nn.Linear:
    """Returns the layer that computes a scorer's scores from hidden states.

    Raises:
        ModelError: the model has no `score` layer, as transformers names it in decoders.
    """
    head = getattr(model, "score", None)
    if head is None:
        raise ModelError(
            f"{type(model).__name__}: no `score` head; reward models and critics need a decoder with "
            "Hugging Face's ...ForSequenceClassification head"
        )
    return head
