"""Attention of the native engine: the model's own layers, with keys and values in a `PagedCache`.

The cache reaches the layers as an argument of the model call, `paged=...`, which is a `CacheView`: `Prefill` for prompts,
`PagedDecode` or `DenseDecode` for decode steps, `Probe` to find out what cache a model needs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from rto_fast.kernels.layer_reference import sdpa_causal
from rto_fast.models.attention import packed_attention, refuse_masked_window
from rto_fast.rollout.cache import PagedCache

PAGED = "rto_paged"


class Scores(NamedTuple):
    """How a layer scores keys."""

    scaling: float  # of query · key
    window: int | None  # only the last `window` tokens count
    softcap: float | None  # scores become softcap · tanh(scores / softcap)


class CacheView:
    """What one forward pass stores in the cache and attends to. Its tokens go to pages and offsets `where`."""

    cache: PagedCache
    where: tuple[Tensor, slice, Tensor]

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Stores the keys and values [T, num_kv_heads, head_dim] of the tokens of this forward pass."""
        self.cache.keys[layer][self.where], self.cache.values[layer][self.where] = key, value

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Attention of layer `module.layer_idx`: query [T, num_heads, head_dim] → the same shape."""
        raise NotImplementedError


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    paged: CacheView | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, Hq, T, D], key and value [1, Hkv, T, D] → ([1, T, Hq, D], None)."""
    if paged is None or attention_mask is not None or s_aux is not None:
        raise ValueError("its attention is given no cache (`paged=`), or an attention mask or sinks besides")
    if key.shape[-1] != value.shape[-1]:
        raise ValueError(
            f"its keys have {key.shape[-1]} elements a head and its values {value.shape[-1]} (latent "
            "attention), and a cache holds both alike"
        )
    refuse_masked_window(module, sliding_window)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    paged.store(module.layer_idx, key, value)  # type: ignore[arg-type]  # a layer of transformers has an int there
    return paged.attend(module, query, key, value, Scores(scaling, sliding_window, softcap))[None], None


# Only the attention is registered, not a mask: transformers' mask would ask the host what is packed, which is a sync.
AttentionInterface.register(PAGED, paged_attention)


class Packed(CacheView):
    """Attention within packed sequences, without a cache.

    Args:
        cu_seqlens: [N + 1] int32, bounds of the sequences.
        max_seqlen: length of the longest one.
    """

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int):
        self.cu_seqlens, self.max_seqlen = cu_seqlens, max_seqlen

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        return packed_attention(
            module,
            query,
            key,
            value,
            None,
            scaling=scores.scaling,
            sliding_window=scores.window,
            softcap=scores.softcap,
            cu_seq_lens_q=self.cu_seqlens,
            max_length_q=self.max_seqlen,
        )[0][0]


class Probe(Packed):
    """Records the (num_kv_heads, head_dim) of each layer."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int):
        super().__init__(cu_seqlens, max_seqlen)
        self.layers: dict[int, tuple[int, int]] = {}

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        self.layers[layer] = key.shape[1], key.shape[2]


class Prefill(Packed):
    """Pieces of prompts, packed. A piece that continues a prompt also attends to what the cache holds of that prompt.

    Args:
        slot_mapping: [T] int64, where each token's key and value go: page · page_size + offset.
        cu_seqlens: [N + 1] int32, bounds of the pieces.
        lengths: lengths of the pieces.
        pages: for each piece that continues a prompt ([pages] int64, tokens in the cache including the piece), else None.
    """

    def __init__(
        self,
        cache: PagedCache,
        slot_mapping: Tensor,
        cu_seqlens: Tensor,
        lengths: list[int],
        pages: list[tuple[Tensor, int] | None],
    ):
        super().__init__(cu_seqlens, max(lengths))
        self.cache, self.slot_mapping, self.lengths, self.pages = cache, slot_mapping, lengths, pages
        self.where = slot_mapping // cache.page_size, slice(None), slot_mapping % cache.page_size
        self.continues = any(piece is not None for piece in pages)

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        if not self.continues:
            return super().attend(module, query, key, value, scores)
        keys, values = self.cache.keys[module.layer_idx], self.cache.values[module.layer_idx]
        pieces, out = zip(*(x.split(self.lengths) for x in (query, key, value))), []
        for piece, pages in zip(pieces, self.pages):
            q, k, v = (x.transpose(0, 1)[None] for x in piece)
            if pages is not None:
                numbers, tokens = pages
                k, v = (pool[numbers].transpose(0, 1).flatten(1, 2)[None, :, :tokens] for pool in (keys, values))
            out.append(sdpa_causal(q, k, v, *scores)[0].transpose(0, 1))
        return torch.cat(out)


def runs_triton(tensor: Tensor) -> bool:
    """Whether the decode step runs Triton kernels on this tensor's device; otherwise it runs plain torch."""
    return tensor.device.type != "cpu"


class PagedDecode(CacheView):
    """One token a sequence, by the Triton kernels. A CUDA graph finds all its tensors at the same addresses.

    Args:
        block_tables: [B, blocks] int32, pages of each sequence in order.
        slot_mapping: [B] int64, where each token's key and value go: page · page_size + offset; −1 for an idle slot.
        lengths: [B] int32, tokens to attend to including the present one; 0 for an idle slot.
    """

    def __init__(self, cache: PagedCache, block_tables: Tensor, slot_mapping: Tensor, lengths: Tensor):
        self.cache, self.block_tables, self.slot_mapping, self.lengths = cache, block_tables, slot_mapping, lengths

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        from rto_fast.kernels import paged_attention as kernels

        kernels.store_kv(key, value, self.cache.addresses[layer], self.slot_mapping, page_size=self.cache.page_size)

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        from rto_fast.kernels import paged_attention as kernels

        return kernels.paged_attention(
            query,
            self.cache.addresses[module.layer_idx],
            self.block_tables,
            self.lengths,
            num_kv_heads=key.shape[1],
            page_size=self.cache.page_size,
            scale=scores.scaling,
            window=scores.window,
            softcap=scores.softcap,
        )


class DenseDecode(CacheView):
    """One token a sequence, in plain torch, on a rectangle of keys as long as the longest sequence.

    Args:
        block_tables: [B, blocks] int32, pages of each sequence in order.
        lengths: [B] int64, tokens in the cache, without the present one.
        active: [B] bool, whether a slot holds a sequence.
        longest: the largest of `lengths`, plus 1.
        pages: (first, last + 1) if each sequence has one page and these follow each other: the rectangle is then a view
            of the cache. Otherwise None, and the rectangle is a copy.
    """

    def __init__(
        self,
        cache: PagedCache,
        block_tables: Tensor,
        lengths: Tensor,
        active: Tensor,
        longest: int,
        pages: tuple[int, int] | None,
    ):
        self.cache, self.lengths, self.longest, self.pages = cache, lengths, longest, pages
        self.block_tables = block_tables[:, : cache.pages_for(longest)]
        self.biases: dict[tuple[int | None, int], Tensor] = {}
        if pages:
            # A page has room for one token more than a sequence can have: an idle slot does no harm in its own page.
            self.where = torch.arange(*pages, device=lengths.device), slice(None), lengths
        else:
            page = block_tables.gather(1, (lengths // cache.page_size)[:, None])[:, 0]
            page = torch.where(active, page, cache.num_pages)  # idle slots write to the last page
            self.where = page.long(), slice(None), lengths % cache.page_size

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        rows, heads = len(query), key.shape[1]
        scaling, window, softcap = scores
        keys, values = (self._rectangle(pools[module.layer_idx]) for pools in (self.cache.keys, self.cache.values))
        grouped = query.reshape(rows * heads, -1, query.shape[-1])  # the query heads that share a key head
        bias = self._bias(window, heads)
        if softcap:
            scored = torch.bmm(grouped, keys.transpose(1, 2)) * scaling
            scored = softcap * torch.tanh(scored / softcap) + bias
        else:
            scored = torch.baddbmm(bias.to(keys.dtype), grouped, keys.transpose(1, 2), alpha=scaling)
        weights = scored.softmax(-1, dtype=torch.float32).to(values.dtype)
        return torch.bmm(weights, values).view(rows, -1, query.shape[-1])

    def _rectangle(self, pool: Tensor) -> Tensor:
        """Keys or values of all sequences, [B·Hkv, longest, D]."""
        if self.pages:
            return pool[self.pages[0] : self.pages[1]].flatten(0, 1)[:, : self.longest]
        return pool[self.block_tables].transpose(1, 2).flatten(2, 3).flatten(0, 1)[:, : self.longest]

    def _bias(self, window: int | None, heads: int) -> Tensor:
        """[B·heads, 1, longest] float32, −inf past a sequence's end and before its window. Layers share it."""
        if (window, heads) not in self.biases:
            positions, last = torch.arange(self.longest, device=self.lengths.device), self.lengths[:, None]
            hidden = positions > last
            if window:
                hidden |= positions <= last - window
            bias = torch.zeros(hidden.shape, device=last.device).masked_fill_(hidden, -torch.inf)
            self.biases[window, heads] = bias.repeat_interleave(heads, 0)[:, None]
        return self.biases[window, heads]
