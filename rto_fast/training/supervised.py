"""The losses of the stages that learn from examples, as functions of a model and of a packed micro-batch (`Model.learn`).

They add up over the micro-batches of an optimizer step, whose number of examples they are given. A mask of real examples is
part of a micro-batch, so that a padded one (`PackedBatch.padded`) has the same loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from rto_fast.batch import PackedBatch, pack, pack_whole, padded_size, segment_sum, to_device
from rto_fast.config import DPOConfig
from rto_fast.data.tokenizing import Demonstration, Pair
from rto_fast.losses import bradley_terry, dpo
from rto_fast.models.forward import causal_logps, token_scores
from rto_fast.reporting.metric_names import ACCURACY, LOSS, MARGIN


@dataclass(frozen=True)
class TextBatch:
    """Demonstrations of an optimizer step."""

    batch: PackedBatch
    num_items: float | Tensor  # labelled tokens of the whole optimizer step

    def padded(self, *, coarse: bool = True) -> Self:
        num_items = torch.full((), float(self.num_items), device=self.batch.labels.device)
        return replace(self, batch=self.batch.padded(coarse=coarse), num_items=num_items)


def text_batch(texts: Sequence[Demonstration], num_items: float, on_prompt: bool, device: str) -> TextBatch:
    prompts, responses = zip(*((text.prompt_ids, text.response_ids) for text in texts))
    return TextBatch(pack(prompts, responses, device, loss_on_prompt=on_prompt), num_items)


def text_loss(module: PreTrainedModel, inputs: TextBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """The negative log-likelihood, a mean over the labelled tokens of the whole optimizer step."""
    loss = -causal_logps(module, inputs.batch).sum() / inputs.num_items
    return loss, {LOSS: loss.detach()}


@dataclass(frozen=True)
class PairBatch:
    """Preference pairs of an optimizer step. The batch has all chosen sides, then all rejected ones."""

    batch: PackedBatch
    sides: Tensor  # [2, n] int64, the numbers of the chosen and of the rejected sequences in the batch
    weights: Tensor  # [n] float32: 1 / pairs of the whole optimizer step, 0 of padding
    reference: Tensor | None = None  # [2, n] float32, summed log-probs of the sides under the reference model

    def padded(self, *, coarse: bool = True) -> Self:
        more = padded_size(len(self.weights), coarse=coarse) - len(self.weights)
        return replace(
            self,
            batch=self.batch.padded(coarse=coarse),
            sides=F.pad(self.sides, (0, more), value=self.batch.num_sequences),  # the first sequence of the padding
            weights=F.pad(self.weights, (0, more)),
            reference=None if self.reference is None else F.pad(self.reference, (0, more)),
        )


def _pair_batch(batch: PackedBatch, step_pairs: int, reference: Tensor | None = None) -> PairBatch:
    sides = torch.arange(batch.num_sequences, device=batch.labels.device).view(2, -1)
    weights = torch.full((sides.shape[1],), 1.0 / step_pairs, device=batch.labels.device)
    return PairBatch(batch, sides, weights, reference)


def whole_sides(pairs: Sequence[Pair]) -> list[list[int]]:
    """Prompts with their responses: all chosen, then all rejected."""
    return [p.prompt_ids + p.chosen_ids for p in pairs] + [p.prompt_ids + p.rejected_ids for p in pairs]


def packed_sides(pairs: Sequence[Pair], device: str | torch.device) -> PackedBatch:
    """The same with labels of the responses."""
    prompts = [p.prompt_ids for p in pairs]
    return pack(prompts + prompts, [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs], device)


def reward_batch(pairs: Sequence[Pair], step_pairs: int, device: str) -> PairBatch:
    return _pair_batch(pack_whole(whole_sides(pairs), device), step_pairs)


def reward_loss(module: PreTrainedModel, inputs: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """The Bradley-Terry loss of the scores after the last tokens, a mean over the pairs of the optimizer step."""
    chosen, rejected = token_scores(module, inputs.batch)[inputs.batch.last[inputs.sides]]
    loss = (inputs.weights * bradley_terry(chosen, rejected)).sum()
    return loss, {LOSS: loss.detach(), ACCURACY: (inputs.weights * (chosen > rejected)).sum()}


def dpo_batch(pairs: Sequence[Pair], reference: Tensor, step_pairs: int, device: str) -> PairBatch:
    """reference: [n, 2] on the CPU, see `PairBatch`."""
    (before,) = to_device([reference.t().contiguous()], device)
    return _pair_batch(packed_sides(pairs, device), step_pairs, before)


def dpo_loss(module: PreTrainedModel, inputs: PairBatch, stage: DPOConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of `rto_fast.losses.dpo`, a mean over the pairs of the optimizer step."""
    assert inputs.reference is not None  # see `dpo_batch`
    sums = segment_sum(causal_logps(module, inputs.batch), inputs.batch.cu_seqlens)
    chosen, rejected = sums[inputs.sides] - inputs.reference  # log π/π_ref
    losses = dpo(chosen, rejected, beta=stage.beta, loss=stage.loss, label_smoothing=stage.label_smoothing)
    loss, margin = (inputs.weights * losses).sum(), stage.beta * (chosen - rejected).detach()
    metrics = {ACCURACY: (inputs.weights * (margin > 0)).sum(), MARGIN: (inputs.weights * margin).sum()}
    return loss, {LOSS: loss.detach()} | metrics
