"""The embedding of tokens, with a gradient that is the same in every run."""

from torch import Tensor, nn

from rto_fast import layer_ops


class OpEmbedding(nn.Embedding):
    """An embedding whose gradient is, on a GPU, that of `kernels/embedding.py`."""

    def forward(self, input: Tensor) -> Tensor:
        # Without checks of the weight, whose dtype `precise` hides.
        return layer_ops.implementation("embedding", self.weight).embedding(input, self.weight, self.padding_idx)


def use_op_embeddings(model: nn.Module) -> None:
    """Makes a model's embeddings, also those of architectures' own classes (Gemma-3 scales its rows), `OpEmbedding`s.

    Parameters, names and hooks stay as they are.
    """
    for module in model.modules():
        if not isinstance(module, nn.Embedding) or isinstance(module, OpEmbedding):
            continue
        if module.max_norm is None and not module.scale_grad_by_freq and not module.sparse:
            kind = type(module)
            # `super().forward` of an architecture's own class then arrives at ours.
            module.__class__ = OpEmbedding if kind is nn.Embedding else type(kind.__name__, (kind, OpEmbedding), {})
