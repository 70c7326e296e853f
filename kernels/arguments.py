"""Checks of the arguments of public ops. Each raises a ValueError that begins with the argument's name.

Shape, dtype and device of a tensor cost nothing to check. Its values are checked on a CPU only, because on a GPU this
would wait for the device.
"""

import os
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rto_fast.kernels import reference

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(
    name: str, tensor: Any, shape: tuple[int, ...] | None, dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """Checks a tensor; a `shape` of None allows any."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


def check_first(name: str, tensor: Any) -> None:
    """Checks an op's first tensor, with which the others are compared: any shape, any device, a float dtype."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    check_tensor(name, tensor, None, float_dtypes(tensor.device), tensor.device)


def float_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    return _FLOATS + (torch.float64,) if device.type == "cpu" and not INTERPRET else _FLOATS


def check_floats(like: Tensor, shape: tuple[int, ...], **tensors: Any) -> None:
    dtypes = float_dtypes(like.device)
    for name, tensor in tensors.items():
        check_tensor(name, tensor, shape, dtypes, like.device)


def check_optional(like: Tensor, shape: tuple[int, ...], dtypes: Sequence[torch.dtype], **tensors: Any) -> None:
    """Checks tensors that may be None."""
    for name, tensor in tensors.items():
        if tensor is not None:
            check_tensor(name, tensor, shape, dtypes, like.device)


class _Range(NamedTuple):
    """The numbers from `low` to `high`, which an argument may be; NaN is not among them."""

    expected: str  # the range in words, for the error message
    low: float
    high: float
    is_optional: bool = False  # may be None
    kind: Any = (float, int, Real)  # the usual types first, because isinstance finds them fast


# Kernels compute in float32. A number that float32 rounds to 0 or to infinity is refused like these.
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_FINITE = _Range("a finite number", -_LARGEST, _LARGEST)
AT_LEAST_0 = _Range("a finite number of at least 0", 0.0, _LARGEST)
_ABOVE_0 = _Range("a finite number above 0", _SMALLEST, _LARGEST)
_COUNT = _Range("an integer of at least 1", 1, (1 << 31) - 1, kind=(int, Integral))
_FROM_0_TO_1 = _Range("a number in [0, 1]", 0.0, 1.0)
_RANGES = {
    "temperature": _ABOVE_0,
    "softcap": _ABOVE_0._replace(is_optional=True),
    "ignore_index": _Range("an integer of 64 bits", -(1 << 63), (1 << 63) - 1, kind=(int, Integral)),
    "num_items": AT_LEAST_0._replace(is_optional=True),
    "clip_eps": _Range("a number in [0, 1)", 0.0, 1.0 - 2**-24),
    "clip_eps_high": AT_LEAST_0._replace(is_optional=True),
    "dual_clip": _Range("a finite number above 1", 1.0 + 2**-23, _LARGEST, is_optional=True),
    "value_clip_eps": _ABOVE_0._replace(is_optional=True),
    "entropy_coef": _FINITE,
    "gamma": _FROM_0_TO_1,
    "gae_lambda": _FROM_0_TO_1,
    "dpo_reward_scale": _FINITE,
    "dpo_reward_clip": AT_LEAST_0,
    "kl_coef": _FINITE,
    "score_scale": _FINITE,
    "score_clip": AT_LEAST_0,
    "top_k": _Range("an integer of at least 0", 0, (1 << 31) - 1, kind=(int, Integral)),
    "top_p": _Range("a number in (0, 1]", _SMALLEST, 1.0),
    "min_p": _FROM_0_TO_1,
    "scale": _ABOVE_0._replace(is_optional=True),
    "window": _COUNT._replace(is_optional=True),
    "eps": AT_LEAST_0,
    "multiplier": _FINITE,
    "num_heads": _COUNT,
    "num_kv_heads": _COUNT,
    "max_seqlen": _Range("an integer of at least 0", 0, (1 << 31) - 1, kind=(int, Integral)),
}


def check_numbers(**numbers: Any) -> None:
    for name, number in numbers.items():
        check_number(name, number, _RANGES[name])


def check_number(name: str, number: Any, allowed: _Range) -> None:
    if number is None and allowed.is_optional:
        return
    if not isinstance(number, allowed.kind) or not allowed.low <= number <= allowed.high:
        is_short = isinstance(number, float) or isinstance(number, int) and abs(number) < 1 << 64
        got = number if is_short else f"a {type(number).__name__}"
        raise ValueError(f"{name}: expected {allowed.expected}{' or None' * allowed.is_optional}, got {got}")


def checked_num_items(num_items: Any) -> float | Tensor | None:
    """Checks a loss's denominator; a tensor is returned detached."""
    if not isinstance(num_items, Tensor):
        check_numbers(num_items=num_items)
        return num_items
    if num_items.dim() or num_items.is_complex():
        what = f"{num_items.dtype} of shape {tuple(num_items.shape)}"
        raise ValueError(f"num_items: expected a number or a real 0-d tensor, got {what}")
    constant = num_items.detach()
    return reference.checked_num_items(constant) if constant.device.type == "cpu" else constant


_PACKED = (
    "packed tokens, shape [T], got {}; from padded [B, S] tensors and the bool mask [B, S] of their tokens: x[mask] of "
    "each, cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()"
)


def checked_cu_seqlens(cu_seqlens: Any, **tensors: Any) -> Tensor:
    """Checks packed float tensors [T] and the bounds of their sequences; returns `cu_seqlens`."""
    name, first = next(iter(tensors.items()))
    check_first(name, first)
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.dim() != 1:
            raise ValueError(f"{name}: expected {_PACKED.format(tuple(tensor.shape))}")
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or not len(cu_seqlens):
        raise ValueError("cu_seqlens: expected a 1-d tensor of N+1 sequence bounds, the first of them 0")
    check_tensor("cu_seqlens", cu_seqlens, None, (torch.int32,), first.device)
    check_floats(first, first.shape, **tensors)
    return reference.checked_bounds(cu_seqlens, len(first)) if first.device.type == "cpu" else cu_seqlens


def check_linear(
    hidden_states: Any, lm_head_weight: Any, labels: Any, bias: Any, temperature: Any, softcap: Any
) -> None:
    check_first("hidden_states", hidden_states)
    if hidden_states.dim() < 1:
        raise ValueError("hidden_states: expected shape [..., D], got ()")
    device = hidden_states.device
    check_tensor("lm_head_weight", lm_head_weight, None, float_dtypes(device), device)
    if lm_head_weight.dim() != 2:
        raise ValueError(f"lm_head_weight: expected shape [V, D], got {tuple(lm_head_weight.shape)}")
    check_tensor(
        "lm_head_weight", lm_head_weight, (len(lm_head_weight), hidden_states.shape[-1]), float_dtypes(device), device
    )
    if lm_head_weight.dtype != hidden_states.dtype and not torch.is_autocast_enabled(device.type):
        expected = f"dtype {hidden_states.dtype} like hidden_states"
        raise ValueError(f"lm_head_weight: expected {expected}, got {lm_head_weight.dtype}")
    check_tensor("labels", labels, hidden_states.shape[:-1], (torch.int64,), device)
    check_optional(hidden_states, lm_head_weight.shape[:1], float_dtypes(device), bias=bias)
    check_numbers(temperature=temperature, softcap=softcap)


def checked_rows(rows: Any, values: Tensor, ignored: int) -> Tensor | None:
    """Checks the positions that a linear op looks at: among them is each whose value [...] is not `ignored`."""
    if rows is None:
        return None
    check_tensor("rows", rows, None, (torch.int64,), values.device)
    if rows.dim() != 1:
        raise ValueError(f"rows: expected shape [n], got {tuple(rows.shape)}")
    return reference.checked_rows(rows, values.reshape(-1) != ignored) if rows.device.type == "cpu" else rows


def check_ppo(
    like: Tensor, loss_mask: Any, weights: Any, clip_eps: Any, clip_eps_high: Any, dual_clip: Any, **tensors: Any
) -> None:
    check_floats(like, like.shape, **tensors)
    check_optional(like, like.shape, float_dtypes(like.device), weights=weights)
    check_tensor("loss_mask", loss_mask, like.shape, (torch.bool,), like.device)
    check_numbers(clip_eps=clip_eps, clip_eps_high=clip_eps_high, dual_clip=dual_clip)
