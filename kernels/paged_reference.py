"""The paged key-value cache in plain torch. The kernels and the engine's CPU path are tested against it.

A layer's cache is k_cache and v_cache [num_pages, num_kv_heads, page_size, head_dim].
`rto_fast.kernels.paged_attention` describes the other arguments.
"""

import torch
from torch import Tensor

from rto_fast.kernels.reference import compute_dtype


def store_kv(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Stores key and value [T, num_kv_heads, head_dim] at slots [T] = page·page_size + offset, except negative ones."""
    keep = slots >= 0
    pages, offsets = slots[keep] // k_cache.shape[2], slots[keep] % k_cache.shape[2]
    k_cache[pages, :, offsets] = key[keep]
    v_cache[pages, :, offsets] = value[keep]


def paged_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """query [B, num_heads, head_dim] → the same shape and dtype; computed in float64 for float64, else in float32."""
    batch, num_heads, head_dim = query.shape
    num_kv_heads, page_size = k_cache.shape[1:3]
    dtype = compute_dtype(query, k_cache)
    num_blocks = -(-int(lengths.max()) // page_size) if batch else 0
    position = torch.arange(num_blocks * page_size, device=query.device)
    is_stored = position < lengths[:, None]  # [B, N]
    # Beyond a sequence's length pages may not exist, and those that do may contain NaN.
    pages = block_tables[:, :num_blocks].long().where(is_stored[:, ::page_size], 0)

    def gather(cache: Tensor) -> Tensor:  # [B, num_kv_heads, N, head_dim]
        tokens = cache[pages].transpose(1, 2).reshape(batch, num_kv_heads, len(position), head_dim)
        return tokens.to(dtype).masked_fill(~is_stored[:, None, :, None], 0)

    grouped = query.reshape(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = grouped.to(dtype) @ gather(k_cache).transpose(2, 3) * scale  # [B, num_kv_heads, group, N]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    is_seen = is_stored if window is None else is_stored & (position >= lengths[:, None] - window)
    is_seen = is_seen[:, None, None]
    scores = scores.masked_fill(~is_seen, float("-inf"))
    weights = scores.softmax(-1).masked_fill(~is_seen, 0)  # where nothing is seen, softmax gives NaN
    return (weights @ gather(v_cache)).view(batch, num_heads, head_dim).to(query.dtype)
