"""Gradients of a step, in one float32 buffer where every parameter has its place: `parameter.main_grad`.

Layers and ops that know `main_grad` add a gradient to it in their backward pass, without rounding it to 16 bits, and give
autograd none. The gradients of all others arrive through autograd and are collected here. One buffer is zeroed by one fill,
its norm is one reduction, and ranks add it up in one call.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 32  # elements, 128 bytes: cuBLAS and our kernels load and store vectors
# From here on a kernel takes longer than its launch; smaller gradients wait, and one call adds many of them.
LARGE = 1 << 20  # elements
PENDING_BYTES = 64 << 20  # of gradients that wait: those of a large model would fill the memory


class Layout:
    """The places of parameters in a flat tensor. Neighbours whose sizes are multiples of 32 elements lie side by side."""

    def __init__(self, parameters: Sequence[Tensor]):
        self.shapes = [parameter.shape for parameter in parameters]
        self.sizes = [-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in parameters]

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each parameter's place in a flat tensor."""
        return [part[: shape.numel()].view(shape) for part, shape in zip(flat.split(self.sizes), self.shapes)]


class Gradients:
    """The gradients of some parameters.

    Float32 parameters have their place as `grad` too, where autograd itself adds up. Those of 16 bits have no `grad`.
    """

    def __init__(self, parameters: Sequence[Tensor], layout: Layout):
        self.parameters, self.layout = parameters, layout
        self.flat: Tensor | None = None
        self.pending: dict[Tensor, Tensor] = {}
        self.pending_bytes = 0
        rounded = [parameter for parameter in parameters if parameter.dtype != torch.float32]
        self.hooks = [parameter.register_post_accumulate_grad_hook(self._take) for parameter in rounded]

    def make(self) -> Tensor:
        """Allocates the buffer if there is none; returns it."""
        if self.flat is None:
            flat = torch.zeros(sum(self.layout.sizes), device=self.parameters[0].device)
            for parameter, place in zip(self.parameters, self.layout.views(flat)):
                parameter.main_grad = place  # type: ignore[attr-defined]
                parameter.grad = place if parameter.dtype == torch.float32 else None
            self.flat = flat
        return self.flat

    def _take(self, parameter: Tensor) -> None:
        """Takes a gradient as soon as autograd has it, so that a large model's are never all in memory."""
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:  # a layer has added it already
            return
        if gradient.numel() >= LARGE:
            self.place_of(parameter).add_(gradient)
            return
        if parameter in self.pending:  # a call may not add to one place twice
            self.collect()
        self.pending[parameter] = gradient
        self.pending_bytes += gradient.nbytes
        if self.pending_bytes > PENDING_BYTES:
            self.collect()

    def place_of(self, parameter: Tensor) -> Tensor:
        return parameter.main_grad  # type: ignore[attr-defined]

    def collect(self) -> None:
        """Adds the gradients that wait, in two calls."""
        gradients, places = list(self.pending.values()), [self.place_of(parameter) for parameter in self.pending]
        self.pending, self.pending_bytes = {}, 0
        if gradients:
            # torch adds many tensors by one kernel only if all have one dtype; its copies convert.
            layout = Layout(gradients)
            exact = layout.views(torch.empty(sum(layout.sizes), device=gradients[0].device))
            torch._foreach_copy_(exact, gradients)
            torch._foreach_add_(places, exact)

    def clear(self) -> None:
        """Zeroes the gradients, also after a backward pass that broke off."""
        self.pending, self.pending_bytes = {}, 0
        if self.flat is not None:
            self.flat.zero_()
        for parameter in self.parameters:
            if parameter.dtype != torch.float32:
                parameter.grad = None

    def free(self) -> None:
        """Gives the buffer back."""
        if self.flat is not None:
            self.flat = None
            for parameter in self.parameters:
                parameter.grad = None
                del parameter.main_grad  # type: ignore[attr-defined]

    def close(self) -> None:
        """Gives back all that the parameters hold for their gradients."""
        self.free()
        for hook in self.hooks:
            hook.remove()
