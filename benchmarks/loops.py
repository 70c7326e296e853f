"""RTO's rewards and advantages as other code computes them: the peers of `rto_advantages` and `gae`.

Three forms: a loop over time on padded tensors, as TRL's and verl's PPO trainers have it; a loop over sequences around
one over time, as packed OpenRLHF-style code has it; and a scan by doubling in plain torch. All take packed tensors, so
that they compare with ours call by call; padding is part of what the first form costs.
"""

import torch


def gae_padded_loop(rewards, values, cu_seqlens, mask, gamma=1.0, gae_lambda=0.95):
    """Pads to [N, L], steps back through time over all sequences at once, unpads."""
    lengths = cu_seqlens.diff().long()
    longest = int(lengths.max())
    inside = torch.arange(longest, device=rewards.device) < lengths.unsqueeze(1)
    padded = [torch.zeros(inside.shape, dtype=t.dtype, device=t.device) for t in (rewards, values, mask)]
    for grid, flat in zip(padded, (rewards, values, mask)):
        grid[inside] = flat
    grid_rewards, grid_values, grid_mask = padded
    carry = next_value = torch.zeros_like(grid_values[:, 0])
    advantages = []
    for t in reversed(range(longest)):
        active = grid_mask[:, t]
        delta = grid_rewards[:, t] + gamma * next_value - grid_values[:, t]
        carry = torch.where(active, delta + gamma * gae_lambda * carry, carry)
        next_value = torch.where(active, grid_values[:, t], next_value)
        advantages.append(torch.where(active, carry, 0.0))
    advantages = torch.stack(advantages[::-1], dim=1)[inside]
    return advantages, torch.where(mask, advantages + values, 0.0)


def gae_sequence_loop(rewards, values, cu_seqlens, mask, gamma=1.0, gae_lambda=0.95):
    """One sequence at a time, one action at a time."""
    advantages = torch.zeros_like(rewards)
    bounds = cu_seqlens.tolist()
    for begin, end in zip(bounds, bounds[1:]):
        carry, next_value = 0.0, 0.0
        for t in mask[begin:end].nonzero().squeeze(-1).flip(0).tolist():
            delta = rewards[begin + t] + gamma * next_value - values[begin + t]
            carry = delta + gamma * gae_lambda * carry
            next_value = values[begin + t]
            advantages[begin + t] = carry
    return advantages, torch.where(mask, advantages + values, 0.0)


def gae_scan(rewards, values, cu_seqlens, mask, gamma=1.0, gae_lambda=0.95):
    """A_t = Σ_l (γλ)^l·δ_{t+l} by doubling: log2 of the longest response passes over all actions."""
    actions, sequence, is_last = _actions(cu_seqlens, mask)
    action_values = values[actions]
    next_values = torch.where(is_last, 0.0, action_values.roll(-1))
    sums, span = rewards[actions] + gamma * next_values - action_values, 1
    longest = int(torch.bincount(sequence).max()) if len(actions) else 0
    while span < longest:
        same = sequence[span:] == sequence[:-span]
        sums = torch.cat([sums[:-span] + same * ((gamma * gae_lambda) ** span * sums[span:]), sums[-span:]])
        span *= 2
    advantages = torch.zeros_like(rewards)
    advantages[actions] = sums
    return advantages, torch.where(mask, advantages + values, 0.0)


def _actions(cu_seqlens, mask):
    """(indices of the actions, the sequence of each, whether it is its sequence's last)."""
    actions = mask.nonzero().squeeze(-1)
    sequence = torch.bucketize(actions, cu_seqlens[1:].long(), right=True)
    is_last = torch.ones_like(actions, dtype=torch.bool)
    is_last[:-1] = sequence[1:] != sequence[:-1]
    return actions, sequence, is_last


def rto_rewards(old_logps, ref_logps, dpo_logps, scores, cu_seqlens, mask):
    """RTO's token rewards with the defaults of `rto_advantages`, the score added in a loop over sequences."""
    dense = (0.05 * (dpo_logps - ref_logps)).clamp(-0.05, 0.05)
    rewards = torch.where(mask, dense - 0.01 * (old_logps - ref_logps), 0.0)
    bounds = cu_seqlens.tolist()
    for sequence, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        actions = mask[begin:end].nonzero()
        if len(actions):
            rewards[begin + actions[-1]] += scores[sequence].clamp(-10, 10)
    return rewards


def rto_rewards_vectorised(old_logps, ref_logps, dpo_logps, scores, cu_seqlens, mask):
    dense = (0.05 * (dpo_logps - ref_logps)).clamp(-0.05, 0.05)
    rewards = torch.where(mask, dense - 0.01 * (old_logps - ref_logps), 0.0)
    actions, sequence, is_last = _actions(cu_seqlens, mask)
    rewards[actions[is_last]] += scores.clamp(-10, 10)[sequence[is_last]]
    return rewards


def _rto(rewards, gae):
    def rto_advantages(old_logps, ref_logps, dpo_logps, values, scores, cu_seqlens, mask):
        token_rewards = rewards(old_logps, ref_logps, dpo_logps, scores, cu_seqlens, mask)
        advantages, returns = gae(token_rewards, values, cu_seqlens, mask)
        kept = advantages[mask]
        mean, variance = kept.mean(), kept.var(correction=0)
        whitened = torch.where(mask, (advantages - mean) * variance.clamp(min=1e-8).rsqrt(), 0.0)
        return whitened, returns, token_rewards

    return rto_advantages


rto_padded_loop = _rto(rto_rewards, gae_padded_loop)
rto_sequence_loop = _rto(rto_rewards, gae_sequence_loop)
rto_scan = _rto(rto_rewards_vectorised, gae_scan)
