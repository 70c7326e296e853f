"""The metrics of an iteration, from what was sampled and paid."""

import torch
from torch import Tensor

from rto_fast.batch import segment_sum
from rto_fast.reporting.metric_names import (
    ADVANTAGE_STD,
    DPO_CLIP_FRACTION,
    DPO_REWARD,
    DPO_SCORE_CORRELATION,
    EXPLAINED_VARIANCE,
    KL,
    KL_COEF,
    KL_PENALTY,
    LENGTH,
    REWARD,
    ROLLOUT_IMBALANCE,
    ROLLOUT_TOKENS_PER_SECOND,
    SCORE,
    SCORE_REWARD,
    TOKENS,
    TOKENS_PER_SECOND,
    TRUNCATED,
)
from rto_fast.rollout import RolloutBatch
from rto_fast.rto.experience import Experience
from rto_fast.rto.token_rewards import TokenRewards
from rto_fast.training import ranks


def rollout_metrics(experience: Experience, rewards: TokenRewards, kl_coef: float) -> dict[str, Tensor | float]:
    """The metrics of a rollout's rewards. Sums over tokens are means over responses."""
    batch, stats = experience.batch, rewards.stats
    mask = batch.response_mask

    def per_response(name: str) -> Tensor:
        return stats[name] / batch.num_sequences

    dense = torch.where(mask, experience.dpo_logps - experience.dpo_ref_logps, 0.0)
    metrics: dict[str, Tensor | float] = {
        SCORE: experience.scores.mean(),
        REWARD: segment_sum(rewards.reward, batch.cu_seqlens).mean(),
        DPO_REWARD: per_response("dpo_reward_sum"),
        KL: per_response("kl_sum"),
        KL_PENALTY: kl_coef * per_response("kl_sum"),
        SCORE_REWARD: per_response("score_reward_sum"),
        KL_COEF: kl_coef,
        DPO_CLIP_FRACTION: stats["dpo_clip_count"] / stats["count"].clamp(min=1),
        DPO_SCORE_CORRELATION: correlation(segment_sum(dense, batch.cu_seqlens), experience.scores),
        LENGTH: stats["count"] / batch.num_sequences,
        TRUNCATED: experience.truncated.float().mean(),
        ADVANTAGE_STD: stats["advantage_var"].sqrt(),
        EXPLAINED_VARIANCE: explained_variance(experience.old_values[mask], rewards.returns[mask]),
    }
    return metrics | reward_shares(experience, rewards) | experience.mismatch


def reward_shares(experience: Experience, rewards: TokenRewards) -> dict[str, Tensor]:
    """The share that each part of the reward has in the size of a response's reward.

    A size has no sign: in a mean over responses, rewards of different signs would cancel.
    """
    cu_seqlens = experience.batch.cu_seqlens
    sizes = torch.stack([segment_sum(part, cu_seqlens).abs().mean() for part in rewards.parts.values()])
    shares = sizes / sizes.sum().clamp(min=1e-8)
    return {f"{name}_share": share for name, share in zip(rewards.parts, shares)}


def correlation(x: Tensor, y: Tensor) -> Tensor:
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt().clamp(min=1e-8)


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    return 1.0 - (returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-8)


def speed_metrics(rollout: RolloutBatch, sampled: float, scored: float, updated: float) -> dict[str, float]:
    """The metrics of an iteration's speed.

    Args:
        sampled, scored, updated: the seconds that each phase of the iteration took.
    """
    seconds = rollout.timings | {"score": scored, "update": updated}
    metrics: dict[str, float] = {f"seconds_{phase}": value for phase, value in seconds.items()}
    if ranks.world_size() > 1:
        metrics[ROLLOUT_IMBALANCE] = rollout.stats[ROLLOUT_IMBALANCE]
    return metrics | {
        TOKENS: rollout.num_tokens,
        TOKENS_PER_SECOND: rollout.num_tokens / (sampled + scored + updated),
        ROLLOUT_TOKENS_PER_SECOND: rollout.num_tokens / sampled,
    }
