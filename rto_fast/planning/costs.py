"""Floating-point operations and bytes of decoding and of training passes, and the time they take on a GPU.

Predictions are arithmetic, not measurements: GEMMs, element-wise kernels, attention and communication do not overlap, so
their times add up.
"""

from dataclasses import dataclass

from rto_fast.planning.hardware import Device, Machine
from rto_fast.planning.shapes import Shape

LAUNCH_SECONDS = 3e-6  # assumed, from one kernel's end to the next one's first byte
GRAPH_SECONDS = 2e-6  # assumed, the same inside a CUDA graph
EAGER_SECONDS = 10e-6  # assumed, of the host for one kernel outside of a graph
# Kernels of a decode step of Llama's family on a GPU with Liger, a layer's and those around the layers: counted by
# tests/rollout/test_decode.py. A layer has one more where fewer sequences' key heads than this leave multiprocessors idle,
# so that attention is split (two programs for each of an H200's 132).
KERNELS_A_LAYER, KERNELS_AROUND, FULL = 9, 7, 264
FUSED = ("llama", "qwen2", "qwen3", "mistral")  # the others run as transformers wrote them; so many kernels has Gemma-2
UNFUSED_A_LAYER, UNFUSED_AROUND = 51, 20
FLOAT32_SHARE = 67 / 989  # of the bfloat16 rate, without tensor cores (datasheet of the H100)
HOST_BANDWIDTH = 100e9  # assumed, bytes/s of the CPU's memory for one process's share of the optimizer


@dataclass(frozen=True)
class Step:
    """Work that shares one launch or one loop of launches."""

    flops: float = 0.0
    bytes: float = 0.0
    launches: int = 0

    def seconds(self, device):
        return max(self.flops / device.flops, self.bytes / device.bandwidth) + self.launches * LAUNCH_SECONDS


# Decoding. `decoder`: a `Shape`, or what has its names.


def decode_step(decoder, sequences, tokens, itemsize=2):
    """The least work of a step: every matrix is read once (of the embedding only rows, unless it is the head too), and of
    `sequences` with `tokens` in the cache together all keys and values."""
    matrices = decoder.layer_weights + decoder.head_weights
    attention = 4 * decoder.layers * decoder.heads * decoder.head_dim
    return Step(2.0 * matrices * sequences + attention * tokens, itemsize * (matrices + decoder.kv_elements * tokens))


def prefill(decoder, prompts, itemsize=2):
    """The least work of computing prompts of these lengths, causally; the head only where a prompt ends."""
    tokens, pairs = sum(prompts), sum(length * (length + 1) / 2 for length in prompts)
    attention = 4 * decoder.layers * decoder.heads * decoder.head_dim
    return Step(
        2.0 * (decoder.layer_weights * tokens + decoder.head_weights * len(prompts)) + attention * pairs,
        itemsize * (decoder.layer_weights + decoder.head_weights + decoder.kv_elements * tokens),
    )


def overhead_seconds(decoder, sequences, device, launch_seconds=GRAPH_SECONDS):
    """What a step of ours has on top: launches, and float32 logits that are written and read."""
    layer, around = KERNELS_A_LAYER, KERNELS_AROUND
    if decoder.model_type not in FUSED:
        layer, around = UNFUSED_A_LAYER, UNFUSED_AROUND
    launches = decoder.layers * (layer + (sequences * decoder.kv_heads < FULL)) + around
    return 8 * decoder.vocab_size * sequences / device.bandwidth + launches * launch_seconds


# Training and scoring


@dataclass(frozen=True)
class Pass:
    """Packed sequences that go through a model: `sequences` of `length` tokens, of which `labelled` have a log-prob."""

    sequences: float
    length: float
    labelled: float = 0.0

    @property
    def tokens(self) -> float:
        return self.sequences * self.length

    @property
    def pairs(self) -> float:
        """Of a token and one before it (or itself)."""
        return self.tokens * (self.length + 1) / 2


def elementwise_bytes(shape: Shape, itemsize: int) -> float:
    """Bytes that transformers' layer moves outside of GEMMs and attention, of one token in a forward pass.

    Two RMSNorms in seven kernels, whose inside is float32, two residual sums, RoPE in five kernels, SiLU and a product.
    """
    norm, wide = 8 * itemsize, 24
    hidden = 2 * (norm + wide) + 6 * itemsize
    heads = 9 * itemsize + (norm + wide if shape.head_norms else 0)
    mlp = 5 * itemsize
    return shape.layers * (
        hidden * shape.hidden_size
        + heads * (shape.heads + shape.kv_heads) * shape.head_dim
        + mlp * shape.intermediate_size
    )


def forward_seconds(shape: Shape, work: Pass, device: Device, itemsize: int = 2) -> float:
    """The layers, without a head: 2 FLOPs a weight and token, 4 a pair, head and its dimension."""
    attention = 4.0 * shape.layers * shape.heads * shape.head_dim * work.pairs
    flops = 2.0 * shape.layer_weights * work.tokens + attention
    return flops / _rate(device, itemsize) + elementwise_bytes(shape, itemsize) * work.tokens / device.bandwidth


def head_seconds(shape: Shape, work: Pass, device: Device, gemms: int, itemsize: int = 2) -> float:
    """`gemms` products of labelled tokens with the [V, D] weight: 1 for log-probs, 3 for the one sweep of
    `linear_ppo_loss`, 4 for `linear_token_logps` with its recomputing backward pass. The float32 logits of each forward
    are written and read back."""
    flops = 2.0 * gemms * shape.head_weights * work.labelled
    return flops / _rate(device, itemsize) + 8.0 * shape.vocab_size * work.labelled / device.bandwidth


def training_seconds(
    shape: Shape, work: Pass, device: Device, gemms: int, itemsize: int, checkpointing: bool, adapters: bool = False
) -> float:
    """Forward and backward passes: the backward's products are twice the forward's (of a frozen base under adapters, once),
    its attention 2.5 times (flash attention computes the scores again); with gradient checkpointing another forward."""
    forward = forward_seconds(shape, work, device, itemsize)
    again = 2.0 * shape.layers * shape.heads * shape.head_dim * work.pairs / _rate(device, itemsize)
    saved = adapters * 2.0 * shape.layer_weights * work.tokens / _rate(device, itemsize)
    head = head_seconds(shape, work, device, max(0, gemms - adapters), itemsize)
    return (3 + checkpointing) * forward + again - saved + head


def _rate(device, itemsize):
    return device.flops * (FLOAT32_SHARE if itemsize == 4 else 1.0)


def rollout_seconds(
    shape: Shape, work: Pass, prompt: float, slots: int, device: Device, itemsize: int, graphs: bool
) -> float:
    """Decoding with all slots busy to the end, each sequence at its mean length; prompts before it.

    Args:
        work: of one GPU, whole sequences, `labelled` the responses' tokens. prompt: its tokens.
    """
    slots = max(1, min(slots, int(work.sequences)))
    tokens = slots * (work.length - work.labelled / work.sequences / 2)
    launch = GRAPH_SECONDS if graphs else EAGER_SECONDS
    step = decode_step(shape, slots, tokens, itemsize).seconds(device)
    step += overhead_seconds(shape, slots, device, launch)
    prompts = Pass(work.sequences, prompt)
    return work.labelled / slots * step + forward_seconds(shape, prompts, device, itemsize)


def optimizer_seconds(parameters, machine, zero, itemsize, offloaded):
    """AdamW: gradient, weight and moments are read (16 bytes), the last three and a 16-bit copy written (14); the norm and
    its clipping read the gradient twice and write it (12). Of this rank's part from ZeRO 1 on; offloaded: gradients go to
    the host, weights come back.

    Args: machine: `Machine` with GPUs. zero: ZeRO stage.
    """
    part, device = parameters / (machine.count if zero else 1), machine.device
    if not offloaded:
        return 42 * part / device.bandwidth
    return 42 * part / HOST_BANDWIDTH + (4 + itemsize) * part / device.host_link


def communication_seconds(
    parameters: float, machine: Machine, zero: int, itemsize: int, micro_batches: int, checkpointing: bool
) -> float:
    """Gradients in float32 and weights, by rings: (N−1)/N of the bytes for each gathering or scattering.

    ZeRO 0: gradients are summed once a step (scattered and gathered). 1: the same halves, weights gathered. 2: gradients
    are scattered at each micro-batch. 3: weights are gathered for each forward and backward as well.
    """
    share = (machine.count - 1) / machine.count * parameters / machine.link if machine.count > 1 else 0.0
    if zero == 0:
        return 8 * share
    if zero == 1:
        return (4 + itemsize) * share
    scattered = 4 * micro_batches * share
    return scattered + share * itemsize * ((2 + checkpointing) * micro_batches if zero == 3 else 1)
