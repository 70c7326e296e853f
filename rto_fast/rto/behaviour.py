"""Log-probs of the policy that sampled: the sampler's own where they can be trusted, else those of a forward pass.

The sampler decodes with other kernels than the training forward runs, so in 16 bits its log-probs are a little off from
those that PPO's first step computes. The difference is measured on some of the responses of every rollout. While PPO
does not notice it (`rto_fast.models.agreement` says when) the sampler's log-probs are the old log-probs, which saves a
forward pass; the KL penalty then has that difference in it, for the reference's come from the training forward. When
PPO would notice it, the old log-probs are recomputed, the loss is weighted with min(π_training/π_sampler, cap)
(truncated importance sampling, Espeholt et al., arXiv 1802.01561, section 4.1), and both sides of the KL penalty come
from the same forward path.
"""

import torch

from rto_fast.batch import pack
from rto_fast.models.agreement import clip_width, mismatch, ppo_notices
from rto_fast.training.response_logps import response_logps

MONITORED = 16  # one in so many responses, and at least four


def monitored_rows(count: int) -> range:
    """The responses of a rollout of `count` whose log-probs are computed twice."""
    return range(0, count, max(1, min(MONITORED, count // 4)))


def behaviour_logps(config, policy, rollout, prompt_ids, response_ids, batch):
    """
    Args:
        rollout: `RolloutBatch`. prompt_ids, response_ids, batch: what is trained on, lists and their PackedBatch.
    Returns:
        (old_logps [T] float32, importance weights [T] or None, metrics)
    """
    rto, max_tokens, temperature = config.rto, config.model.micro_batch_tokens, config.rollout.temperature

    def recompute(rows):
        return response_logps(
            policy, [prompt_ids[i] for i in rows], [response_ids[i] for i in rows], max_tokens, temperature
        )

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
    mask = batch.response_mask
    return old_logps, weights, metrics | {"importance_weight": weights[mask].mean()}
