"""Checks before hours are spent: is the policy the one that sampled, is the reference where the policy starts, does the DPO
model tell good from bad, do all models end a response alike. Every rank decides from the same numbers."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rto_fast.batch import pack
from rto_fast.config import Config
from rto_fast.errors import ModelError, TrainingError
from rto_fast.evaluation.estimates import rate, wins
from rto_fast.models.agreement import FACTOR, OTHER_MODEL, Noise, clip_width, k3_limit
from rto_fast.models.model import Model
from rto_fast.rto.behaviour import monitored_rows
from rto_fast.rto.health import Finding
from rto_fast.training.response_logps import response_logps

if TYPE_CHECKING:
    from rto_fast.rto.trainer import Experience, Models

CHECKED_PAIRS = 64  # of a supplied DPO model: enough to tell a model that is wrong from one that is right
NOT_REPEATABLE = "is not repeatable: look for randomness in the model (noise, dropout) or state that it keeps"
UNRELATED = 2.0  # nats a token, about what a language model knows of a token at all


def forward_noise(config: Config, policy: Model, experience: "Experience") -> Noise:
    """What rounding does to the policy's training forward pass, on some of the responses that it sampled.

    Raises:
        TrainingError: the pass is random, or keeps a state. Noise that was measured on it would hide that.
    """
    rows = monitored_rows(len(experience.response_ids))[:4]
    prompt_ids, response_ids = ([ids[i] for i in rows] for ids in (experience.prompt_ids, experience.response_ids))
    mask = pack(prompt_ids, response_ids, policy.device).response_mask

    def logps(precise: bool) -> torch.Tensor:
        max_tokens, temperature = config.rto.micro_batch_tokens, config.rollout.temperature
        return response_logps(policy, prompt_ids, response_ids, max_tokens, temperature, precise=precise)[mask]

    own, truth, again = logps(False), logps(True), logps(True)
    apart = (truth - again).abs().mean().item()
    # Atomic additions may differ in the last bits of the higher precision, far below one bit of the model's own.
    if not apart <= torch.finfo(policy.dtype).eps * truth.abs().mean().item():
        raise TrainingError(
            f"the probability ratio of the very first update is not 1: two passes of the policy over the same responses are "
            f"{apart:.2g} nats a token apart. Its forward pass {NOT_REPEATABLE}"
        )
    return Noise.measure(own, truth)


def are_sampled(metrics: Mapping[str, Any]) -> bool:
    """Whether the old log-probs of an `Experience` with these metrics are the sampler's own."""
    return "mismatch_mean" in metrics and "importance_weight" not in metrics


def check_ratio(config: Config, noise: Noise, sampled: bool, passes: Mapping[str, Any]) -> None:
    """Before the first update the policy is the one that sampled: its probability ratio is 1.

    Args:
        noise: of the policy, from `forward_noise`.
        sampled: whether the old log-probs are the sampler's.
        passes: metrics of the first optimizer step's passes (`approx_kl`, `clip_fraction`), before the step is taken.
    Raises:
        TrainingError: it is not, beyond what rounding explains, and what PPO does not notice of a sampler.
    """
    kl, clipped, clip = float(passes["approx_kl"]), float(passes["clip_fraction"]), clip_width(config.rto)
    # The sampler's own limit was checked on some responses, these are others: k3 of a sample varies.
    limit = max(noise.repeated_k3, FACTOR * k3_limit(clip) if sampled else 0.0)
    # By Chebyshev's inequality: no larger share of tokens can lie beyond the clip.
    if kl <= limit and clipped <= 2 * limit / clip**2:  # NaN is no ≤
        return
    cause = (
        "the log-probs came from the sampler, which runs other weights or another model; set rto.old_logps: recompute or "
        "rollout.engine: hf"
        if sampled
        else f"its forward pass {NOT_REPEATABLE}"
    )
    raise TrainingError(
        f"the probability ratio of the very first update is not 1: approx_kl {kl:.2g} (up to {limit:.2g} does no harm), "
        f"{clipped:.1%} of the tokens clipped. PPO would start from a policy that did not sample: {cause}"
    )


def check_sampler(noise: Noise, metrics: Mapping[str, Any], engine: str) -> list[Finding]:
    """Old log-probs are recomputed where PPO would notice how far the sampler's are off; another model's samples are of no
    use.

    Args:
        noise: of the policy, from `forward_noise`.
        metrics: of the first rollout.
        engine: `rollout.engine`.
    Returns:
        a finding where the difference is no rounding: the engine does not compute the policy.
    Raises:
        TrainingError: the sampler is another model.
    """
    if "mismatch_mean" not in metrics:
        return []
    apart, k3 = float(metrics["mismatch_mean"]), float(metrics["mismatch_k3"])
    told = f"the sampler's log-probs of its own first samples are {apart:.2g} nats a token from the policy's"
    if not k3 <= OTHER_MODEL:
        raise TrainingError(f"{told}: it samples from other weights; use rollout.engine: hf")
    if apart <= noise.repeated_mean:
        return []
    return [
        Finding(
            "sampler_is_not_the_policy",
            f"{told}, and rounding explains {noise.repeated_mean:.2g}: it does not compute what is trained",
            "if rollout.engine: vllm runs lower precision on purpose, this is its price; else use rollout.engine: hf"
            if engine == "vllm"
            else "use rollout.engine: hf, and report the model",
        )
    ]


def check_reference(
    config: Config, models: "Models", experience: "Experience", metrics: Mapping[str, Any], noise: Noise
) -> list[Finding]:
    """A policy that starts as its reference has no KL to it.

    Args:
        experience, metrics: of the first rollout.
        noise: of the policy, from `forward_noise`.
    Returns:
        findings: a policy that starts elsewhere may be meant.
    Raises:
        ModelError: names both directories.
    """
    if models.origins is None:
        return []
    start, reference = models.origins
    # Of the sampler's log-probs the distance to the training forward was measured, on other responses.
    limit = max(noise.repeated_mean, FACTOR * float(metrics["mismatch_mean"]) if are_sampled(metrics) else 0.0)
    kl = experience.kl
    assert kl is not None  # of a rollout it is known
    apart = kl[experience.batch.response_mask].abs().mean().item()
    told = f"the policy starts from {start}, its reference is {reference}, and they are {apart:.2g} nats a token apart"
    same = Path(start) == Path(reference)
    if apart <= limit or (config.rto.init_from == "dpo" and not same):  # DPO's policy has moved on purpose
        return []
    if same:
        raise ModelError(
            f"{told}: the directory was changed while it was read, or its model does not compute the same twice"
        )
    if not apart < UNRELATED:
        raise ModelError(
            f"{told}: these models have nothing in common; set rto.ref_model to the one that the policy was trained from, "
            "or leave it out"
        )
    return [
        Finding(
            "reference_is_elsewhere",
            f"{told}: the KL penalty pulls the policy away from where it starts",
            "leave rto.ref_model out unless that is meant",
        )
    ]


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
