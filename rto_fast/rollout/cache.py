"""The KV cache: one pool of pages for each layer, allocated for a rollout and released for the update."""

import heapq
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rto_fast.errors import RolloutError
from rto_fast.system.memory import free_memory
from rto_fast.system.notices import notify

GIB = 1 << 30
POOL_SHARE = {"cuda": 0.85, "cpu": 0.5}  # of the free memory; the rest of a GPU's is for prefills and logits


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of Python numbers. It is copied from pinned memory, so that the host does not wait for the device."""
    # NumPy takes a third of torch's time for lists of tens of thousands.
    values = torch.tensor(np.array(values), dtype=dtype)
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def memory_budget(device: torch.device, gib: float | None) -> int:
    """Bytes that the cache may take: `gib` of the configuration, or a share of the free memory."""
    if gib is not None:
        return int(gib * GIB)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # memory that torch caches is free too, apart from that of captured graphs
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    return int(POOL_SHARE[device.type] * free)


def choose_page_size(longest: int, is_cuda: bool) -> int:
    """Tokens in a page.

    Args:
        longest: tokens of the longest sequence, its prompt included.
    """
    # A CPU can read a sequence in place if it is one page; unused memory of a page costs nothing there.
    return 64 if is_cuda else pages_for(longest, 16) * 16


def pages_for(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)


def wanted_pages(lengths: Iterable[int], longest: int, samples_per_prompt: int, page_size: int) -> int:
    """Pages with which no sequence waits for pages of another one.

    Args:
        lengths: tokens of each sequence that is decoded at once.
        longest: tokens of the longest sequence.
    """
    # Samples that wait keep the pages of their prompt.
    kept = pages_for(longest, page_size) if samples_per_prompt > 1 else 0
    return sum(pages_for(length, page_size) for length in lengths) + kept


class PagedCache:
    """Pages of `page_size` tokens: `keys[layer]` and `values[layer]` are [pages + 1, kv heads, page_size, head_dim].

    On a CPU, idle slots write to the last page. `addresses` [layers, 2] int64 holds the pools' addresses. The tensor itself
    stays where it is when pools are released and allocated again: captured CUDA graphs read it and stay valid.

    Args:
        layers: (kv heads, head_dim) of each layer.
    """

    def __init__(self, layers: list[tuple[int, int]], page_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.layers, self.page_size, self.dtype, self.device = layers, page_size, dtype, device
        self.addresses = torch.zeros(len(layers), 2, dtype=torch.int64, device=device)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.release()

    @property
    def page_bytes(self) -> int:
        return sum(2 * heads * dim for heads, dim in self.layers) * self.page_size * self.dtype.itemsize

    def pages_for(self, tokens: int) -> int:
        return pages_for(tokens, self.page_size)

    def allocate(self, wanted: int, least: int, budget: int) -> None:
        """Allocates `wanted` pages, or as many as fit `budget` bytes and the device's memory.

        Args:
            least: pages that one sequence needs.
        Raises:
            RolloutError: `least` pages do not fit.
        """
        self.release()
        pages = min(wanted, budget // self.page_bytes - 1)
        if pages < least:
            raise RolloutError(
                f"rollout.kv_cache_gib: the longest sequence needs {least * self.page_bytes / GIB:.3g} GiB of KV cache, and "
                f"{budget / GIB:.3g} GiB are given or free; give more, or shorten rollout.max_new_tokens"
            )
        while True:
            try:
                return self._allocate_pools(pages)
            except RuntimeError as error:  # torch.OutOfMemoryError is one; on a CPU there is no class for it
                self.release()
                if "allocate" not in str(error) and not isinstance(error, torch.OutOfMemoryError):
                    raise
                if pages == least:
                    raise RolloutError(
                        f"rollout: no memory for the KV cache of one sequence, {least * self.page_bytes / GIB:.3g} GiB; "
                        "shorten rollout.max_new_tokens"
                    ) from error
            smaller = max(pages // 2, least)
            notify(
                "rollout",
                "cache_shrinks",
                f"rollout: no memory for a KV cache of {pages * self.page_bytes / GIB:.2f} GiB; trying "
                f"{smaller * self.page_bytes / GIB:.2f} GiB (fewer responses are decoded at once)",
            )
            pages = smaller

    def _allocate_pools(self, pages: int) -> None:
        for heads, dim in self.layers:
            shape = (pages + 1, heads, self.page_size, dim)
            # Zeros, because the CPU path multiplies by 0 what lies beyond a sequence's end.
            self.keys.append(torch.zeros(shape, dtype=self.dtype, device=self.device))
            self.values.append(torch.zeros(shape, dtype=self.dtype, device=self.device))
        self.num_pages = pages
        self.free = list(range(pages))  # a heap, which gives low pages first, so that a few pages lie close together
        self.ref_counts = [0] * pages
        pools = [[k.data_ptr(), v.data_ptr()] for k, v in zip(self.keys, self.values)]
        self.addresses.copy_(to_device(pools, torch.int64, self.device))

    def release(self) -> None:
        held = len(self.keys)
        self.keys, self.values, self.free, self.ref_counts, self.num_pages = [], [], [], [], 0
        if held and self.device.type == "cuda":
            torch.cuda.empty_cache()  # or what is allocated next would lie amid this memory and keep all of it

    def take(self, count: int) -> list[int]:
        """Takes `count` free pages, or none if fewer are free."""
        if count > len(self.free):
            return []
        pages = [heapq.heappop(self.free) for _ in range(count)]
        self.share(pages)
        return pages

    def share(self, pages: list[int]) -> None:
        """Counts one more user of each page."""
        for page in pages:
            self.ref_counts[page] += 1

    def give(self, pages: list[int]) -> None:
        """Counts one user less of each page; pages without a user are free."""
        for page in pages:
            self.ref_counts[page] -= 1
            if not self.ref_counts[page]:
                heapq.heappush(self.free, page)

    def copy(self, sources: list[int], targets: list[int]) -> None:
        """Copies pages `sources` to pages `targets`, in every layer."""
        if sources:
            source, target = to_device([sources, targets], torch.int64, self.device)
            for pool in (*self.keys, *self.values):
                pool[target] = pool[source]
