"""PPO on an experience: epochs of optimizer steps, each the sum of its micro-batches."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from rto_fast.batch import PackedBatch, pack, to_device
from rto_fast.config import Config, RTOConfig
from rto_fast.models.forward import forward_hidden, token_scores
from rto_fast.models.head import output_head
from rto_fast.models.model import ScoreStatistics
from rto_fast.ops import linear_ppo_loss, linear_token_logps, ppo_policy_loss, ppo_value_loss
from rto_fast.reporting.metric_names import APPROX_KL, ENTROPY, FIRST_STEP_KL, IMBALANCE
from rto_fast.rto.experience import Experience, Models, normalised
from rto_fast.rto.token_rewards import TokenRewards
from rto_fast.system.progress import progress
from rto_fast.training import ranks
from rto_fast.training.accumulate import Accumulator, add_to
from rto_fast.training.optimizer import ScheduledOptimizer


@dataclass(frozen=True)
class MicroBatch:
    """Some responses of an optimizer step: [T] float32 tensors in the alignment of `batch`."""

    batch: PackedBatch
    num_items: float | Tensor  # the denominator of the losses, that of the whole optimizer step
    old_logps: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    policy_weights: Tensor | None = None  # of the tokens in the policy's loss; None: 1
    value_weights: Tensor | None = None

    def padded(self, *, coarse: bool = True) -> "MicroBatch":
        """See `PackedBatch.padded`. The padding has no label, so whatever it has else does not count."""
        batch = self.batch.padded(coarse=coarse)
        more = batch.num_tokens - self.batch.num_tokens
        columns = {field.name: getattr(self, field.name) for field in fields(self)[2:]}
        padded = {name: F.pad(column, (0, more)) for name, column in columns.items() if column is not None}
        num_items = torch.full((), float(self.num_items), dtype=torch.float32, device=self.old_logps.device)
        return replace(self, batch=batch, num_items=num_items, **padded)


def update(
    config: Config,
    models: Models,
    optimizers: Mapping[str, ScheduledOptimizer],
    experience: Experience,
    rewards: TokenRewards,
    seed: int,
    accumulator: Accumulator,
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Runs the PPO epochs over an experience.

    Args:
        optimizers: "policy_optimizer" and, where there is a critic, "critic_optimizer".
        seed: of the order in which the responses are visited.
        check: called with the metrics of the first optimizer step's passes, before that step is taken.
    Returns:
        The metrics, averaged over the optimizer steps, and the first step's KL to the policy that sampled.
    """
    rto, temperature, critic = config.rto, config.rollout.temperature, models.critic
    columns = split_by_response(rto, experience, rewards)
    minibatches = shuffled_minibatches(rto, len(experience.response_ids), seed)
    lengths = experience.lengths
    totals: dict[str, Any] = {}
    with progress("rto: update", len(minibatches), "optimizer steps") as phase:
        for number, minibatch in enumerate(minibatches):
            num_items = loss_denominator(rto, experience, minibatch)
            step = accumulator.step(minibatch, lengths, optimizers.values())
            for rows, factor in step:
                with step:
                    micro_batch = pack_micro_batch(experience, columns, rows, num_items)
                    backward = optimizers["policy_optimizer"].backward
                    step.add(
                        models.policy.learn(
                            policy_loss, micro_batch, rto, temperature, backward=backward, factor=factor
                        )
                    )
                    if critic is not None:
                        backward = optimizers["critic_optimizer"].backward
                        step.add(
                            critic.learn(value_loss, micro_batch, rto, critic.scores, backward=backward, factor=factor)
                        )
            metrics: dict[str, Any] = step.metrics()
            if number == 0:
                first_kl = metrics[APPROX_KL]
                if check:
                    check(metrics)
            if ranks.world_size() > 1:
                metrics[IMBALANCE] = ranks.imbalance([lengths[i] for i in minibatch])
            metrics |= optimizers["policy_optimizer"].step()
            if critic is not None:
                metrics |= {f"critic_{name}": value for name, value in optimizers["critic_optimizer"].step().items()}
            add_to(totals, metrics)
            phase.advance()
    for optimizer in optimizers.values():
        optimizer.free_gradients()
    return {name: value / len(minibatches) for name, value in totals.items()} | {FIRST_STEP_KL: first_kl}


def shuffled_minibatches(rto: RTOConfig, count: int, seed: int) -> list[list[int]]:
    """The responses of each optimizer step, of all epochs: each epoch visits every response once."""
    generator = torch.Generator().manual_seed(seed)
    epochs = (torch.randperm(count, generator=generator) for _ in range(rto.ppo_epochs))
    return [minibatch.tolist() for epoch in epochs for minibatch in epoch.split(rto.batch_size)]


def loss_denominator(rto: RTOConfig, experience: Experience, minibatch: Sequence[int]) -> float:
    """What the means of an optimizer step are over. Known before its first micro-batch, so that their gradients add up
    exactly."""
    return float(sum(1 if rto.loss_per_sequence else len(experience.response_ids[i]) for i in minibatch))


def split_by_response(rto: RTOConfig, experience: Experience, rewards: TokenRewards) -> dict[str, tuple[Tensor, ...]]:
    """The tensors of a `MicroBatch`, {name: one part for each response}."""
    batch = experience.batch
    columns = {
        "old_logps": experience.old_logps,
        "old_values": experience.old_values,
        "advantages": rewards.advantages,
        "returns": rewards.returns,
    }
    if rto.loss_per_sequence:
        counts = to_device([torch.tensor([len(ids) for ids in experience.response_ids])], experience.old_logps.device)[
            0
        ]
        weights = (1.0 / counts).repeat_interleave(batch.cu_seqlens.diff(), output_size=batch.num_tokens)
        columns |= {"policy_weights": weights, "value_weights": weights}
    if experience.importance is not None:
        columns["policy_weights"] = experience.importance * columns.get("policy_weights", 1.0)
    return {name: values.split(experience.lengths) for name, values in columns.items()}


def pack_micro_batch(
    experience: Experience, columns: Mapping[str, tuple[Tensor, ...]], rows: Sequence[int], num_items: float
) -> MicroBatch:
    """Packs the responses of `rows`."""
    prompt_ids, response_ids = ([ids[i] for i in rows] for ids in (experience.prompt_ids, experience.response_ids))
    batch = pack(prompt_ids, response_ids, experience.old_logps.device)
    tensors = {name: torch.cat([parts[i] for i in rows]) for name, parts in columns.items()}
    return MicroBatch(batch, num_items, **tensors)


def policy_loss(
    module: PreTrainedModel, micro_batch: MicroBatch, rto: RTOConfig, temperature: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped loss straight from the hidden states; see `rto_fast.ops.linear_ppo_loss`."""
    batch, mask = micro_batch.batch, micro_batch.batch.response_mask
    hidden, head = forward_hidden(module, batch), output_head(module)
    options: dict[str, Any] = {
        "weights": micro_batch.policy_weights,
        "num_items": micro_batch.num_items,
        "clip_eps": rto.clip_eps,
        "clip_eps_high": rto.clip_eps_high,
        "dual_clip": rto.dual_clip,
    }
    if head.bias is None:
        return head.run(
            linear_ppo_loss,
            hidden,
            batch.labels,
            micro_batch.old_logps,
            micro_batch.advantages,
            mask,
            rows=batch.rows,
            entropy_coef=rto.entropy_coef,
            temperature=temperature,
            **options,
        )
    logps, entropy = head.run(
        linear_token_logps, hidden, batch.labels, rows=batch.rows, temperature=temperature, return_entropy=True
    )
    loss, metrics = ppo_policy_loss(logps, micro_batch.old_logps, micro_batch.advantages, mask, **options)
    weights = mask if micro_batch.policy_weights is None else micro_batch.policy_weights * mask
    mean_entropy = (entropy * weights).sum() / micro_batch.num_items
    return loss - rto.entropy_coef * mean_entropy, metrics | {ENTROPY: mean_entropy.detach()}


def value_loss(
    module: PreTrainedModel, micro_batch: MicroBatch, rto: RTOConfig, scores: ScoreStatistics | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The critic's clipped loss; see `rto_fast.ops.ppo_value_loss`."""
    return ppo_value_loss(
        normalised(token_scores(module, micro_batch.batch), scores),
        micro_batch.old_values,
        micro_batch.returns,
        micro_batch.batch.response_mask,
        weights=micro_batch.value_weights,
        num_items=micro_batch.num_items,
        value_clip_eps=rto.value_clip_eps,
    )
