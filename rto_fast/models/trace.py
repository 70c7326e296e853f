"""Finds the layer in which two forward passes begin to differ, or in which one fails, for error messages."""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn

from rto_fast.errors import ModelError, UserError, error_text


@dataclass(frozen=True)
class Pass:
    """A forward pass, and the tokens of it that are compared."""

    run: Callable[[], Any]
    tokens: int  # of all its sequences
    rows: slice  # the tokens that are compared


def first_difference(model: nn.Module, one: Pass, other: Pass, tolerance: float) -> str | None:
    """Returns the first layer to finish with different outputs from equal inputs in two passes, as "name (class)".

    Args:
        one, other: the passes, of `model`, which compare as many tokens.
        tolerance: the largest difference that is rounding, relative to the largest value of a tensor.
    Returns:
        None if there is no such layer below the model itself.
    """
    first, second = _record(model, one), _record(model, other)

    def differs(call: tuple[str, int]) -> bool:
        return [_alike(*pair, tolerance) for pair in zip(first[call], second[call])] == [True, False]

    return next(
        (call[0] for call in first if call in second and differs(call)), None
    )  # calls are in order of their ends


def failing_layer(model: nn.Module, error: BaseException) -> str | None:
    """Returns the innermost layer of `model` that an exception came from, as "name (class)"."""
    names = {id(module): name for name, module in model.named_modules()}
    callers = [frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__)]
    layers = [title(names[id(each)], each) for each in callers if isinstance(each, nn.Module) and names.get(id(each))]
    return layers[-1] if layers else None


@contextlib.contextmanager
def naming_layer(model: nn.Module, name: str) -> Iterator[None]:
    """Turns an exception from a forward pass of packed sequences into a ModelError that names the layer."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the model's code may raise anything
        layer = failing_layer(model, error) or type(model).__name__
        reason = "it needs an attention mask, and they have none" if _misses_mask(error) else error_text(error)
        raise ModelError(f"{name}: {layer} cannot run packed sequences: {reason}") from error


def _misses_mask(error: BaseException) -> bool:
    """Returns whether a function that got None as its `attention_mask` raised the exception when it used it."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return "'NoneType'" in str(error) and frame.f_locals.get("attention_mask", error) is None


def title(name: str, module: nn.Module) -> str:
    """Returns a layer's name in messages."""
    return f"{name} ({type(module).__name__})"


def _record(model: nn.Module, one: Pass) -> dict[tuple[str, int], tuple[list[Tensor], list[Tensor]]]:
    """Runs a pass; returns {(layer, number of its call): (inputs, outputs)}, the compared rows of each tensor."""
    record: dict[tuple[str, int], tuple[list[Tensor], list[Tensor]]] = {}
    counts: Counter[str] = Counter()
    begun: list[list[Tensor]] = []  # copies of running layers' inputs, which they may change in place

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
        begun.append(list(_rows((args, kwargs), one)))

    def end(layer: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        record[layer, counts[layer]] = begun.pop(), list(_rows(output, one))
        counts[layer] += 1

    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                hook = functools.partial(end, title(name, module))
                hooks.enter_context(module.register_forward_pre_hook(begin, with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        one.run()
    return record


def _rows(value: Any, one: Pass) -> Iterator[Tensor]:
    """Yields the compared rows of every tensor in `value` that has one for each token, [1, T, …] or [T, …]."""
    if isinstance(value, Tensor):
        if value.dim() > 1 and value.shape[1] == one.tokens and value.shape[0] == 1:
            yield value[0, one.rows].detach().clone()
        elif value.dim() and value.shape[0] == one.tokens:
            yield value[one.rows].detach().clone()
    elif isinstance(value, dict | tuple | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _rows(item, one)


def _alike(first: list[Tensor], second: list[Tensor], tolerance: float) -> bool:
    pairs = ((a.double(), b.double()) for a, b in zip(first, second) if a.shape == b.shape)
    return all(torch.allclose(a, b, rtol=0.0, atol=tolerance * a.abs().max().item(), equal_nan=True) for a, b in pairs)
