"""Attention of the native engine, with keys and values in a `PagedCache`.

What a forward pass attends to is a `CacheView`: `Prefill` for prompts, `PagedDecode` or `DenseDecode` for decode steps. Our
decoder (`rto_fast.models.decoder`) takes it as its view, layers of transformers as an argument of the model call,
`paged=...`. `Probe` finds out what cache a model needs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from rto_fast import layer_ops
from rto_fast.models.attention import refuse_masked_window
from rto_fast.models.decoder_families import AttentionSpec
from rto_fast.rollout.cache import PagedCache

PAGED = "rto_paged"


class Scores(NamedTuple):
    """How a layer scores keys."""

    scaling: float  # of query · key
    window: int | None  # only the last `window` tokens count
    softcap: float | None  # scores become softcap · tanh(scores / softcap)


class CacheView:
    """What one forward pass stores in the cache and attends to.

    Its tokens go to pages and offsets `where`; to slots `slot_mapping` [T] int64, page · page_size + offset, where Triton
    kernels store them.
    """

    cache: PagedCache
    where: tuple[Tensor, slice, Tensor]
    slot_mapping: Tensor

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Stores the keys and values [T, num_kv_heads, head_dim] of the tokens of this forward pass."""
        self.cache.keys[layer][self.where], self.cache.values[layer][self.where] = key, value

    def scored(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Attention of a layer, after `store`: query [T, num_heads, head_dim] → the same shape."""
        raise NotImplementedError

    def attend(self, attention: AttentionSpec, qkv: Tensor, rope: Tensor | None) -> Tensor:
        """Rotates, stores and attends: qkv [T, heads, head_dim], rope [T, 2, R] → [T, num_heads · head_dim]."""
        if runs_triton(qkv):
            from rto_fast.kernels import rotary

            rotary.rotate_and_store(
                qkv,
                rope,
                self.cache.addresses[attention.layer],
                self.slot_mapping,
                page_size=self.cache.page_size,
                **attention.rotation,
            )
            query, key, value = qkv.split(attention.heads, 1)
        else:
            query, key, value = attention.rotated(qkv, rope)
            self.store(attention.layer, key, value)
        scores = Scores(attention.scale, attention.window, attention.softcap)
        return self.scored(attention.layer, query, key, value, scores).flatten(1)


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
    layer: Any = module.layer_idx
    paged.store(layer, key, value)
    out = paged.scored(layer, query, key, value, Scores(scaling, sliding_window, softcap))
    return out.contiguous()[None], None  # some models call `view` on it


# Only the attention is registered, not a mask: transformers' mask would ask the host what is packed, which is a sync.
AttentionInterface.register(PAGED, paged_attention)


class Probe(CacheView):
    """Attention within packed sequences that records the (num_kv_heads, head_dim) of each layer.

    Args:
        cu_seqlens: [N + 1] int32, bounds of the sequences.
        max_seqlen: length of the longest one.
    """

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int):
        self.cu_seqlens, self.max_seqlen = cu_seqlens, max_seqlen
        self.layers: dict[int, tuple[int, int]] = {}

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        self.layers[layer] = key.shape[1], key.shape[2]

    def scored(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        return layer_ops.packed_attention(
            query,
            key,
            value,
            self.cu_seqlens,
            self.max_seqlen,
            scale=scores.scaling,
            window=scores.window,
            softcap=scores.softcap,
        )


class Prefill(CacheView):
    """Pieces of prompts, packed. A piece that continues a prompt also attends to what the cache holds of that prompt.

    Args:
        slot_mapping: [T] int64, where each token's key and value go: page · page_size + offset.
        cu_seqlens: [N + 1] int32, bounds of the pieces.
        max_seqlen: tokens of the longest piece.
        earlier: if a piece continues a prompt: the slots [K] int64 of all keys that the pieces attend to, piece after piece,
            and their bounds [N + 1] int32. Otherwise None.
    """

    def __init__(
        self,
        cache: PagedCache,
        slot_mapping: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        earlier: tuple[Tensor, Tensor] | None,
    ):
        self.cache, self.slot_mapping, self.cu_seqlens, self.max_seqlen = cache, slot_mapping, cu_seqlens, max_seqlen
        self.where, self.read, self.cu_seqlens_k = self._places(slot_mapping), None, None
        if earlier is not None:
            self.read, self.cu_seqlens_k = self._places(earlier[0]), earlier[1]

    def _places(self, slots: Tensor) -> tuple[Tensor, slice, Tensor]:
        return slots // self.cache.page_size, slice(None), slots % self.cache.page_size

    def scored(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        if self.read is not None:
            key, value = self.cache.keys[layer][self.read], self.cache.values[layer][self.read]
        return layer_ops.packed_attention(
            query,
            key,
            value,
            self.cu_seqlens,
            self.max_seqlen,
            scale=scores.scaling,
            window=scores.window,
            softcap=scores.softcap,
            cu_seqlens_k=self.cu_seqlens_k,
        )


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

    def scored(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        from rto_fast.kernels import paged_attention as kernels

        return kernels.paged_attention(
            query,
            self.cache.addresses[layer],
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

    def scored(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        rows, heads = len(query), key.shape[1]
        scaling, window, softcap = scores
        keys, values = (self._rectangle(pools[layer]) for pools in (self.cache.keys, self.cache.values))
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
