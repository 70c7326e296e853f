"""Log-probs of the policy that sampled: the sampler's own where they can be trusted, else those of a forward pass.

The sampler decodes with other kernels than the training forward pass runs, so in 16 bits its log-probs are a little off from
those that PPO's first step computes. The difference is measured on some of the responses of every rollout. While PPO does
not notice it (`rto_fast.models.agreement` says when), the sampler's log-probs are the old log-probs, which saves a forward
pass; the KL penalty then contains that difference, for the reference's log-probs come from the training forward pass. When
PPO would notice it, the old log-probs are recomputed, the loss is weighted with min(π_training/π_sampler, cap) (truncated
importance sampling, Espeholt et al., arXiv 1802.01561, section 4.1), and both sides of the KL penalty come from the same
forward pass.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rto_fast.batch import PackedBatch, pack
from rto_fast.config import Config
from rto_fast.models.agreement import clip_width, mismatch, ppo_notices
from rto_fast.models.model import Model
from rto_fast.reporting.metric_names import IMPORTANCE_WEIGHT
from rto_fast.rollout import RolloutBatch
from rto_fast.training.response_logps import response_logps

MONITORED = 16  # the log-probs of every 16th response are compared, and of at least four


def monitored_rows(count: int) -> range:
    """The responses of a rollout of `count` whose log-probs are computed twice."""
    return range(0, count, max(1, min(MONITORED, count // 4)))


def behaviour_logps(
    config: Config,
    policy: Model,
    rollout: RolloutBatch,
    prompt_ids: list[list[int]],
    response_ids: list[list[int]],
    batch: PackedBatch,
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Chooses the old log-probs of a rollout.

    Args:
        rollout: as it was sampled.
        prompt_ids, response_ids: what is trained on.
        batch: the same, packed.
    Returns:
        The old log-probs, [T] float32 in nats; the weights of the policy's loss, [T] float32 or None for 1; and the metrics
        of the difference between the sampler and the training forward pass, none where nothing was compared.
    """
    rto = config.rto

    def recompute(rows: Sequence[int]) -> Tensor:
        prompts, responses = ([ids[i] for i in rows] for ids in (prompt_ids, response_ids))
        return response_logps(policy, prompts, responses, config.model.micro_batch_tokens, config.rollout.temperature)

    every = range(len(response_ids))
    # `paper_code` may have put another token in the place of the one that was drawn.
    if rollout.logps is None or rto.old_logps == "recompute" or response_ids != rollout.response_ids:
        return recompute(every), None, {}
    device = batch.labels.device
    sampled = rollout.aligned(rollout.logps, batch)
    rows = monitored_rows(len(response_ids))
    monitored = pack([prompt_ids[i] for i in rows], [response_ids[i] for i in rows], device).response_mask
    parts = rollout.logps.split([len(ids) for ids in response_ids])
    metrics = mismatch(recompute(rows)[monitored], torch.cat([parts[i] for i in rows]).to(device))
    if rto.old_logps == "sampler" or not ppo_notices(metrics, clip_width(rto)):
        return sampled, None, metrics
    old_logps = recompute(every)
    weights = (old_logps - sampled).exp().clamp(max=rto.importance_cap)
    return old_logps, weights, metrics | {IMPORTANCE_WEIGHT: weights[batch.response_mask].mean()}
