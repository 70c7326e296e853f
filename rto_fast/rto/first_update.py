"""Checks of a run's first rollout, before hours are spent: is the policy the model that sampled, is the reference where the
policy starts, does the DPO model tell good responses from bad ones. Every rank decides from the same numbers."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rto_fast.batch import pack
from rto_fast.config import Config
from rto_fast.errors import ModelError, TrainingError
from rto_fast.models.agreement import FACTOR, OTHER_MODEL, Noise, clip_width, k3_limit
from rto_fast.models.model import Model
from rto_fast.reporting.log import Finding
from rto_fast.reporting.metric_names import APPROX_KL, CLIP_FRACTION, MISMATCH_K3, MISMATCH_MEAN
from rto_fast.rto.behaviour import are_sampled, monitored_rows
from rto_fast.rto.experience import Experience, Models, response_logps
from rto_fast.session import TrainingSession
from rto_fast.stages import CHECKED_PAIRS, pair_logps, preference_finding

NOT_REPEATABLE = "is not repeatable: look for randomness in the model (noise, dropout) or state that it keeps"
UNRELATED = 2.0  # nats a token, about what a language model knows of a token at all


def check_first_rollout(
    config: Config, models: Models, experience: Experience, kl: Tensor, warn: Callable[[Finding], object]
) -> Callable[[Mapping[str, Any]], None]:
    """Checks the sampler and the reference.

    With log-probs that are exact the ratio is 1, and a policy that starts from its reference is at a distance of 0, so
    that the effect of rounding need not be measured.

    Args:
        kl: [T] log π/π_ref of the rollout, nats.
        warn: is called with what is odd but may be meant.
    Returns:
        The check of the first optimizer step, see `check_ratio`.
    Raises:
        TrainingError: the responses come from another model, or the policy's forward pass is not repeatable.
        ModelError: the reference is another model.
    """
    noise = cache(partial(forward_noise, config, models.policy, experience))
    if not experience.exact and (finding := check_sampler(noise(), experience.mismatch, config.rollout.engine)):
        warn(finding)
    if finding := check_reference(config, models, experience, kl, noise):
        warn(finding)
    return partial(check_ratio, config, noise, experience.exact or are_sampled(experience.mismatch))


def forward_noise(config: Config, policy: Model, experience: Experience) -> Noise:
    """Measures what rounding does to the policy's training forward pass, on some of the responses that it sampled.

    Raises:
        TrainingError: the pass is random, or keeps a state. Noise that was measured on it would hide that.
    """
    rows = monitored_rows(len(experience.response_ids))[:4]
    prompt_ids, response_ids = ([ids[i] for i in rows] for ids in (experience.prompt_ids, experience.response_ids))
    mask = pack(prompt_ids, response_ids, policy.device).response_mask

    def logps(precise: bool) -> Tensor:
        # One response a pass: a pass in the higher precision takes a multiple of the memory that is planned for.
        return response_logps(policy, prompt_ids, response_ids, 1, config.rollout.temperature, precise=precise)[mask]

    own, truth, again = logps(False), logps(True), logps(True)
    apart = (truth - again).abs().mean().item()
    # Atomic additions may differ in the last bits of the higher precision, far below one bit of the model's own.
    if not apart <= torch.finfo(policy.module.dtype).eps * truth.abs().mean().item():
        raise TrainingError(
            f"the probability ratio of the very first update is not 1: two passes of the policy over the same responses are "
            f"{apart:.2g} nats a token apart. Its forward pass {NOT_REPEATABLE}"
        )
    return Noise.measure(own, truth)


def check_ratio(config: Config, noise: Callable[[], Noise], sampled: bool, passes: Mapping[str, Any]) -> None:
    """Checks that the policy is the model that sampled: before the first update its probability ratio is 1.

    Args:
        noise: measures that of the policy, see `forward_noise`. It is not asked where the ratio is near 1 without.
        sampled: whether the old log-probs are the sampler's.
        passes: metrics of the first optimizer step's passes (`approx_kl`, `clip_fraction`), before the step is taken.
    Raises:
        TrainingError: the ratio differs from 1 by more than rounding explains and, for a sampler, than PPO ignores.
    """
    kl, clipped, clip = float(passes[APPROX_KL]), float(passes[CLIP_FRACTION]), clip_width(config.rto)

    def is_near_1() -> bool:
        # By Chebyshev's inequality: no larger share of tokens can lie beyond the clip.
        return kl <= limit and clipped * clip**2 <= 2 * limit  # NaN is no ≤

    # The sampler's own limit was checked on some responses, these are others: k3 of a sample varies.
    limit = FACTOR * k3_limit(clip) if sampled else 0.0
    if is_near_1():
        return
    limit = max(limit, noise().repeated_k3)
    if is_near_1():
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


def check_sampler(noise: Noise, mismatch: Mapping[str, Any], engine: str) -> Finding | None:
    """Checks that the engine samples from the policy.

    Where PPO would notice the difference of the log-probs they are recomputed; samples of another model are of no use.

    Args:
        noise: of the policy, from `forward_noise`.
        mismatch: metrics of the first rollout, see `behaviour_logps`; empty where nothing was compared.
        engine: `rollout.engine`.
    Returns:
        A finding where rounding does not explain the difference.
    Raises:
        TrainingError: the sampler is another model.
    """
    if MISMATCH_MEAN not in mismatch:
        return None
    apart, k3 = float(mismatch[MISMATCH_MEAN]), float(mismatch[MISMATCH_K3])
    distance = f"the sampler's log-probs of its own first samples are {apart:.2g} nats a token from the policy's"
    if not k3 <= OTHER_MODEL:
        raise TrainingError(f"{distance}: it samples from other weights; use rollout.engine: hf")
    if apart <= noise.repeated_mean:
        return None
    return Finding(
        "sampler_is_not_the_policy",
        f"{distance}, and rounding explains {noise.repeated_mean:.2g}: it does not compute what is trained",
        "if rollout.engine: vllm runs lower precision on purpose, this is its price; else use rollout.engine: hf"
        if engine == "vllm"
        else "use rollout.engine: hf, and report the model",
    )


def check_reference(
    config: Config, models: Models, experience: Experience, kl: Tensor, noise: Callable[[], Noise]
) -> Finding | None:
    """Checks that a policy which starts from its reference has no KL to it.

    Args:
        kl: [T] log π/π_ref of the first rollout, nats.
        noise: measures that of the policy, see `forward_noise`. It is not asked where the distance is exactly 0.
    Returns:
        A finding where the policy starts elsewhere, which may be meant.
    Raises:
        ModelError: the two are no related models, or the same directory gives two models.
    """
    if models.origins is None:
        return None
    start, reference = models.origins
    same = Path(start) == Path(reference)
    apart = kl[experience.batch.rows].abs().mean().item()
    if apart == 0 or (config.rto.init_from == "dpo" and not same):  # DPO's policy has moved on purpose
        return None
    limit = noise().repeated_mean
    if are_sampled(experience.mismatch):  # their distance to the training forward was measured on other responses
        limit = max(limit, FACTOR * float(experience.mismatch[MISMATCH_MEAN]))
    if apart <= limit:
        return None
    distance = (
        f"the policy starts from {start}, its reference is {reference}, and they are {apart:.2g} nats a token apart"
    )
    if same:
        raise ModelError(
            f"{distance}: the directory was changed while it was read, or its model does not compute the same twice"
        )
    if not apart < UNRELATED:
        raise ModelError(
            f"{distance}: these models have nothing in common; set rto.ref_model to the one that the policy was trained "
            "from, or leave it out"
        )
    return Finding(
        "reference_is_elsewhere",
        f"{distance}: the KL penalty pulls the policy away from where it starts",
        "leave rto.ref_model out unless that is meant",
    )


def check_dpo_model(session: TrainingSession, models: Models) -> None:
    """Warns where a supplied DPO model does not prefer what people preferred. The DPO stage measures its own model."""
    if models.dpo is None:
        return
    pairs, max_tokens = session.data.held_out_pairs[:CHECKED_PAIRS], session.budget("rto").scoring
    if not pairs:
        return
    logps = []
    for model in (models.dpo, models.dpo_reference or models.reference):
        with model.resident():
            logps.append(pair_logps(model, pairs, max_tokens))
    if finding := preference_finding(logps[0] - logps[1], supplied=True):
        session.log.warning("dpo", 0, *finding)
