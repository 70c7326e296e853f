"""The public ops in plain torch. They run on CPU tensors, and the Triton kernels are tested against them.

The losses and log-probs are differentiable. All ops compute in float64 if they are given float64, else in float32. The
two functions that would need a [T, V] tensor work on blocks of rows and keep the logits of a limited number of rows, so
that memory is bounded for any T.
"""

from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits of a block, 28 MB of float32. From 32 MB on, glibc returns memory to the system, and each block would fault
# again.
BLOCK_ELEMENTS = 7 << 20
KEPT_ELEMENTS = 1 << 26  # logits kept for the backward pass, 256 MB; those of further rows are recomputed
CACHE_ELEMENTS = 1 << 18  # logits worked on at once, 1 MB, the L2 cache of today's CPUs


def block_sizes(vocab_size: int) -> tuple[int, int]:
    """(rows of a block of logits, rows whose logits are kept for the backward pass)."""
    return max(1, BLOCK_ELEMENTS // vocab_size), KEPT_ELEMENTS // vocab_size


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


class RTOAdvantages(NamedTuple):
    token_rewards: torch.Tensor
    kl: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    stats: dict[str, torch.Tensor]


@torch.library.custom_op("rto_fast::checked_labels", mutates_args=())
def checked_labels(labels: Tensor, counts: Tensor, vocab_size: int, exempt: str) -> Tensor:
    """Checks labels, and replaces those that do not count by -1.

    This is an op of its own, which `torch.compile` traces as one node. A look at values would break the graph.

    Args:
        labels: [...] int64.
        counts: [...] bool, whether a label counts.
        exempt: says which labels do not count, for the error message.
    Raises:
        ValueError: a label that counts is not in [0, vocab_size).
    """
    outside = counts & ((labels < 0) | (labels >= vocab_size))
    if outside.any():
        index = tuple(outside.nonzero()[0].tolist())
        where = f" at {list(index)}" if index else ""
        raise ValueError(f"labels: expected values in [0, {vocab_size}){exempt}, got {labels[index].item()}{where}")
    return labels.where(counts, -1)


@checked_labels.register_fake
def _(labels: Tensor, counts: Tensor, vocab_size: int, exempt: str) -> Tensor:
    return torch.empty_like(labels)


@torch.library.custom_op("rto_fast::checked_num_items", mutates_args=())
def checked_num_items(num_items: Tensor) -> Tensor:
    """Checks num_items, a 0-d tensor; an op of its own like `checked_labels`.

    Raises:
        ValueError: it is negative or not finite.
    """
    if not 0 <= num_items.item() < float("inf"):
        raise ValueError(f"num_items: expected a finite number of at least 0, got {num_items.item()}")
    return num_items.clone()


@checked_num_items.register_fake
def _(num_items: Tensor) -> Tensor:
    return torch.empty_like(num_items)


@torch.library.custom_op("rto_fast::checked_bounds", mutates_args=())
def checked_bounds(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Checks cu_seqlens [N+1] int32; an op of its own like `checked_labels`.

    Raises:
        ValueError: the bounds do not rise from 0 to num_tokens (a step of 0 is an empty sequence).
    """
    bounds = cu_seqlens.tolist()
    wrong = next((i for i in range(1, len(bounds)) if bounds[i] < bounds[i - 1]), None)
    if bounds[0] != 0 or bounds[-1] != num_tokens or wrong is not None:
        got = f"{bounds[0]} first" if bounds[0] else f"{bounds[-1]} last"
        if wrong is not None:
            got = f"{bounds[wrong]} after {bounds[wrong - 1]} at [{wrong}]"
        raise ValueError(f"cu_seqlens: expected bounds that rise from 0 to the {num_tokens} tokens, got {got}")
    return cu_seqlens.clone()


@checked_bounds.register_fake
def _(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    return torch.empty_like(cu_seqlens)


@torch.library.custom_op("rto_fast::checked_rows", mutates_args=())
def checked_rows(rows: Tensor, counts: Tensor) -> Tensor:
    """Checks rows [n] int64; an op of its own like `checked_labels`.

    Args:
        counts: [T] bool, the positions that must be among them.
    Raises:
        ValueError: they are not ascending positions in [0, T), or one that counts is missing.
    """
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(counts):
        got = f"{int(rows.min())} to {int(rows.max())}"
        raise ValueError(f"rows: expected positions in [0, {len(counts)}), got {got}")
    if (rows[1:] < rows[:-1]).any():
        raise ValueError("rows: expected ascending positions")
    missing = counts.index_fill(0, rows, False)
    if missing.any():
        raise ValueError(f"rows: position {int(missing.nonzero()[0])} counts and is missing")
    return rows.clone()


@checked_rows.register_fake
def _(rows: Tensor, counts: Tensor) -> Tensor:
    return torch.empty_like(rows)


def _without_ignored(labels: Tensor, ignore_index: int, vocab_size: int) -> Tensor:
    return checked_labels(labels, labels != ignore_index, vocab_size, f" or ignore_index ({ignore_index})")


class _TokenLogps(torch.autograd.Function):
    """Log-probs and entropies of rows of logits, 0 for rows whose label is -1.

    The passes go through blocks of rows that stay in cache. Nothing as large as the logits is kept, because recomputing
    the softmax is cheaper than reading it back.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        dtype = compute_dtype(logits)
        logps = torch.zeros(labels.shape, dtype=dtype, device=logits.device)
        entropy = torch.zeros_like(logps) if with_entropy else None
        for rows in _row_blocks(logits, CACHE_ELEMENTS):
            log_probs = _scaled(logits[rows], temperature, dtype).log_softmax(-1)
            valid, label = labels[rows] >= 0, labels[rows].clamp(min=0)
            logps[rows] = log_probs.gather(-1, label.unsqueeze(-1)).squeeze(-1).where(valid, 0.0)
            if entropy is not None:
                probs = log_probs.exp()
                entropy[rows] = -(probs * _finite(log_probs)).sum(-1).where(valid, 0.0)
        ctx.save_for_backward(logits, labels, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logps, entropy

    @staticmethod
    def backward(ctx: Any, dlogps: Tensor | None, dentropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, labels, entropy = ctx.saved_tensors
        dlogits, dtype = torch.empty_like(logits), compute_dtype(logits)
        valid = labels >= 0
        dlogps = torch.zeros_like(valid, dtype=dtype) if dlogps is None else dlogps.where(valid, 0.0)
        for rows in _row_blocks(logits, CACHE_ELEMENTS):
            scaled = _scaled(logits[rows], ctx.temperature, dtype)
            if dentropy is None:
                gradient = scaled.softmax(-1).mul_(-dlogps[rows].unsqueeze(-1))
            else:
                log_probs = scaled.log_softmax(-1)
                gradient = log_probs.exp()
                slope = _finite(log_probs).add_(entropy[rows].unsqueeze(-1))
                slope.mul_(dentropy[rows].where(valid[rows], 0.0).unsqueeze(-1)).add_(dlogps[rows].unsqueeze(-1))
                gradient.mul_(slope.neg_())
            gradient.scatter_add_(-1, labels[rows].clamp(min=0).unsqueeze(-1), dlogps[rows].unsqueeze(-1))
            dlogits[rows] = gradient if ctx.temperature == 1.0 else gradient.div_(ctx.temperature)
        return dlogits, None, None, None


def _row_blocks(matrix: Tensor, elements: int) -> list[slice]:
    rows = max(1, elements // max(matrix.shape[-1], 1))
    return [slice(first, first + rows) for first in range(0, len(matrix), rows)]


def _scaled(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    logits = logits.to(dtype)
    return logits if temperature == 1.0 else logits / temperature


def _finite(log_probs: Tensor) -> Tensor:
    """Clamps in place, so that p·log p is 0 and not NaN for a logit of -inf. A NaN stays NaN."""
    return log_probs.clamp_(min=-1e4)


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `rto_fast.ops.token_logps`. `inplace_backward` has no effect here."""
    labels = _without_ignored(labels, ignore_index, logits.shape[-1])
    logps, entropy = _TokenLogps.apply(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), temperature, return_entropy
    )
    logps = logps.view(labels.shape)
    return (logps, entropy.view(labels.shape)) if return_entropy else logps


def _block_linear_logps(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits.to(compute_dtype(logits)) / softcap)
    return _TokenLogps.apply(logits, labels, temperature, with_entropy)


def linear_token_logps(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `rto_fast.ops.linear_token_logps`. Ignored rows never reach the GEMM."""
    flat_labels = _without_ignored(labels, ignore_index, len(lm_head_weight)).reshape(-1)
    hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
    is_sparse = rows is not None
    if rows is None:
        rows = (flat_labels >= 0).nonzero().squeeze(-1)
        is_sparse = len(rows) < len(flat_labels)
    if is_sparse:
        hidden, flat_labels = hidden.index_select(0, rows), flat_labels.index_select(0, rows)
    block_rows, kept_rows = block_sizes(max(len(lm_head_weight), 1))
    logps, entropies = [], []
    for first in range(0, max(len(rows), 1), block_rows):
        block = hidden[first : first + block_rows], flat_labels[first : first + block_rows]
        function = _block_linear_logps
        if first + block_rows > kept_rows and torch.is_grad_enabled():
            function = partial(checkpoint, _block_linear_logps, use_reentrant=False)
        logp, entropy = function(*block, lm_head_weight, bias, temperature, softcap, return_entropy)
        logps.append(logp)
        entropies.append(entropy)

    def whole(parts: list[Tensor]) -> Tensor:
        values = parts[0] if len(parts) == 1 else torch.cat(parts)
        if is_sparse:
            values = values.new_zeros(labels.numel()).index_put((rows,), values)
        return values.view(labels.shape)

    return (whole(logps), whole(cast(list[Tensor], entropies))) if return_entropy else whole(logps)


def _normaliser(
    loss_mask: Tensor, weights: Tensor | None, num_items: float | Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(weight of each token, 1/denominator). An empty mask gives a loss of 0, not NaN."""
    weight = loss_mask.to(dtype) if weights is None else torch.where(loss_mask, weights.detach().to(dtype), 0.0)
    total = weight.sum() if num_items is None else torch.as_tensor(num_items, dtype=dtype, device=weight.device)
    return weight, torch.where(total == 0, 0.0, 1.0 / total.where(total != 0, 1.0))


def ppo_policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    clip_eps: float = 0.2,
    clip_eps_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See `rto_fast.ops.ppo_policy_loss`."""
    dtype = compute_dtype(logps)
    weight, scale = _normaliser(loss_mask, weights, num_items, dtype)
    high = clip_eps if clip_eps_high is None else clip_eps_high
    # Entries outside of the mask may be anything, even NaN. They are replaced first, so that 0·NaN cannot occur.
    log_ratio = torch.where(loss_mask, logps.to(dtype) - old_logps.detach().to(dtype), 0.0).clamp(-20.0, 20.0)
    advantages = torch.where(loss_mask, advantages.detach().to(dtype), 0.0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_eps, 1.0 + high)
    loss = torch.maximum(unclipped, clipped)
    is_clipped = clipped > unclipped
    if dual_clip is not None:
        bound = -dual_clip * advantages
        is_clipped = is_clipped | ((advantages < 0) & (loss > bound))
        loss = torch.where(advantages < 0, torch.minimum(loss, bound), loss)
    total = (loss * weight).sum() * scale
    with torch.no_grad():
        metrics = {
            "policy_loss": total.detach(),
            "approx_kl": ((log_ratio.expm1() - log_ratio) * weight).sum() * scale,
            "clip_fraction": (is_clipped * weight).sum() * scale,
        }
    return total, metrics


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    loss_mask: Tensor,
    *,
    weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    value_clip_eps: float | None = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See `rto_fast.ops.ppo_value_loss`."""
    dtype = compute_dtype(values)
    weight, scale = _normaliser(loss_mask, weights, num_items, dtype)
    tensors = values, old_values.detach(), returns.detach()
    values, old_values, returns = (torch.where(loss_mask, t.to(dtype), 0.0) for t in tensors)
    error = (values - returns).square()
    is_clipped = torch.zeros_like(loss_mask)
    if value_clip_eps is not None:
        clipped_values = old_values + (values - old_values).clamp(-value_clip_eps, value_clip_eps)
        clipped_error = (clipped_values - returns).square()
        # old + (v − old) is not exactly v, so only a change beyond the range counts as clipped.
        is_clipped = (clipped_error > error) & ((values - old_values).abs() > value_clip_eps)
        error = torch.maximum(error, clipped_error)
    total = 0.5 * (error * weight).sum() * scale
    with torch.no_grad():
        metrics = {"value_loss": total.detach(), "value_clip_fraction": (is_clipped * weight).sum() * scale}
    return total, metrics


def linear_ppo_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    rows: Tensor | None = None,
    weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    clip_eps: float = 0.2,
    clip_eps_high: float | None = None,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See `rto_fast.ops.linear_ppo_loss`. Tokens outside the mask are dropped before the GEMM."""
    labels = checked_labels(labels, loss_mask, len(lm_head_weight), " where loss_mask is True")
    logps, entropy = linear_token_logps(
        hidden_states,
        lm_head_weight,
        labels,
        rows=rows,
        temperature=temperature,
        softcap=softcap,
        ignore_index=-1,
        return_entropy=True,
    )
    loss, metrics = ppo_policy_loss(
        logps,
        old_logps,
        advantages,
        loss_mask,
        weights=weights,
        num_items=num_items,
        clip_eps=clip_eps,
        clip_eps_high=clip_eps_high,
        dual_clip=dual_clip,
    )
    weight, scale = _normaliser(loss_mask, weights, num_items, logps.dtype)
    mean_entropy = (entropy * weight).sum() * scale
    if entropy_coef:
        loss = loss - entropy_coef * mean_entropy
    return loss, metrics | {"entropy": mean_entropy.detach()}


def _segments(cu_seqlens: Tensor, total: int) -> Tensor:
    """Index of the sequence of each of `total` packed positions, [total] int64."""
    lengths = cu_seqlens.diff().long()
    return torch.repeat_interleave(torch.arange(len(lengths), device=cu_seqlens.device), lengths, output_size=total)


def _padded(cu_seqlens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Places of the M tokens in the mask in an [N, L] grid: (sequence [M], column [M], token index [M], L)."""
    tokens = mask.nonzero().squeeze(-1)
    rows = _segments(cu_seqlens, len(mask))[tokens]
    counts = torch.bincount(rows, minlength=len(cu_seqlens) - 1)
    starts = counts.cumsum(0) - counts
    columns = torch.arange(len(tokens), device=mask.device) - starts[rows]
    return rows, columns, tokens, int(counts.max()) if len(counts) else 0


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
    mask: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `rto_fast.ops.gae`. Steps backwards through time over all sequences at once."""
    dtype = compute_dtype(rewards, values)
    sequences = len(cu_seqlens) - 1
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    rows, columns, tokens, length = _padded(cu_seqlens, mask)
    grid_rewards = rewards.new_zeros(sequences, length, dtype=dtype)
    grid_values = torch.zeros_like(grid_rewards)
    valid = torch.zeros(sequences, length, dtype=torch.bool, device=rewards.device)
    grid_rewards[rows, columns] = rewards[tokens].to(dtype)
    grid_values[rows, columns] = values[tokens].to(dtype)
    valid[rows, columns] = True
    bootstrap = rewards.new_zeros(sequences, dtype=dtype) if bootstrap_values is None else bootstrap_values.to(dtype)
    grid_advantages = torch.zeros_like(grid_rewards)
    next_value, carry = bootstrap, torch.zeros_like(bootstrap)
    for t in reversed(range(length)):
        delta = grid_rewards[:, t] + gamma * next_value - grid_values[:, t]
        # Columns past a sequence's end come first and leave carry and bootstrap as they are.
        carry = torch.where(valid[:, t], delta + gamma * gae_lambda * carry, carry)
        next_value = torch.where(valid[:, t], grid_values[:, t], next_value)
        grid_advantages[:, t] = carry
    advantages = torch.zeros_like(rewards, dtype=dtype)
    advantages[tokens] = grid_advantages[rows, columns]
    returns = torch.where(mask, advantages + values.to(dtype), 0.0)
    return advantages, returns


def _move_to_delimiters(
    token_rewards: Tensor, cu_seqlens: Tensor, response_mask: Tensor, granularity: str, delimiter_mask: Tensor | None
) -> Tensor:
    """Moves the sum of the token rewards of each sentence or sequence to its last response token."""
    if granularity == "token":
        return token_rewards
    rows, _, tokens, _ = _padded(cu_seqlens, response_mask)
    if not len(tokens):
        return token_rewards
    ends = torch.ones_like(rows, dtype=torch.bool)
    ends[:-1] = rows[1:] != rows[:-1]
    if granularity == "sentence" and delimiter_mask is not None:
        ends |= delimiter_mask[tokens]
    unit = ends.long().cumsum(0) - ends.long()
    sums = token_rewards.new_zeros(int(unit[-1]) + 1).index_add(0, unit, token_rewards[tokens])
    moved = torch.zeros_like(token_rewards)
    moved[tokens[ends]] = sums
    return moved


def rto_advantages(
    old_logps: Tensor,
    ref_logps: Tensor,
    dpo_logps: Tensor,
    values: Tensor,
    scores: Tensor,
    cu_seqlens: Tensor,
    response_mask: Tensor,
    *,
    dpo_ref_logps: Tensor | None = None,
    dpo_reward_scale: float = 0.05,
    dpo_reward_clip: float = 0.05,
    kl_coef: float = 0.01,
    score_scale: float = 1.0,
    score_clip: float = 10.0,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
    granularity: str = "token",
    delimiter_mask: Tensor | None = None,
    shaping: bool = False,
    bootstrap_values: Tensor | None = None,
    whiten: bool = True,
) -> RTOAdvantages:
    """See `rto_fast.ops.rto_advantages`."""
    dtype = compute_dtype(old_logps)
    dpo_ref_logps = ref_logps if dpo_ref_logps is None else dpo_ref_logps
    log_ratio = torch.where(response_mask, dpo_logps.to(dtype) - dpo_ref_logps.to(dtype), 0.0)
    kl = torch.where(response_mask, old_logps.to(dtype) - ref_logps.to(dtype), 0.0)
    dense = dpo_reward_scale * log_ratio
    clipped = dense.clamp(-dpo_reward_clip, dpo_reward_clip) if dpo_reward_clip else dense
    dpo_rewards = _move_to_delimiters(clipped, cu_seqlens, response_mask, granularity, delimiter_mask)

    segments = _segments(cu_seqlens, len(response_mask))
    sequences = len(cu_seqlens) - 1
    # The last response token of each sequence: the largest masked-in index, -1 where there is none.
    positions = torch.arange(len(response_mask), device=response_mask.device).where(response_mask, -1)
    last = positions.new_full((sequences,), -1).scatter_reduce(0, segments, positions, "amax")
    has_response = last >= 0
    final = score_scale * (scores.clamp(-score_clip, score_clip) if score_clip else scores).to(dtype)
    if shaping:
        final = final - clipped.new_zeros(sequences).index_add(0, segments, clipped)
    token_rewards = dpo_rewards - kl_coef * kl
    token_rewards = token_rewards.index_add(0, last[has_response], final[has_response])

    advantages, returns = gae(
        token_rewards,
        values,
        cu_seqlens,
        gamma=gamma,
        gae_lambda=gae_lambda,
        mask=response_mask,
        bootstrap_values=bootstrap_values,
    )
    count = response_mask.sum().to(dtype)
    mean = advantages.sum() / count.clamp(min=1)
    variance = torch.where(response_mask, advantages - mean, 0.0).square().sum() / count.clamp(min=1)
    if whiten:
        advantages = torch.where(response_mask, (advantages - mean) * variance.clamp(min=1e-8).rsqrt(), 0.0)
    stats = {
        "count": count,
        "advantage_mean": mean,
        "advantage_var": variance,
        "dpo_reward_sum": clipped.sum(),
        "kl_sum": kl.sum(),
        "score_reward_sum": final[has_response].sum(),
        "dpo_clip_count": (dense.abs() > dpo_reward_clip).sum().to(dtype) if dpo_reward_clip else count * 0,
    }
    return RTOAdvantages(token_rewards, kl, advantages, returns, stats)
