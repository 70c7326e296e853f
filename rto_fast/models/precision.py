"""Runs a model's own forward pass in a higher precision, without a second copy of its weights.

What rounding does to a model's log-probs depends on the model: on its depth, its outliers, the size of its logits. It is
measured by running the same forward pass once in the model's dtype and once in a higher one.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

_HIGHER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}
_CASTS = (torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.float)
# They read no values. Views of neighbours in memory (`rto_fast.models.placement.joined`) need the weights' own addresses.
_AS_IT_IS = ("__get__", "__set__", "__len__", "size", "dim", "numel", "split", "stride", "is_contiguous")
_AS_IT_IS += ("data_ptr", "untyped_storage", "detach", "as_strided")
# Elements of a weight that are cast at once, 512 MiB in float64; the output layer of a large model would take gigabytes.
CAST_ELEMENTS = 1 << 26
_RAISES: ContextVar[bool] = ContextVar("raises", default=False)  # whether `precise` raises the precision here


def higher_precision(dtype: torch.dtype) -> torch.dtype:
    """Returns a dtype whose rounding is negligible beside that of `dtype`: float32 for 16 bits, else float64."""
    return _HIGHER.get(dtype, torch.float64)


def linear_in(dtype: torch.dtype, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Returns x @ weight.T + bias in `dtype`, and casts the weight a piece at a time."""
    pieces = weight.split(max(1, CAST_ELEMENTS // weight.shape[1]))
    out = torch.cat([F.linear(x.to(dtype), piece.to(dtype)) for piece in pieces], -1)
    return out if bias is None else out + bias.to(dtype)


class _Precise(TorchFunctionMode):
    """Raises the floating-point tensors and the dtype arguments of every function of torch to at least `dtype`."""

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
        if func is F.embedding:  # cast after the look-up: a whole embedding in a higher precision is large
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


def is_precise() -> bool:
    """Whether forward passes compute in a higher precision than the model's (`precise`)."""
    return _RAISES.get()


@contextlib.contextmanager
def precise(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Makes forward passes of `model` compute in at least `dtype`, for the time of the context, without gradients.

    `torch.enable_grad` inside of it gives gradients, of the dtype of what they belong to. Each weight is cast when it is
    used. Kernels that are called with addresses instead of tensors are not affected.

    Args:
        model: a Hugging Face model; with ZeRO-3 its weights must be whole.
        dtype: torch.float32 or torch.float64.
    """
    if next(model.parameters()).dtype.itemsize >= dtype.itemsize:
        yield
        return
    # A model that computes a buffer anew (RoPE's frequencies) must not keep it in another dtype.
    buffers = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    token = _RAISES.set(True)
    try:
        with torch.no_grad(), plain_layers(model), _plain_experts(model), _plain_linear(), _Precise(dtype):
            yield
    finally:
        _RAISES.reset(token)
        for module, kept in buffers:
            module._buffers.update(kept)


@contextlib.contextmanager
def _plain_linear() -> Iterator[None]:
    """Puts torch's own `linear` back, which ZeRO 3 replaces for good: `_Precise` does not see into the other one."""
    before = F.linear
    F.linear = torch._C._nn.linear
    try:
        yield
    finally:
        F.linear = before


def from_liger(value: Any) -> bool:
    """Whether `value` is a method or a function of Liger's (`rto_fast.models.liger`)."""
    return callable(value) and (getattr(value, "__module__", None) or "").startswith("liger_kernel")


def runs_liger(model: nn.Module) -> bool:
    """Whether layers of a model run Liger's kernels now."""
    return any(from_liger(vars(module).get("forward")) for module in model.modules())


@contextlib.contextmanager
def plain_layers(model: nn.Module) -> Iterator[None]:
    """Takes Liger's kernels off a model, whose layers run as transformers implements them, for the time of the context."""
    found = [(module, vars(module)["forward"]) for module in model.modules() if from_liger(vars(module).get("forward"))]
    for module, _ in found:
        del module.__dict__["forward"]
    try:
        yield
    finally:
        for module, forward in found:
            module.__dict__["forward"] = forward


@contextlib.contextmanager
def _plain_experts(model: Any) -> Iterator[None]:
    """Runs experts one by one, because torch's grouped GEMM does not take float64."""
    before = getattr(model.config, "_experts_implementation", None)
    if before in (None, "eager"):
        yield
        return
    try:
        model.set_experts_implementation("eager")
        yield
    finally:
        model.set_experts_implementation(before)
