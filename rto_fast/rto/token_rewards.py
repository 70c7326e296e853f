"""RTO's idea (arXiv 2404.18922, eq. 4.7): each token is paid at once for how much the DPO policy prefers it.

    r_h = β1·log π_dpo/π_ref − β2·log π/π_ref + 1[h = H]·β3·score

Without clips, and in plain torch, for the tokens of one response:

    dpo_reward = β1 * (dpo_logps - dpo_ref_logps)
    kl_penalty = β2 * (old_logps - ref_logps)
    reward = dpo_reward - kl_penalty
    reward[-1] += β3 * score

`rto_fast.ops.rto_advantages` computes this, the advantages by GAE and their whitening in one kernel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rto_fast.config import RTOConfig
from rto_fast.ops import rto_advantages
from rto_fast.reporting.metric_names import DPO_REWARD, KL_PENALTY, SCORE_REWARD
from rto_fast.rto.experience import Experience


@dataclass
class TokenRewards:
    """What each token is paid and the advantages that follow: [T] float32 each, 0 outside of the responses."""

    reward: Tensor  # dpo_reward − kl_penalty + score_reward
    dpo_reward: Tensor  # as it was paid: scaled, clipped, moved to the ends of sentences, less its shaping
    kl_penalty: Tensor
    score_reward: Tensor
    kl: Tensor  # log π/π_ref, nats
    advantages: Tensor
    returns: Tensor
    stats: dict[str, Tensor]  # see `rto_advantages`

    @property
    def parts(self) -> dict[str, Tensor]:
        return {DPO_REWARD: self.dpo_reward, KL_PENALTY: self.kl_penalty, SCORE_REWARD: self.score_reward}


def token_rewards(rto: RTOConfig, experience: Experience, kl_coef: float, delimiters: Tensor | None) -> TokenRewards:
    """Pays the tokens of a rollout.

    Args:
        kl_coef: β2.
        delimiters: [V] bool, see `delimiter_table`; None unless the dense reward is paid at the ends of sentences.
    """
    batch = experience.batch
    scores, bootstrap_values = scores_of_truncated(rto, experience)
    # Without a reward model all scores are 0, but the penalty of truncation stands.
    score_scale = rto.score_scale or 1.0
    result = rto_advantages(
        experience.old_logps,
        experience.ref_logps,
        experience.dpo_logps,
        experience.old_values,
        scores,
        batch.cu_seqlens,
        batch.response_mask,
        dpo_ref_logps=experience.dpo_ref_logps,
        dpo_reward_scale=rto.dense_reward_scale,  # β1
        dpo_reward_clip=rto.dpo_reward_clip,
        kl_coef=kl_coef,  # β2
        score_scale=score_scale,  # β3
        score_clip=rto.score_clip,
        gamma=rto.gamma,
        # Without a critic the advantage is the discounted sum of all rewards to come: λ = 1 over values of 0.
        gae_lambda=rto.gae_lambda if rto.advantage == "gae" else 1.0,
        granularity=rto.granularity,
        delimiter_mask=delimiters[batch.labels.clamp(min=0)] if delimiters is not None else None,
        shaping=rto.shaping,
        bootstrap_values=bootstrap_values,
        whiten=rto.whiten,
    )
    reward = result.token_rewards
    paid = score_scale * (scores.clamp(-rto.score_clip, rto.score_clip) if rto.score_clip else scores)
    score_reward = torch.zeros_like(reward).index_copy(0, batch.last, paid.to(reward.dtype))
    kl_penalty = kl_coef * result.kl
    return TokenRewards(
        reward=reward,
        dpo_reward=reward + kl_penalty - score_reward,
        kl_penalty=kl_penalty,
        score_reward=score_reward,
        kl=result.kl,
        advantages=result.advantages,
        returns=result.returns,
        stats=result.stats,
    )


def scores_of_truncated(rto: RTOConfig, experience: Experience) -> tuple[Tensor, Tensor | None]:
    """Applies `rto.truncation` to the scores of truncated responses.

    Returns:
        The scores that are paid, [N], and the values after the last token, [N]; None where every response counts as ended.
    """
    scores, truncated = experience.scores, experience.truncated
    if rto.truncation == "penalty":
        # At most 0 before the penalty: a response that never ends must not be worth more than one that ends.
        return torch.where(truncated, scores.clamp(max=0.0) - rto.truncation_penalty, scores), None
    if rto.truncation == "bootstrap":
        return torch.where(truncated, 0.0, scores), torch.where(truncated, experience.values_after, 0.0)
    return scores, None


def delimiter_table(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, characters: str, device: torch.device | str
) -> Tensor:
    """Finds the tokens whose text ends with one of `characters`, apart from spaces; [V] bool."""
    texts = tokenizer.batch_decode([[i] for i in range(vocab_size)])
    ends = [any(text.rstrip(" ").endswith(c) for c in characters) for text in texts]
    return torch.tensor(ends, device=device)
