"""The public ops: fused log-probs, RTO advantages, PPO losses and a sampler, for any RLHF loop.

Everything works on packed tensors: T tokens of N sequences back to back, `cu_seqlens [N+1] int32` marks the bounds,
index t is the state s_t and the action `labels[t]` (labels are already shifted). CUDA tensors run the Triton kernels,
CPU tensors the plain torch reference; with TRITON_INTERPRET=1 in the environment CPU tensors run the Triton code
through its interpreter. Log-probs, entropies and KL are in nats; outputs are float32 (float64 from float64 on CPU).
Wrong shapes, devices or dtypes raise ValueError naming the argument. Labels outside [0, V) do so on a CPU; Triton does not
wait for the device to look for them, nor reads outside of a row: the log-prob of such a label is NaN, and so are the loss it
is in, the gradient of its row and the whole gradient of `lm_head_weight`. The algorithm is arXiv 2404.18922. `sample_tokens`
is for decoding: it has no gradient, and on CUDA it neither waits for the device nor depends on it, for CUDA graphs.

`torch.compile`: every Triton op is one node of the graph, with its gradient (fullgraph=True). In the reference,
`token_logps` and the PPO losses are traced whole; the others, whose shapes depend on masks, break the graph.

ZeRO-3: outside the forward of its own module `lm_head.weight` is empty, here an error. Run the linear ops as that
forward, see `rto_fast.models.head`: DeepSpeed then gathers the weight, for a recomputing backward pass too.
`deepspeed.zero.GatheredParameters` around forward and backward serves as well, but not where the head is tied: the
embedding lets go of the weight in between.
"""

import os
from typing import Literal, overload

import torch
from torch import Tensor

from rto_fast.kernels import reference, sampling_reference
from rto_fast.kernels.reference import RTOAdvantages

__all__ = [
    "token_logps", "linear_token_logps", "linear_ppo_loss", "ppo_policy_loss", "ppo_value_loss", "gae",
    "rto_advantages", "RTOAdvantages", "sample_tokens",
]  # fmt: skip

_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _implementation(module, tensor, reference=reference):
    """The Triton module of an op for CUDA tensors, the reference otherwise."""
    if not (tensor.is_cuda or (_INTERPRET and tensor.device.type == "cpu")):
        return reference
    # Not at the top: CPU tensors do without Triton. By statements: `torch.compile` cannot trace import_module.
    import rto_fast.kernels.advantages
    import rto_fast.kernels.linear_ppo_loss
    import rto_fast.kernels.linear_token_logps
    import rto_fast.kernels.ppo_losses
    import rto_fast.kernels.sampling
    import rto_fast.kernels.token_logps

    return getattr(rto_fast.kernels, module)


def _check(name, tensor, shape, dtypes, device):
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


def _floats(device):
    return _FLOATS + (torch.float64,) if device.type == "cpu" and not _INTERPRET else _FLOATS


def _check_floats(reference_tensor, shape, **tensors):
    device = reference_tensor.device
    for name, tensor in tensors.items():
        if tensor is not None:
            _check(name, tensor, shape, _floats(device), device)


def _check_mask(name, mask, shape, device):
    if mask is not None:
        _check(name, mask, shape, (torch.bool,), device)


def _check_positive(**numbers):
    for name, number in numbers.items():
        if number is not None and not number > 0:
            raise ValueError(f"{name}: expected a number above 0, got {number}")


def _check_cu_seqlens(cu_seqlens, device):
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dim() != 1 or not len(cu_seqlens):
        raise ValueError("cu_seqlens: expected a 1-d tensor of N+1 sequence bounds, the first of them 0")
    _check("cu_seqlens", cu_seqlens, cu_seqlens.shape, (torch.int32,), device)


def _check_linear(hidden_states, lm_head_weight, labels, bias, temperature, softcap):
    if hidden_states.dim() < 1:
        raise ValueError("hidden_states: expected shape [..., D], got ()")
    if lm_head_weight.dim() != 2:
        raise ValueError(f"lm_head_weight: expected shape [V, D], got {tuple(lm_head_weight.shape)}")
    device = hidden_states.device
    _check("hidden_states", hidden_states, hidden_states.shape, _floats(device), device)
    _check("lm_head_weight", lm_head_weight, (len(lm_head_weight), hidden_states.shape[-1]), _floats(device), device)
    if lm_head_weight.dtype != hidden_states.dtype and not torch.is_autocast_enabled(device.type):
        raise ValueError(f"lm_head_weight: expected dtype {hidden_states.dtype} like hidden_states, "
                         f"got {lm_head_weight.dtype}")  # fmt: skip
    _check("labels", labels, hidden_states.shape[:-1], (torch.int64,), device)
    if bias is not None:
        _check("bias", bias, lm_head_weight.shape[:1], _floats(device), device)
    _check_positive(temperature=temperature, softcap=softcap)


def _check_ppo(like, loss_mask, weights, clip_eps, clip_eps_high, dual_clip, **tensors):
    _check_floats(like, like.shape, weights=weights, **tensors)
    _check_mask("loss_mask", loss_mask, like.shape, like.device)
    if not 0 <= clip_eps < 1:
        raise ValueError(f"clip_eps: expected a number in [0, 1), got {clip_eps}")
    if clip_eps_high is not None and clip_eps_high < 0:
        raise ValueError(f"clip_eps_high: expected a number of at least 0, got {clip_eps_high}")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip: expected a number above 1, got {dual_clip}")


@overload
def token_logps(
    logits: Tensor, labels: Tensor, *, temperature: float = ..., ignore_index: int = ...,
    return_entropy: Literal[False] = ..., inplace_backward: bool = ...,
) -> Tensor: ...  # fmt: skip
@overload
def token_logps(
    logits: Tensor, labels: Tensor, *, temperature: float = ..., ignore_index: int = ...,
    return_entropy: Literal[True], inplace_backward: bool = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def token_logps(
    logits, labels, *, temperature=1.0, ignore_index=-100, return_entropy=False, inplace_backward=False
):  # fmt: skip
    """Log-probability of each label under softmax(logits / temperature), without a [T, V] log-softmax.

    Args:
        logits: [..., V] float32, bfloat16 or float16; accumulated in float32.
        labels: [...] int64 in [0, V), or `ignore_index` where the result (and its gradient) is 0. Others: ValueError on a
            CPU, NaN on CUDA.
        temperature: divides the logits; above 0.
        return_entropy: also return the entropy of each row's distribution, from the same read of the logits.
        inplace_backward: let the backward pass overwrite `logits` with its gradient (CUDA; saves one [T, V] buffer).
            The logits must not be used afterwards.
    Returns:
        logps [...] float32, or (logps, entropy).
    """
    if logits.dim() < 1 or not logits.shape[-1]:
        raise ValueError(f"logits: expected shape [..., V] with V > 0, got {tuple(logits.shape)}")
    _check("logits", logits, logits.shape, _floats(logits.device), logits.device)
    _check("labels", labels, logits.shape[:-1], (torch.int64,), logits.device)
    _check_positive(temperature=temperature)
    return _implementation("token_logps", logits).token_logps(
        logits, labels, temperature=temperature, ignore_index=ignore_index, return_entropy=return_entropy,
        inplace_backward=inplace_backward,
    )  # fmt: skip


@overload
def linear_token_logps(
    hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor, *, bias: Tensor | None = ...,
    temperature: float = ..., softcap: float | None = ..., ignore_index: int = ..., return_entropy: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def linear_token_logps(
    hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor, *, bias: Tensor | None = ...,
    temperature: float = ..., softcap: float | None = ..., ignore_index: int = ..., return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def linear_token_logps(
    hidden_states, lm_head_weight, labels, *, bias=None, temperature=1.0, softcap=None, ignore_index=-100,
    return_entropy=False,
):  # fmt: skip
    """`token_logps` of the logits `hidden_states @ lm_head_weight.T + bias`, which are held in tiles.

    On CUDA the forward pass holds a float32 tile of them: an eighth of the logits of all rows that are not ignored, but
    at least 32 and at most 512 MiB (columns are rounded up to a multiple of 128). The backward pass holds at most 1 GiB.

    Args:
        hidden_states: [..., D], the output of the last layer (after its norm).
        lm_head_weight: [V, D], same dtype.
        labels: [...] int64 in [0, V), or `ignore_index`: these rows are dropped before the GEMM. Others: ValueError on a
            CPU, NaN on CUDA.
        bias: [V] or None. softcap: c·tanh(logits / c) before the temperature (Gemma-2), or None.
    Returns:
        logps [...] float32, or (logps, entropy); differentiable in hidden_states, lm_head_weight and bias.
    """
    _check_linear(hidden_states, lm_head_weight, labels, bias, temperature, softcap)
    return _implementation("linear_token_logps", hidden_states).linear_token_logps(
        hidden_states, lm_head_weight, labels, bias=bias, temperature=temperature, softcap=softcap,
        ignore_index=ignore_index, return_entropy=return_entropy,
    )  # fmt: skip


def linear_ppo_loss(
    hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor, old_logps: Tensor, advantages: Tensor,
    loss_mask: Tensor, *, weights: Tensor | None = None, num_items: float | Tensor | None = None, clip_eps: float = 0.2,
    clip_eps_high: float | None = None, dual_clip: float | None = None, entropy_coef: float = 0.0,
    temperature: float = 1.0, softcap: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Clipped PPO loss straight from hidden states: `linear_token_logps` and `ppo_policy_loss` in one sweep.

    The loss is Σ weights·(policy loss − entropy_coef·entropy) / num_items over `loss_mask`; see `ppo_policy_loss`.

    Args:
        hidden_states: [..., D]. lm_head_weight: [V, D].
        labels: [...] int64, in [0, V) inside the mask (others: ValueError on a CPU, a loss of NaN on CUDA), any outside.
        old_logps, advantages: [...] float. loss_mask: [...] bool. The rest as in `ppo_policy_loss`.
    Returns:
        (loss 0-d, metrics): those of `ppo_policy_loss` and `entropy` (mean, nats), 0-d tensors on the device.
    """
    _check_linear(hidden_states, lm_head_weight, labels, None, temperature, softcap)
    _check("old_logps", old_logps, labels.shape, _floats(hidden_states.device), hidden_states.device)
    _check_ppo(old_logps, loss_mask, weights, clip_eps, clip_eps_high, dual_clip, advantages=advantages)
    return _implementation("linear_ppo_loss", hidden_states).linear_ppo_loss(
        hidden_states, lm_head_weight, labels, old_logps, advantages, loss_mask, weights=weights, num_items=num_items,
        clip_eps=clip_eps, clip_eps_high=clip_eps_high, dual_clip=dual_clip, entropy_coef=entropy_coef,
        temperature=temperature, softcap=softcap,
    )  # fmt: skip


def ppo_policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, loss_mask: Tensor, *, weights: Tensor | None = None,
    num_items: float | Tensor | None = None, clip_eps: float = 0.2, clip_eps_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Clipped PPO policy loss (arXiv 1707.06347, eq. 7), with clip-higher and dual clip.

    Args:
        logps, old_logps, advantages: [...] float; log-ratios are clamped to ±20. loss_mask: [...] bool.
        weights: [...] per-token weights, default 1; with 1/len(sequence) and num_items = number of sequences the loss
            is the mean over sequences of their token means.
        num_items: float or 0-d tensor that replaces the denominator Σ weights·loss_mask, so that losses of
            micro-batches and ranks add up to the loss of the whole batch exactly.
        clip_eps, clip_eps_high: the ratio is clipped to [1 − clip_eps, 1 + (clip_eps_high or clip_eps)].
        dual_clip: for negative advantages the loss is at most dual_clip·|A| (arXiv 1912.09729); above 1, or None.
    Returns:
        (loss 0-d, metrics): policy_loss, approx_kl (k3, mean of ratio − 1 − log ratio), clip_fraction; 0-d tensors on
        the device with the loss's denominator, so they too add up. An empty mask gives 0.
    """
    _check_ppo(logps, loss_mask, weights, clip_eps, clip_eps_high, dual_clip, logps=logps, old_logps=old_logps,
               advantages=advantages)  # fmt: skip
    return _implementation("ppo_losses", logps).ppo_policy_loss(
        logps, old_logps, advantages, loss_mask, weights=weights, num_items=num_items, clip_eps=clip_eps,
        clip_eps_high=clip_eps_high, dual_clip=dual_clip,
    )  # fmt: skip


def ppo_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, loss_mask: Tensor, *, weights: Tensor | None = None,
    num_items: float | Tensor | None = None, value_clip_eps: float | None = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Clipped value loss ½·max((v − R)², (clip(v, old ± value_clip_eps) − R)²), averaged like `ppo_policy_loss`.

    Args:
        values, old_values, returns: [...] float. loss_mask: [...] bool. value_clip_eps: above 0, None for no clipping.
    Returns:
        (loss 0-d, metrics): value_loss, value_clip_fraction.
    """
    _check_floats(values, values.shape, values=values, old_values=old_values, returns=returns, weights=weights)
    _check_mask("loss_mask", loss_mask, values.shape, values.device)
    _check_positive(value_clip_eps=value_clip_eps)
    return _implementation("ppo_losses", values).ppo_value_loss(
        values, old_values, returns, loss_mask, weights=weights, num_items=num_items, value_clip_eps=value_clip_eps
    )


def gae(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, *, gamma: float = 1.0, gae_lambda: float = 0.95,
    mask: Tensor | None = None, bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) over packed sequences.

    Args:
        rewards, values: [T] float. cu_seqlens: [N+1] int32.
        mask: [T] bool, the tokens that are actions (default all). The others are stepped over: their advantage and
            return are 0, and the value after an action is that of the next action.
        bootstrap_values: [N] float, the value after a sequence's last action (default 0: the sequence ended).
    Returns:
        (advantages [T], returns [T]) float32 with returns = advantages + values.
    """
    _check("rewards", rewards, rewards.shape[:1], _floats(rewards.device), rewards.device)
    _check_cu_seqlens(cu_seqlens, rewards.device)
    _check_floats(rewards, rewards.shape, values=values)
    _check_floats(rewards, (len(cu_seqlens) - 1,), bootstrap_values=bootstrap_values)
    _check_mask("mask", mask, rewards.shape, rewards.device)
    return _implementation("advantages", rewards).gae(
        rewards, values, cu_seqlens, gamma=gamma, gae_lambda=gae_lambda, mask=mask, bootstrap_values=bootstrap_values
    )


def rto_advantages(
    old_logps: Tensor, ref_logps: Tensor, dpo_logps: Tensor, values: Tensor, scores: Tensor, cu_seqlens: Tensor,
    response_mask: Tensor, *, dpo_ref_logps: Tensor | None = None, dpo_reward_scale: float = 0.05,
    dpo_reward_clip: float = 0.05, kl_coef: float = 0.01, score_scale: float = 1.0, score_clip: float = 10.0,
    gamma: float = 1.0, gae_lambda: float = 0.95, granularity: Literal["token", "sentence", "sequence"] = "token",
    delimiter_mask: Tensor | None = None, shaping: bool = False, bootstrap_values: Tensor | None = None,
    whiten: bool = True,
) -> RTOAdvantages:  # fmt: skip
    """RTO's token rewards (arXiv 2404.18922, eq. 4.7), their GAE and whitening.

    token reward = clip(dpo_reward_scale·(dpo_logps − dpo_ref_logps), ±dpo_reward_clip)
    − kl_coef·(old_logps − ref_logps) and, on the last response token, + score_scale·clip(score, ±score_clip).

    Args:
        old_logps, ref_logps, dpo_logps, values: [T] float. scores: [N] float. cu_seqlens: [N+1] int32.
        response_mask: [T] bool, tokens the policy sampled; holes (tool output) are stepped over as in `gae`.
        dpo_ref_logps: [T], the DPO model's own reference; default ref_logps.
        dpo_reward_clip, score_clip: 0 turns the clip off.
        granularity: "token"; "sentence": token rewards are summed onto each response token of `delimiter_mask` [T] bool
            and the rest onto the last one; "sequence": all onto the last response token.
        shaping: subtract a sequence's summed (clipped) DPO rewards on its last token (potential-based, RS-PPO).
        bootstrap_values: [N], value after the last action of truncated sequences, 0 for finished ones.
        whiten: advantages to mean 0 and variance 1 over all response tokens (population variance, at least 1e-8).
    Returns:
        RTOAdvantages(token_rewards, kl, advantages, returns, stats), [T] float32 and 0 outside the mask. `returns` use
        the unwhitened advantages. `stats`, 0-d: count, advantage_mean, advantage_var (before whitening), and the sums
        over tokens dpo_reward_sum (clipped), kl_sum, score_reward_sum, dpo_clip_count.
    """
    _check("old_logps", old_logps, old_logps.shape[:1], _floats(old_logps.device), old_logps.device)
    _check_cu_seqlens(cu_seqlens, old_logps.device)
    _check_floats(old_logps, old_logps.shape, ref_logps=ref_logps, dpo_logps=dpo_logps, values=values,
                  dpo_ref_logps=dpo_ref_logps)  # fmt: skip
    _check_floats(old_logps, (len(cu_seqlens) - 1,), scores=scores, bootstrap_values=bootstrap_values)
    _check_mask("response_mask", response_mask, old_logps.shape, old_logps.device)
    _check_mask("delimiter_mask", delimiter_mask, old_logps.shape, old_logps.device)
    if granularity not in ("token", "sentence", "sequence"):
        raise ValueError(f"granularity: expected 'token', 'sentence' or 'sequence', got {granularity!r}")
    if granularity == "sentence" and delimiter_mask is None:
        raise ValueError("delimiter_mask: required when granularity is 'sentence'")
    return _implementation("advantages", old_logps).rto_advantages(
        old_logps, ref_logps, dpo_logps, values, scores, cu_seqlens, response_mask, dpo_ref_logps=dpo_ref_logps,
        dpo_reward_scale=dpo_reward_scale, dpo_reward_clip=dpo_reward_clip, kl_coef=kl_coef, score_scale=score_scale,
        score_clip=score_clip, gamma=gamma, gae_lambda=gae_lambda, granularity=granularity,
        delimiter_mask=delimiter_mask, shaping=shaping, bootstrap_values=bootstrap_values, whiten=whiten,
    )  # fmt: skip


def sample_tokens(
    logits: Tensor, uniforms: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
    min_p: float = 0.0, softcap: float | None = None, stop_ids: Tensor | None = None,
    stop_allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Draws a token per row from softmax(logits / temperature), filtered, and gives its log-probabilities.

    Two random numbers a row invert the distribution function, one over tiles of the vocabulary, one over the tokens of
    the chosen tile: the same token from any device, up to rounding, whatever the batch. A token of probability 0 is
    never drawn. Filters apply in the order of transformers' warpers, and what equals the last value kept is kept.

    Args:
        logits: [B, V] float32, bfloat16 or float16, rows contiguous and any stride apart.
        uniforms: [B, 2] float32 multiples of 2^-24 in [0, 1), `rto_fast.kernels.sampling_reference.philox_uniforms`.
        temperature: divides the logits; 0 takes the highest, the first of equals.
        top_k: keeps the k highest logits, 0 all.
        top_p: keeps of these the highest whose probabilities reach top_p together; in (0, 1].
        min_p: keeps of these what has at least min_p times the probability of the highest; in [0, 1].
        softcap: c·tanh(logits / c) before anything else (Gemma-2), or None.
        stop_ids: [K] int64 in [0, V), which rows of which stop_allowed [B] bool is False cannot draw (None: they can).
            Others: ValueError on a CPU once they would be forbidden, no effect on CUDA.
    Returns:
        tokens [B] int64; logps [B] float32 under softmax(logits / temperature), nothing filtered or forbidden (at
        temperature 1 for 0): the policy that PPO optimises; sampling_logps [B] float32 under the distribution drawn
        from (0 for temperature 0). Where there is none (NaN or +inf in the row, nothing but -inf or stop_ids):
        token 0, both log-probs NaN.
    """
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"logits: expected shape [B, V] with V > 0, got {tuple(logits.shape)}")
    rows, device = len(logits), logits.device
    _check("logits", logits, logits.shape, _floats(device), device)
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"logits: expected contiguous rows, got stride {logits.stride(1)} in the last dimension")
    _check("uniforms", uniforms, (rows, 2), (torch.float32,), device)
    if stop_ids is not None:
        _check("stop_ids", stop_ids, (stop_ids.numel(),), (torch.int64,), device)
    _check_mask("stop_allowed", stop_allowed, (rows,), device)
    _check_positive(softcap=softcap)
    if not temperature >= 0:
        raise ValueError(f"temperature: expected a number of at least 0, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k: expected an integer of at least 0, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p: expected a number in [0, 1], got {min_p}")
    return _implementation("sampling", logits, sampling_reference).sample_tokens(
        logits, uniforms, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, softcap=softcap,
        stop_ids=stop_ids, stop_allowed=stop_allowed,
    )  # fmt: skip
