"""Checks before hours are spent: is the policy the one that sampled, is the reference where the policy starts, does the DPO
model tell good from bad, do all models end a response alike. Every rank decides from the same numbers."""

from pathlib import Path

import torch

from rto_fast.errors import ModelError, TrainingError
from rto_fast.estimates import rate, wins
from rto_fast.health import Finding

CHECKED_PAIRS = 64  # of a supplied DPO model: enough to tell a model that is wrong from one that is right
# Mean |Δ log-prob| of the same token between two forward passes that pack it differently: far more than rounding does.
ROUNDING = {"float32": 0.003, "16 bit": 0.02}
UNRELATED = 2.0  # nats a token, about what a language model knows of a token at all


def _rounding(model):
    return ROUNDING["16 bit" if next(model.parameters()).dtype.itemsize < 4 else "float32"]


def are_sampled(metrics):
    """Whether the old log-probs of an `Experience` with these metrics are the sampler's own."""
    return "mismatch_mean" in metrics and "importance_weight" not in metrics


def check_ratio(config, policy, sampled, metrics):
    """Before the first update the policy is the one that sampled: its probability ratio is 1.

    Args:
        metrics: of the first optimizer step's passes (`approx_kl`, `clip_fraction`), before the step is taken.
    Raises:
        TrainingError: it is not, beyond what the dtype and the sampler's mismatch explain.
    """
    noise = max(_rounding(policy), config.rto.max_mismatch if sampled else 0.0)
    kl, clipped = float(metrics["approx_kl"]), float(metrics["clip_fraction"])
    # approx_kl is about half the mean square of Δ, and the square root of that a few times its mean: the tails are heavy.
    kl_limit, clip_limit = 0.5 * (5 * noise) ** 2, 0.05 if noise >= ROUNDING["16 bit"] else 0.001
    high = config.rto.clip_eps_high
    clip = config.rto.clip_eps if high is None else min(high, config.rto.clip_eps)
    if kl <= kl_limit and (clipped <= clip_limit or clip < 2 * noise):  # so narrow a clip cuts rounding; NaN is no ≤
        return
    cause = (
        "the log-probs came from the sampler, which runs other weights or another model; set rto.old_logps: recompute or "
        "rollout.engine: hf (if the difference is meant: raise rto.max_mismatch)"
        if sampled
        else "its forward pass is not repeatable: look for randomness in the model (noise, dropout) or state that it keeps"
    )
    raise TrainingError(
        f"the probability ratio of the very first update is not 1: approx_kl {kl:.2g} (up to {kl_limit:.2g} is rounding), "
        f"{clipped:.1%} of the tokens clipped. PPO would start from a policy that did not sample: {cause}"
    )


def check_sampler(config, metrics):
    """Old log-probs are recomputed where the sampler is a little off; half a nat a token is another model.

    Raises:
        TrainingError
    """
    mismatch = float(metrics.get("mismatch_mean", 0.0))
    if not mismatch <= max(0.5, config.rto.max_mismatch):
        raise TrainingError(
            f"the sampler's log-probs of its own first samples are {mismatch:.2g} nats a token from the policy's: it "
            "samples from other weights; use rollout.engine: hf"
        )


def check_reference(config, models, experience, metrics):
    """A policy that starts as its reference has no KL to it.

    Args:
        experience, metrics: of the first rollout.
    Returns:
        findings: a policy that starts elsewhere may be meant.
    Raises:
        ModelError: names both directories.
    """
    if models.origins is None:
        return []
    start, reference = models.origins
    noise = max(_rounding(models.policy), float(metrics.get("mismatch_mean", 0.0)))
    apart = experience.kl[experience.batch.response_mask].abs().mean().item()
    told = f"the policy starts from {start}, its reference is {reference}, and they are {apart:.2g} nats a token apart"
    same = Path(start) == Path(reference)
    if apart <= 2 * noise or (config.rto.init_from == "dpo" and not same):  # DPO's policy has moved on purpose
        return []
    if same:
        raise ModelError(f"{told}: the directory was changed while it was read, or its model does not compute the same "
                         "twice")  # fmt: skip
    if not apart < UNRELATED:
        raise ModelError(f"{told}: these models have nothing in common; set rto.ref_model to the one that the policy was "
                         "trained from, or leave it out")  # fmt: skip
    return [Finding("reference_is_elsewhere", f"{told}: the KL penalty pulls the policy away from where it starts",
                    "leave rto.ref_model out unless that is meant")]  # fmt: skip


def preference_finding(change: torch.Tensor, supplied: bool) -> Finding | None:
    """Whether a DPO model's implicit reward ranks preference pairs as people did.

    Args:
        change: [N, 2] log π_dpo/π_ref of chosen and rejected. supplied: as `dpo.model`, else trained here.
    """
    accuracy = rate(wins(change[:, 0], change[:, 1]))
    told = (
        f"the DPO model ranks {accuracy.value:.0%} of {accuracy.count} held-out pairs right "
        f"(95 % interval {accuracy.low:.0%} to {accuracy.high:.0%})"
    )
    cause = (
        "dpo.ref_model must be what dpo.model was trained from" if supplied else "dpo.lr or dpo.epochs may be too low"
    )
    remedy = (
        "see that chosen and rejected are the right way round (python -m rto_fast.data shows them); "
        f"{cause}; rto.dpo_reward_scale: 0 does without it"
    )
    if accuracy.high < 0.5:
        return Finding("dense_reward_is_inverted", f"the dense reward points the wrong way: {told}", remedy)
    # Of few pairs every model might be a coin; people agree with each other on two thirds to three quarters.
    if accuracy.count >= CHECKED_PAIRS // 2 and accuracy.low < 0.5 and accuracy.value < 0.55:
        return Finding("dense_reward_is_noise", f"the dense reward may be noise: {told}", remedy)
    return None


def stop_finding(key, path, stop_ids, end, tokenizer) -> Finding | None:
    """Whether a supplied model ends its responses with the token that the policy's end with.

    Args:
        stop_ids: that the model at `path` (a configuration's `key`) knows, as far as its files say. end, tokenizer: of
            the policy.
    """
    if not stop_ids or end in stop_ids:
        return None
    own = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in stop_ids)
    return Finding(
        f"{key} ends otherwise",
        f"{key}: {path} ends responses with {own}, the policy's end with {tokenizer.convert_ids_to_tokens(end)!r} ({end}): "
        "its numbers for the last token, and for what comes after it, mean little",
        "give both the same chat template and eos_token (tokenizer_config.json, generation_config.json)",
    )
