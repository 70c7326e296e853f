"""Where in a model two forward passes part, or one fails: the layer that a message names."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rto_fast.errors import ModelError, UserError, error_text


@dataclass(frozen=True)
class Pass:
    """A forward pass, and the tokens of it that are compared.

    run: the pass. tokens: of all its sequences. rows: those compared.
    """

    run: Callable[[], Any]
    tokens: int
    rows: slice


def first_difference(model: nn.Module, one: Pass, other: Pass, tolerance: float) -> str | None:
    """The innermost layer that makes different things of the same inputs in two passes, as "name (class)".

    Args:
        model: whose layers are looked at.
        one, other: passes over the same rows.
        tolerance: relative to the largest value of a tensor; a smaller difference is rounding.
    Returns:
        the first such layer to finish; None: none below the model itself does.
    """
    first, second = _record(model, one), _record(model, other)
    for call, (inputs, outputs) in first.items():  # in the order in which the layers finish
        if call in second:
            alike = [_alike(a, b, tolerance) for a, b in zip((inputs, outputs), second[call])]
            if alike == [True, False]:
                return call[0]
    return None


def failing_layer(model: nn.Module, error: BaseException) -> str | None:
    """The innermost layer of `model` that an exception came from, as "name (class)"."""
    names, found, traceback = {id(module): name for name, module in model.named_modules()}, None, error.__traceback__
    while traceback:
        module = traceback.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and names.get(id(module)):
            found = title(names[id(module)], module)
        traceback = traceback.tb_next
    return found


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
    """Whether an exception is that of a function which was given no attention mask and takes one apart."""
    traceback = error.__traceback__
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    values = traceback.tb_frame.f_locals if traceback else {}
    return "'NoneType'" in str(error) and values.get("attention_mask", error) is None


def title(name: str, module: nn.Module) -> str:
    """What messages call a layer."""
    return f"{name} ({type(module).__name__})"


def _record(model: nn.Module, one: Pass) -> dict[tuple[str, int], tuple[list[Tensor], list[Tensor]]]:
    """{(title of a layer, number of its call): (inputs, outputs)}, the compared rows of each tensor."""
    record: dict[tuple[str, int], tuple[list[Tensor], list[Tensor]]] = {}
    counts: Counter[str] = Counter()
    begun: list[list[Tensor]] = []  # inputs of the layers at work: a layer may change them in place

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
        begun.append(list(_rows((args, kwargs), one)))

    def end(layer: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            record[layer, counts[layer]] = begun.pop(), list(_rows(output, one))
            counts[layer] += 1

        return hook

    hooks = []
    try:
        for name, module in model.named_modules():
            if name:
                hooks.append(module.register_forward_pre_hook(begin, with_kwargs=True))
                hooks.append(module.register_forward_hook(end(title(name, module)), with_kwargs=True))
        one.run()
    finally:
        for hook in hooks:
            hook.remove()
    return record


def _rows(value: Any, one: Pass) -> Iterator[Tensor]:
    """The compared rows of every tensor in `value` that has one for each token: [1, T, …] or [T, …]."""
    if isinstance(value, Tensor):
        if value.dim() > 1 and value.shape[1] == one.tokens and value.shape[0] == 1:
            yield value[0, one.rows].detach().clone()
        elif value.dim() and value.shape[0] == one.tokens:
            yield value[one.rows].detach().clone()
    elif isinstance(value, dict):
        for item in value.values():
            yield from _rows(item, one)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _rows(item, one)


def _alike(first: list[Tensor], second: list[Tensor], tolerance: float) -> bool:
    for a, b in zip(first, second):
        if a.shape == b.shape:
            a, b = a.double(), b.double()
            if not torch.allclose(a, b, rtol=0.0, atol=tolerance * a.abs().max().item(), equal_nan=True):
                return False
    return True
