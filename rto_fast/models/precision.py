"""A model's own forward pass in a higher precision, without a second copy of its weights.

What rounding does to a model's log-probs depends on the model: on its depth, its outliers, the size of its logits. It is
measured by running the same forward pass once in the model's dtype and once in a higher one.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

_HIGHER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}
_CASTS = (torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.float)
_AS_IT_IS = ("__get__", "__set__", "__len__", "size", "dim", "numel", "split")  # they look at no values
# Of a weight, cast at once: 512 MiB of float64. The output layer of a large model would take gigabytes.
CAST_ELEMENTS = 1 << 26


def higher_precision(dtype: torch.dtype) -> torch.dtype:
    """The dtype whose rounding does not count beside that of `dtype`: float32 for 16 bits, else float64."""
    return _HIGHER.get(dtype, torch.float64)


def linear_in(dtype: torch.dtype, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias in `dtype`, the weight cast a piece at a time."""
    pieces = weight.split(max(1, CAST_ELEMENTS // weight.shape[1]))
    out = torch.cat([F.linear(x.to(dtype), piece.to(dtype)) for piece in pieces], -1)
    return out if bias is None else out + bias.to(dtype)


class _Precise(TorchFunctionMode):
    """Every function of torch gets its floating-point tensors, and its dtype arguments, in at least `dtype`."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.lower = {low for low in _HIGHER if low.itemsize < dtype.itemsize}
        self.dtype = dtype

    def raised(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(self.dtype) if value.dtype in self.lower else value
        if isinstance(value, torch.dtype):
            return self.dtype if value in self.lower else value
        if isinstance(value, dict):
            return {key: self.raised(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(self.raised, value))
        return value

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding:  # looked up first, for a whole embedding in a higher precision is large
            return self.raised(func(*args, **kwargs))
        if func.__name__ in _AS_IT_IS:
            found = func(*args, **kwargs)
            # A model asks for a tensor's dtype to cast others to it.
            return self.raised(found) if isinstance(found, torch.dtype) else found
        if func is F.linear and args[1].dtype in self.lower and args[1].numel() > CAST_ELEMENTS:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return linear_in(self.dtype, args[0], args[1], bias)
        if func in _CASTS:
            return args[0].to(self.raised(getattr(torch, func.__name__)))
        return func(*self.raised(args), **self.raised(kwargs))


@contextlib.contextmanager
def precise(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Forward passes of `model` compute in at least `dtype` for the time of the context, from the weights as they are.

    Weights are cast as they are used, one at a time. Kernels that take addresses instead of tensors are out of reach.

    Args:
        model: a Hugging Face model; in DeepSpeed's ZeRO-3, with its weights whole.
        dtype: torch.float32 or torch.float64; nothing happens where the weights have it.
    """
    if next(model.parameters()).dtype.itemsize >= dtype.itemsize:
        yield
        return
    # A model may compute a buffer anew (RoPE's frequencies): it must not keep one of another dtype.
    buffers = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    try:
        with torch.no_grad(), _plain_experts(model), _Precise(dtype):
            yield
    finally:
        for module, kept in buffers:
            module._buffers.update(kept)


@contextlib.contextmanager
def _plain_experts(model: Any) -> Iterator[None]:
    """Experts one by one: torch's grouped GEMM knows no float64."""
    before = getattr(model.config, "_experts_implementation", None)
    if before in (None, "eager"):
        yield
        return
    try:
        model.set_experts_implementation("eager")
        yield
    finally:
        model.set_experts_implementation(before)
