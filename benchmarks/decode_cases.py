"""Cases of the decode kernels, and the peers with which they are compared."""

import inspect
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.cases import Case
from benchmarks.costs import DECODE_BATCH, LAYER_OPS, SAMPLING_OPS, decode_shape
from benchmarks.decoders import LLAMA3_8B, LLAMA_20M, QWEN3_06B, TINY
from benchmarks.peers import adapt, compiled, load, torch_token_logps
from benchmarks.shapes import MODELS, Shape, packed
from rto_fast import layer_ops, ops
from rto_fast.kernels import layer_reference, paged_reference
from rto_fast.kernels import paged_attention as kernel
from rto_fast.kernels.sampling_reference import philox_uniforms

PAGE, FLASH_PAGE = 64, 256  # tokens of a page: the native engine's default, and FlashAttention 2's
FEW = (1, 8, 32, 64)  # sequences of 1,024 tokens, whose attention several programs may share


@dataclass
class Cache:
    """A cache of shuffled pages [num_pages, heads, page, D] (for FlashAttention [num_pages, page, heads, D])."""

    keys: torch.Tensor
    values: torch.Tensor
    tables: torch.Tensor  # [B, blocks] int32
    lengths: torch.Tensor  # [B] int32

    @property
    def addresses(self):
        return torch.tensor([self.keys.data_ptr(), self.values.data_ptr()], device=self.keys.device)


def paged(tokens, lengths, page, flash, generator):
    """A `Cache` of keys and values [2, all tokens, heads, D], where sequences follow each other."""
    device, counts = tokens.device, lengths.tolist()
    blocks = [-(-count // page) for count in counts]
    free = torch.randperm(sum(blocks), generator=generator)
    pools = torch.zeros(2, len(free) * page, *tokens.shape[2:], device=device, dtype=tokens.dtype)
    tables = torch.zeros(len(counts), max(blocks), dtype=torch.int32)
    slots = []
    for row, (count, pages) in enumerate(zip(counts, free.split(blocks))):
        tables[row, : len(pages)] = pages
        slots.append((pages[:, None] * page + torch.arange(page)).flatten()[:count])
    pools[:, torch.cat(slots).to(device)] = tokens
    pools = pools.unflatten(1, (-1, page))
    keys, values = pools if flash else pools.transpose(2, 3).contiguous()
    return Cache(keys, values, tables.to(device), lengths.int().to(device))


def attention_inputs(shape, device, dtype):
    """(query [B, heads, D], keys, values, tables, addresses, lengths, FlashAttention's keys, values and tables).

    Sequences have 0.5 to 1.5 times the mean length.
    """
    decoder = shape.decoder
    generator = torch.Generator(device).manual_seed(0)
    bounds = packed(shape.tokens, shape.sequences, "cpu")[0]
    tokens = torch.randn(
        2, shape.tokens, decoder.kv_heads, decoder.head_dim, generator=generator, device=device, dtype=dtype
    )
    query = torch.randn(
        shape.sequences, decoder.heads, decoder.head_dim, generator=generator, device=device, dtype=dtype
    )
    order = torch.Generator().manual_seed(0)
    cache = paged(tokens, bounds.diff(), PAGE, False, order)
    flash = paged(tokens, bounds.diff(), FLASH_PAGE, True, order)
    return (
        query,
        cache.keys,
        cache.values,
        cache.tables,
        cache.addresses,
        cache.lengths,
        flash.keys,
        flash.values,
        flash.tables,
    )


def gather_sdpa(query, keys, values, tables, addresses, lengths, *flash):
    """Attention on a rectangle copied out of the pages, as in transformers' continuous batching without FlashAttention."""
    longest = tables.shape[1] * keys.shape[2]
    keys, values = (pool[tables].transpose(1, 2).flatten(2, 3) for pool in (keys, values))
    mask = torch.arange(longest, device=query.device) < lengths[:, None]
    out = F.scaled_dot_product_attention(
        query[:, :, None], keys, values, attn_mask=mask[:, None, None], enable_gqa=query.shape[1] != keys.shape[1]
    )
    return out[:, :, 0]


def ours(query, keys, values, tables, addresses, lengths, *flash):
    scale = query.shape[-1] ** -0.5
    if not query.is_cuda:
        return paged_reference.paged_attention(query, keys, values, tables, lengths, scale=scale)
    return kernel.paged_attention(
        query, addresses, tables, lengths, num_kv_heads=keys.shape[1], page_size=keys.shape[2], scale=scale
    )


def paged_attention(device):
    def flash_attn(function):
        def call(query, _keys, _values, _tables, _addresses, lengths, keys, values, tables):
            return function(query[:, None], keys, values, cache_seqlens=lengths, block_table=tables)[:, 0]

        return call

    def varlen(function):
        if "block_table" not in inspect.signature(function).parameters:
            return f"torch {torch.__version__}: varlen_attn has no block_table"

        def call(query, _keys, _values, _tables, _addresses, lengths, keys, values, tables):
            bounds = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
            # With pages its own choice of splits gives wrong results (torch 2.12 and 2.13).
            return function(
                query,
                keys,
                values,
                bounds,
                None,
                1,
                tables.shape[1] * keys.shape[1],
                seqused_k=lengths,
                block_table=tables,
                enable_gqa=True,
                num_splits=1,
            )

        return call

    return {
        "ours": ours,
        "gather + SDPA": gather_sdpa,
        "torch varlen_attn": adapt(load("torch.nn.attention.varlen", "varlen_attn"), varlen, True, device),
        "flash-attn with_kvcache": adapt(load("flash_attn", "flash_attn_with_kvcache"), flash_attn, True, device),
    }


# The rotation works in place. It is by 0 here, so that each call finds the same values.


def norm_inputs(shape, device, dtype):
    """(x, residual [sequences, D], weight [D])."""
    residual = torch.randn(shape.sequences, shape.decoder.hidden_size, device=device, dtype=dtype)
    return torch.randn_like(residual), residual, torch.ones(residual.shape[1], device=device, dtype=dtype)


def torch_add_rms_norm(x, residual, weight):
    return layer_reference.rms_norm(residual + x, weight, 1e-6)


def add_rms_norm(device):
    def liger(function):
        return lambda x, residual, weight: function.apply(x, residual, weight, 1e-6)[0]

    ours = layer_ops.add_rms_norm
    return {
        "ours": lambda x, residual, weight: ours(x, residual, weight, 1e-6)[0],
        "torch": torch_add_rms_norm,
        "Liger": adapt(
            load("liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction"), liger, True, device
        ),
        "torch.compile": compiled(torch_add_rms_norm, device),
    }


def rotate_inputs(shape, device, dtype):
    """(queries, keys and values [sequences, all heads, head_dim], rope, pages of keys and values, addresses, slots)."""
    decoder, rows = shape.decoder, shape.sequences
    qkv = torch.randn(rows, decoder.heads + 2 * decoder.kv_heads, decoder.head_dim, device=device, dtype=dtype)
    rope = torch.zeros(rows, 2, decoder.head_dim, device=device, dtype=dtype)
    rope[:, 0] = 1.0
    pools = torch.zeros(2, rows, decoder.kv_heads, PAGE, decoder.head_dim, device=device, dtype=dtype)
    addresses = torch.tensor([pool.data_ptr() for pool in pools], device=device)
    slots = torch.arange(rows, device=device) * PAGE + torch.arange(rows, device=device) % PAGE
    return qkv, rope, *pools, addresses, slots


def rotate_and_store(decoder, device):
    """Norms of Qwen3's heads, with weights of 1, for heads that are normalised already."""
    heads = [decoder.heads, decoder.kv_heads, decoder.kv_heads]
    with_norms = decoder.model_type == "qwen3"

    def normed(x):
        return layer_reference.rms_norm(x, x.new_ones(x.shape[-1]), 1e-6) if with_norms else x

    def torch_way(qkv, rope, keys, values, addresses, slots):
        query, key, value = qkv.split(heads, 1)
        query, key = (layer_reference.rotate(normed(x), rope) for x in (query, key))
        keys[slots // PAGE, :, slots % PAGE], values[slots // PAGE, :, slots % PAGE] = key, value
        return torch.cat([query, key], 1)

    def ours(qkv, rope, keys, values, addresses, slots):
        if device.type != "cuda":
            return torch_way(qkv, rope, keys, values, addresses, slots)
        from rto_fast.kernels import rotary

        weight = qkv.new_ones(decoder.head_dim) if with_norms else None
        rotary.rotate_and_store(
            qkv,
            rope,
            addresses,
            slots,
            num_heads=heads[0],
            num_kv_heads=heads[1],
            page_size=PAGE,
            query_norm=weight,
            key_norm=weight,
            eps=1e-6,
        )
        return qkv[:, : heads[0] + heads[1]]

    def liger(function):
        def call(qkv, rope, keys, values, addresses, slots):
            query, key, value = qkv.split(heads, 1)
            query, key = (normed(x).transpose(0, 1)[None] for x in (query, key))
            query, key, *_ = function.apply(query, key, rope[None, :, 0], rope[None, :, 1])
            query, key = query[0].transpose(0, 1), key[0].transpose(0, 1)
            kernel.store_kv(key, value, addresses, slots, page_size=PAGE)
            return torch.cat([query, key], 1)

        return call

    return {
        "ours": ours,
        "torch": torch_way,
        "Liger's RoPE, our store": adapt(load("liger_kernel.ops.rope", "LigerRopeFunction"), liger, True, device),
    }


def torch_sample(logits, uniforms):
    logps = logits.float().log_softmax(-1)
    tokens = torch.multinomial(logps.exp(), 1)
    return tokens[:, 0], logps.gather(-1, tokens)[:, 0]


def top_p_sample(warper):
    """As transformers does it, with a sort of the whole vocabulary and two softmaxes."""
    filtered = warper(0.9)

    def sample(logits, uniforms):
        tokens = torch.multinomial(filtered(None, logits).softmax(-1), 1)[:, 0]
        return tokens, torch_token_logps(logits, tokens)

    return sample


def sampling_inputs(shape, device):
    """(logits [B, V] float32, uniforms [B, 2]); a few hundred logits have nine tenths of the probability."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(shape.tokens, shape.vocab_size, generator=generator, device=device)
    samples = torch.arange(shape.tokens, device=device)
    return logits.mul_(4), philox_uniforms(0, samples, torch.zeros_like(samples))


def attention_cases(shape, device, dtype):
    yield Case(
        "paged_attention",
        "forward",
        shape,
        paged_attention(device),
        lambda: attention_inputs(shape, device, dtype),
        graph=True,
    )


def layer_cases(shape, device, dtype):
    functions = add_rms_norm(device), rotate_and_store(shape.decoder, device)
    for op, providers, inputs in zip(LAYER_OPS, functions, (norm_inputs, rotate_inputs)):
        yield Case(op, "forward", shape, providers, lambda make=inputs: make(shape, device, dtype), graph=True)


def sampling_cases(shape, device):
    """Cases of sampling for `shape.tokens` sequences. Results are random and differ between providers."""
    plain = {"ours": ops.sample_tokens, "torch": torch_sample, "torch.compile": compiled(torch_sample, device)}
    filtered = {
        "ours": lambda logits, uniforms: ops.sample_tokens(logits, uniforms, top_p=0.9),
        "transformers' warper": adapt(
            load("transformers.generation.logits_process", "TopPLogitsWarper"), top_p_sample, False, device
        ),
    }
    for op, functions in zip(SAMPLING_OPS, (plain, filtered)):
        yield Case(op, "forward", shape, functions, lambda: sampling_inputs(shape, device), graph=True, random=True)


def decode_cases(device, small=False):
    """The kernels' part of a decode step of 256 sequences, and attention of fewer. small: shapes for a trial on a CPU."""
    for decoder in (TINY,) if small else (LLAMA3_8B, QWEN3_06B):
        shape = decode_shape(decoder, 5, 40) if small else decode_shape(decoder)
        for build in (attention_cases, layer_cases):
            yield from build(shape, device, torch.float32 if small else torch.bfloat16)
    if not small:
        for decoder, sequences in itertools.product((LLAMA3_8B, QWEN3_06B, LLAMA_20M), FEW):
            yield from attention_cases(decode_shape(decoder, sequences, 1024), device, torch.bfloat16)
    for shape in (Shape("tiny", 4, 16, 1000),) if small else (s.at(DECODE_BATCH) for s in MODELS[:2]):
        yield from sampling_cases(shape, device)


def cpu_cases():
    """Sampling as the native engine does it on a CPU. Its attention there is in `rto_fast.rollout.attention`."""
    for name, vocab_size in (("20M Llama", 8192), ("embedded", 49)):
        yield from sampling_cases(Shape(name, 64, 0, vocab_size), torch.device("cpu"))
