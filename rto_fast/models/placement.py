"""Where weights lie: projections of one input are neighbours in memory, so that one GEMM can compute them.

The parameters stay the same objects, and saved checkpoints keep transformers' names.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# The projections of one input, by their names in transformers' attention and MLP modules.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def projection_groups(model: nn.Module) -> list[list[Any]]:
    """Returns the groups of linear layers that have the same input: (query, key, value), (gate, up) of each layer.

    The layers are `nn.Linear` modules or PEFT's LoRA layers around them.
    """
    groups = [[getattr(module, name, None) for name in names] for module in model.modules() for names in SIBLINGS]
    return [group for group in groups if all(type(getattr(m, "base_layer", m)) is nn.Linear for m in group)]


def adapter_groups(model: nn.Module) -> list[list[Any]]:
    """Returns the groups of LoRA's first layers that have the same input: those of an adapter in a group of projections."""
    halves = [[m.lora_A for m in group if hasattr(m, "lora_A")] for group in projection_groups(model)]
    found = [(group, dict.fromkeys(name for half in group for name in half)) for group in halves]
    return [[half[name] for half in group if name in half] for group, names in found for name in names]


@torch.inference_mode(False)
@torch.no_grad()
def lay_side_by_side(groups: Iterable[Sequence[Any]], names: Sequence[str] = ("weight", "bias")) -> None:
    """Moves the weights of each group of linear layers into one buffer, so that one GEMM can compute them.

    The parameters stay the same objects with the same values. Parameters that share their memory with others, such as an
    optimizer's flat buffer, are left alone, and so are those that were made in inference mode.
    """
    for group in groups:
        for name in names:
            tensors = [getattr(module, name) for module in group]
            if any(t is None or t.is_inference() or t.untyped_storage().nbytes() != t.nbytes for t in tensors):
                continue
            for tensor, part in zip(tensors, torch.cat(tensors).split([len(t) for t in tensors])):
                tensor.data = part


def joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """One view of tensors that lie side by side in memory, stacked along the first dimension; None if they do not.

    Layers call it in every pass, so it does no more than it has to: the tensors are matrices of one width, or vectors.
    """
    first = tensors[0]
    if len(tensors) == 1:
        return first
    start, rows = first.data_ptr(), 0
    end, dtype = start, first.dtype
    for tensor in tensors:
        if tensor.data_ptr() != end or tensor.dtype is not dtype or not tensor.is_contiguous():
            return None
        end += tensor.nbytes
        rows += tensor.shape[0]
    storage, shape = first.untyped_storage(), (rows, *first.shape[1:])
    # Tensors that are neighbours by chance have different storages, which no view can span.
    if end - storage.data_ptr() > storage.nbytes() or math.prod(shape) * first.itemsize != end - start:
        return None
    return first.detach().as_strided(shape, first.stride()) if end > start else None


def moved(tensors: Iterable[Tensor], move: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Moves the storages of tensors, each once, and returns the tensors' views of them: neighbours stay neighbours.

    Args:
        move: takes and returns the elements of a storage, [n].
    """
    storages: dict[tuple[int, torch.dtype], Tensor] = {}
    views = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), tensor.dtype
        if key not in storages:
            storages[key] = move(tensor.detach().as_strided((storage.nbytes() // tensor.itemsize,), (1,), 0))
        views.append(storages[key].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()))
    return views
