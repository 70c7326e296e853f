"""Attention over packed sequences for transformers' layers, with which it is registered. Our decoder's layers do not use it.

Sequences do not see each other because the kernels are given `cu_seqlens`. transformers would guess a mask from position
ids, only if there is no attention mask and no cache, and would let sequences leak otherwise without an error.

On a GPU it is our kernel, whose backward pass adds up in a fixed order: that of FlashAttention (also torch's `varlen_attn`)
and of memory-efficient attention adds by atomics, so that no two runs have the same bits. Everywhere else, and where a pass
is what others are compared with, it is scaled_dot_product_attention of each sequence, which is exact everywhere. On a 2-core
CPU that takes 5 ms for 64 sequences of 40–90 tokens (4 heads of 16), where one call with a block mask takes 239 ms, since it
also computes every pair of tokens that the mask hides.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from rto_fast import layer_ops
from rto_fast.kernels.layer_reference import packed_sdpa
from rto_fast.models.precision import is_precise

PACKED = "rto_packed"
PLAIN = "rto_plain"  # the same without our kernel, for checks of it


def refuse_masked_window(module: nn.Module, window: int | None) -> None:
    """Refuses an attention layer that leaves its sliding window to an attention mask; our masks are made of `window`.

    Args:
        module: the layer.
        window: that the layer passes to the attention function.
    Raises:
        ValueError: the configuration gives the layer a sliding window, and `window` is None.
    """
    config = getattr(module, "config", None)
    size = getattr(config, "sliding_window", None)
    if window is not None or not size:
        return
    kinds, longest = getattr(config, "layer_types", None), getattr(config, "max_position_embeddings", size)
    if kinds[module.layer_idx] == "sliding_attention" if kinds else size < longest:
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
    plain: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of packed sequences, with the interface of transformers' attention functions.

    Args:
        query: [1, Hq, T, D].
        key, value: [1, Hkv, T, D].
        cu_seq_lens_q: [N + 1] int32, the bounds of the sequences.
        max_length_q: tokens of the longest sequence.
        scaling, sliding_window, softcap: see `rto_fast.kernels.layer_reference.sdpa_causal`.
        plain: whether it is torch's on a GPU too.
    Returns:
        ([1, T, Hq, D], None).
    Raises:
        ValueError: the layer needs what this does not compute.
    """
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
    ours = query.is_cuda and query.dtype != torch.float64 and query.shape[-1] <= 256 and key.shape == value.shape
    if ours and not plain and not is_precise():
        options: dict[str, Any] = {"scale": scaling, "window": sliding_window, "softcap": softcap}
        out = layer_ops.packed_attention(query, key, value, cu_seq_lens_q, max_length_q, **options)
    else:
        out = packed_sdpa(query, key, value, cu_seq_lens_q, scaling, sliding_window, softcap)
    return out.contiguous()[None], None  # some models call `view` on it


# No mask function is registered, so transformers builds no mask and does not look for packing, which would wait for the GPU.
AttentionInterface.register(PACKED, packed_attention)
AttentionInterface.register(PLAIN, partial(packed_attention, plain=True))


@contextlib.contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[PreTrainedModel]:
    """Gives the model another of transformers' attention implementations in the context."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(name)
        yield model
    finally:
        model.set_attn_implementation(before)
