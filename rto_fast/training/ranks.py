"""The processes of a run: which one this is, what each computes, and how the results come together.

Every rank holds all data and every rollout (token ids and a few numbers a token) and takes every decision alike; what is
shared out are forward and backward passes. So statistics and normalisers are global by construction, and only the order in
which a gradient's sum is rounded depends on the number of ranks.
"""

import heapq
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from rto_fast.batch import micro_batches
from rto_fast.system.progress import progress


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this rank is the one that writes files and speaks."""
    return rank() == 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank; every rank asks at the same moment."""
    if world_size() == 1:
        return bool(flag)
    flags = torch.tensor([float(flag)])
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())


def from_main(values: torch.Tensor) -> torch.Tensor:
    """The main rank's `values`, of the same shape and type on every rank."""
    if world_size() > 1:
        dist.broadcast(values, 0)
    return values


def add_up(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sums of 0-d tensors over the ranks, which all have the same names."""
    if world_size() == 1:
        return dict(values)
    total = torch.stack([value.detach().double() for value in values.values()])
    dist.all_reduce(total)
    return dict(zip(values, total))


def share(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Distributes items of these token counts so that every part has about as many tokens: longest first, each to the part
    that has least.

    Returns:
        the indices of each part, ascending.
    """
    loads = [(0, part) for part in range(parts)]
    shares: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, part = heapq.heappop(loads)
        shares[part].append(index)
        heapq.heappush(loads, (load + lengths[index], part))
    return [sorted(part) for part in shares]


def imbalance(lengths: Sequence[int]) -> float:
    """Tokens of the rank that has most of them, by the mean: how much longer a step takes than with equal shares."""
    loads = [sum(lengths[i] for i in part) for part in share(lengths, world_size())]
    return max(loads) * len(loads) / max(1, sum(loads))


def shared_micro_batches(lengths: Sequence[int], max_tokens: int) -> list[tuple[list[int], bool]]:
    """This rank's micro-batches of at most `max_tokens` (see `micro_batches`), as many as every other rank's: sharded models
    gather their weights in each pass, together.

    Returns:
        [(indices, is it work)]: a rank with fewer runs the shortest item again, whose result is not to count.
    """
    if world_size() == 1:
        return [(run, True) for run in micro_batches(lengths, max_tokens)]
    runs = []
    for part in share(lengths, world_size()):
        runs.append([[part[i] for i in run] for run in micro_batches([lengths[i] for i in part], max_tokens)])
    own, most = runs[rank()], max(map(len, runs))
    shortest = min(range(len(lengths)), key=lengths.__getitem__)
    return [(run, True) for run in own] + [([shortest], False)] * (most - len(own))


def map_items(
    forward: Callable[[list[int]], torch.Tensor], lengths: Sequence[int], rows: Sequence[int], max_tokens: int
) -> torch.Tensor:
    """Computes something of every item, shared out among the ranks.

    Args:
        forward: indices of a micro-batch → their rows, item after item. lengths: tokens of each item. rows: that
            `forward` returns for each.
    Returns:
        the rows of all items, in their order, on every rank.
    """
    values = []
    micro_batches_here = shared_micro_batches(lengths, max_tokens)
    with progress(total=sum(len(run) for run, is_work in micro_batches_here if is_work), unit="sequences") as phase:
        for run, is_work in micro_batches_here:
            result = forward(run)
            values.append(result if is_work else result[:0])
            phase.advance(len(run) * is_work)
    own = torch.cat(values)
    if world_size() == 1:
        return own
    shares = share(lengths, world_size())
    parts = gather(own, [sum(rows[i] for i in part) for part in shares])
    by_item = {}
    for part, gathered in zip(shares, parts):
        by_item |= dict(zip(part, gathered.split([rows[i] for i in part])))
    return torch.cat([by_item[i] for i in range(len(lengths))])


def gather(values: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
    """The ranks' tensors, which have `counts` rows."""
    padded = values.new_zeros(max(counts), *values.shape[1:])
    padded[: len(values)] = values
    everyones = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everyones, padded)
    return [whole[:count] for whole, count in zip(everyones, counts)]
