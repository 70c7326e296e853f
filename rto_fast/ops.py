"""The public ops: fused log-probs, RTO advantages, PPO losses and a sampler, for any RLHF loop.

All ops take packed tensors: T tokens of N sequences back to back, where `cu_seqlens [N+1] int32` marks the bounds. Index t
is the state s_t and the action `labels[t]`; labels are already shifted. The algorithm is that of arXiv 2404.18922.

- Implementation: CUDA tensors run the Triton kernels, CPU tensors the plain torch reference. With TRITON_INTERPRET=1 in the
  environment, CPU tensors run the Triton code in its interpreter.
- Results: log-probs, entropies and KL are in nats. Outputs are float32 (float64 from float64 on a CPU).
- Errors: wrong shapes, devices and dtypes, and numbers that are not finite or out of range, raise a ValueError with the
  argument's name. The values of `cu_seqlens`, `num_items` and labels are checked on a CPU only: on CUDA this would wait for
  the device; each argument says what happens there. Triton never reads outside of a row: a label outside of [0, V) has the
  log-prob NaN, which also makes NaN of its loss, of the gradient of its row and of the whole gradient of `lm_head_weight`.
- Gradients flow to the logits, hidden states, weight and bias of log-probs, and to `logps` and `values` of the losses. Every
  other tensor is a constant, even if it requires a gradient: `old_logps` may be `logps` itself. The results of `gae`,
  `rto_advantages` and `sample_tokens` require no gradient.
- `torch.compile`: every Triton op is one node of the graph, with its gradient (fullgraph=True). Of the reference,
  `token_logps` and the PPO losses are traced whole. The others break the graph, because their shapes depend on masks.
- CUDA graphs: `sample_tokens` neither waits for the device nor depends on its state, so graphs of decode steps can hold it.
- ZeRO-3: outside of the forward of its own module `lm_head.weight` is empty, which is an error here. Run the linear ops as
  that forward, as `rto_fast.models.head` does: DeepSpeed then gathers the weight, also for a recomputing backward pass.
  `deepspeed.zero.GatheredParameters` around forward and backward works too, except with a tied head, whose weight the
  embedding releases in between.
"""

from types import ModuleType
from typing import Literal, overload

import torch
from torch import Tensor

from rto_fast.kernels import arguments, reference, sampling_reference
from rto_fast.kernels.arguments import (
    AT_LEAST_0,
    check_first,
    check_floats,
    check_linear,
    check_number,
    check_numbers,
    check_optional,
    check_ppo,
    check_tensor,
    checked_cu_seqlens,
    checked_num_items,
    checked_rows,
    float_dtypes,
)
from rto_fast.kernels.reference import RTOAdvantages

__all__ = [
    "token_logps",
    "linear_token_logps",
    "linear_ppo_loss",
    "ppo_policy_loss",
    "ppo_value_loss",
    "gae",
    "rto_advantages",
    "RTOAdvantages",
    "sample_tokens",
]


def _implementation(module: str, tensor: Tensor, reference: ModuleType = reference) -> ModuleType:
    """The Triton module of that name for CUDA tensors, the reference otherwise."""
    if not (tensor.is_cuda or (arguments.INTERPRET and tensor.device.type == "cpu")):
        return reference
    # Not at the top, because CPU tensors need no Triton. Not by import_module, which `torch.compile` cannot trace.
    import rto_fast.kernels.advantages
    import rto_fast.kernels.linear_ppo_loss
    import rto_fast.kernels.linear_token_logps
    import rto_fast.kernels.ppo_losses
    import rto_fast.kernels.sampling
    import rto_fast.kernels.token_logps

    return getattr(rto_fast.kernels, module)


@overload
def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = ...,
    ignore_index: int = ...,
    return_entropy: Literal[False] = ...,
    inplace_backward: bool = ...,
) -> Tensor: ...
@overload
def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = ...,
    ignore_index: int = ...,
    return_entropy: Literal[True],
    inplace_backward: bool = ...,
) -> tuple[Tensor, Tensor]: ...
def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each label under softmax(logits / temperature), without a [T, V] log-softmax.

    Args:
        logits: [..., V] float32, bfloat16 or float16; accumulated in float32.
        labels: [...] int64 in [0, V), or `ignore_index`, where the result and its gradient are 0. Other labels raise a
            ValueError on a CPU and give NaN on CUDA.
        temperature: divides the logits; above 0.
        ignore_index: the label of rows that do not count.
        return_entropy: also returns the entropy of each row's distribution, from the same read of the logits.
        inplace_backward: lets the backward pass overwrite `logits` with their gradient, which saves a [T, V] buffer on
            CUDA. The logits must not be used afterwards.
    Returns:
        logps [...] float32, or (logps, entropy).
    """
    check_first("logits", logits)
    if logits.dim() < 1 or not logits.shape[-1]:
        raise ValueError(f"logits: expected shape [..., V] with V > 0, got {tuple(logits.shape)}")
    check_tensor("labels", labels, logits.shape[:-1], (torch.int64,), logits.device)
    check_numbers(temperature=temperature, ignore_index=ignore_index)
    return _implementation("token_logps", logits).token_logps(
        logits,
        labels,
        temperature=temperature,
        ignore_index=ignore_index,
        return_entropy=return_entropy,
        inplace_backward=inplace_backward,
    )


@overload
def linear_token_logps(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    rows: Tensor | None = ...,
    bias: Tensor | None = ...,
    temperature: float = ...,
    softcap: float | None = ...,
    ignore_index: int = ...,
    return_entropy: Literal[False] = ...,
) -> Tensor: ...
@overload
def linear_token_logps(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    rows: Tensor | None = ...,
    bias: Tensor | None = ...,
    temperature: float = ...,
    softcap: float | None = ...,
    ignore_index: int = ...,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...
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
    """`token_logps` of the logits `hidden_states @ lm_head_weight.T + bias`, of which only a chunk is in memory at a time.

    On CUDA each pass holds float32 logits of at most 1 GiB. The log-probs have the bits of those of `sample_tokens` and
    `linear_ppo_loss`, where the logits have the same bits.

    Args:
        hidden_states: [..., D] float, the output of the last layer after its norm.
        lm_head_weight: [V, D], of the same dtype.
        labels: [...] int64 in [0, V), or `ignore_index` for rows that are dropped before the GEMM. Other labels raise a
            ValueError on a CPU and give NaN on CUDA.
        rows: [n] int64, the positions of labels that are not ignored, ascending, in the flattened `labels`; None to look for
            them, for which each pass waits for the device. Others may be among them, also twice, so that a CUDA graph has
            rows of a fixed number: where the label is ignored, the result and its gradient are 0. A missing position raises
            a ValueError on a CPU and gives 0 on CUDA. There positions are not checked either: one outside of [0, T) makes
            kernels read and write foreign memory.
        bias: [V] or None.
        temperature: divides the logits; above 0.
        softcap: applies c·tanh(logits / c) before the temperature (Gemma-2), or None.
        ignore_index: the label of rows that do not count.
        return_entropy: also returns the entropy of each row's distribution.
    Returns:
        logps [...] float32, or (logps, entropy); differentiable in hidden_states, lm_head_weight and bias.
    """
    check_linear(hidden_states, lm_head_weight, labels, bias, temperature, softcap)
    check_numbers(ignore_index=ignore_index)
    rows = checked_rows(rows, labels, ignore_index)
    return _implementation("linear_token_logps", hidden_states).linear_token_logps(
        hidden_states,
        lm_head_weight,
        labels,
        rows=rows,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        return_entropy=return_entropy,
    )


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
    """Clipped PPO loss straight from hidden states: `linear_token_logps` and `ppo_policy_loss` in one sweep.

    The loss is Σ weights·(policy loss − entropy_coef·entropy) / num_items over `loss_mask`; see `ppo_policy_loss`.

    Args:
        hidden_states: [..., D] float.
        lm_head_weight: [V, D], of the same dtype.
        labels: [...] int64, in [0, V) inside the mask and anything outside. Other labels inside raise a ValueError on a CPU
            and make the loss NaN on CUDA.
        old_logps: [...] float, log-probs of the policy that sampled.
        advantages: [...] float.
        loss_mask: [...] bool.
        rows: [n] int64, the positions of the mask, ascending; see `linear_token_logps`. A row outside of the mask is 0.
        entropy_coef: factor of the entropy in the loss.
        temperature: divides the logits; above 0.
        softcap: applies c·tanh(logits / c) before the temperature (Gemma-2), or None.
        weights, num_items, clip_eps, clip_eps_high, dual_clip: as in `ppo_policy_loss`.
    Returns:
        (loss 0-d, metrics): the metrics of `ppo_policy_loss` and `entropy` (mean, nats), 0-d tensors on the device.
    """
    check_linear(hidden_states, lm_head_weight, labels, None, temperature, softcap)
    check_floats(hidden_states, labels.shape, old_logps=old_logps)
    check_ppo(old_logps, loss_mask, weights, clip_eps, clip_eps_high, dual_clip, advantages=advantages)
    check_numbers(entropy_coef=entropy_coef)
    num_items, rows = checked_num_items(num_items), checked_rows(rows, loss_mask, False)
    return _implementation("linear_ppo_loss", hidden_states).linear_ppo_loss(
        hidden_states,
        lm_head_weight,
        labels,
        old_logps,
        advantages,
        loss_mask,
        rows=rows,
        weights=weights,
        num_items=num_items,
        clip_eps=clip_eps,
        clip_eps_high=clip_eps_high,
        dual_clip=dual_clip,
        entropy_coef=entropy_coef,
        temperature=temperature,
        softcap=softcap,
    )


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
    """Clipped PPO policy loss (arXiv 1707.06347, eq. 7), with clip-higher and dual clip.

    Args:
        logps: [...] float, log-probs of the policy. Log-ratios are clamped to ±20.
        old_logps: [...] float, log-probs of the policy that sampled.
        advantages: [...] float.
        loss_mask: [...] bool, the tokens that count.
        weights: [...] float, weights of tokens, 1 by default. With 1/len(sequence) and num_items = number of sequences, the
            loss is the mean over sequences of their token means.
        num_items: float or 0-d tensor that replaces the denominator Σ weights·loss_mask, so that the losses of micro-batches
            and ranks add up to exactly the loss of the whole batch. It is at least 0, and 0 makes a loss of 0. This is not
            checked of a tensor on CUDA, where a negative one turns the sign of the loss and NaN makes it NaN.
        clip_eps: in [0, 1); the ratio is clipped to [1 − clip_eps, 1 + clip_eps_high].
        clip_eps_high: at least 0; None for `clip_eps`.
        dual_clip: above 1; for negative advantages the loss is at most dual_clip·|A| (arXiv 1912.09729). None for no bound.
    Returns:
        (loss 0-d, metrics): `policy_loss`, `approx_kl` (k3, the mean of ratio − 1 − log ratio) and `clip_fraction`, 0-d
        tensors on the device. They have the denominator of the loss, so they add up too. An empty mask gives 0.
    """
    check_first("logps", logps)
    check_ppo(logps, loss_mask, weights, clip_eps, clip_eps_high, dual_clip, old_logps=old_logps, advantages=advantages)
    num_items = checked_num_items(num_items)
    return _implementation("ppo_losses", logps).ppo_policy_loss(
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
    """Clipped value loss ½·max((v − R)², (clip(v, old ± value_clip_eps) − R)²), averaged like `ppo_policy_loss`.

    Args:
        values: [...] float, of the critic.
        old_values: [...] float, of the critic at the time of the rollout.
        returns: [...] float.
        loss_mask: [...] bool, the tokens that count.
        weights, num_items: as in `ppo_policy_loss`.
        value_clip_eps: above 0; None for no clipping.
    Returns:
        (loss 0-d, metrics): `value_loss` and `value_clip_fraction`, 0-d tensors on the device.
    """
    check_first("values", values)
    check_floats(values, values.shape, old_values=old_values, returns=returns)
    check_optional(values, values.shape, float_dtypes(values.device), weights=weights)
    check_tensor("loss_mask", loss_mask, values.shape, (torch.bool,), values.device)
    check_numbers(value_clip_eps=value_clip_eps)
    num_items = checked_num_items(num_items)
    return _implementation("ppo_losses", values).ppo_value_loss(
        values, old_values, returns, loss_mask, weights=weights, num_items=num_items, value_clip_eps=value_clip_eps
    )


@torch.no_grad()
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
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) over packed sequences.

    Args:
        rewards: [T] float.
        values: [T] float.
        cu_seqlens: [N+1] int32; sequence n is the tokens from cu_seqlens[n] up to cu_seqlens[n + 1]. The bounds rise from 0
            to T, and two equal ones are an empty sequence. Other bounds raise a ValueError on a CPU. On CUDA they are not
            checked: bounds outside of [0, T] make the kernel read and write foreign memory, and the results of tokens that
            are in no sequence are undefined.
        gamma: discount, in [0, 1].
        gae_lambda: in [0, 1].
        mask: [T] bool, the tokens that are actions; all by default. Other tokens are skipped: their advantage and return are
            0, and the value after an action is that of the next action.
        bootstrap_values: [N] float, the value after the last action of a sequence; by default 0, for sequences that ended.
    Returns:
        (advantages [T], returns [T]) float32, without gradients; returns = advantages + values.
    """
    cu_seqlens = checked_cu_seqlens(cu_seqlens, rewards=rewards, values=values)
    check_optional(rewards, (len(cu_seqlens) - 1,), float_dtypes(rewards.device), bootstrap_values=bootstrap_values)
    check_optional(rewards, rewards.shape, (torch.bool,), mask=mask)
    check_numbers(gamma=gamma, gae_lambda=gae_lambda)
    return _implementation("advantages", rewards).gae(
        rewards, values, cu_seqlens, gamma=gamma, gae_lambda=gae_lambda, mask=mask, bootstrap_values=bootstrap_values
    )


@torch.no_grad()
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
    granularity: Literal["token", "sentence", "sequence"] = "token",
    delimiter_mask: Tensor | None = None,
    shaping: bool = False,
    bootstrap_values: Tensor | None = None,
    whiten: bool = True,
) -> RTOAdvantages:
    """RTO's token rewards (arXiv 2404.18922, eq. 4.7), their GAE and whitening.

    token reward = clip(dpo_reward_scale·(dpo_logps − dpo_ref_logps), ±dpo_reward_clip)
    − kl_coef·(old_logps − ref_logps) and, on the last response token, + score_scale·clip(score, ±score_clip).

    Args:
        old_logps: [T] float, log-probs of the policy that sampled.
        ref_logps: [T] float, log-probs of the reference of the KL penalty.
        dpo_logps: [T] float, log-probs of the DPO model.
        values: [T] float, of the critic.
        scores: [N] float, of the reward model.
        cu_seqlens: [N+1] int32, as in `gae`.
        response_mask: [T] bool, the tokens that the policy sampled. Others between them, such as the output of tools, are
            skipped as in `gae`.
        dpo_ref_logps: [T] float, log-probs of the DPO model's own reference; by default `ref_logps`.
        dpo_reward_scale: factor of the DPO reward, β in the paper.
        dpo_reward_clip: at least 0; 0 turns the clip off.
        kl_coef: factor of the KL penalty.
        score_scale: factor of the score.
        score_clip: at least 0; 0 turns the clip off.
        gamma: discount, in [0, 1].
        gae_lambda: in [0, 1].
        granularity: where DPO rewards are paid. "token": on each token. "sentence": their sums on each response token of
            `delimiter_mask`, and the rest on the last response token. "sequence": all on the last response token.
        delimiter_mask: [T] bool, for "sentence".
        shaping: subtracts the sum of a sequence's clipped DPO rewards on its last response token (potential-based shaping,
            RS-PPO).
        bootstrap_values: [N] float, the value after the last action of truncated sequences, 0 for finished ones.
        whiten: scales advantages to mean 0 and variance 1 over all response tokens (population variance, at least 1e-8).
    Returns:
        RTOAdvantages(token_rewards, kl, advantages, returns, stats). The tensors are [T] float32 without gradients, 0
        outside of the mask; `returns` are those of the advantages before whitening. `stats` are 0-d: `count`,
        `advantage_mean` and `advantage_var` before whitening, and the sums over tokens `dpo_reward_sum` (clipped),
        `kl_sum`, `score_reward_sum` and `dpo_clip_count`.
    """
    optional = {} if dpo_ref_logps is None else {"dpo_ref_logps": dpo_ref_logps}
    cu_seqlens = checked_cu_seqlens(
        cu_seqlens, old_logps=old_logps, ref_logps=ref_logps, dpo_logps=dpo_logps, values=values, **optional
    )
    check_floats(old_logps, (len(cu_seqlens) - 1,), scores=scores)
    check_optional(old_logps, scores.shape, float_dtypes(scores.device), bootstrap_values=bootstrap_values)
    check_tensor("response_mask", response_mask, old_logps.shape, (torch.bool,), old_logps.device)
    check_optional(old_logps, old_logps.shape, (torch.bool,), delimiter_mask=delimiter_mask)
    check_numbers(
        dpo_reward_scale=dpo_reward_scale,
        dpo_reward_clip=dpo_reward_clip,
        kl_coef=kl_coef,
        score_scale=score_scale,
        score_clip=score_clip,
        gamma=gamma,
        gae_lambda=gae_lambda,
    )
    if granularity not in ("token", "sentence", "sequence"):
        raise ValueError(f"granularity: expected 'token', 'sentence' or 'sequence', got {granularity!r}")
    if granularity == "sentence" and delimiter_mask is None:
        raise ValueError("delimiter_mask: required when granularity is 'sentence'")
    return _implementation("advantages", old_logps).rto_advantages(
        old_logps,
        ref_logps,
        dpo_logps,
        values,
        scores,
        cu_seqlens,
        response_mask,
        dpo_ref_logps=dpo_ref_logps,
        dpo_reward_scale=dpo_reward_scale,
        dpo_reward_clip=dpo_reward_clip,
        kl_coef=kl_coef,
        score_scale=score_scale,
        score_clip=score_clip,
        gamma=gamma,
        gae_lambda=gae_lambda,
        granularity=granularity,
        delimiter_mask=delimiter_mask,
        shaping=shaping,
        bootstrap_values=bootstrap_values,
        whiten=whiten,
    )


def sample_tokens(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    softcap: float | None = None,
    stop_ids: Tensor | None = None,
    stop_allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws a token for each row from the filtered softmax(logits / temperature), and computes its log-probs.

    Two random numbers a row invert the distribution function, one over tiles of the vocabulary and one over the tokens of
    the chosen tile. The token is the same on any device, up to rounding, and in any batch. A token of probability 0 is
    never drawn. Filters apply in the order of transformers' warpers, and all logits equal to the last one kept are kept.

    Args:
        logits: [B, V] float32, bfloat16 or float16. Rows are contiguous and may have any stride.
        uniforms: [B, 2] float32, multiples of 2^-24 in [0, 1); see `rto_fast.kernels.sampling_reference.philox_uniforms`.
        temperature: divides the logits; 0 takes the highest logit, the first of equal ones.
        top_k: keeps the k highest logits; 0 keeps all.
        top_p: keeps of these the highest ones whose probabilities reach top_p together; in (0, 1].
        min_p: keeps of these those with at least min_p times the probability of the highest; in [0, 1].
        softcap: applies c·tanh(logits / c) before anything else (Gemma-2), or None.
        stop_ids: [K] int64 in [0, V), the stop tokens. Other ids raise a ValueError on a CPU once they would be forbidden,
            and have no effect on CUDA.
        stop_allowed: [B] bool, whether a row may draw a stop token; None for all rows.
    Returns:
        tokens: [B] int64.
        logps: [B] float32, under softmax(logits / temperature) without filters and forbidden tokens, the policy that PPO
            optimises. For temperature 0 they are those at temperature 1.
        sampling_logps: [B] float32, under the distribution from which the token was drawn; 0 for temperature 0.

        If a row has no distribution (it has NaN or +inf, or nothing but −inf and stop tokens), its token is 0 and its
        log-probs are NaN.
    """
    check_first("logits", logits)
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"logits: expected shape [B, V] with V > 0, got {tuple(logits.shape)}")
    rows, device = len(logits), logits.device
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"logits: expected contiguous rows, got stride {logits.stride(1)} in the last dimension")
    check_tensor("uniforms", uniforms, (rows, 2), (torch.float32,), device)
    if stop_ids is not None:
        check_tensor("stop_ids", stop_ids, None, (torch.int64,), device)
        check_tensor("stop_ids", stop_ids, (stop_ids.numel(),), (torch.int64,), device)
    check_optional(logits, (rows,), (torch.bool,), stop_allowed=stop_allowed)
    check_number("temperature", temperature, AT_LEAST_0)
    check_numbers(softcap=softcap, top_k=top_k, top_p=top_p, min_p=min_p)
    return _implementation("sampling", logits, sampling_reference).sample_tokens(
        logits,
        uniforms,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        softcap=softcap,
        stop_ids=stop_ids,
        stop_allowed=stop_allowed,
    )
