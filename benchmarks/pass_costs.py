"""What a scoring or training pass of a whole model must compute and move with our layers: predictions, no measurements.

A prediction is the sum of its parts. GEMMs run at the sustained rate, attention at the rate that its sketch was measured
at, and the rest at the bandwidth. Kernels follow each other, so their times add up. A pass cannot be shorter than
its launches either, unless it is a CUDA graph.
"""

from dataclasses import dataclass

from benchmarks.costs import DEVICES, Device
from benchmarks.decoders import LLAMA_1_5B, QWEN3_06B, SMOLLM2_135M, Decoder
from rto_fast.models.pass_time import LAYER_BACKWARD_LAUNCHES, LAYER_LAUNCHES

# Shares of a GPU's burst rate of large GEMMs, 790 TFLOP/s on an H200: GEMMs that run on for tens of milliseconds (667), and
# the forward sketch of attention at 8 x 2,048 tokens of Llama-3-8B's heads (387), which is assumed of the backward
# pass too.
SUSTAINED, ATTENTION = 667 / 790, 387 / 790
HOST_SECONDS = 10e-6  # assumed, of Python and the driver for one kernel of an eager pass


@dataclass(frozen=True)
class Pass:
    """The work of one pass over packed sequences."""

    gemm_flops: float
    attention_flops: float
    bytes: float  # moved by what is neither a GEMM nor attention
    kernels: int

    def seconds(self, device: Device) -> float:
        gemms = self.gemm_flops / (device.flops * SUSTAINED)
        return gemms + self.attention_flops / (device.flops * ATTENTION) + self.bytes / device.bandwidth

    def host_seconds(self) -> float:
        return self.kernels * HOST_SECONDS


def scoring_pass(decoder: Decoder, lengths: list[int], labelled: int) -> Pass:
    """Log-probs of `labelled` of the tokens of packed sequences, bfloat16."""
    tokens = sum(lengths)
    return Pass(
        2.0 * (decoder.layer_weights * tokens + decoder.head_weights * labelled),
        _attention_flops(decoder, lengths),
        tokens * decoder.layers * _forward_bytes(decoder) + 8.0 * labelled * decoder.vocab_size,
        decoder.layers * LAYER_LAUNCHES,
    )


def training_pass(decoder: Decoder, lengths: list[int], labelled: int) -> Pass:
    """PPO's forward and backward pass, with weight gradients in float32."""
    tokens, forward = sum(lengths), scoring_pass(decoder, lengths, 0)
    return Pass(
        3.0 * forward.gemm_flops + 6.0 * decoder.head_weights * labelled,
        # Five products instead of two, of which the two that give the scores are computed twice.
        forward.attention_flops * (1 + 3.5),
        forward.bytes
        + tokens * decoder.layers * _backward_bytes(decoder)
        # A row of logits is written, read twice and overwritten by its gradient.
        + (4 + 4 + 4 + 2) * labelled * decoder.vocab_size
        # The gradient of the embedding is filled, and added to float32; those of the layers are written by their GEMMs.
        + 12.0 * decoder.head_weights,
        decoder.layers * (LAYER_LAUNCHES + LAYER_BACKWARD_LAUNCHES),
    )


def _attention_flops(decoder: Decoder, lengths: list[int]) -> float:
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    return 4.0 * decoder.layers * decoder.heads * decoder.head_dim * pairs


def _forward_bytes(decoder: Decoder) -> float:
    """Bytes a token and layer: two norms (read both inputs, write both results), RoPE, the gated activation."""
    rotated = (decoder.heads + 2 * decoder.kv_heads) * decoder.head_dim
    return 2 * (2 * 4 * decoder.hidden_size + 2 * rotated + 3 * decoder.intermediate_size)


def _backward_bytes(decoder: Decoder) -> float:
    """The same of their backward kernels, and of the one that multiplies attention's output by its gradient."""
    rotated = (decoder.heads + 2 * decoder.kv_heads) * decoder.head_dim
    outputs = 2 * decoder.heads * decoder.head_dim
    return 2 * (2 * 4 * decoder.hidden_size + 2 * rotated + 5 * decoder.intermediate_size + outputs)


MEASURED_MODELS, TOKENS = (SMOLLM2_135M, QWEN3_06B, LLAMA_1_5B), 16384


def predictions() -> str:
    """A table of the passes that `benchmarks.passes` measures: ms on each GPU, and of the host without a CUDA graph."""
    lines = [
        "| model | pass | kernels of layers | host, ms | " + " | ".join(DEVICES) + " |",
        "|---" * (4 + len(DEVICES)) + "|",
    ]
    lengths = [256] * (TOKENS // 256)
    for decoder in MEASURED_MODELS:
        for name, build in (("score", scoring_pass), ("train", training_pass)):
            found = build(decoder, lengths, TOKENS // 2)
            cells = [decoder.name, name, f"{found.kernels:,}", f"{1e3 * found.host_seconds():.1f}"]
            cells += [f"{1e3 * found.seconds(device):.1f}" for device in DEVICES.values()]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
