"""Proves that code does not wait for a device: it looks at no value of a tensor."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rto_fast.kernels import gemm_choice, layer_reference, reference

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

    What only a CPU runs may look: the references of the layers and the advantages, and the checks of our ops, which
    are ops of their own. The references of the losses may not: they show that the rows are known ahead. On a GPU, a new
    product is looked at once.

    Args:
        allowed: functions that decide something on the host.
    """

    def __init__(self, allowed: Sequence[Callable] = ()):
        super().__init__()
        own = (reference.gae, reference.rto_advantages, gemm_choice._choose)
        self.codes = {function.__code__ for function in (*allowed, *own)}

    def _is_allowed(self) -> bool:
        frame = sys._getframe(2)
        while frame:
            if frame.f_code.co_filename == layer_reference.__file__ or frame.f_code in self.codes:
                return True
            frame = frame.f_back
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        indexed = func is torch.ops.aten.index.Tensor or func is torch.ops.aten.index_put_.default
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)] if indexed else []
        looks = name.startswith(OPS) and not (kwargs or {}).get("output_size")
        assert not (masks or looks) or self._is_allowed(), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))
