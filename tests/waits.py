"""Proves that code does not wait for a device: it looks at no value of a tensor."""

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

    An op of our own counts as one that does not: what its checks look at on a CPU they leave alone on a GPU.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        indexed = func is torch.ops.aten.index.Tensor or func is torch.ops.aten.index_put_.default
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)] if indexed else []
        assert not masks and not name.startswith(OPS), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))
