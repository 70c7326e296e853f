"""Linear layers of one input as one GEMM, forward and backward, on the weights and the LoRA adapters of the modules.

    qkv = JoinedLinear([attention.q_proj, attention.k_proj, attention.v_proj])(x)

The projections run as one GEMM where their weights are neighbours in memory (`rto_fast.models.placement`), else as one each,
with the same values.

A parameter with the attribute `main_grad`, a float32 tensor of its shape, gets its gradient added there, without rounding to
16 bits, and none from autograd. Where the main_grads are neighbours too, one GEMM does it.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rto_fast.kernels.gemm import gemm, linear
from rto_fast.models.placement import joined


class _Adapter(NamedTuple):
    """An active LoRA adapter of one projection: y[:, columns] += scale · (x @ aᵀ) @ bᵀ."""

    columns: slice  # of y
    ranks: slice  # its columns of t = scale · (x @ aᵀ), which holds all adapters side by side
    a: Tensor  # [R, K]
    b: Tensor  # [N, R]
    scale: float


class _Parts(NamedTuple):
    """What the modules hold when they are called."""

    weights: list[Tensor]  # [N, K] each
    biases: list[Tensor | None]  # [N] each
    adapters: list[_Adapter]


class JoinedLinear:
    """The outputs of linear layers of one input, side by side.

    Weights, adapters and `main_grad`s are looked up in each call, so they may be moved and switched between passes.

    Args:
        linears: `nn.Linear` modules, or PEFT's LoRA layers around them. Others, and LoRA with dropout, DoRA, biases or
            merged weights, run as they are.
    """

    def __init__(self, linears: Sequence[nn.Module]):
        self.linears = tuple(linears)

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the outputs [T, ΣN] for x [T, K], in the dtype of x, or in autocast's."""
        dtype: torch.dtype | None = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            x, dtype = x.to(torch.get_autocast_dtype(x.device.type)), None
        parts = _parts(self.linears, dtype)
        if parts is None:
            outputs = [module(x) for module in self.linears]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        if torch.is_grad_enabled():
            a, b = [adapter.a for adapter in parts.adapters], [adapter.b for adapter in parts.adapters]
            return _JoinedLinear.apply(x, parts, *parts.weights, *parts.biases, *a, *b)
        return _forward(x, parts)[0]


def _parts(linears: Sequence[Any], dtype: torch.dtype | None) -> _Parts | None:
    """Returns the weights and active adapters of the modules; None if one of them has to run as it is.

    Args:
        dtype: of the input, which adapters must have; None if everything is cast.
    """
    weights, biases, found, start = [], [], [], 0
    for module in linears:
        base = module if type(module) is nn.Linear else _base_layer(module)
        if base is None or "forward" in vars(module):
            return None
        weight = base.weight
        weights.append(weight)
        biases.append(base.bias)
        columns = slice(start, start := start + len(weight))
        if base is not module and not module.disable_adapters:
            for order, name in enumerate(name for name in module.active_adapters if name in module.lora_A):
                pair = _adapter_weights(module, name)
                if pair is None or dtype not in (None, pair[0].dtype):
                    return None
                found.append((order, columns, *pair, module.scaling[name]))
    found.sort(key=lambda adapter: adapter[0])  # the a's of one adapter in a row, as they lie in memory
    ranks = pairwise([0, *accumulate(len(a) for _, _, a, _, _ in found)])
    return _Parts(weights, biases, [_Adapter(c, slice(*r), a, b, s) for r, (_, c, a, b, s) in zip(ranks, found)])


def _base_layer(module: Any) -> Any:
    """Returns the linear layer inside one of PEFT's LoRA layers; None if `module` is anything else, or is merged."""
    kind = type(module)
    is_lora = kind.__name__ == "Linear" and kind.__module__ == "peft.tuners.lora.layer"
    return module.base_layer if is_lora and type(module.base_layer) is nn.Linear and not module.merged else None


def _adapter_weights(module: Any, name: str) -> tuple[Tensor, Tensor] | None:
    """Returns (a, b) of an adapter that adds scale · (x @ aᵀ) @ bᵀ; None if it does anything else."""
    a, b = module.lora_A[name], module.lora_B[name]
    is_variant = name in getattr(module, "lora_variant", ()) or getattr(module, "use_dora", {}).get(name, False)
    is_plain = type(a) is type(b) is nn.Linear and a.bias is b.bias is None and not is_variant
    return (a.weight, b.weight) if is_plain and type(module.lora_dropout[name]) is nn.Identity else None


def _cast(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in the dtype of `like`, which differs under autocast. `precise` casts large weights better than `to`."""
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)


def _product(a: Tensor, b: Tensor, out: Tensor, scale: float = 1.0, accumulate: bool = False) -> None:
    """out (+)= scale · a @ b. With `out=`, because autocast changes the forms without it."""
    torch.addmm(out, a, b, beta=int(accumulate), alpha=scale, out=out)


def _base_output(x: Tensor, parts: _Parts) -> Tensor:
    """Returns the outputs without adapters."""
    biases = [bias for bias in parts.biases if bias is not None]
    weight = joined(parts.weights) if len(biases) in (0, len(parts.biases)) else None
    if weight is None:
        each = [
            linear(x, _cast(weight, x), None if bias is None else _cast(bias, x))
            for weight, bias in zip(parts.weights, parts.biases)
        ]
        return torch.cat(each, -1)
    bias = joined(biases) if biases else None
    if biases:
        bias = _cast(torch.cat(biases) if bias is None else bias, x)
    return linear(x, _cast(weight, x), bias)


def _runs(adapters: Sequence[_Adapter]) -> list[tuple[slice, Tensor, float]]:
    """Returns (columns of t, a, scale) of each GEMM that computes t: of one for all adapters if their a's are neighbours."""
    scales = {adapter.scale for adapter in adapters}
    whole = joined([adapter.a for adapter in adapters]) if len(scales) == 1 else None
    if whole is None:
        return [(adapter.ranks, adapter.a, adapter.scale) for adapter in adapters]
    return [(slice(0, len(whole)), whole, scales.pop())]


def _forward(x: Tensor, parts: _Parts) -> tuple[Tensor, Tensor | None]:
    """Returns the outputs, and t (see `_Adapter`) if there are adapters."""
    y = _base_output(x, parts)
    if not parts.adapters:
        return y, None
    t = x.new_empty(len(x), parts.adapters[-1].ranks.stop)
    for ranks, a, scale in _runs(parts.adapters):
        _product(x, _cast(a, x).t(), t[:, ranks], scale)
    for adapter in parts.adapters:
        _product(t[:, adapter.ranks], _cast(adapter.b, x).t(), y[:, adapter.columns], accumulate=True)
    return y, t


def _gradients(
    dy: Tensor, x: Tensor | None, parameters: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients dyᵀ @ x, whose rows belong to the parameters one after another; None for those that have a main_grad."""
    if not any(needed):
        return [None] * len(needed)
    assert x is not None  # it was saved because one is needed
    sizes = [len(parameter) for parameter in parameters]
    main_grads = [getattr(parameter, "main_grad", None) for parameter in parameters]
    present = [main_grad for main_grad in main_grads if main_grad is not None]
    if all(needed) and not present:
        # Views of one tensor, which autograd takes as gradients without copies.
        whole = x.new_empty(sum(sizes), x.shape[1], dtype=parameters[0].dtype)
        return list(gemm(dy.t(), x, whole).split(sizes))
    main_grad = joined(present) if all(needed) and len(present) == len(sizes) else None
    if main_grad is not None:
        gemm(dy.t(), x, main_grad, accumulate=True)
        return [None] * len(sizes)
    each = zip(dy.split(sizes, 1), parameters, needed)
    return [gradient for part, parameter, need in each for gradient in _gradients(part, x, [parameter], [need])]


def _bias_gradients(
    dy: Tensor, biases: Sequence[Tensor | None], sizes: Sequence[int], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Sums of dy over the rows, which belong to the biases as in `_gradients`; None for those that have a main_grad."""
    main_grads = [getattr(bias, "main_grad", None) if need else None for bias, need in zip(biases, needed)]
    present = [main_grad for main_grad in main_grads if main_grad is not None]
    if not any(needed):
        return [None] * len(sizes)
    first = present[0] if present else next(bias for bias in biases if bias is not None)
    sums = dy.sum(0, dtype=first.dtype)
    main_grad = joined(present) if len(present) == len(sizes) else None
    if main_grad is not None:
        main_grad += sums
        return [None] * len(sizes)
    gradients: list[Tensor | None] = []
    for part, main_grad, need in zip(sums.split(sizes), main_grads, needed):
        if main_grad is not None:
            main_grad += part
        gradients.append(part if need and main_grad is None else None)
    return gradients


def _input_gradient(dy: Tensor, weights: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Returns dy @ weights, without the part of the adapters."""
    weight = joined(weights)
    dx = dy.new_empty(len(dy), weights[0].shape[1])
    parts = [(dy, weight)] if weight is not None else list(zip(dy.split(sizes, 1), weights))
    for number, (part, weight) in enumerate(parts):
        _product(part, _cast(weight, dy), dx, accumulate=number > 0)
    return dx


def _adapter_gradients(
    dy: Tensor, x: Tensor | None, dx: Tensor | None, parts: _Parts, adapters: Sequence[_Adapter], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Adds the adapters' part to dx, and returns the gradients of their a's as `_gradients` does.

    Args:
        adapters: those of `parts` with their weights as autograd saved them.
    """
    if dx is None and not any(needed):
        return [None] * len(needed)
    dt = dy.new_empty(len(dy), adapters[-1].ranks.stop)
    for adapter in adapters:
        _product(dy[:, adapter.columns], _cast(adapter.b, dy), dt[:, adapter.ranks], adapter.scale)
    if dx is not None:
        for ranks, a, _ in _runs(adapters):
            _product(dt[:, ranks], _cast(a, dy), dx, accumulate=True)
    return _gradients(dt, x, [adapter.a for adapter in parts.adapters], needed)


class _JoinedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: _Parts, *parameters: Tensor | None) -> Tensor:
        y, t = _forward(x, parts)
        n, m = len(parts.weights), len(parts.adapters)
        needs_x, needed = ctx.needs_input_grad[0], ctx.needs_input_grad[2:]
        of_weights, of_biases, of_a, of_b = needed[:n], needed[n : 2 * n], needed[2 * n :][:m], needed[2 * n + m :]
        ctx.parts = parts  # with the parameters themselves, which have the main_grads
        ctx.needed = of_weights, of_biases, of_a, of_b
        ctx.save_for_backward(
            x if any(of_weights) or any(of_a) else None,
            t if any(of_b) else None,
            *(weight if needs_x else None for weight in parts.weights),
            *(adapter.a if needs_x else None for adapter in parts.adapters),
            *(adapter.b if needs_x or any(of_a) else None for adapter in parts.adapters),
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        parts, (of_weights, of_biases, of_a, of_b) = ctx.parts, ctx.needed
        x, t, *saved = ctx.saved_tensors
        n, m = len(parts.weights), len(parts.adapters)
        sizes = [len(weight) for weight in parts.weights]
        dx = _input_gradient(dy, saved[:n], sizes) if ctx.needs_input_grad[0] else None
        gradients = _gradients(dy, x, parts.weights, of_weights) + _bias_gradients(dy, parts.biases, sizes, of_biases)
        if m:
            pairs = zip(parts.adapters, saved[n : n + m], saved[n + m :])
            adapters = [adapter._replace(a=a, b=b) for adapter, a, b in pairs]
            gradients += _adapter_gradients(dy, x, dx, parts, adapters, of_a)
        for number, adapter in enumerate(parts.adapters):
            part = None if t is None else t[:, adapter.ranks]
            gradients += _gradients(dy[:, adapter.columns], part, [adapter.b], of_b[number : number + 1])
        return dx, None, *gradients
