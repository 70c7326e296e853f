"""Proves that code does not wait for a device: it looks at no value of a tensor."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What gives the host a number or a shape that depends on values.
OPS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "unique",
    "bincount",
    "repeat_interleave.Tensor",
)


class NoWaits(TorchDispatchMode):
    """`with NoWaits():` raises where an op would make the host wait for a GPU.

    What only a CPU runs may look: the references of our kernels, and the checks of our ops, which are ops of their own.

    Args:
        allowed: functions that decide something on the host.
    """

    def __init__(self, allowed: Sequence[Callable] = ()):
        super().__init__()
        self.codes = {function.__code__ for function in allowed}

    def _is_allowed(self) -> bool:
        frame = sys._getframe(2)
        while frame:
            is_reference = Path(frame.f_code.co_filename).name.endswith("_reference.py")
            if is_reference or frame.f_code in self.codes:
                return True
            frame = frame.f_back
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        indexed = func is torch.ops.aten.index.Tensor or func is torch.ops.aten.index_put_.default
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)] if indexed else []
        assert not (masks or name.startswith(OPS)) or self._is_allowed(), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))
