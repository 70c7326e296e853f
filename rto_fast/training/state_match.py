"""Checks that a trainer can have written a state: its types, its shapes, and that its numbers are finite."""

import torch

from rto_fast.training.progress_file import is_count, is_number


def find_misfit(state: object, own: object, place: str = "") -> str | None:
    """Says what is wrong with `state`, or returns None.

    Args:
        state: as `load_state` returns it.
        own: the trainer's present state, of the same structure, with a function in the place of a tensor that is gathered
            from all ranks. Keys that only one of the two has are left to `load_state_dict`.
        place: the path of `state` in the whole, for the message.
    """
    if isinstance(own, dict):
        if not isinstance(state, dict):
            return _expected(place, "names and values", state)
        for key, value in state.items():
            inner = f"{place}.{key}".removeprefix(".")
            # Moments exist after the first step only; they have the weights' names and shapes.
            like = own[key] if key in own else own.get("weights", value)
            if misfit := find_misfit(value, like, inner):
                return misfit
        return None
    if callable(own) or isinstance(own, torch.Tensor):
        return _misfit_of_tensor(state, own if isinstance(own, torch.Tensor) else None, place)
    if isinstance(own, str):
        return None if isinstance(state, str) else _expected(place, "text", state)
    if isinstance(own, int):
        return None if is_count(state) else _expected(place, "a count", state)
    if isinstance(own, float):
        return None if is_number(state, at_least=0) else _expected(place, "a finite number of at least 0", state)
    return None


def _misfit_of_tensor(state: object, own: torch.Tensor | None, place: str) -> str | None:
    if not isinstance(state, torch.Tensor):
        return _expected(place, "a tensor", state)
    if own is not None and state.shape != own.shape:
        return f"{place}: expected shape {tuple(own.shape)}, got {tuple(state.shape)}"
    if not state.is_floating_point():
        return _expected(place, "a tensor of floating-point numbers", state.dtype)
    return None if state.isfinite().all() else f"{place}: it has numbers that are not finite"


def _expected(place: str, what: str, got: object) -> str:
    text = repr(got) if isinstance(got, (int, float, str)) else type(got).__name__
    return f"{place}: expected {what}, got {text[:40]}"
