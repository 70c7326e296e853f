"""Packed batches, and the definition of how their tensors are aligned.

A sequence of L raw tokens, the prompt and then the response, becomes L − 1 positions: `input_ids = raw[:-1]` and
`labels = raw[1:]`. Index t is the state s_t and the action `labels[t]`, so log-probs, values, rewards, advantages and
returns at t belong to the same action. Sequences lie back to back without padding; `cu_seqlens` marks their bounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F

IGNORE_INDEX = -100
ALIGNMENT = 128  # bytes: tensors that share a copy begin where kernels may load vectors


@dataclass(frozen=True)
class PackedBatch:
    input_ids: torch.Tensor  # [T] int64
    labels: torch.Tensor  # [T] int64, IGNORE_INDEX at positions without a loss
    position_ids: torch.Tensor  # [T] int64, from 0 in each sequence
    cu_seqlens: torch.Tensor  # [N + 1] int32
    max_seqlen: int
    rows: torch.Tensor  # [n] int64, the positions with a label, ascending

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

    def padded(self, *, coarse: bool = True) -> "PackedBatch":
        """This batch with tensors of sizes that many batches share (`padded_size`); real tokens keep their places.

        The padding repeats the batch from its beginning, as further sequences without labels: what a model computes of it is
        finite where it is for real tokens. `rows` ends with the first token of the padding. A loss and metrics over the
        labels are those of this batch, and the padding's part of a gradient is 0.

        Args:
            coarse: for CUDA graphs, which hold the sizes of all tensors: `max_seqlen` and the number of bounds are of few
                values too; the bounds end with empty sequences. Otherwise for eager passes, where only GEMMs count.
        """
        tokens = self.num_tokens
        # At least one, for `rows`, and never more than the batch has.
        more = padded_size(tokens + 1, coarse=coarse) - tokens
        more_rows = padded_size(len(self.rows), coarse=coarse) - len(self.rows)
        ends = (self.cu_seqlens[1:] + tokens).clamp(max=tokens + more)
        bounds, max_seqlen = torch.cat([self.cu_seqlens, ends]), self.max_seqlen
        if coarse:
            empty = (1 << (2 * self.num_sequences - 1).bit_length()) - 2 * self.num_sequences  # to a power of 2
            bounds, max_seqlen = F.pad(bounds, (0, empty), value=tokens + more), 1 << (max_seqlen - 1).bit_length()
        return PackedBatch(
            input_ids=torch.cat([self.input_ids, self.input_ids[:more]]),
            labels=F.pad(self.labels, (0, more), value=IGNORE_INDEX),
            position_ids=torch.cat([self.position_ids, self.position_ids[:more]]),
            cu_seqlens=bounds,
            max_seqlen=max_seqlen,
            rows=F.pad(self.rows, (0, more_rows), value=tokens),
        )


def padded_size(count: int, *, coarse: bool = True) -> int:
    """The smallest of the sizes of padded batches that holds `count`.

    Args:
        coarse: eight sizes between a power of 2 and the next, at most an eighth more than `count`. Otherwise multiples of 64
            and, from 4,096 on, of a 64th of the next power of 2, 32 of them, which are 1 % more on average.
    """
    bits = count.bit_length()
    step = 1 << max(bits - 4, 0)
    if not coarse:
        step = min(step, max(64, 1 << max(bits - 6, 0)))
    return -(-count // step) * step


def to_device(tensors: Sequence[torch.Tensor], device: torch.device | str) -> list[torch.Tensor]:
    """Moves CPU tensors to the device, all in one copy from pinned memory, for which the host does not wait."""
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=torch.device(device).type == "cuda")

    def views(whole: torch.Tensor) -> list[torch.Tensor]:
        parts = zip(tensors, whole.split(sizes))
        return [part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for tensor, part in parts]

    for view, tensor in zip(views(buffer), tensors):
        view.copy_(tensor)
    return views(buffer.to(device, non_blocking=True))


def _flat(sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(the tokens of all sequences, the number of each one's), int64."""
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
    return np.fromiter(chain.from_iterable(sequences), np.int64, int(lengths.sum())), lengths


def _pack(
    input_ids: np.ndarray, labels: np.ndarray, lengths: np.ndarray, unlabelled: np.ndarray, device: torch.device | str
) -> PackedBatch:
    """Packs sequences of `lengths` positions, in each of which the first `unlabelled` positions have no label."""
    ends = lengths.cumsum()
    position_ids = np.arange(len(input_ids)) - (ends - lengths).repeat(lengths)
    is_labelled = position_ids >= unlabelled.repeat(lengths)
    arrays = (
        input_ids,
        np.where(is_labelled, labels, IGNORE_INDEX),
        position_ids,
        np.concatenate([[0], ends]).astype(np.int32),
        is_labelled.nonzero()[0],
    )
    input_ids, labels, position_ids, cu_seqlens, rows = to_device([torch.from_numpy(array) for array in arrays], device)
    return PackedBatch(input_ids, labels, position_ids, cu_seqlens, int(lengths.max()), rows)


def _check(lengths: np.ndarray) -> None:
    if not len(lengths) or lengths.min() < 1:
        raise ValueError("pack: every sequence needs at least one position, and there must be one sequence")


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
    tokens, parts = _flat([part for pair in zip(prompt_ids, response_ids, strict=True) for part in pair])
    prompt_lengths, response_lengths = parts.reshape(-1, 2).T
    lengths = prompt_lengths + response_lengths
    _check(lengths - 1)
    is_first, is_last = np.zeros((2, len(tokens)), bool)
    ends = lengths.cumsum()
    is_first[ends - lengths], is_last[ends - 1] = True, True
    unlabelled = np.zeros_like(lengths) if loss_on_prompt else np.maximum(prompt_lengths - 1, 0)
    return _pack(tokens[~is_last], tokens[~is_first], lengths - 1, unlabelled, device)


def pack_whole(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> PackedBatch:
    """Packs sequences with all their L tokens as inputs and without labels, for models that score whole sequences."""
    tokens, lengths = _flat(sequences)
    _check(lengths)
    return _pack(tokens, tokens, lengths, lengths, device)


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
