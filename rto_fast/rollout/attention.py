"""Attention of the native engine: the model's own layers, keys and values in a `PagedCache`.

The cache reaches the layers as an argument of the model call, `paged=...`: a `Prefill` or a `Decode`.
"""

import torch
from transformers import AttentionInterface

from rto_fast.models.attention import packed_attention, refuse_masked_window, sdpa_causal

PAGED = "rto_paged"


def paged_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    *,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    softcap=None,
    paged=None,
    s_aux=None,
    **_,
):
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
    paged.store(module.layer_idx, key, value)
    out = paged.attend(module, query, key, value, scaling, sliding_window, softcap)
    return out[None], None


# Only the attention is registered, not a mask: a mask of transformers would ask the host what is packed (a sync).
AttentionInterface.register(PAGED, paged_attention)


class Probe:
    """Records the cache each layer needs; the attention itself is that of packed sequences."""

    def __init__(self, cu_seqlens, max_seqlen):
        self.layers, self.cu_seqlens, self.max_seqlen = {}, cu_seqlens, max_seqlen

    def store(self, layer, key, value):
        self.layers[layer] = key.shape[1:]

    def attend(self, module, query, key, value, scaling, window, softcap):
        return _attend_packed(module, query, key, value, self.cu_seqlens, self.max_seqlen, scaling, window, softcap)


def _attend_packed(module, query, key, value, cu_seqlens, max_seqlen, scaling, window, softcap):
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    return packed_attention(
        module,
        query,
        key,
        value,
        None,
        scaling=scaling,
        sliding_window=window,
        softcap=softcap,
        cu_seq_lens_q=cu_seqlens,
        max_length_q=max_seqlen,
    )[0][0]


class Prefill:
    """Pieces of prompts, packed. A piece that does not begin its prompt also sees what the cache holds of it.

    Args:
        slot_mapping: [T] int64, where each token's key and value go: page · page_size + offset.
        cu_seqlens: [N + 1] int32 of the pieces. lengths: theirs, a list. pages: for each piece None, or ([pages] int64,
            tokens in the cache when the piece is), where it continues a prompt.
    """

    def __init__(self, cache, slot_mapping, cu_seqlens, lengths, pages):
        self.cache, self.slot_mapping, self.cu_seqlens, self.lengths = cache, slot_mapping, cu_seqlens, lengths
        self.where = slot_mapping // cache.page_size, slice(None), slot_mapping % cache.page_size
        self.pages, self.continues = pages, any(piece is not None for piece in pages)

    def store(self, layer, key, value):
        self.cache.keys[layer][self.where], self.cache.values[layer][self.where] = key, value

    def attend(self, module, query, key, value, scaling, window, softcap):
        if not self.continues:
            return _attend_packed(
                module, query, key, value, self.cu_seqlens, max(self.lengths), scaling, window, softcap
            )
        keys, values = self.cache.keys[module.layer_idx], self.cache.values[module.layer_idx]
        pieces, out = zip(*(x.split(self.lengths) for x in (query, key, value))), []
        for piece, pages in zip(pieces, self.pages):
            q, k, v = (x.transpose(0, 1)[None] for x in piece)
            if pages is not None:
                k, v = (_gather(pool, *pages) for pool in (keys, values))
            out.append(sdpa_causal(q, k, v, scaling, window, softcap)[0].transpose(0, 1))
        return torch.cat(out)


def _gather(pool, pages, tokens):
    """[1, Hkv, tokens, D] of one sequence."""
    return pool[pages].transpose(0, 1).flatten(1, 2)[None, :, :tokens]


def runs_triton(tensor):
    """Whether the decode step runs Triton kernels where this tensor is; else it runs plain torch."""
    return tensor.device.type != "cpu"


class PagedDecode:
    """One token a sequence, by the Triton kernels. Everything lies where a CUDA graph finds it again.

    Args:
        block_tables: [B, blocks] int32. slot_mapping: [B] int64, where each token's key and value go: page · page_size +
            offset, -1 of an idle slot. lengths: [B] int32, tokens to attend to, the present one included; 0 of an idle slot.
    """

    def __init__(self, cache, block_tables, slot_mapping, lengths):
        self.cache, self.block_tables, self.slot_mapping, self.lengths = cache, block_tables, slot_mapping, lengths

    def store(self, layer, key, value):
        from rto_fast.kernels import paged_attention as kernels

        kernels.store_kv(key, value, self.cache.addresses[layer], self.slot_mapping, page_size=self.cache.page_size)

    def attend(self, module, query, key, value, scaling, window, softcap):
        from rto_fast.kernels import paged_attention as kernels

        return kernels.paged_attention(
            query,
            self.cache.addresses[module.layer_idx],
            self.block_tables,
            self.lengths,
            num_kv_heads=key.shape[1],
            page_size=self.cache.page_size,
            scale=scaling,
            window=window,
            softcap=softcap,
        )


class DenseDecode:
    """The same in plain torch, on a rectangle of keys as long as the longest sequence.

    Args:
        lengths: [B] int64, tokens in the cache without the present one. active: [B] bool. longest: the largest of
            `lengths`, plus 1. pages: (first, last + 1) where each sequence has one page and these follow each other: the
            rectangle is then a view of the cache; otherwise it is a copy.
    """

    def __init__(self, cache, block_tables, lengths, active, longest, pages):
        self.cache, self.lengths, self.longest, self.pages, self.biases = cache, lengths, longest, pages, {}
        self.block_tables = block_tables[:, : cache.pages_for(longest)]
        if pages:
            # A page has room for one token more than a sequence comes to: an idle slot does no harm in its own.
            self.where = torch.arange(*pages, device=lengths.device), slice(None), lengths
        else:
            page = block_tables.gather(1, (lengths // cache.page_size)[:, None])[:, 0]
            page = torch.where(active, page, cache.num_pages)  # the last page takes what idle slots write
            self.where = page.long(), slice(None), lengths % cache.page_size

    def store(self, layer, key, value):
        self.cache.keys[layer][self.where], self.cache.values[layer][self.where] = key, value

    def attend(self, module, query, key, value, scaling, window, softcap):
        rows, heads = len(query), key.shape[1]
        keys, values = (self._rectangle(pools[module.layer_idx]) for pools in (self.cache.keys, self.cache.values))
        grouped = query.reshape(rows * heads, -1, query.shape[-1])  # the query heads of a key head
        bias = self._bias(window, heads)
        if softcap:
            scores = torch.bmm(grouped, keys.transpose(1, 2)) * scaling
            scores = softcap * torch.tanh(scores / softcap) + bias
        else:
            scores = torch.baddbmm(bias.to(keys.dtype), grouped, keys.transpose(1, 2), alpha=scaling)
        weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
        return torch.bmm(weights, values).view(rows, -1, query.shape[-1])

    def _rectangle(self, pool):
        """[B·Hkv, longest, D]"""
        if self.pages:
            return pool[self.pages[0] : self.pages[1]].flatten(0, 1)[:, : self.longest]
        return pool[self.block_tables].transpose(1, 2).flatten(2, 3).flatten(0, 1)[:, : self.longest]

    def _bias(self, window, heads):
        """[B·heads, 1, longest] float32: -inf past a sequence's end and before its window; the same in every layer."""
        if (window, heads) not in self.biases:
            positions, last = torch.arange(self.longest, device=self.lengths.device), self.lengths[:, None]
            hidden = positions > last
            if window:
                hidden |= positions <= last - window
            bias = torch.zeros(hidden.shape, device=last.device).masked_fill_(hidden, -torch.inf)
            self.biases[window, heads] = bias.repeat_interleave(heads, 0)[:, None]
        return self.biases[window, heads]
