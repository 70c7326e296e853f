"""Attention over packed sequences: one registered function for every Hugging Face decoder.

The mask is ours: sequences never see each other because the kernels are told `cu_seqlens`, not because a mask is guessed
from position ids (transformers does that only when no attention mask is given and no cache is used, and leaks silently
otherwise). Order of preference: flash-attn's varlen kernel, torch's `varlen_attn`, scaled_dot_product_attention sequence by
sequence. The last is exact everywhere; on a 2-core CPU, 64 sequences of 40–90 tokens take it 5 ms where one SDPA call with a
block mask takes 239 ms (4 heads of 16), since the block mask also computes every pair of tokens that it then hides.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

PACKED = "rto_packed"


@cache
def _flash_attn() -> Callable[..., Tensor] | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:  # not on the registry as a wheel: optional
        return None
    return flash_attn_varlen_func


@cache
def _torch_varlen() -> tuple[Callable[..., Any], set[str]]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, set(inspect.signature(varlen_attn).parameters)


def _flash_packed(
    flash_attn: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    return flash_attn(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        softmax_scale=scaling,
        causal=True,
        window_size=(window - 1 if window else -1, 0),
        softcap=softcap or 0.0,
    )


def _varlen_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    varlen_attn, parameters = _torch_varlen()
    options: dict[str, bool] = {}
    if "enable_gqa" in parameters:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    elif query.shape[1] != key.shape[1]:  # torch 2.11 wants equal head counts
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return varlen_attn(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale=scaling,
        window_size=(window - 1 if window else -1, 0),
        **options,
    )


def sdpa_causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention: [N, Hq, L, D] queries, the last L of the [N, Hkv, K, D] keys' and values' positions."""
    length, keys = query.shape[2], key.shape[2]
    gqa = query.shape[1] != key.shape[1]
    mask = None
    if length != keys or (window and window < keys):
        # Nothing of the mask's size but bits: a long prompt's is large.
        positions = torch.arange(keys, device=query.device)
        last = positions[keys - length :, None]
        mask = positions <= last
        if window:
            mask &= positions > last - window
    if gqa and (softcap or (query.is_cuda and (mask is not None or query.dtype == torch.float32))):
        # No kernel of CUDA takes a mask, or float32, and unequal head counts: all scores at once would be in memory.
        groups = query.shape[1] // key.shape[1]
        key, value, gqa = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), False
    if not softcap:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=gqa
        )
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def _sdpa_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    # Neighbours of one length go as one batch: prompts, sorted by length, above all.
    runs = [(length, len(list(run))) for length, run in groupby(cu_seqlens.diff().tolist())]
    # split, not slices: its backward is one concatenation, where each slice's would fill a gradient of all T tokens.
    pieces = zip(*(x.transpose(0, 1).split([n * length for length, n in runs], 1) for x in (query, key, value)))
    outputs = []
    for (length, count), piece in zip(runs, pieces):
        if count == 1:
            q, k, v = (x[None] for x in piece)
            outputs.append(sdpa_causal(q, k, v, scaling, window, softcap)[0])
        else:
            q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in piece)
            outputs.append(sdpa_causal(q, k, v, scaling, window, softcap).transpose(0, 1).flatten(1, 2))
    return torch.cat(outputs, 1).transpose(0, 1)


def refuse_masked_window(module: nn.Module, window: int | None) -> None:
    """Raises ValueError where the configuration gives this layer a sliding window and the layer asks for none: it relies
    on a mask, and ours are made of `window`."""
    config = getattr(module, "config", None)
    size = getattr(config, "sliding_window", None)
    if window is not None or not size:
        return
    if kinds := getattr(config, "layer_types", None):
        slides = kinds[module.layer_idx] == "sliding_attention"
    else:
        slides = size < getattr(config, "max_position_embeddings", size)
    if slides:
        raise ValueError(
            f"its sliding window of {size} tokens is in its attention mask only, which packed sequences and "
            "paged caches do without"
        )


def packed_attention(
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
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, Hq, T, D], key and value [1, Hkv, T, D] → ([1, T, Hq, D], None)."""
    if cu_seq_lens_q is None:
        raise ValueError("its attention is not told where the packed sequences begin (cu_seq_lens_q)")
    for given, what in (
        (attention_mask is not None, "a mask of its own (attention_mask)"),
        (s_aux is not None, "attention sinks (s_aux)"),
        (dropout and module.training, f"attention dropout ({dropout})"),
    ):
        if given:
            raise ValueError(f"its attention needs {what}, which packed attention does not compute")
    refuse_masked_window(module, sliding_window)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    half = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    if half and (flash_attn := _flash_attn()):
        out = _flash_packed(
            flash_attn, query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window, softcap
        )
    elif half and not softcap and query.shape[-1] <= 256 and not query.shape[-1] % 8:
        out = _varlen_packed(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window)
    else:
        out = _sdpa_packed(query, key, value, cu_seq_lens_q, scaling, sliding_window, softcap)
    return out.contiguous()[None], None  # some models go on with `view`


# Only the attention is registered, not a mask: transformers then builds none and does not look for packing (a sync).
AttentionInterface.register(PACKED, packed_attention)


@contextlib.contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[PreTrainedModel]:
    """Gives the model another of transformers' attention implementations in the context."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(name)
        yield model
    finally:
        model.set_attn_implementation(before)
