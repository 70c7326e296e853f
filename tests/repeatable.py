"""Proves that code repeats to the bit on a GPU: it calls no op of torch whose bits differ between two runs there."""

import sys
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# What the docs of `torch.use_deterministic_algorithms` list, and the aten ops (their beginnings) that do it on CUDA.
ALWAYS = {
    "torch.nn.Conv1d": "convolution",
    "torch.nn.Conv2d": "convolution",
    "torch.nn.Conv3d": "convolution",
    "torch.nn.ConvTranspose1d": "convolution",
    "torch.nn.ConvTranspose2d": "convolution",
    "torch.nn.ConvTranspose3d": "convolution",
    "torch.nn.ReplicationPad1d": "replication_pad1d_backward",
    "torch.nn.ReplicationPad2d": "replication_pad2d_backward",
    "torch.nn.ReplicationPad3d": "replication_pad3d_backward",
    "torch.nn.ReflectionPad1d": "reflection_pad1d_backward",
    "torch.nn.ReflectionPad2d": "reflection_pad2d_backward",
    "torch.nn.ReflectionPad3d": "reflection_pad3d_backward",
    "torch.nn.AvgPool3d": "avg_pool3d_backward",
    "torch.nn.AdaptiveAvgPool2d": "_adaptive_avg_pool2d_backward",
    "torch.nn.AdaptiveAvgPool3d": "_adaptive_avg_pool3d_backward",
    "torch.nn.MaxPool3d": "max_pool3d_with_indices_backward",
    "torch.nn.AdaptiveMaxPool2d": "adaptive_max_pool2d_backward",
    "torch.nn.FractionalMaxPool2d": "fractional_max_pool2d_backward",
    "torch.nn.FractionalMaxPool3d": "fractional_max_pool3d_backward",
    "torch.nn.MaxUnpool1d": "max_unpool2d",
    "torch.nn.MaxUnpool2d": "max_unpool2d",
    "torch.nn.MaxUnpool3d": "max_unpool3d",
    "torch.nn.functional.interpolate": "upsample_",
    "torch.nn.functional.grid_sample": "grid_sampler_",
    "torch.nn.NLLLoss": "nll_loss",
    "torch.nn.CTCLoss": "_ctc_loss_backward",
    "torch.nn.EmbeddingBag": "_embedding_bag",
    "torch.histc": "histc",
    "torch.bincount": "bincount",
    "torch.median": "median",
    "torch.Tensor.put_": "put",
    # Not in every release's list: it adds by atomics where few ids come many times, unless the mode is on, and its kernel
    # for up to 3,072 tokens has a race.
    "torch.nn.Embedding": "embedding_dense_backward",
    # Not in the list: they add the gradient of queries by atomics, unless the mode is on.
    "flash attention": "_flash_attention_backward",
    "flash attention of sequences": "_scaled_dot_product_flash_attention_backward",
    "memory-efficient attention": "_efficient_attention_backward",
    "memory-efficient attention of sequences": "_scaled_dot_product_efficient_attention_backward",
    "cuDNN's attention": "_cudnn_attention_backward",
    "cuDNN's attention of sequences": "_scaled_dot_product_cudnn_attention_backward",
}
ELSEWHERE = {"torch.bmm", "torch.Tensor.resize_"}  # of sparse and of quantised tensors
# New weights, from the seed of the run (`rto_fast/session.py`), of an adapter or of the embedded model.
INITIALISE = ("rto_fast/data/world.py", "rto_fast/models/directory.py", "rto_fast/models/lora.py")
RANDOM = ("rand", "normal", "uniform", "bernoulli", "multinomial", "exponential", "native_dropout", "poisson")


def _repeats_rows(dim: int, index: Tensor) -> bool:
    """Whether an op along `dim` reaches a place twice: an index [n], or one of the shape of what is added or written."""
    along = index.movedim(dim, 0) if index.dim() else index[None]
    ordered = along.sort(0).values
    return bool((ordered[1:] == ordered[:-1]).any())


def _differ(index: Tensor, source: Tensor, dim: int) -> bool:
    """Whether rows of `source` that go to the same place differ, so that the last one to arrive decides."""
    rows = source.movedim(dim, 0).reshape(len(index), -1)
    written = rows.new_empty(int(index.max()) + 1, rows.shape[1])
    written[index] = rows
    return not torch.equal(written[index].nan_to_num(), rows.nan_to_num())


def _adds(self: Tensor, dim: int, index: Tensor, *_: Any, **__: Any) -> bool:
    return _repeats_rows(dim, index)


def _copies(self: Tensor, dim: int, index: Tensor, source: Tensor, *_: Any, **__: Any) -> bool:
    return len(index) > 0 and _differ(index, source, dim)


def _scatters(self: Tensor, dim: int, index: Tensor, source: Any, *_: Any, **__: Any) -> bool:
    return isinstance(source, Tensor) and _repeats_rows(dim, index)


def _puts(self: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False, *_: Any) -> bool:
    """CUDA sorts what is added, so it repeats. A CPU adds by atomics if it has threads."""
    found = [index for index in indices if index is not None]
    if not found or found[0].dtype in (torch.bool, torch.uint8):
        return False  # no place twice
    places = torch.zeros(torch.broadcast_shapes(*(index.shape for index in found)), dtype=torch.int64)
    for index, size in zip(indices, self.shape):
        if index is not None:
            places = places * size + index % size
    return (accumulate or values.numel() > 1) and len(places.unique()) < places.numel()


def _sums_floats(self: Tensor, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> bool:
    return (dtype or self.dtype).is_floating_point


# Ops of the same docs that repeat unless a place is reached twice.
SOMETIMES: dict[str, tuple[str, Callable[..., bool]]] = {
    "torch.index_add": ("index_add", _adds),
    "torch.index_select": ("index_add", _adds),  # its gradient
    "torch.Tensor.scatter_add_": ("scatter_add", _adds),
    "torch.gather": ("scatter_add", _adds),  # its gradient
    "torch.Tensor.scatter_reduce": ("scatter_reduce", _adds),
    "torch.Tensor.scatter": ("scatter", _scatters),
    "torch.Tensor.index_copy": ("index_copy", _copies),
    "torch.Tensor.index_put": ("index_put", _puts),
    "torch.Tensor.__getitem__": ("index_put", _puts),  # its gradient
    "torch.repeat_interleave": ("index_add", _adds),  # its gradient
    "torch.cumsum": ("cumsum", _sums_floats),
}
_RULES = dict(SOMETIMES.values())


def fault(func: Any, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """Why the bits of a call may differ between two runs on a GPU; None if they do not."""
    name = func._schema.name.removeprefix("aten::").removesuffix("_").removeprefix("_unsafe_")
    if name.startswith(tuple(ALWAYS.values())):
        return f"{name} has no fixed order on a GPU"
    rule = _RULES.get(name)
    if rule is not None and rule(*args, **kwargs):
        return f"{name} reaches a place twice, or sums floats, in no fixed order"
    draws = name.startswith(RANDOM) and kwargs.get("generator") is None
    if draws and (kwargs.get("device") or getattr(args[0], "device", None)) != torch.device("meta"):
        return f"{name} draws from the global random state"
    return None


class Repeatable(TorchDispatchMode):
    """`with Repeatable() as mode:` collects in `mode.faults` what would not repeat, and from where it was called.

    What only a CPU runs may do anything: the references of the kernels (`kernels/*reference.py`).

    Args:
        allowed: ops that only a CPU runs, in a backward pass of such a reference.
    """

    def __init__(self, allowed: Collection[str] = ()) -> None:
        super().__init__()
        self.allowed = allowed
        self.faults: set[str] = set()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if (reason := fault(func, args, kwargs or {})) is not None:
            file, line = _caller()
            initialises = "random state" in reason and file.endswith(INITIALISE)
            if not (file.endswith("reference.py") or initialises or reason.split()[0] in self.allowed):
                self.faults.add(f"{reason} ({file}:{line})")
        return func(*args, **(kwargs or {}))


def _caller() -> tuple[str, int]:
    """The innermost file and line of ours on the stack, below these tests."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/rto_fast/" in name or "/kernels/" in name and "site-packages" not in name:
            return name, frame.f_lineno
        frame = frame.f_back
    return "?", 0
