"""Packed batches, and the definition of how their tensors are aligned.

A sequence of L raw tokens, the prompt and then the response, becomes L − 1 positions: `input_ids = raw[:-1]` and
`labels = raw[1:]`. Index t is the state s_t and the action `labels[t]`, so log-probs, values, rewards, advantages and
returns at t belong to the same action. Sequences lie back to back without padding; `cu_seqlens` marks their bounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

IGNORE_INDEX = -100


@dataclass(frozen=True)
class PackedBatch:
    input_ids: torch.Tensor  # [T] int64
    labels: torch.Tensor  # [T] int64, IGNORE_INDEX at positions without a loss
    position_ids: torch.Tensor  # [T] int64, from 0 in each sequence
    cu_seqlens: torch.Tensor  # [N + 1] int32
    max_seqlen: int

    @property
    def response_mask(self) -> torch.Tensor:
        return self.labels != IGNORE_INDEX

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def last(self) -> torch.Tensor:
        """Index of each sequence's last position, [N] int64."""
        return self.cu_seqlens[1:].long() - 1


def _pack(inputs: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], device: torch.device | str) -> PackedBatch:
    lengths = torch.tensor([len(ids) for ids in inputs], dtype=torch.int32)
    if not len(lengths) or int(lengths.min()) < 1:
        raise ValueError("pack: every sequence needs at least one position, and there must be one sequence")
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])
    starts = cu_seqlens[:-1].repeat_interleave(lengths)
    total = int(cu_seqlens[-1])
    return PackedBatch(
        input_ids=torch.tensor([t for ids in inputs for t in ids]).to(device),
        labels=torch.tensor([t for ids in labels for t in ids]).to(device),
        position_ids=(torch.arange(total) - starts).to(device),
        cu_seqlens=cu_seqlens.to(device),
        max_seqlen=int(lengths.max()),
    )


def pack(
    prompt_ids: Sequence[Sequence[int]],
    response_ids: Sequence[Sequence[int]],
    device: torch.device | str = "cpu",
    *,
    loss_on_prompt: bool = False,
) -> PackedBatch:
    """Packs prompts and responses, given as token ids, into L − 1 positions each.

    Args:
        loss_on_prompt: whether labels of the prompt count too.
    """
    inputs, labels = [], []
    for prompt, response in zip(prompt_ids, response_ids, strict=True):
        raw = list(prompt) + list(response)
        inputs.append(raw[:-1])
        first = 1 if loss_on_prompt else max(len(prompt), 1)
        labels.append([IGNORE_INDEX] * (first - 1) + raw[first:])
    return _pack(inputs, labels, device)


def pack_whole(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> PackedBatch:
    """Packs sequences with all their L tokens as inputs and without labels, for models that score whole sequences."""
    return _pack(sequences, [[IGNORE_INDEX] * len(ids) for ids in sequences], device)


def segment_sum(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Sums the values of each sequence, [T] → [N], differentiably and in a fixed order."""
    return torch.segment_reduce(values, "sum", lengths=cu_seqlens.diff().long(), unsafe=True)


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Splits items of these lengths, in order, into lists of indices of at most `max_tokens` tokens together.

    An item that is longer is in a list of its own.
    """
    batches: list[list[int]] = [[]]
    total = 0
    for index, length in enumerate(lengths):
        if batches[-1] and total + length > max_tokens:
            batches.append([])
            total = 0
        batches[-1].append(index)
        total += length
    return batches if batches[-1] else []
