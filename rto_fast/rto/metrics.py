"""What is recorded of an iteration: its metrics, and for the run's report what the tokens of some responses earned."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rto_fast.batch import segment_sum
from rto_fast.reporting.metric_names import (
    ADVANTAGE,
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
    VALUE,
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
        EXPLAINED_VARIANCE: explained_variance(experience.old_values[batch.rows], rewards.returns[batch.rows]),
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


# Of each recorded iteration, and of each response: the record stays small for any model.
RECORDED_RESPONSES, RECORDED_TOKENS = 4, 512


def recorded_iterations(iterations: int) -> set[int]:
    """The numbers, from 0, of the first, the middle and the last iteration, which show how the token rewards change."""
    return {0, iterations // 2, iterations - 1}


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token. The texts join to that of the whole, special tokens included.

    A token is decoded together with those before it, as TGI and vLLM stream text: many tokenizers drop the space in front of
    a token that stands alone. A character of several tokens belongs to the last of them.
    """

    def decode(start: int, end: int) -> str:
        return tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    texts, start, read = [], 0, 0
    for end in range(1, len(ids) + 1):
        before, whole = decode(start, read), decode(start, end)
        if whole.endswith("\ufffd") and end < len(ids) and end - read < 4:  # UTF-8 has at most four bytes a character
            texts.append("")
            continue
        texts.append(whole[len(before) :])
        start, read = read, end
    return texts


def token_records(
    experience: Experience, rewards: TokenRewards, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Records some responses for `RunLog.tokens`; the values of their tokens are lists."""
    lengths, mask = experience.lengths, experience.batch.response_mask.split(experience.lengths)
    columns = rewards.parts | {ADVANTAGE: rewards.advantages, VALUE: experience.old_values}
    split = {name: values.split(lengths) for name, values in columns.items()}
    records = []
    for i, ids in enumerate(experience.response_ids[:RECORDED_RESPONSES]):
        numbers = {
            name: [round(number, 5) + 0.0 for number in parts[i][mask[i]][:RECORDED_TOKENS].tolist()]  # + 0.0: no -0.0
            for name, parts in split.items()
        }
        # The score is paid on the last token, which may lie behind the cut.
        score = round(float(split[SCORE_REWARD][i].sum()), 5)
        shown = {"index": i, "prompt": experience.prompts[i].prompt, "count": len(ids), SCORE: score}
        records.append(shown | {"tokens": token_texts(tokenizer, ids[:RECORDED_TOKENS])} | numbers)
    return records
