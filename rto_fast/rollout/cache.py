"""The KV cache: pages in one pool a layer, taken for a rollout and released for the update."""

import heapq
import os
import warnings

import torch

from rto_fast.errors import RolloutError

GIB = 1 << 30


def memory_budget(device, gib):
    """Bytes the pool may have: what the configuration says, or a share of what is free."""
    if gib is not None:
        return int(gib * GIB)
    if device.type == "cuda":
        # Memory that torch holds but does not use is free too; a tenth is left to prefills and logits.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(0.9 * (torch.cuda.mem_get_info(device)[0] + cached))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


class PagedCache:
    """Pages of `page_size` tokens: `keys[layer]`, `values[layer]` are [pages + 1, kv heads, page_size, head_dim].

    The last page takes what idle slots write. `addresses` [layers, 2] int64 holds where the pools lie; it stays where
    it is when the pools go and come, so that captured CUDA graphs, which read it, stay valid.
    """

    def __init__(self, layers, page_size, dtype, device):
        self.layers, self.page_size, self.dtype, self.device = layers, page_size, dtype, device
        self.addresses = torch.zeros(len(layers), 2, dtype=torch.int64, device=device)
        self.release()

    @property
    def page_bytes(self):
        return sum(2 * heads * dim for heads, dim in self.layers) * self.page_size * self.dtype.itemsize

    def pages_for(self, tokens):
        return -(-tokens // self.page_size)

    def allocate(self, wanted, least, budget):
        """Takes memory for `wanted` pages, or for as many as `budget` bytes and the device have.

        Raises:
            RolloutError: not even `least` pages, which one sequence needs, fit.
        """
        pages = min(wanted, budget // self.page_bytes - 1)
        while pages >= least:
            try:
                self._allocate_pools(pages)
                return
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not isinstance(error, torch.OutOfMemoryError) and "allocate" not in str(error):
                    raise
                self.release()
                smaller = pages // 2
                warnings.warn(
                    f"rollout: no memory for a KV cache of {pages * self.page_bytes / GIB:.2f} GiB; "
                    f"trying {smaller * self.page_bytes / GIB:.2f} GiB (fewer responses are decoded at once)",
                    stacklevel=2,
                )  # fmt: skip
                pages = smaller
        raise RolloutError(
            f"rollout.kv_cache_gib: the longest sequence needs {least * self.page_bytes / GIB:.3g} GiB of KV cache, and "
            f"{budget / GIB:.3g} GiB are given or free; give more, or shorten rollout.max_new_tokens"
        )

    def _allocate_pools(self, pages):
        for heads, dim in self.layers:
            shape = (pages + 1, heads, self.page_size, dim)
            # Zeros, for the CPU path multiplies what lies beyond a sequence's end by 0.
            self.keys.append(torch.zeros(shape, dtype=self.dtype, device=self.device))
            self.values.append(torch.zeros(shape, dtype=self.dtype, device=self.device))
        self.num_pages = pages
        self.free = list(range(pages))  # a heap: low pages first, so that few pages lie close together
        self.users = [0] * pages
        pools = [[k.data_ptr(), v.data_ptr()] for k, v in zip(self.keys, self.values)]
        self.addresses.copy_(torch.tensor(pools, dtype=torch.int64))

    def release(self):
        self.keys, self.values, self.free, self.users, self.num_pages = [], [], [], [], 0

    @property
    def idle_slot(self):
        """Where a slot without a sequence writes."""
        return self.num_pages * self.page_size

    def take(self, count):
        """`count` pages, or None where there are not so many."""
        if count > len(self.free):
            return None
        pages = [heapq.heappop(self.free) for _ in range(count)]
        self.share(pages)
        return pages

    def share(self, pages):
        for page in pages:
            self.users[page] += 1

    def give(self, pages):
        for page in pages:
            self.users[page] -= 1
            if not self.users[page]:
                heapq.heappush(self.free, page)

    def copy(self, sources, targets):
        """Copies pages, in every layer."""
        if sources:
            sources, targets = (torch.tensor(pages, device=self.device) for pages in (sources, targets))
            for pool in (*self.keys, *self.values):
                pool[targets] = pool[sources]
