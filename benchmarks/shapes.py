"""The shapes that are measured, output layers of three models and smaller ones for CPUs, and inputs as in training.

Random logits of one scale are an easy case for a softmax kernel and for a PPO loss. Here the label of a row is likely
(log-probs of 0 to -12), tokens come in sequences whose first half is a prompt, and old log-probs are the model's own
plus noise, so that the ratio is clipped for a few percent of the tokens, as in a real update.
"""

from dataclasses import dataclass, replace

import torch

from rto_fast.ops import linear_token_logps


@dataclass(frozen=True)
class Shape:
    """T tokens of N sequences, the hidden size D and the vocabulary size V."""

    name: str
    tokens: int
    hidden_size: int
    vocab_size: int
    sequence_length: int = 512

    def at(self, tokens):
        return replace(self, tokens=tokens)


LLAMA3_8B = Shape("Llama-3-8B", 8192, 4096, 128256)
QWEN3_06B = Shape("Qwen3-0.6B", 8192, 1024, 151936)
GEMMA3_270M = Shape("Gemma3-270M", 8192, 640, 262144)
MODELS = (LLAMA3_8B, QWEN3_06B, GEMMA3_270M)
# For CPUs: the output layers of a small model and of the embedded default.
CPU_SHAPES = (Shape("small", 512, 256, 16000, 128), Shape("embedded", 2048, 64, 49, 64))
TINY = Shape("tiny", 64, 16, 300, 16)


def _generator(device, seed=0):
    return torch.Generator(device).manual_seed(seed)


def packed(tokens, sequences, device):
    """(cu_seqlens of sequences of uneven lengths, response mask, which is the second half of each)."""
    generator = _generator("cpu")
    shares = torch.rand(sequences, generator=generator) + 0.5
    bounds = torch.cat([torch.zeros(1), (shares / shares.sum()).cumsum(0) * tokens]).round().int()
    bounds[-1] = tokens
    lengths = bounds.diff().long()
    positions = torch.arange(tokens) - bounds[:-1].long().repeat_interleave(lengths)
    mask = positions >= (lengths // 2).repeat_interleave(lengths)
    return bounds.to(device), mask.to(device)


def logits_inputs(shape, device, dtype):
    """(logits [T, V] of standard deviation 2, with up to 14 more for the label; labels [T])."""
    generator = _generator(device)
    labels = torch.randint(0, shape.vocab_size, (shape.tokens,), generator=generator, device=device)
    logits = torch.randn(shape.tokens, shape.vocab_size, generator=generator, device=device, dtype=dtype).mul_(2)
    boost = 14 * torch.rand(shape.tokens, generator=generator, device=device)
    logits[torch.arange(shape.tokens, device=device), labels] += boost.to(dtype)
    return logits, labels


def linear_inputs(shape, device, dtype):
    """(hidden [T, D], weight [V, D], labels [T]), which give such logits."""
    generator = _generator(device)
    size = (shape.vocab_size, shape.hidden_size)
    weight = torch.randn(size, generator=generator, device=device).mul_(2 * shape.hidden_size**-0.5)
    labels = torch.randint(0, shape.vocab_size, (shape.tokens,), generator=generator, device=device)
    hidden = torch.randn(shape.tokens, shape.hidden_size, generator=generator, device=device)
    hidden += 3.5 * torch.rand(shape.tokens, 1, generator=generator, device=device) * weight[labels]  # |weight|² = 4
    return hidden.to(dtype), weight.to(dtype), labels


def ppo_inputs(shape, device, dtype, mask):
    """(hidden, weight, labels, old_logps, advantages, loss_mask). mask: "half" of the tokens, or "full"."""
    hidden, weight, labels = linear_inputs(shape, device, dtype)
    generator = _generator(device, 1)
    noise, advantages = torch.randn(2, shape.tokens, generator=generator, device=device)
    with torch.no_grad():
        old_logps = linear_token_logps(hidden, weight, labels) + 0.1 * noise
    return hidden, weight, labels, old_logps, advantages, loss_mask(shape, device, mask)


def loss_mask(shape, device, mask):
    if mask == "full":
        return torch.ones(shape.tokens, dtype=torch.bool, device=device)
    return packed(shape.tokens, max(1, shape.tokens // shape.sequence_length), device)[1]


def policy_inputs(tokens, device):
    """(logps, old_logps, advantages, mask) [T]."""
    generator = _generator(device)
    old_logps, noise, advantages = torch.randn(3, tokens, generator=generator, device=device)
    old_logps = -old_logps.abs()
    mask = packed(tokens, max(1, tokens // 512), device)[1]
    return old_logps + 0.1 * noise, old_logps, advantages, mask


def advantages_inputs(tokens, sequences, device):
    """(old_logps, ref_logps, dpo_logps, values [T], scores [N], cu_seqlens [N+1], response_mask [T])."""
    generator = _generator(device)
    draws = torch.randn(4, tokens, generator=generator, device=device)
    old_logps = -draws[0].abs()
    scores = torch.randn(sequences, generator=generator, device=device)
    return (
        old_logps,
        old_logps + 0.3 * draws[1],
        old_logps + 0.5 * draws[2],
        draws[3],
        scores,
        *packed(tokens, sequences, device),
    )
