"""The health of an RTO run: rules over its metrics, each with what to do about it.

A rule reads the iterations so far and returns nothing, or what is wrong and which key to change. Thresholds are rules of
thumb, with their sources beside them. Most need several iterations in a row, since one rollout is a small sample. The
shipped runs stay far below all of them.
"""

import math
from collections.abc import Callable
from statistics import fmean, median
from typing import Any

from rto_fast.config import Config
from rto_fast.models.agreement import clip_width, k3_limit, ppo_notices
from rto_fast.reporting.log import RunLog
from rto_fast.reporting.metric_names import (
    APPROX_KL,
    CLIP_FRACTION,
    CRITIC_SKIPPED,
    DPO_CLIP_FRACTION,
    DPO_REWARD_SHARE,
    DPO_SCORE_CORRELATION,
    ENTROPY,
    EXPLAINED_VARIANCE,
    IMBALANCE,
    KL,
    KL_PENALTY_SHARE,
    LENGTH,
    MICRO_BATCH_TOKENS,
    MISMATCH_BIAS,
    MISMATCH_K3,
    PLANNED_TOKENS,
    ROLLOUT_IMBALANCE,
    SCORE_REWARD_SHARE,
    SKIPPED,
    TRUNCATED,
    VALUE_LOSS,
)
from rto_fast.reporting.run_files import number, read_records

QUIET = 10  # iterations without its cause after which a warning is over, so that one that comes and goes is said once


History = list[dict[str, Any]]  # the metrics of each iteration, in order; None where a number was not finite
Advice = tuple[str, str]  # what is wrong, and what to do
Rule = Callable[[History, Config], Advice | None]


def _last(history: History, metric: str, count: int) -> list[float]:
    """The metric's last `count` values; none where one is missing."""
    values = [record.get(metric) for record in history[-count:]]
    return values if len(values) == count and None not in values else []  # type: ignore[return-value]


def _above(history: History, metric: str, threshold: float, count: int) -> bool:
    """Whether the metric's last `count` values are all above `threshold`."""
    return min(_last(history, metric, count), default=threshold) > threshold


def dense_reward_dominates(history: History, config: Config) -> Advice | None:
    """The scales of the dense reward and of the score come from two models, so only a look at their sizes tells whether they
    match. In the shipped runs the dense reward is at most a third of the score's size."""
    rto = config.rto
    dense, score = _last(history, DPO_REWARD_SHARE, 5), _last(history, SCORE_REWARD_SHARE, 5)
    if not (dense and score and rto.score_scale and rto.dpo_reward_scale):
        return None
    ratios = [d / max(s, 1e-3) for d, s in zip(dense, score)]
    if min(ratios) <= 3:
        return None
    ratio = median(ratios)
    clip = f" and rto.dpo_reward_clip from {rto.dpo_reward_clip:g} to {rto.dpo_reward_clip / ratio:.2g}"
    return (
        f"the dense reward of a response is {ratio:.1f} times the size of its score: the policy follows the DPO model and "
        "hardly the score",
        f"for equal sizes lower rto.dpo_reward_scale from {rto.dpo_reward_scale:g} to {rto.dpo_reward_scale / ratio:.2g}"
        f"{clip if rto.dpo_reward_clip else ''}",
    )


def dense_reward_is_clipped(history: History, config: Config) -> Advice | None:
    """The clip is for outliers. If it cuts more than half of the tokens, little more than a sign of the reward is left."""
    if not _above(history, DPO_CLIP_FRACTION, 0.5, 5):
        return None
    share, rto = history[-1][DPO_CLIP_FRACTION], config.rto
    return (
        f"the dense reward of {share:.0%} of the tokens is cut at ±{rto.dpo_reward_clip:g}",
        f"raise rto.dpo_reward_clip, or halve rto.dpo_reward_scale ({rto.dpo_reward_scale:g})",
    )


def dense_reward_contradicts_score(history: History, config: Config) -> Advice | None:
    """The standard error of a correlation over 64 responses is 1/8, and that of its mean over ten rollouts 1/25."""
    values = _last(history, DPO_SCORE_CORRELATION, 10)
    if fmean(values or [0.0]) >= -0.2:
        return None
    return (
        f"responses that the DPO model prefers get lower scores (correlation {fmean(values):.2f} over 10 iterations): the "
        "two rewards pull apart",
        "see that DPO and reward model learned from the same preferences, and dpo.ref_model; else lower "
        f"rto.dpo_reward_scale ({config.rto.dpo_reward_scale:g})",
    )


def kl_explodes(history: History, config: Config) -> Advice | None:
    """A policy that is a nat a token away is another model: language models have one or two nats of entropy a token, and
    reward models are over-optimised long before (Gao et al., arXiv 2210.10760)."""
    kl, length = _last(history, KL, 3), _last(history, LENGTH, 3)
    if min((k / max(n, 1.0) for k, n in zip(kl, length)), default=0.0) <= 1.0:
        return None
    return (
        f"the policy is {kl[-1]:.3g} nats a response from its reference, {kl[-1] / length[-1]:.2g} a token",
        f"raise rto.kl_coef ({config.rto.kl_coef:g}) or set rto.kl_target; lower rto.lr ({config.rto.lr:g})",
    )


def kl_is_negative(history: History, config: Config) -> Advice | None:
    """The mean of log π/π_ref over π's own samples estimates a KL, which is not negative. The threshold is TRL's."""
    if max(_last(history, KL, 5), default=0.0) >= -1.0:
        return None
    return (
        f"the KL to the reference is negative ({history[-1][KL]:.3g} nats): the samples are not the policy's own",
        "sample from the whole distribution (rollout.top_p: 1, top_k: 0, min_p: 0), or set rto.old_logps: recompute",
    )


def kl_penalty_dominates(history: History, config: Config) -> Advice | None:
    if not _above(history, KL_PENALTY_SHARE, 0.5, 5):
        return None
    return (
        f"the KL penalty is {history[-1][KL_PENALTY_SHARE]:.0%} of what a response is paid or charged: it outweighs "
        "score and dense reward",
        f"lower rto.lr ({config.rto.lr:g}) if the KL still rises, else rto.kl_coef ({config.rto.kl_coef:g})",
    )


def entropy_collapses(history: History, config: Config) -> Advice | None:
    """A policy that has become nearly certain draws the same response again and has nothing left to learn from (arXiv
    2505.22617). RTO lowers entropy by itself, in the shipped runs to a half."""
    first = fmean(_last(history[:3], ENTROPY, 3) or [0.0])
    if max(_last(history, ENTROPY, 5), default=first) >= 0.2 * first:
        return None
    return (
        f"entropy fell from {first:.2g} to {history[-1][ENTROPY]:.2g} nats a token: samples are nearly all alike",
        f"raise rto.kl_coef ({config.rto.kl_coef:g}) or rto.entropy_coef ({config.rto.entropy_coef:g}), or lower "
        f"rto.lr ({config.rto.lr:g})",
    )


def responses_are_cut(history: History, config: Config) -> Advice | None:
    if not _above(history, TRUNCATED, 0.25, 5):
        return None
    return (
        f"{history[-1][TRUNCATED]:.0%} of the responses are cut at rollout.max_new_tokens "
        f"({config.rollout.max_new_tokens})",
        "raise it if they need the room; if they have grown, raise rto.truncation_penalty "
        f"({config.rto.truncation_penalty:g})",
    )


def updates_are_too_large(history: History, config: Config) -> Advice | None:
    """PPO usually clips less than .2 of the tokens, and Spinning Up stops an epoch at a KL of .015; a tenth of a nat is far
    beyond."""
    if not (_above(history, CLIP_FRACTION, 0.2, 3) or _above(history, APPROX_KL, 0.1, 3)):
        return None
    last, rto = history[-1], config.rto
    return (
        f"updates are large: {last[CLIP_FRACTION]:.0%} of the tokens clipped, {last[APPROX_KL]:.2g} nats a token from "
        "the policy that sampled",
        f"lower rto.lr ({rto.lr:g}) or rto.ppo_epochs ({rto.ppo_epochs}), or raise rto.batch_size ({rto.batch_size})",
    )


def critic_explains_nothing(history: History, config: Config) -> Advice | None:
    """Below 0 the critic is worse than the mean of the returns. A critic from a reward model starts there and learns."""
    if max(_last(history, EXPLAINED_VARIANCE, 15), default=0.0) >= -0.05:
        return None
    return (
        "the critic has explained none of the returns' variance for 15 iterations (explained_variance "
        f"{history[-1][EXPLAINED_VARIANCE]:.2g}): advantages are noisier than without it",
        f"raise rto.critic_lr ({config.rto.critic_lr:g}), or take rto.advantage: reinforce_pp, which needs no critic",
    )


def value_loss_explodes(history: History, config: Config) -> Advice | None:
    """The value loss is compared with its own start, for its unit is that of the scores."""
    start = _last(history[:3], VALUE_LOSS, 3)
    if len(history) < 8 or not start or not _above(history, VALUE_LOSS, 5 * max(start), 3):
        return None
    return (
        f"the value loss is {history[-1][VALUE_LOSS]:.3g}, at the start it was at most {max(start):.3g}",
        f"lower rto.critic_lr ({config.rto.critic_lr:g})",
    )


def steps_are_skipped(history: History, config: Config) -> Advice | None:
    """There is no loss scaling here as in float16 training, so a gradient that is not finite has a cause."""
    if not any((r.get(SKIPPED) or 0) + (r.get(CRITIC_SKIPPED) or 0) > 0 for r in history[-5:]):
        return None
    return (
        "optimizer steps were skipped, their gradient was not finite",
        f"lower rto.lr ({config.rto.lr:g}) and rto.critic_lr ({config.rto.critic_lr:g}); look for scores without bound "
        "(rto.score_clip)",
    )


def sampler_disagrees(history: History, config: Config) -> Advice | None:
    """The limits come from `rto_fast.models.agreement`."""
    clip = clip_width(config.rto)
    recent = [r for r in history[-3:] if r.get(MISMATCH_K3) is not None and r.get(MISMATCH_BIAS) is not None]
    if len(recent) < 3 or not all(ppo_notices(record, clip) for record in recent):
        return None
    if config.rto.old_logps == "sampler":
        done, remedy = "they are used all the same", "set rto.old_logps: auto"
    else:
        done, remedy = "they are recomputed and the loss is weighted", "nothing is wrong, but it costs a forward pass"
    if config.rollout.engine != "native":
        remedy += "; rollout.engine: native samples with the training's own weights"
    return (
        f"PPO with a clip of {clip:g} notices how far the sampler's log-probs are from the training's (k3 "
        f"{recent[-1][MISMATCH_K3]:.2g} nats a token, {k3_limit(clip):.2g} would do no harm; mean ratio "
        f"{1 + recent[-1][MISMATCH_BIAS]:.3f}): {done}",
        remedy,
    )


def ranks_are_uneven(history: History, config: Config) -> Advice | None:
    for metric, key in ((IMBALANCE, "rto.batch_size"), (ROLLOUT_IMBALANCE, "rto.prompts_per_rollout")):
        values = _last(history, metric, 5)
        if fmean(values or [1.0]) > 1.5:
            return f"the busiest rank has {fmean(values):.1f} times the tokens of the mean ({metric})", f"raise {key}"
    return None


def micro_batches_shrank(history: History, config: Config) -> Advice | None:
    tokens, planned = history[-1].get(MICRO_BATCH_TOKENS), history[-1].get(PLANNED_TOKENS)
    if not tokens or not planned or tokens >= planned:
        return None
    return (
        f"memory ran out: micro-batches went from {planned:,} tokens to {tokens:,}",
        f"set model.micro_batch_tokens: {tokens} next time, or model.gradient_checkpointing",
    )


RULES: tuple[Rule, ...] = (
    dense_reward_dominates,
    dense_reward_is_clipped,
    dense_reward_contradicts_score,
    kl_explodes,
    kl_is_negative,
    kl_penalty_dominates,
    entropy_collapses,
    responses_are_cut,
    updates_are_too_large,
    critic_explains_nothing,
    value_loss_explodes,
    steps_are_skipped,
    sampler_disagrees,
    ranks_are_uneven,
    micro_batches_shrank,
)


class Health:
    """Checks every iteration. A warning is printed and recorded when it begins, and recorded when it is over."""

    def __init__(self, config: Config, log: RunLog, stage: str = "rto"):
        self.config, self.log, self.stage = config, log, stage
        self.history: History = []
        self.seen: dict[str, int] = {}  # the last iteration of each warning that is not over
        if not log.silent:
            (log.folder / "warnings.jsonl").touch()  # its presence tells the report that the run was checked
            for record in self._recorded():
                self.check(record["step"], record, is_recorded=True)

    def _recorded(self) -> History:
        """Reads the iterations of a resumed run so far, whose warnings have been said."""
        notes: list[str] = []
        records = read_records(self.log.folder / "metrics.jsonl", notes)
        for note in notes:
            self.log.say(
                f"{self.log.folder / 'metrics.jsonl'}: {note.partition(': ')[2]}; the run goes on without them"
            )
        records = [record for record in records if record.get("stage") == self.stage]
        # None where a metric is no finite number.
        plain = [{k: v if math.isfinite(number(v)) else None for k, v in record.items()} for record in records]
        return [record for record in plain if record.get("step") is not None]

    def check(self, step: int, metrics: dict[str, Any], is_recorded: bool = False) -> None:
        """Checks the metrics of iteration `step`, as `RunLog.metrics` returns them.

        Args:
            is_recorded: the run was resumed after this iteration, and its warnings have been said.
        """
        if self.log.silent:
            return
        self.history.append(metrics)
        for rule in RULES:
            name = rule.__name__
            try:
                found = rule(self.history, self.config)
            except ArithmeticError:  # the metrics come from a damaged file, see `_recorded`
                found = None
            if found:
                if name not in self.seen and not is_recorded:
                    self.log.warning(self.stage, step, name, *found)
                self.seen[name] = step
            elif step - self.seen.get(name, step) >= QUIET:
                last_step = self.seen.pop(name)
                if not is_recorded:
                    self.log.warning_over(self.stage, last_step, name)
