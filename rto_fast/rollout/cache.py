"""The KV cache: pages in one pool a layer, taken for a rollout and released for the update."""

import heapq
from collections.abc import Iterable

import numpy as np
import torch

from rto_fast.errors import RolloutError
from rto_fast.system.memory import free_memory
from rto_fast.system.notices import notify

GIB = 1 << 30
POOL_SHARE = {"cuda": 0.85, "cpu": 0.5}  # of the free memory; the rest of a GPU's is for prefills and logits


def to_device(values, dtype, device):
    """A tensor of Python numbers; the host does not wait for what the device is doing, as for memory that is not pinned."""
    values = torch.tensor(np.array(values), dtype=dtype)  # by NumPy: a third of the time for lists of ten thousands
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def memory_budget(device: torch.device, gib: float | None) -> int:
    """Bytes that the pool may have: `gib` of `rollout.kv_cache_gib`, or a share of what is free."""
    if gib is not None:
        return int(gib * GIB)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch holds but does not use is free, apart from that of captured graphs
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    return int(POOL_SHARE[device.type] * free)


def choose_page_size(configured: int | None, longest: int, is_cuda: bool) -> int:
    """Tokens in a page.

    Args:
        configured: `rollout.page_size`.
        longest: tokens of the longest sequence, its prompt included.
    """
    # A CPU reads a sequence in place if it is one page, and memory is paged by the system anyway.
    return configured or (64 if is_cuda else pages_for(longest, 16) * 16)


def pages_for(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)


def wanted_pages(lengths: Iterable[int], longest: int, samples_per_prompt: int, page_size: int) -> int:
    """Pages with which no sequence has to wait for another one's.

    Args:
        lengths: tokens of each sequence that is decoded at once.
        longest: tokens of the longest sequence.
    """
    # Samples that wait keep their prompt's pages.
    kept = pages_for(longest, page_size) if samples_per_prompt > 1 else 0
    return sum(pages_for(length, page_size) for length in lengths) + kept


class PagedCache:
    """Pages of `page_size` tokens: `keys[layer]`, `values[layer]` are [pages + 1, kv heads, page_size, head_dim].

    On a CPU the last page takes what idle slots write. `addresses` [layers, 2] int64 holds where the pools lie; it stays
    where it is when the pools go and come, so that captured CUDA graphs, which read it, stay valid.
    """

    def __init__(self, layers, page_size, dtype, device):
        self.layers, self.page_size, self.dtype, self.device = layers, page_size, dtype, device
        self.addresses = torch.zeros(len(layers), 2, dtype=torch.int64, device=device)
        self.release()

    @property
    def page_bytes(self):
        return sum(2 * heads * dim for heads, dim in self.layers) * self.page_size * self.dtype.itemsize

    def pages_for(self, tokens):
        return pages_for(tokens, self.page_size)

    def allocate(self, wanted, least, budget):
        """Takes memory for `wanted` pages, or for as many as `budget` bytes and the device have.

        Raises:
            RolloutError: not even `least` pages, which one sequence needs, fit.
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
            except RuntimeError as error:  # torch.OutOfMemoryError is one; a CPU's has no class of its own
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

    def _allocate_pools(self, pages):
        for heads, dim in self.layers:
            shape = (pages + 1, heads, self.page_size, dim)
            # Zeros, for the CPU path multiplies what lies beyond a sequence's end by 0.
            self.keys.append(torch.zeros(shape, dtype=self.dtype, device=self.device))
            self.values.append(torch.zeros(shape, dtype=self.dtype, device=self.device))
        self.num_pages = pages
        self.free = list(range(pages))  # a heap: low pages first, so that few pages lie close together
        self.ref_counts = [0] * pages
        pools = [[k.data_ptr(), v.data_ptr()] for k, v in zip(self.keys, self.values)]
        self.addresses.copy_(to_device(pools, torch.int64, self.device))

    def release(self):
        held = getattr(self, "keys", [])
        self.keys, self.values, self.free, self.ref_counts, self.num_pages = [], [], [], [], 0
        if held and self.device.type == "cuda":
            torch.cuda.empty_cache()  # or what is allocated next lies in the middle of this memory, and holds it

    def take(self, count):
        """`count` pages, or None where there are not so many."""
        if count > len(self.free):
            return None
        pages = [heapq.heappop(self.free) for _ in range(count)]
        self.share(pages)
        return pages

    def share(self, pages):
        for page in pages:
            self.ref_counts[page] += 1

    def give(self, pages):
        for page in pages:
            self.ref_counts[page] -= 1
            if not self.ref_counts[page]:
                heapq.heappush(self.free, page)

    def copy(self, sources, targets):
        """Copies pages, in every layer."""
        if sources:
            sources, targets = to_device([sources, targets], torch.int64, self.device)
            for pool in (*self.keys, *self.values):
                pool[targets] = pool[sources]
