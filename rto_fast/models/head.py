"""The output layer as a place to run the linear ops in."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rto_fast.errors import ModelError

if TYPE_CHECKING:  # transformers takes seconds to import, and the layer needs only torch
    from transformers import PreTrainedModel

    from rto_fast.models.lora import Adapter


class OpLinear(nn.Linear):
    """A linear layer whose forward can be an op of its weight (and bias):

        head(hidden_states, op=linear_ppo_loss, labels=labels, old_logps=old_logps, ...)

    ZeRO-3 gathers a weight around the forward and the backward pass of the module it belongs to, by hooks that reading
    `lm_head.weight` does not trigger; a weight tied to the embedding likewise.
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


def use_op_linear(model: "PreTrainedModel | Adapter") -> OpLinear:
    """Puts an `OpLinear` in the place of a model's output layer, or of a scorer's head; parameters and names stay.

    To be called before `deepspeed.initialize`.

    Returns:
        the new layer.
    Raises:
        ModelError: the output layer is more than a linear layer (an adapter, a quantised one).
    """
    head = model.get_output_embeddings() or score_head(model)
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
    """The layer that makes a scorer's scores of its hidden states.

    Raises:
        ModelError: there is none of the name that transformers gives it in decoders.
    """
    head = getattr(model, "score", None)
    if head is None:
        raise ModelError(
            f"{type(model).__name__}: no `score` head; reward models and critics need a decoder with "
            "Hugging Face's ...ForSequenceClassification head"
        )
    return head
