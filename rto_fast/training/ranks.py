"""The processes of a run: which one this is, what each computes, and how the results come together.

Every rank holds all data and every rollout (token ids and a few numbers a token) and makes the same decisions. Forward and
backward passes are shared out among the ranks. So statistics and denominators are global by construction, and only the order
in which a gradient's sum is rounded depends on the number of ranks.
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
    """Whether this rank is the one that writes files and prints."""
    return rank() == 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank. All ranks call it together."""
    if world_size() == 1:
        return bool(flag)
    flags = torch.tensor([float(flag)])
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())


def smallest(value: float) -> float:
    """The least `value` of all ranks, which call it together."""
    if world_size() == 1:
        return value
    values = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(values, op=dist.ReduceOp.MIN)
    return values.item()


def from_main(values: torch.Tensor) -> torch.Tensor:
    """Replaces `values` by those of the main rank, which have the same shape and type; returns them."""
    if world_size() > 1:
        dist.broadcast(values, 0)
    return values


def add_up(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sums 0-d tensors over the ranks, which all have the same names."""
    if world_size() == 1:
        return dict(values)
    total = torch.stack([value.detach() for value in values.values()]).double()
    dist.all_reduce(total)
    return dict(zip(values, total))


def share(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Distributes items so that every part has about as many tokens: longest first, each to the part that has least.

    Args:
        lengths: the tokens of each item.
    Returns:
        The indices of each part, ascending.
    """
    loads = [(0, part) for part in range(parts)]
    shares: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, part = heapq.heappop(loads)
        shares[part].append(index)
        heapq.heappush(loads, (load + lengths[index], part))
    return [sorted(part) for part in shares]


def imbalance(lengths: Sequence[int]) -> float:
    """The tokens of the busiest rank divided by the mean: how much longer a step takes than with equal shares."""
    loads = [sum(lengths[i] for i in part) for part in share(lengths, world_size())]
    return max(loads) * len(loads) / max(1, sum(loads))


def shared_micro_batches(lengths: Sequence[int], max_tokens: int) -> list[tuple[list[int], bool]]:
    """Splits this rank's items into micro-batches of at most `max_tokens` (see `micro_batches`).

    Every rank gets the same number of them: sharded models gather their weights in each pass, together.

    Returns:
        The indices of each micro-batch, and whether its result counts. A rank with fewer micro-batches than the others runs
        the shortest item again, whose result does not count.
    """
    if world_size() == 1:
        return [(indices, True) for indices in micro_batches(lengths, max_tokens)]
    of_ranks = []
    for part in share(lengths, world_size()):
        own_batches = micro_batches([lengths[i] for i in part], max_tokens)
        of_ranks.append([[part[i] for i in indices] for indices in own_batches])
    own, most = of_ranks[rank()], max(map(len, of_ranks))
    shortest = min(range(len(lengths)), key=lengths.__getitem__)
    return [(indices, True) for indices in own] + [([shortest], False)] * (most - len(own))


def map_items(
    forward: Callable[[list[int]], torch.Tensor], lengths: Sequence[int], rows: Sequence[int], max_tokens: int
) -> torch.Tensor:
    """Computes something of every item, shared out among the ranks.

    Args:
        forward: computes the rows of a micro-batch, item after item, from the indices of its items.
        lengths: the tokens of each item.
        rows: the number of rows that `forward` returns for each item.
        max_tokens: the tokens in one micro-batch.
    Returns:
        The rows of all items, in their order, on every rank.
    """
    values = []
    micro_batches_here = shared_micro_batches(lengths, max_tokens)
    total = sum(len(indices) for indices, is_work in micro_batches_here if is_work)
    with progress(total=total, unit="sequences") as phase:
        for indices, is_work in micro_batches_here:
            result = forward(indices)
            values.append(result if is_work else result[:0])
            phase.advance(len(indices) * is_work)
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
    """Gathers a tensor of each rank; they have `counts` rows."""
    padded = values.new_zeros(max(counts), *values.shape[1:])
    padded[: len(values)] = values
    everyones = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everyones, padded)
    return [whole[:count] for whole, count in zip(everyones, counts)]
