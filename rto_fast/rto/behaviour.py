"""Old log-probs where sampler and trainer differ: engines that run other kernels than training.

Those are vLLM, transformers' `generate`, models without our decoder layers, and CPUs. An engine that is exact
(`rto_fast.rollout.base.Exactness`) needs nothing of this: its log-probs are the old log-probs.

The sampler's log-probs of an engine that is not are a little off from those that PPO's first step computes. The difference
is measured on some of the responses of every rollout. While PPO does not notice it (`rto_fast.models.agreement` says when),
the sampler's log-probs are the old log-probs, which saves a forward pass; the KL penalty then contains that difference, for
the reference's log-probs come from the training forward pass. When PPO would notice it, the old log-probs are recomputed,
the loss is weighted with min(π_training/π_sampler, cap) (truncated importance sampling, Espeholt et al., arXiv 1802.01561,
section 4.1), and both sides of the KL penalty come from the same forward pass.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rto_fast.batch import PackedBatch, pack
from rto_fast.config import RTOConfig
from rto_fast.models.agreement import clip_width, mismatch, ppo_notices
from rto_fast.reporting.metric_names import IMPORTANCE_WEIGHT, MISMATCH_MEAN
from rto_fast.rollout import RolloutBatch

# Computes the policy's log-probs of the responses of these numbers, or of all, [T] in the alignment of `pack`.
Recompute = Callable[[Sequence[int] | None], Tensor]

MONITORED = 16  # the log-probs of every 16th response are compared, and of at least four


def monitored_rows(count: int) -> range:
    """The responses of a rollout of `count` whose log-probs are computed twice."""
    return range(0, count, max(1, min(MONITORED, count // 4)))


def sampler_mismatch(
    rto: RTOConfig, rollout: RolloutBatch, response_ids: list[list[int]], batch: PackedBatch, recompute: Recompute
) -> dict[str, Tensor]:
    """Compares the sampler with the training forward pass on some of a rollout's responses.

    Args:
        rollout: as it was sampled.
        response_ids: what is trained on.
        batch: the same, with the prompts, packed.
    Returns:
        The metrics of the difference; none where the sampler's log-probs cannot be used.
    """
    # `paper_code` may have put another token in the place of the one that was drawn.
    if rollout.logps is None or rto.old_logps == "recompute" or response_ids != rollout.response_ids:
        return {}
    rows = monitored_rows(len(response_ids))
    monitored = pack([rollout.prompt_ids[i] for i in rows], [response_ids[i] for i in rows], batch.labels.device)
    parts = rollout.logps.split([len(ids) for ids in response_ids])
    sampled = RolloutBatch.aligned(torch.cat([parts[i] for i in rows]), monitored)
    return mismatch(recompute(rows)[monitored.rows], sampled[monitored.rows])


def behaviour_logps(
    rto: RTOConfig, rollout: RolloutBatch, batch: PackedBatch, mismatch: dict[str, Tensor], recompute: Recompute
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Chooses the old log-probs of a rollout: the sampler's own where they can be trusted, else those of a forward pass.

    Args:
        rollout: as it was sampled.
        batch: what is trained on.
        mismatch: from `sampler_mismatch`.
    Returns:
        The old log-probs, [T] float32 in nats; the weights of the policy's loss, [T] float32 or None for 1; and the metrics
        of the difference between the sampler and the training forward pass, none where nothing was compared.
    """
    if not mismatch or rollout.logps is None:
        return recompute(None), None, {}
    sampled = rollout.aligned(rollout.logps, batch)
    if rto.old_logps == "sampler" or not ppo_notices(mismatch, clip_width(rto)):
        return sampled, None, mismatch
    old_logps = recompute(None)
    weights = (old_logps - sampled).exp().clamp(max=rto.importance_cap)
    return old_logps, weights, mismatch | {IMPORTANCE_WEIGHT: weights[batch.rows].mean()}


def are_sampled(mismatch: Mapping[str, Any]) -> bool:
    """Whether `behaviour_logps` took the sampler's log-probs, by the metrics that it returned."""
    return MISMATCH_MEAN in mismatch and IMPORTANCE_WEIGHT not in mismatch
