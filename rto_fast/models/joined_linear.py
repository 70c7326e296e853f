"""Linear layers of one input as one GEMM, forward and backward, on the weights and the LoRA adapters of the modules.

    qkv = JoinedLinear([attention.q_proj, attention.k_proj, attention.v_proj])(x)

The projections run as one GEMM where their weights are neighbours in memory (`rto_fast.models.placement`), else as one each,
with the same values.

A parameter with the attribute `main_grad`, a float32 tensor of its shape, gets its gradient added there, without rounding to
16 bits, and none from autograd. Where the main_grads are neighbours too, one GEMM does it.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rto_fast import layer_ops
from rto_fast.kernels.gemm import gemm, linear
from rto_fast.kernels.layer_reference import AdapterInput, AdapterOutput
from rto_fast.models.placement import joined

# Elements of a float32 base to which adapters are added: 256 MiB at a time.
BASE_ELEMENTS = 1 << 26


class _Adapter(NamedTuple):
    """An active LoRA adapter of one projection: y[:, columns] += (scale · (x @ aᵀ)) @ bᵀ."""

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

    @property
    def parameters(self) -> list[Tensor | None]:
        """All of them, in the order in which the backward pass makes their gradients."""
        if not self.adapters:
            return [*self.weights, *self.biases]
        return [*self.weights, *self.biases, *(a.a for a in self.adapters), *(a.b for a in self.adapters)]


class JoinedLinear:
    """The outputs of linear layers of one input, side by side.

    Weights, adapters and `main_grad`s are looked up in each call, so they may be moved and switched between passes.

    Args:
        linears: `nn.Linear` modules, or PEFT's LoRA layers around them. Others, those with hooks, and LoRA with dropout,
            DoRA, biases or merged weights, run as they are.
    """

    def __init__(self, linears: Sequence[Any]):
        self.linears = tuple(linears)

    def bound(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """A function that computes the same for inputs of `dtype`, without gradients, and looks nothing up.

        It is valid until weights are moved, or adapters switched.
        """
        parts = _parts(self.linears, dtype)
        if parts is None:
            return self
        if any(parameter is not None and parameter.dtype != dtype for parameter in parts.parameters):
            return self  # a CUDA graph would read a copy of this moment
        operands = _operands(parts, dtype)
        if operands.outputs or len(operands.weights) > 1:
            return lambda x: _forward(x, operands, keeps=False)[0]
        (weight,), (bias,) = operands.weights, operands.biases
        return lambda x: linear(x, weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the outputs [T, ΣN] for x [T, K], in the dtype of x, or in autocast's."""
        dtype: torch.dtype | None = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            x, dtype = x.to(torch.get_autocast_dtype(x.device.type)), None
        parts = _parts(self.linears, dtype)
        if parts is None:
            outputs = [module(x) for module in self.linears]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        if not torch.is_grad_enabled():
            return _forward(x, _operands(parts, x.dtype), keeps=False)[0]
        parameters = parts.parameters
        needed = [parameter is not None and parameter.requires_grad for parameter in parameters]
        # Autograd need not know a parameter whose gradient is added to its main_grad: it would visit it for nothing.
        known = [need and not hasattr(parameter, "main_grad") for parameter, need in zip(parameters, needed)]
        inputs = [parameter for parameter, is_known in zip(parameters, known) if is_known]
        if not inputs and not x.requires_grad and True in needed:
            inputs = [parameters[needed.index(True)]]  # else there would be no backward pass
        return _JoinedLinear.apply(x, parts, needed, known, *inputs)


def _parts(linears: Sequence[Any], dtype: torch.dtype | None) -> _Parts | None:
    """Returns the weights and active adapters of the modules; None if one of them has to run as it is.

    Args:
        dtype: of the input, which adapters must have; None if everything is cast.
    """
    weights, biases, found, start = [], [], [], 0
    for module in linears:
        base = module if _is_plain(module) else _base_layer(module)
        if base is None or "forward" in module.__dict__:
            return None
        weights.append(base.weight)
        biases.append(base.bias)
        columns = slice(start, start := start + base.out_features)
        if base is not module and not module.disable_adapters:
            for order, name in enumerate(name for name in module.active_adapters if name in module.lora_A):
                pair = _adapter_weights(module, name)
                if pair is None or dtype not in (None, pair[0].dtype):
                    return None
                found.append((order, columns, *pair, module.scaling[name]))
    if not found:
        return _Parts(weights, biases, [])
    found.sort(key=lambda adapter: adapter[0])  # the a's of one adapter in a row, as they lie in memory
    ranks = pairwise([0, *accumulate(a.shape[0] for _, _, a, _, _ in found)])
    return _Parts(weights, biases, [_Adapter(c, slice(*r), a, b, s) for r, (_, c, a, b, s) in zip(ranks, found)])


def _base_layer(module: Any) -> Any:
    """Returns the linear layer inside one of PEFT's LoRA layers; None if `module` is anything else, or is merged."""
    kind = type(module)
    is_lora = kind.__name__ == "Linear" and kind.__module__ == "peft.tuners.lora.layer"
    return module.base_layer if is_lora and _is_plain(module.base_layer) and not module.merged else None


def has_hooks(attributes: dict[str, Any]) -> bool:
    """Whether a module with these attributes has hooks, which whoever does its work would not call."""
    before, after = attributes["_forward_pre_hooks"], attributes["_forward_hooks"]
    return bool(before or after or attributes["_backward_pre_hooks"] or attributes["_backward_hooks"])


def _is_plain(module: Any) -> bool:
    return type(module) is nn.Linear and not has_hooks(module.__dict__)


def _adapter_weights(module: Any, name: str) -> tuple[Tensor, Tensor] | None:
    """Returns (a, b) of an adapter that adds scale · (x @ aᵀ) @ bᵀ; None if it does anything else."""
    a, b = module.lora_A[name], module.lora_B[name]
    is_variant = name in getattr(module, "lora_variant", ()) or getattr(module, "use_dora", {}).get(name, False)
    is_plain = _is_plain(a) and _is_plain(b) and a.bias is b.bias is None and not is_variant
    return (a.weight, b.weight) if is_plain and type(module.lora_dropout[name]) is nn.Identity else None


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`, which differs under autocast. `precise` casts large weights better than `to`."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _product(a: Tensor, b: Tensor, out: Tensor, scale: float = 1.0, accumulate: bool = False) -> None:
    """out (+)= scale · a @ b. With `out=`, because autocast changes the forms without it."""
    torch.addmm(out, a, b, beta=int(accumulate), alpha=scale, out=out)


class _Operands(NamedTuple):
    """What is multiplied: the parts, cast, with neighbours as one."""

    weights: list[Tensor]
    biases: list[Tensor | None]  # of each weight
    inputs: list[AdapterInput]
    outputs: list[AdapterOutput]


def _operands(parts: _Parts, dtype: torch.dtype) -> _Operands:
    weights, biases = parts.weights, parts.biases
    present = [bias for bias in biases if bias is not None]
    weight, bias = joined(weights), joined(present) if len(present) == len(biases) else None
    if weight is not None and (bias is not None or not present):
        weights, biases = [weight], [bias]
    return _Operands(
        [_cast(weight, dtype) for weight in weights],
        [None if bias is None else _cast(bias, dtype) for bias in biases],
        _inputs(parts.adapters, dtype),
        [AdapterOutput(a.columns, a.ranks, _cast(a.b, dtype), a.scale) for a in parts.adapters],
    )


def _inputs(adapters: Sequence[_Adapter], dtype: torch.dtype) -> list[AdapterInput]:
    """Of all adapters together if their a's are neighbours, which takes one product; else of each."""
    scales = {adapter.scale for adapter in adapters}
    whole = joined([adapter.a for adapter in adapters]) if len(scales) == 1 else None
    if whole is None:
        return [AdapterInput(a.ranks, _cast(a.a, dtype), a.scale) for a in adapters]
    return [AdapterInput(slice(0, whole.shape[0]), _cast(whole, dtype), scales.pop())]


def _forward(x: Tensor, operands: _Operands, keeps: bool) -> tuple[Tensor, Tensor | None]:
    """Returns (y [T, ΣN], t [T, ΣR] if there are adapters and `keeps`)."""
    weights, biases, inputs, outputs = operands
    if not outputs:
        return _base(x, operands), None
    ops = layer_ops.implementation("adapters", x)
    t = ops.adapter_input(x, inputs, keeps)
    if x.dtype.itemsize > 2:
        y = _base(x, operands)
        ops.add_adapters(y, t, outputs, y)
        return y, t if keeps else None
    # Both sums are rounded together, see `kernels/adapters.py`.
    sizes = [weight.shape[0] for weight in weights]
    y = x.new_empty(x.shape[0], sum(sizes))
    rows = max(BASE_ELEMENTS // y.shape[1] // 128 * 128, 128)
    buffer = y.new_empty(min(rows, len(x)), y.shape[1], dtype=torch.float32)
    for first in range(0, len(x), rows):
        some = slice(first, first + rows)
        base = buffer[: len(x) - first]
        for columns, weight, bias in zip(base.split(sizes, 1), weights, biases):
            linear(x[some], weight, bias, out=columns)
        ops.add_adapters(base, t[..., some, :], outputs, y[some])
    return y, t if keeps else None


def _base(x: Tensor, operands: _Operands) -> Tensor:
    """The outputs without adapters."""
    parts = [linear(x, weight, bias) for weight, bias in zip(operands.weights, operands.biases)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _gradients(
    dy: Tensor, x: Tensor | None, parameters: Sequence[Tensor], sizes: list[int], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients dyᵀ @ x, whose rows belong to the parameters one after another; None for those that have a main_grad."""
    if True not in needed:
        return [None] * len(needed)
    assert x is not None  # it was saved because one is needed
    main_grads = [getattr(parameter, "main_grad", None) for parameter in parameters]
    present = [main_grad for main_grad in main_grads if main_grad is not None]
    if False not in needed and not present:
        # Views of one tensor, which autograd takes as gradients without copies.
        whole = x.new_empty(sum(sizes), x.shape[1], dtype=parameters[0].dtype)
        return list(gemm(dy.t(), x, whole).split(sizes))
    main_grad = joined(present) if False not in needed and len(present) == len(sizes) else None
    if main_grad is not None:
        gemm(dy.t(), x, main_grad, accumulate=True)
        return [None] * len(sizes)
    each = zip(dy.split(sizes, 1), parameters, sizes, needed)
    return [g for part, parameter, size, need in each for g in _gradients(part, x, [parameter], [size], [need])]


def _bias_gradients(
    dy: Tensor, biases: Sequence[Tensor | None], sizes: list[int], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Sums of dy over the rows, which belong to the biases as in `_gradients`; None for those that have a main_grad."""
    if True not in needed:
        return [None] * len(needed)
    main_grads = [getattr(bias, "main_grad", None) if need else None for bias, need in zip(biases, needed)]
    present = [main_grad for main_grad in main_grads if main_grad is not None]
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


def _input_gradient(dy: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Returns dy @ weights, without the part of the adapters."""
    dx = dy.new_empty(dy.shape[0], weights[0].shape[1])
    parts = [dy] if len(weights) == 1 else dy.split([weight.shape[0] for weight in weights], 1)
    for number, (part, weight) in enumerate(zip(parts, weights)):
        _product(part, weight, dx, accumulate=number > 0)
    return dx


def _adapter_gradients(
    ctx: Any, dy: Tensor, dx: Tensor | None, x: Tensor | None, t: Tensor | None, kept: Sequence[Tensor]
) -> list[Tensor | None]:
    """Adds the adapters' part to dx, and returns the gradients of all a's and then of all b's as `_gradients` does.

    Args:
        kept: the a's of `_inputs` if dx is needed, and the b's if the gradient of t is.
    """
    adapters, m = ctx.parts.adapters, len(ctx.parts.adapters)
    of_a, of_b = ctx.needed[-2 * m : -m], ctx.needed[-m:]
    gradients: list[Tensor | None] = [None] * m
    if kept:
        dt = dy.new_empty(dy.shape[0], adapters[-1].ranks.stop)
        for adapter, b in zip(adapters, kept[-m:]):
            _product(dy[:, adapter.columns], b, dt[:, adapter.ranks], adapter.scale)
        if dx is not None:
            for ranks, a in zip(ctx.ranks, kept):
                _product(dt[:, ranks], a, dx, accumulate=True)
        sizes = [adapter.a.shape[0] for adapter in adapters]
        gradients = _gradients(dt, x, [adapter.a for adapter in adapters], sizes, of_a)
    for adapter, need in zip(adapters, of_b):
        part = None if t is None else t[:, adapter.ranks]
        gradients += _gradients(dy[:, adapter.columns], part, [adapter.b], [adapter.b.shape[0]], [need])
    return gradients


class _JoinedLinear(torch.autograd.Function):
    """Its inputs are x, and of the parameters those that autograd has to know, in their order in `_Parts.parameters`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: _Parts, needed: list[bool], known: list[bool], *inputs: Tensor) -> Tensor:
        operands = _operands(parts, x.dtype)
        y, t = _forward(x, operands, keeps=True)
        n, m, needs_x = len(parts.weights), len(parts.adapters), ctx.needs_input_grad[0]
        trains_a, trains_b = True in needed[2 * n : 2 * n + m], True in needed[2 * n + m :]
        weights = operands.weights if needs_x else []
        ctx.save_for_backward(
            x if trains_a or True in needed[:n] else None,
            t if trains_b else None,
            *weights,
            *(of_input.a for of_input in operands.inputs if needs_x),
            *(of_output.b for of_output in operands.outputs if needs_x or trains_a),
        )
        # `parts` has the parameters themselves, which have the main_grads.
        ctx.parts, ctx.needed, ctx.known, ctx.num_inputs = parts, needed, known, len(inputs)
        ctx.num_weights, ctx.ranks = len(weights), [of_input.ranks for of_input in operands.inputs]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (weights, biases, adapters), needed, n = ctx.parts, ctx.needed, len(ctx.parts.weights)
        x, t, *kept = ctx.saved_tensors
        sizes = [weight.shape[0] for weight in weights]
        dx = _input_gradient(dy, kept[: ctx.num_weights]) if ctx.num_weights else None
        gradients = _gradients(dy, x, weights, sizes, needed[:n]) + _bias_gradients(
            dy, biases, sizes, needed[n : 2 * n]
        )
        if adapters:
            gradients += _adapter_gradients(ctx, dy, dx, x, t, kept[ctx.num_weights :])
        if any(gradient is not None and not is_known for gradient, is_known in zip(gradients, ctx.known)):
            raise RuntimeError("a parameter lost its main_grad between the forward and the backward pass")
        returned = [gradient for gradient, is_known in zip(gradients, ctx.known) if is_known]
        return dx, None, None, None, *(returned or [None] * ctx.num_inputs)
