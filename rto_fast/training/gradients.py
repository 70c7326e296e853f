"""Gradients of a step, in one float32 buffer where every parameter has its place: `parameter.main_grad`.

Layers and ops that know `main_grad` add a gradient to it in their backward pass, without rounding it to 16 bits, and give
autograd none. The gradients of all others arrive through autograd and are collected here. One buffer is zeroed by one fill,
its norm is one reduction, and ranks add it up in one call.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

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
    Parameters that several of these share belong to the one that was used last. They are left as they were before when it
    is closed or forgotten.
    """

    def __init__(self, parameters: Sequence[Tensor], layout: Layout):
        self.parameters, self.layout = parameters, layout
        self.flat: Tensor | None = None
        self.places: dict[Tensor, Tensor] = {}
        self.pending: dict[Tensor, Tensor] = {}
        self.pending_bytes = 0
        take = _weakly(self._take)  # a model must not keep the gradients of an optimizer that nobody else has
        self.hooks = [parameter.register_post_accumulate_grad_hook(take) for parameter in parameters]
        weakref.finalize(self, _leave, self.places, self.hooks).atexit = False

    def make(self) -> Tensor:
        """Allocates the buffer if there is none, makes it the parameters' own, and returns it."""
        if self.flat is None:
            self.flat = torch.zeros(sum(self.layout.sizes), device=self.parameters[0].device)
            self.places.update(zip(self.parameters, self.layout.views(self.flat)))
        if not all(_is_own(parameter, self.places) for parameter in self.parameters):
            for parameter, place in self.places.items():
                parameter.main_grad = place  # type: ignore[attr-defined]
                parameter.grad = place if parameter.dtype == torch.float32 else None
        return self.flat

    def _take(self, parameter: Tensor) -> None:
        """Takes a gradient as soon as autograd has it, so that a large model's are never all in memory."""
        gradient, place = parameter.grad, self.places.get(parameter)
        # None and the place: the gradient is there already. Others may own the parameter now.
        if gradient is None or gradient is place or not _is_own(parameter, self.places):
            return
        parameter.grad = place if parameter.dtype == torch.float32 else None
        if gradient.numel() >= LARGE:
            self.places[parameter].add_(gradient)
            return
        if parameter in self.pending:  # a call may not add to one place twice
            self.collect()
        self.pending[parameter] = gradient
        self.pending_bytes += gradient.nbytes
        if self.pending_bytes > PENDING_BYTES:
            self.collect()

    def collect(self) -> None:
        """Adds the gradients that wait, in two calls."""
        gradients, places = list(self.pending.values()), [self.places[parameter] for parameter in self.pending]
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
        self.flat = None
        _leave(self.places, [])

    def close(self) -> None:
        """Gives back all that the parameters hold for their gradients."""
        self.free()
        _leave(self.places, self.hooks)


def _weakly(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """A function that calls a method, and does nothing once its object is gone."""
    reference = weakref.WeakMethod(method)

    def call(parameter: Tensor) -> None:
        if found := reference():
            found(parameter)

    return call


def _is_own(parameter: Tensor, places: dict[Tensor, Tensor]) -> bool:
    """Whether a parameter's gradient is collected in its place among these."""
    return (place := getattr(parameter, "main_grad", None)) is not None and place is places.get(parameter)


def _leave(places: dict[Tensor, Tensor], hooks: Sequence[Any]) -> None:
    """Takes the places and hooks off their parameters, the places only where they are in use."""
    for parameter in places:
        if _is_own(parameter, places):
            parameter.grad = None
            del parameter.main_grad  # type: ignore[attr-defined]
    places.clear()
    for hook in hooks:
        hook.remove()
