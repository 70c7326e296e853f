"""What an op must move and compute, and what that takes on a GPU: limits, and predictions for our kernels.

A limit is the time of the FLOPs and of the compulsory bytes (each input read once, each output written once),
whichever is longer. A prediction adds, step by step, the traffic that our design has on top; GEMMs and row kernels do
not overlap, so their times add up. Predictions are arithmetic, not measurements.
"""

from dataclasses import dataclass

from benchmarks.decoders import LLAMA3_8B, QWEN3_06B, CacheShape, Decoder
from benchmarks.shapes import MODELS
from rto_fast.kernels import linear_ppo_loss, linear_token_logps

SAMPLING_OPS = ("sample_tokens", "sample_tokens, top_p 0.9")
LAYER_OPS = ("add_rms_norm", "rotate_and_store")
DECODE_BATCH, DECODE_CONTEXT = 256, 512  # sequences and their mean tokens, where decode kernels and steps are compared

LAUNCH_SECONDS = 3e-6  # assumed, from one kernel's end to the next one's first byte
GRAPH_SECONDS = 2e-6  # assumed, the same inside a CUDA graph
# Kernels of a decode step on a GPU, of each layer and around the layers, counted by tests/rollout/test_decode.py.
# A layer has one more where the sequences have fewer key heads than FULL in all. Then attention has at least two programs
# for each of them, which share its splits of keys: there are up to 264 programs, two for each SM of an H200.
FULL = 133
# {model_type: (a layer, around)}. Gemma has norms after both blocks too, and Gemma-3 two tables of RoPE. Embeddings are
# multiplied by a number in Gemma and Granite.
KERNELS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3"), (9, 7)),
    "granite": (9, 8),
    "gemma2": (11, 8),
    "gemma3_text": (11, 9),
}
UNFUSED = (32, 21)  # the other architectures run as transformers wrote them: Cohere's kernels


@dataclass(frozen=True)
class Device:
    """A GPU's achievable rates."""

    name: str
    bandwidth: float  # bytes/s of a large copy, read plus written
    flops: float  # bfloat16 FLOP/s of a large GEMM


def _from_datasheet(name: str, terabytes: float, teraflops: float) -> Device:
    """A GPU that was not measured, with the fractions of its datasheet's rates that an H200 reached."""
    return Device(name, terabytes * 1e12 * 4.3 / 4.8, teraflops * 1e12 * 790 / 989)


# Datasheets of NVIDIA: SXM versions, dense bfloat16 with float32 accumulation. On an H200 a large copy reached 4.3 of
# 4.8 TB/s and a large GEMM 790 of 989 TFLOP/s in a burst; GEMMs that ran on for tens of milliseconds had 667.
DEVICES = {
    "A100": _from_datasheet("A100-80", 2.039, 312),
    "H100": _from_datasheet("H100", 3.35, 989),
    "H200": Device("H200", 4.3e12, 790e12),
    "B200": _from_datasheet("B200", 8.0, 2250),
}


@dataclass(frozen=True)
class Step:
    """Work that shares one launch or one loop of launches."""

    flops: float = 0.0
    bytes: float = 0.0
    launches: int = 0

    def seconds(self, device: Device) -> float:
        return max(self.flops / device.flops, self.bytes / device.bandwidth) + self.launches * LAUNCH_SECONDS


def decode_step(decoder: Decoder, sequences: int, tokens: int, itemsize: int = 2) -> Step:
    """The least work of one decode step.

    Every matrix is read once (of the embedding only rows, unless it is the output layer too), and all keys and values of
    `sequences` with `tokens` in the cache together.
    """
    matrices = decoder.layer_weights + decoder.head_weights
    attention = 4 * decoder.layers * decoder.heads * decoder.head_dim
    return Step(2.0 * matrices * sequences + attention * tokens, itemsize * (matrices + decoder.kv_elements * tokens))


def prefill(decoder: Decoder, prompts: list[int], itemsize: int = 2) -> Step:
    """The least work of computing prompts of these lengths, causally; the output layer only where a prompt ends."""
    tokens, pairs = sum(prompts), sum(length * (length + 1) / 2 for length in prompts)
    attention = 4 * decoder.layers * decoder.heads * decoder.head_dim
    return Step(
        2.0 * (decoder.layer_weights * tokens + decoder.head_weights * len(prompts)) + attention * pairs,
        itemsize * (decoder.layer_weights + decoder.head_weights + decoder.kv_elements * tokens),
    )


def overhead_seconds(decoder: Decoder, sequences: int, device: Device) -> float:
    """What our decode step has on top: launches in a CUDA graph, and float32 logits that are written and read."""
    layer, around = KERNELS.get(decoder.model_type, UNFUSED)
    launches = decoder.layers * (layer + (sequences * decoder.kv_heads < FULL)) + around
    return 8 * decoder.vocab_size * sequences / device.bandwidth + launches * GRAPH_SECONDS


def limit(op, phase, shape, kept=1.0):
    """The least work of an op: bfloat16 in and out, float32 [T] vectors; `kept`: share of tokens not masked out."""
    if op == "paged_attention":
        # Keys and values, queries and results, block tables of one page in 64 tokens; a token's heads times its key and
        # its value.
        decoder = shape.decoder
        cached = 2 * decoder.kv_heads * decoder.head_dim * shape.tokens
        return Step(
            4.0 * shape.hidden_size * shape.tokens,
            2 * cached + 4 * shape.hidden_size * shape.sequences + 4 * shape.tokens / 64,
        )
    if op == "packed_attention":
        # Two products forward, five backward. Queries, keys, values, the output and the log-sum-exp are written or read;
        # so are, backward, the output's gradient and three gradients.
        decoder = shape.decoder
        product = 2.0 * shape.pairs * decoder.heads * decoder.head_dim
        row = 4 * shape.tokens * (decoder.heads + decoder.kv_heads) * decoder.head_dim
        lse = 4 * shape.tokens * decoder.heads
        if phase == "forward":
            return Step(2 * product, row + lse)
        return Step(7 * product, 3 * row + 2 * lse)
    if op in LAYER_OPS:
        decoder, rows = shape.decoder, shape.sequences
        if op == "add_rms_norm":
            return Step(bytes=2 * (4 * rows + 1) * decoder.hidden_size)  # x, the residual twice, and the result
        # All heads are read; queries and keys, and keys and values, are written; a row of cosines and sines each.
        heads = 2 * decoder.heads + 6 * decoder.kv_heads
        return Step(bytes=2 * rows * decoder.head_dim * (heads + 1))
    tokens, hidden, vocab = kept * shape.tokens, shape.hidden_size, shape.vocab_size
    logits, gemm, weight = tokens * vocab, 2 * tokens * vocab * hidden, 2 * (tokens + vocab) * hidden
    return {
        ("token_logps", "forward"): Step(bytes=2 * logits + 12 * tokens),
        ("token_logps", "backward"): Step(bytes=4 * logits + 12 * tokens),
        ("linear_token_logps", "forward"): Step(gemm, weight),
        ("linear_token_logps", "forward+backward"): Step(4 * gemm, 3 * weight),
        ("linear_ppo_loss", "forward+backward"): Step(3 * gemm, 2 * weight),
        # Reads 4 vectors and the mask, writes 4 vectors; reads 2, writes 2; reads 3 and the mask, writes a gradient.
        ("rto_advantages", "forward"): Step(bytes=33 * shape.tokens),
        ("gae", "forward"): Step(bytes=17 * shape.tokens),
        ("ppo_policy_loss", "forward+backward"): Step(bytes=17 * shape.tokens),
        ("ppo_value_loss", "forward+backward"): Step(bytes=17 * shape.tokens),
        # float32 logits; two random numbers in, a token and two log-probs out.
        (SAMPLING_OPS[0], "forward"): Step(bytes=4 * logits + 24 * shape.tokens),
        (SAMPLING_OPS[1], "forward"): Step(bytes=4 * logits + 24 * shape.tokens),
    }[op, phase]


def _linear_forward(tokens, shape):
    """A GEMM writes chunks of float32 logits, larger than L2, that a row kernel reads back."""
    gemm = 2 * tokens * shape.vocab_size * shape.hidden_size
    return [Step(flops=gemm), Step(bytes=4 * tokens * shape.vocab_size)]


def prediction(op, phase, shape, kept=1.0):
    """The steps of our kernels."""
    if op == "paged_attention":
        # Every group of query heads is padded to the 16 rows of a tensor-core product.
        least, padded = limit(op, phase, shape), 16 * shape.decoder.kv_heads / shape.decoder.heads
        return [Step(padded * least.flops, least.bytes, launches=1)]
    if op in LAYER_OPS:
        return [Step(bytes=limit(op, phase, shape).bytes, launches=1)]
    tokens = max(1, int(kept * shape.tokens))
    logits, hidden, vocab = tokens * shape.vocab_size, shape.hidden_size, shape.vocab_size
    gemm = 2 * logits * hidden
    if op.startswith("sample_tokens"):
        # With a filter the logits are read three times. Of each 512, two sums are written and read.
        reads = 3 if "top_p" in op else 1
        return [Step(bytes=(4 * reads + 16 / 512) * logits + 24 * tokens, launches=1)]
    if op == "token_logps":
        return [Step(bytes=limit(op, phase, shape, kept).bytes, launches=1)]
    if op == "linear_token_logps" and phase == "forward":
        return _linear_forward(tokens, shape)
    if op == "linear_token_logps":
        # A chunk's float32 logits are written by their GEMM, read by the row kernel, which writes bfloat16 gradients;
        # dhidden accumulates in float32 from the second chunk on.
        chunks = -(-vocab // linear_token_logps.columns_per_chunk(tokens, vocab))
        traffic = Step(bytes=(4 + 2) * logits + 8 * (chunks - 1) * tokens * hidden)
        return [*_linear_forward(tokens, shape), Step(flops=3 * gemm), traffic]
    if op == "linear_ppo_loss":
        # The row kernel reads a row twice and writes it once; dweight accumulates from the second chunk on.
        chunks = -(-tokens // linear_ppo_loss.rows_per_chunk(tokens, vocab, hidden, True))
        traffic = Step(bytes=(4 + 4 + 2) * logits + 8 * (chunks - 1) * vocab * hidden)
        return [Step(flops=3 * gemm), traffic]
    # Vector ops: a second launch whitens (reads and writes 4 bytes and the mask), or adds up partial sums; the PPO
    # losses' backward reads the derivative and writes the gradient.
    extra = {"rto_advantages": 9, "gae": 0}.get(op, 8)
    launches = {"rto_advantages": 2, "gae": 1}.get(op, 3)
    return [Step(bytes=limit(op, phase, shape).bytes + extra * shape.tokens, launches=launches)]


def step_seconds(decoder, device, sequences=DECODE_BATCH, tokens=None, *, itemsize=2, ours=False):
    """Bound, or prediction (`ours`), of one step of sequences that have `tokens` together (default: 512 each)."""
    step = decode_step(decoder, sequences, sequences * DECODE_CONTEXT if tokens is None else tokens, itemsize)
    return step.seconds(device) + (overhead_seconds(decoder, sequences, device) if ours else 0.0)


def rollout_seconds(decoder, workload, device, *, itemsize=2, ours=False):
    """Bound, or prediction, of a workload: prefill, then all sequences decode together from the start, each as long as
    its response lasts. No schedule does with fewer bytes: weights are read once for each token of the longest response,
    keys and values once for each token of every one."""
    total = prefill(decoder, workload.prompts, itemsize).seconds(device)
    # A response's first token comes from the prefill, the next one from a step with prompt + 1 tokens in the cache.
    for k in range(1, max(workload.responses)):
        lengths = [p + k for p, n in zip(workload.prompts, workload.responses) if n > k]
        total += step_seconds(decoder, device, len(lengths), sum(lengths), itemsize=itemsize, ours=ours)
    return total


def milliseconds(steps, device):
    return 1e3 * sum(step.seconds(device) for step in steps)


def decode_shape(decoder, sequences=DECODE_BATCH, context=DECODE_CONTEXT):
    return CacheShape(decoder, sequences, sequences * context)


def table(device):
    """Rows of (op, phase, shape, limit in ms, prediction in ms) for every op at the shapes that are benchmarked."""
    million = MODELS[0].at(1 << 20)
    cases = [
        *(
            (op, phase, shape)
            for op, phase in (
                ("token_logps", "forward"),
                ("token_logps", "backward"),
                ("linear_token_logps", "forward"),
                ("linear_token_logps", "forward+backward"),
                ("linear_ppo_loss", "forward+backward"),
            )
            for shape in MODELS
        ),
        *(
            (op, phase, million)
            for op, phase in (
                ("rto_advantages", "forward"),
                ("gae", "forward"),
                ("ppo_policy_loss", "forward+backward"),
                ("ppo_value_loss", "forward+backward"),
            )
        ),
        *(("paged_attention", "forward", decode_shape(decoder)) for decoder in (LLAMA3_8B, QWEN3_06B)),
        *((op, "forward", decode_shape(decoder)) for op in LAYER_OPS for decoder in (LLAMA3_8B, QWEN3_06B)),
        *((op, "forward", shape.at(DECODE_BATCH)) for op in SAMPLING_OPS for shape in MODELS[:2]),
    ]
    return [
        (
            op,
            phase,
            shape,
            milliseconds([limit(op, phase, shape)], device),
            milliseconds(prediction(op, phase, shape), device),
        )
        for op, phase, shape in cases
    ]
