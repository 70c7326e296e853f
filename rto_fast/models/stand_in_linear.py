"""Linear layers of one input, side by side; stands in for `JoinedLinear`."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """One view of tensors that lie side by side, stacked along the first dimension; None if they do not."""
    end = tensors[0].data_ptr()
    for tensor in tensors:
        shared = tensor.untyped_storage().data_ptr() == tensors[0].untyped_storage().data_ptr()
        if not shared or tensor.data_ptr() != end or not tensor.is_contiguous() or tensor.dtype != tensors[0].dtype:
            return None
        end += tensor.nbytes
    return tensors[0].detach().as_strided((sum(map(len, tensors)), *tensors[0].shape[1:]), tensors[0].stride())


class JoinedLinear:
    def __init__(self, linears: Sequence[Any]):
        self.linears = linears

    def __call__(self, x: Tensor) -> Tensor:
        if len(self.linears) == 1:
            return self.linears[0](x)
        if not torch.is_grad_enabled() and all(type(m) is nn.Linear for m in self.linears):
            weights, biases = [m.weight for m in self.linears], [m.bias for m in self.linears]
            weight, bias = joined(weights), None if None in biases else joined(biases)
            if weight is not None and (bias is None) == all(b is None for b in biases):
                return F.linear(x, weight, bias)
        return torch.cat([m(x) for m in self.linears], -1)


@torch.inference_mode(False)
@torch.no_grad()
def lay_side_by_side(groups: Iterable[list[Any]], names: Sequence[str] = ("weight", "bias")) -> None:
    """Moves the weights of each group of projections into one buffer.

    The parameters stay the same objects with the same values. Parameters that share their memory with others, such as an
    optimizer's flat buffer, are left alone.
    """
    for group in groups:
        for name in names:
            tensors = [getattr(linear, name) for linear in group]
            if any(t is None or t.untyped_storage().nbytes() != t.nbytes for t in tensors):
                continue
            for tensor, part in zip(tensors, torch.cat(tensors).split([len(t) for t in tensors])):
                tensor.data = part
