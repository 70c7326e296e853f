"""Cases of training's attention, and the peers with which it is compared."""

import torch
import torch.nn.functional as F

from benchmarks.cases import Case
from benchmarks.decoders import LLAMA3_8B, QWEN3_06B, SMOLLM2_135M, TINY, PackedShape
from benchmarks.peers import adapt, load
from rto_fast import layer_ops
from rto_fast.kernels.layer_reference import repeat_heads


def uneven(count, least, most):
    return tuple(torch.randint(least, most, (count,), generator=torch.Generator().manual_seed(1)).tolist())


SHAPES = (
    PackedShape(LLAMA3_8B, (2048,) * 8),
    PackedShape(QWEN3_06B, uneven(36, 256, 640)),
    PackedShape(SMOLLM2_135M, (256,) * 64),
)


def inputs(shape, device, dtype):
    """(query, key, value) [T, heads, head_dim], views of one tensor as rotary embedding gives them, and cu_seqlens."""
    decoder = shape.decoder
    heads = [decoder.heads, decoder.kv_heads, decoder.kv_heads]
    qkv = torch.randn(
        shape.tokens,
        sum(heads),
        decoder.head_dim,
        generator=torch.Generator(device).manual_seed(0),
        device=device,
        dtype=dtype,
    )
    bounds = F.pad(torch.tensor(shape.lengths).cumsum(0), (1, 0)).int().to(device)
    return *qkv.split(heads, 1), bounds


def attention(shape, device):
    """The functions of (query, key, value, cu_seqlens)."""
    longest, scale = max(shape.lengths), shape.decoder.head_dim**-0.5

    def ours(query, key, value, bounds):
        return layer_ops.packed_attention(query, key, value, bounds, longest)

    def varlen(function):
        def call(query, key, value, bounds):
            key, value = repeat_heads(query, key, value)
            return function(query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0))

        return call

    def flash_attn(function):
        return lambda q, k, v, bounds: function(q, k, v, bounds, bounds, longest, longest, causal=True)

    def flash_attn_4(function):
        def call(query, key, value, bounds):
            out = function(
                query,
                key,
                value,
                cu_seqlens_q=bounds,
                cu_seqlens_k=bounds,
                max_seqlen_q=longest,
                max_seqlen_k=longest,
                causal=True,
            )
            return out[0] if isinstance(out, tuple) else out

        return call

    def sdpa(query, key, value, bounds):
        # Sequences of one length are a batch; torch has no other form for packed ones.
        query, key, value = (x.unflatten(0, (-1, longest)).transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return {
        "ours": ours,
        "torch varlen_attn": adapt(load("torch.nn.attention.varlen", "varlen_attn"), varlen, True, device),
        "flash-attn": adapt(load("flash_attn", "flash_attn_varlen_func"), flash_attn, True, device),
        "flash-attn-4": adapt(load("flash_attn.cute", "flash_attn_varlen_func"), flash_attn_4, True, device),
        "torch SDPA": sdpa if len(set(shape.lengths)) == 1 else "sequences of one length only",
    }


def attention_cases(device, small=False):
    """Forward, and both passes, of training's attention at three shapes. small: a shape for a trial on a CPU."""
    dtype = torch.float32 if small else torch.bfloat16
    for shape in (PackedShape(TINY, (20, 20)),) if small else SHAPES:
        functions = attention(shape, device)
        for phase in ("forward", "forward+backward"):
            yield Case("packed_attention", phase, shape, functions, lambda shape=shape: inputs(shape, device, dtype), 3)
