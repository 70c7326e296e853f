"""The cases of `benchmarks.static`: calls that launch every kernel in every form that matters, and what is expected."""

import itertools

import torch

from rto_fast.kernels.layer_reference import AdapterInput, AdapterOutput
from rto_fast.kernels.ordered_gemm import TILES

# The least number of 128-bit accesses of kernels that stream rows; whether a kernel must use the tensor cores; whether
# it must round every operation separately, as torch's kernels do ("exact"), or where it is written so ("as_written").
EXPECTED = {
    # vector_loads have at least 64 bits, four tokens of a 16-bit input.
    "gae_kernel": {"vector_loads": 2, "wide_stores": 2},
    "rto_advantages_kernel": {"vector_loads": 5, "wide_stores": 4},
    "rto_whiten_kernel": {"wide_loads": 1, "wide_stores": 1},
    "ppo_policy_fwd_kernel": {"wide_loads": 3, "wide_stores": 1},
    "ppo_value_fwd_kernel": {"wide_loads": 3, "wide_stores": 1},
    "token_logps_fwd_kernel": {"wide_loads": 8, "as_written": True},
    "partial_state_kernel": {"wide_loads": 8},
    "token_logps_bwd_kernel": {"wide_loads": 4, "wide_stores": 4},
    "logits_gradient_kernel": {"wide_loads": 8, "wide_stores": 4},
    "linear_ppo_kernel": {"wide_loads": 16, "wide_stores": 4, "as_written": True},
    "store_kv_kernel": {"wide_loads": 4, "wide_stores": 4},
    "paged_attention_kernel": {"wide_loads": 16, "as_written": True},
    "attention_fwd_kernel": {"wide_loads": 6, "wide_stores": 1, "as_written": True},
    "attention_dq_kernel": {"wide_loads": 6, "wide_stores": 1},
    "attention_dkdv_kernel": {"wide_loads": 6, "wide_stores": 1},
    "combine_splits_kernel": {"wide_loads": 1, "as_written": True},
    "sample_tokens_kernel": {"wide_loads": 6, "as_written": True},
    "rms_norm_kernel": {"wide_loads": 2, "wide_stores": 1, "exact": True},
    "rms_norm_bwd_kernel": {"wide_loads": 3, "wide_stores": 1},
    "rotary_kernel": {"wide_loads": 2, "wide_stores": 2, "exact": True},
    "rotary_bwd_kernel": {"wide_loads": 2, "wide_stores": 2},
    "adapter_input_kernel": {"wide_loads": 4},
    "adapter_output_kernel": {"wide_loads": 2, "wide_stores": 1},
    "gated_kernel": {"wide_loads": 2, "wide_stores": 1},
    "gated_bwd_kernel": {"wide_loads": 3, "wide_stores": 2},
    "sum_partials_kernel": {"wide_loads": 4},
    "embedding_partials_kernel": {"wide_loads": 2, "wide_stores": 1},
    "embedding_bwd_kernel": {"wide_loads": 2},
    "ordered_gemm_kernel": {"wide_loads": 16},
}


def tokens(count, dtype=torch.float32, grad=False):
    return torch.zeros(count, dtype=dtype, requires_grad=grad)


def cu_seqlens(count, sequences):
    return torch.linspace(0, count, sequences + 1).int()


def rto_advantages(count, sequences, dtype=torch.float32, **options):
    def call(module):
        mask = torch.ones(count, dtype=torch.bool)
        delimiters = mask if options.get("granularity") == "sentence" else None
        module.rto_advantages(
            *(tokens(count, dtype) for _ in range(4)),
            tokens(sequences),
            cu_seqlens(count, sequences),
            mask,
            delimiter_mask=delimiters,
            **options,
        )

    return "advantages", call


def gae(count, sequences, dtype=torch.float32, masked=False):
    def call(module):
        mask = torch.ones(count, dtype=torch.bool) if masked else None
        bootstrap = tokens(sequences) if masked else None
        bounds = cu_seqlens(count, sequences)
        module.gae(tokens(count), tokens(count, dtype), bounds, mask=mask, bootstrap_values=bootstrap)

    return "advantages", call


def ppo_loss(name, dtype, count=8192, **options):
    def call(module):
        mask = torch.ones(count, dtype=torch.bool)
        loss, _ = getattr(module, name)(*(tokens(count, dtype, grad=not i) for i in range(3)), mask, **options)
        loss.backward()

    return "ppo_losses", call


def token_logps(rows, vocab_size, dtype, entropy=False, inplace=False):
    def call(module):
        logits = torch.empty(
            rows, vocab_size, dtype=dtype, requires_grad=True
        )  # memory that is not touched costs nothing
        labels = torch.zeros(rows, dtype=torch.long)
        result = module.token_logps(logits, labels, return_entropy=entropy, inplace_backward=inplace)
        (sum(result) if entropy else result).sum().backward()

    return "token_logps", call


def linear(name, vocab_size, dtype, **options):
    """A hidden size of 16 keeps the CPU's GEMMs short; the kernels see rows of logits only."""

    def call(module):
        hidden, weight = (torch.zeros(n, 16, dtype=dtype, requires_grad=True) for n in (4, vocab_size))
        labels, mask = torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.bool)
        bias = {"bias": tokens(vocab_size, dtype)} if options.pop("biased", False) else {}
        if name == "linear_ppo_loss":
            result = module.linear_ppo_loss(hidden, weight, labels, tokens(4), tokens(4), mask, **options)[0]
        else:
            result = module.linear_token_logps(hidden, weight, labels, **bias, **options)
        (sum(result) if isinstance(result, tuple) else result).sum().backward()

    return name, call


def sample_tokens(vocab_size, dtype, rows=4, stops=False, **options):
    def call(module):
        bans = {"stop_ids": torch.zeros(2, dtype=torch.long), "stop_allowed": torch.ones(rows, dtype=torch.bool)}
        logits = torch.empty(rows, vocab_size, dtype=dtype)
        module.sample_tokens(logits, torch.empty(rows, 2), **(bans if stops else {}), **options)

    return "sampling", call


def packed_attention(heads, kv_heads, head_dim, max_seqlen, dtype=torch.bfloat16, **options):
    """Queries, keys and values are views of one tensor."""

    def call(module):
        qkv = torch.empty(4096, heads + 2 * kv_heads, head_dim, dtype=dtype, requires_grad=True)
        parts = qkv.split([heads, kv_heads, kv_heads], 1)
        out = module.packed_attention(*parts, cu_seqlens(4096, 8), max_seqlen, **options)
        out.backward(torch.empty_like(out))

    return "attention", call


def paged_attention(batch, kv_heads, group, head_dim, page_size, dtype=torch.bfloat16, **options):
    def call(module):
        query, key = (torch.empty(batch, heads, head_dim, dtype=dtype) for heads in (kv_heads * group, kv_heads))
        addresses, slots = torch.zeros(2, dtype=torch.long), torch.zeros(batch, dtype=torch.long)
        tables, lengths = torch.zeros(batch, 4096 // page_size, dtype=torch.int), torch.zeros(batch, dtype=torch.int)
        module.store_kv(key, key, addresses, slots, page_size=page_size)
        module.paged_attention(
            query, addresses, tables, lengths, num_kv_heads=kv_heads, page_size=page_size, scale=0.1, **options
        )

    return "paged_attention", call


def rms_norm(size, dtype=torch.bfloat16, count=4096, frozen=False, **options):
    """The norm alone and with the residual sum, without and with gradients."""

    def call(module):
        x, residual = (torch.empty(count, size, dtype=dtype) for _ in range(2))
        weight = torch.empty(size, dtype=dtype, requires_grad=not frozen)
        with torch.no_grad():
            module.rms_norm(x, weight, 1e-6, **options)
            module.add_rms_norm(x, residual, weight, 1e-6, **options)
        module.rms_norm(x.requires_grad_(), weight, 1e-6, **options).sum().backward()
        multiplier = {"multiplier": 0.22} if options else {}
        out, total = module.add_rms_norm(x, residual, weight, 1e-6, **options, **multiplier)
        torch.autograd.backward((out, total), (torch.empty_like(out), torch.empty_like(out)))

    return "rms_norm", call


def rotary(heads, kv_heads, head_dim, dtype=torch.bfloat16, norms=False, rotated=None, count=256, **options):
    """With the stores to the cache, and with gradients."""

    def call(module):
        qkv = torch.empty(count, heads + 2 * kv_heads, head_dim, dtype=dtype)
        rope = None if rotated == 0 else torch.empty(count, 2, rotated or head_dim, dtype=dtype)
        weights = [torch.empty(head_dim, dtype=dtype, requires_grad=True) for _ in range(2)]
        arguments = dict(num_heads=heads, num_kv_heads=kv_heads, eps=1e-6, **options)
        if norms:
            arguments |= dict(query_norm=weights[0], key_norm=weights[1])
        addresses, slots = torch.zeros(2, dtype=torch.long), torch.zeros(count, dtype=torch.long)
        module.rotate_and_store(qkv, rope, addresses, slots, page_size=64, **arguments)
        outputs = module.rotary_embedding(qkv.requires_grad_(), rope, **arguments)
        torch.autograd.backward(outputs, [torch.empty(x.shape, dtype=dtype) for x in outputs])

    return "rotary", call


def embedding(size, dtype=torch.bfloat16, main_grad=True, count=256):
    """The gradient, added in float32 or as a tensor of its own."""

    def call(module):
        weight = torch.empty(1000, size, dtype=dtype, requires_grad=True)
        if main_grad:
            weight.main_grad = torch.zeros(1000, size)
        out = module.embedding(torch.zeros(count, dtype=torch.long), weight, None)
        out.backward(torch.empty_like(out))

    return "embedding", call


def gated(size, activation="silu", dtype=torch.bfloat16, count=256):
    def call(module):
        out = module.gated_activation(torch.empty(count, 2 * size, dtype=dtype, requires_grad=True), activation)
        out.backward(torch.empty_like(out))

    return "gated", call


def adapters(count, columns, rank, size, dtype=torch.bfloat16, keeps=False):
    """LoRA of projections of one input."""

    def call(module):
        num_ranks, bounds = rank * len(columns), [0, *itertools.accumulate(columns)]
        whole = AdapterInput(slice(0, num_ranks), torch.empty(num_ranks, size, dtype=dtype), 2.0)
        outputs = [
            AdapterOutput(
                slice(*bounds[i : i + 2]), slice(i * rank, i * rank + rank), torch.empty(n, rank, dtype=dtype), 2.0
            )
            for i, n in enumerate(columns)
        ]
        t = module.adapter_input(torch.empty(count, size, dtype=dtype), [whole], keeps)
        base = torch.empty(count, bounds[-1])
        module.add_adapters(base, t, outputs, base if dtype == torch.float32 else base.to(dtype))

    return "adapters", call


def decode_step(slots, stops, min_new_tokens, grow):
    def call(module):
        numbers, active = torch.zeros(slots, dtype=torch.long), torch.ones(slots, dtype=torch.bool)
        tables, results = torch.zeros(slots, 16, dtype=torch.int), torch.zeros(slots + 1, 9)
        module.begin_step(
            numbers,
            active,
            tables,
            numbers,
            numbers,
            torch.zeros(slots + 1, 9, 2),
            page_size=64,
            min_new_tokens=min_new_tokens,
        )
        module.finish_step(
            (numbers, results[0], results[1]),
            torch.zeros(stops, dtype=torch.long),
            numbers,
            numbers,
            active,
            numbers,
            numbers,
            numbers,
            results.long(),
            results,
            results,
            numbers,
            active,
            grow=grow,
        )

    return "decode_step", call


# Vocabulary sizes of the three benchmarked models.
LLAMA3_8B, QWEN3_06B, GEMMA3_270M = 128256, 151936, 262144


# By label: (module of rto_fast.kernels, a call of it on CPU tensors, of which only the launches are recorded).
def ordered_gemm(tile, rows=64, cols=4096, inner=14336, dtype=torch.bfloat16, out_dtype=None, biased=False):
    def call(module):
        bias = torch.zeros(cols, dtype=dtype) if biased else None
        out = torch.zeros(rows, cols, dtype=out_dtype or dtype)
        module.ordered_gemm(
            torch.zeros(rows, inner, dtype=dtype), torch.zeros(cols, inner, dtype=dtype), bias, out, tile
        )

    return "ordered_gemm", call


CASES = {
    "gae fp32 short": gae(1000, 10),
    "gae bf16 long masked bootstrap": gae(32768, 2, torch.bfloat16, masked=True),
    "rto fp32 mean length 100": rto_advantages(1000, 10),
    "gae fp32 1M tokens": gae(1 << 20, 1024, masked=True),
    "rto fp32 mean length 1000": rto_advantages(8000, 8),
    "rto fp32 1M tokens": rto_advantages(1 << 20, 1024),
    "rto fp32 mean length 16k": rto_advantages(32768, 2),
    "rto bf16 sequence": rto_advantages(8000, 8, torch.bfloat16, granularity="sequence"),
    "rto bf16 sentence shaping bootstrap": rto_advantages(
        32768, 2, torch.bfloat16, granularity="sentence", shaping=True, bootstrap_values=tokens(2)
    ),
    "policy fp32": ppo_loss("ppo_policy_loss", torch.float32),
    "policy bf16 weights dual_clip num_items": ppo_loss(
        "ppo_policy_loss", torch.bfloat16, weights=tokens(8192), dual_clip=3.0, num_items=8192.0
    ),
    "values fp32": ppo_loss("ppo_value_loss", torch.float32),
    "values bf16 weights": ppo_loss("ppo_value_loss", torch.bfloat16, weights=tokens(8192)),
    "logits llama bf16": token_logps(4096, LLAMA3_8B, torch.bfloat16),
    "logits llama fp32 entropy": token_logps(4096, LLAMA3_8B, torch.float32, entropy=True),
    "logits qwen bf16 entropy inplace": token_logps(4096, QWEN3_06B, torch.bfloat16, entropy=True, inplace=True),
    "logits qwen bf16 entropy few rows": token_logps(4, QWEN3_06B, torch.bfloat16, entropy=True),
    "logits gemma fp32 few rows": token_logps(4, GEMMA3_270M, torch.float32),
    "linear llama bf16": linear("linear_token_logps", LLAMA3_8B, torch.bfloat16),
    "linear qwen bf16 entropy": linear("linear_token_logps", QWEN3_06B, torch.bfloat16, return_entropy=True),
    "linear gemma bf16 softcap bias entropy": linear(
        "linear_token_logps", GEMMA3_270M, torch.bfloat16, softcap=30.0, biased=True, return_entropy=True
    ),
    "linear llama fp32": linear("linear_token_logps", LLAMA3_8B, torch.float32),
    "ppo llama bf16": linear("linear_ppo_loss", LLAMA3_8B, torch.bfloat16),
    "ppo qwen bf16 weights dual_clip entropy": linear(
        "linear_ppo_loss", QWEN3_06B, torch.bfloat16, weights=tokens(4), dual_clip=3.0, entropy_coef=0.01
    ),
    "ppo gemma bf16 softcap entropy": linear(
        "linear_ppo_loss", GEMMA3_270M, torch.bfloat16, softcap=30.0, entropy_coef=0.01
    ),
    "ppo llama fp32": linear("linear_ppo_loss", LLAMA3_8B, torch.float32),
    "paged llama bf16": paged_attention(256, 8, 4, 128, 64),
    "paged llama bf16 small pages": paged_attention(256, 8, 4, 128, 16),
    "paged llama bf16 few": paged_attention(8, 8, 4, 128, 256),
    "paged qwen bf16 few": paged_attention(1, 8, 2, 128, 64),
    "paged 20M bf16 few": paged_attention(8, 6, 1, 64, 64),
    "paged gemma bf16 window softcap few": paged_attention(4, 4, 2, 256, 64, window=1024, softcap=50.0),
    "paged phi bf16 head_dim 80": paged_attention(256, 32, 1, 80, 32),
    "paged fp16 group 7": paged_attention(256, 8, 7, 64, 64, torch.float16),
    "paged bf16 group 71": paged_attention(64, 8, 71, 64, 64),
    "paged fp32": paged_attention(256, 8, 2, 64, 64, torch.float32),
    "sample llama bf16": sample_tokens(LLAMA3_8B, torch.bfloat16),
    "sample qwen fp32 stops": sample_tokens(QWEN3_06B, torch.float32, stops=True),
    "sample qwen fp32 stops top_k top_p min_p": sample_tokens(
        QWEN3_06B, torch.float32, stops=True, top_k=50, top_p=0.9, min_p=0.05
    ),
    "sample gemma bf16 softcap top_p": sample_tokens(GEMMA3_270M, torch.bfloat16, softcap=30.0, top_p=0.95),
    "sample llama fp16 min_p": sample_tokens(LLAMA3_8B, torch.float16, min_p=0.05),
    "sample llama fp32 greedy stops": sample_tokens(LLAMA3_8B, torch.float32, stops=True, temperature=0.0),
    "sample tiny fp32": sample_tokens(2048, torch.float32),
    **{f"gemm bf16 {tile.rows} x {tile.cols} x {tile.inner}": ordered_gemm(tile) for tile in TILES},
    "gemm smollm2 fp16 bias fp32 out": ordered_gemm(TILES[1], 8, 960, 576, torch.float16, torch.float32, biased=True),
    "norm smollm2 bf16": rms_norm(576),
    "norm llama bf16": rms_norm(4096),
    "attention llama bf16 long": packed_attention(32, 8, 128, 2048),
    "attention qwen bf16": packed_attention(16, 8, 128, 640),
    "attention qwen bf16 short": packed_attention(16, 8, 128, 256),
    "attention smollm2 bf16": packed_attention(9, 3, 64, 256),
    "attention smollm2 bf16 two splits": packed_attention(9, 3, 64, 512),
    "attention smollm2 bf16 long": packed_attention(9, 3, 64, 2048),
    "attention mistral bf16 window": packed_attention(32, 8, 128, 2048, window=1024),
    "attention gemma-2 bf16 window softcap": packed_attention(8, 4, 256, 2048, window=1024, softcap=50.0),
    "attention phi-3 fp16 head_dim 96": packed_attention(32, 32, 96, 2048, torch.float16),
    "attention fp32": packed_attention(6, 2, 64, 256, torch.float32),
    "attention fp32 long": packed_attention(4, 2, 128, 2048, torch.float32),
    "norm llama bf16 frozen": rms_norm(4096, frozen=True),
    "norm gemma-2 bf16 unit offset multiplier": rms_norm(3584, unit_offset=True),
    "norm llama-3-405b bf16": rms_norm(16384),
    "norm 20M fp32": rms_norm(384, torch.float32),
    "embedding llama bf16": embedding(4096),
    "embedding smollm2 bf16": embedding(576),
    "embedding fp16 own gradient": embedding(1024, torch.float16, main_grad=False),
    "embedding fp32": embedding(384, torch.float32),
    "rotary llama bf16": rotary(32, 8, 128),
    "rotary qwen bf16 head norms": rotary(16, 8, 128, norms=True, count=4096),
    "rotary gemma-3 bf16 head norms": rotary(4, 1, 256, norms=True, unit_offset=True),
    "rotary phi-4 bf16 96 of 128": rotary(24, 8, 128, rotated=96),
    "rotary smollm3 bf16 nothing rotated": rotary(16, 4, 128, rotated=0),
    "rotary fp16 head norms 96 of 128": rotary(6, 2, 128, torch.float16, norms=True, rotated=96),
    "rotary fp32 head norms": rotary(6, 2, 64, torch.float32, norms=True),
    "gated qwen bf16": gated(3072),
    "gated gemma-2 bf16 gelu_tanh": gated(9216, "gelu_tanh"),
    "gated fp16 gelu": gated(1536, "gelu", torch.float16),
    "gated fp32": gated(1536, "silu", torch.float32),
    "lora llama bf16 qkv of rank 16, 1 row": adapters(1, (4096, 1024, 1024), 16, 4096),
    "lora llama bf16 qkv of rank 64, 256 rows": adapters(256, (4096, 1024, 1024), 64, 4096),
    "lora llama bf16 down of rank 64, 32 rows": adapters(32, (4096,), 64, 14336),
    "lora llama bf16 gate_up of rank 16, training": adapters(16384, (14336, 14336), 16, 4096, keeps=True),
    "lora llama bf16 down of rank 256, training": adapters(4096, (4096,), 256, 14336, keeps=True),
    "lora fp16 qkv of rank 4": adapters(64, (576, 192, 192), 4, 576, torch.float16),
    "lora fp32 qkv of rank 32": adapters(512, (384, 128, 128), 32, 384, torch.float32),
    "lora fp32 qkv of rank 32, training": adapters(2048, (384, 128, 128), 32, 384, torch.float32, keeps=True),
    "step of 256": decode_step(256, 2, 3, True),
    "first draw of 1": decode_step(1, 1, 1, False),
}
