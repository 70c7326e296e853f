"""Chooses what a report draws, for one run or several."""

import math
from collections.abc import Mapping, Sequence

from rto_fast.reporting import metric_names
from rto_fast.reporting.draw import COLORS, Panel
from rto_fast.reporting.markup import brief
from rto_fast.reporting.metric_names import LR, SECONDS, SKIPPED, TOKENS, TOKENS_PER_SECOND
from rto_fast.reporting.run_files import EVALUATION, RunFiles, Series

# Counts, rates and times are no learning curves; some of them have panels of their own.
NOT_CURVES = {TOKENS, TOKENS_PER_SECOND, SECONDS, SKIPPED, LR}

# (file, title, {metric: label}). When runs are compared, a panel of several metrics becomes a panel for each metric.
RTO_PANELS = [
    ("score", "Sentence score of the rollouts", {metric_names.SCORE: "score"}),
    ("kl", "KL to the reference, nats a response", {metric_names.KL: "KL"}),
    ("entropy", "Entropy, nats a token", {metric_names.ENTROPY: "entropy"}),
    ("length", "Response length, tokens", {metric_names.LENGTH: "length"}),
    ("truncated", "Share of responses cut at the limit", {metric_names.TRUNCATED: "truncated"}),
    (
        "clip",
        "Share of tokens clipped",
        {
            metric_names.CLIP_FRACTION: "policy loss",
            metric_names.VALUE_CLIP_FRACTION: "value loss",
            metric_names.DPO_CLIP_FRACTION: "DPO reward",
        },
    ),
    (
        "correlation",
        "Correlation of DPO reward and score, by response",
        {metric_names.DPO_SCORE_CORRELATION: "correlation"},
    ),
    ("approx_kl", "KL of an update to its rollout policy, nats a token", {metric_names.APPROX_KL: "approx. KL"}),
    ("policy_loss", "Policy loss", {metric_names.POLICY_LOSS: "policy loss"}),
    ("value_loss", "Value loss", {metric_names.VALUE_LOSS: "value loss"}),
    (
        "explained_variance",
        "Variance of returns explained by the critic",
        {metric_names.EXPLAINED_VARIANCE: "explained variance"},
    ),
    ("grad_norm", "Gradient norm", {metric_names.GRAD_NORM: "policy", metric_names.CRITIC_GRAD_NORM: "critic"}),
]

HELD_OUT = {
    metric_names.SCORE: "Score on held-out prompts",
    metric_names.KL: "KL on held-out prompts, nats a response",
    metric_names.LENGTH: "Length on held-out prompts, tokens",
}

# The parts of a response's reward: (metric, the metric of its share, sign, label).
REWARD_PARTS = [
    (metric_names.SCORE_REWARD, metric_names.SCORE_REWARD_SHARE, 1, "score"),
    (metric_names.DPO_REWARD, metric_names.DPO_REWARD_SHARE, 1, "DPO reward"),
    (metric_names.KL_PENALTY, metric_names.KL_PENALTY_SHARE, -1, "− KL penalty"),
]
PART_COLORS = {"score": COLORS[0], "DPO reward": COLORS[2], "− KL penalty": COLORS[1], "sum": "#8b8f97"}


def sections(runs: Sequence[RunFiles]) -> list[tuple[str, list[Panel]]]:
    """The sections of the report, each a title and its panels; those for which the runs have no numbers are left out."""
    pays_dense_reward = any(value for run in runs for value in run.series("rto", metric_names.DPO_REWARD)[1])
    found = [
        ("Reinforced Token Optimization" if pays_dense_reward else "Reinforcement learning", _rto(runs)),
        ("Where the reward comes from", _rewards(runs)),
        ("Supervised stages", _supervised(runs)),
        ("Throughput", _throughput(runs)),
    ]
    drawable = [(title, [panel for panel in panels if panel.is_drawable]) for title, panels in found]
    return [(title, panels) for title, panels in drawable if panels]


def _lines(
    runs: Sequence[RunFiles], stage: str, slug: str, title: str, metrics: dict[str, str], xlabel: str = "step"
) -> list[Panel]:
    """The panels of a stage's metrics. One run gives one panel with a line for each metric; several runs give a panel for
    each metric with a line for each run.

    Args:
        metrics: {metric: label}.
    """
    if len(runs) == 1:
        series = {label: runs[0].series(stage, metric) for metric, label in metrics.items()}
        return [Panel(slug, title, {label: s for label, s in series.items() if s[0]}, xlabel=xlabel)]
    panels = []
    for metric, label in metrics.items():
        series = {run.name: run.series(stage, metric) for run in runs}
        own = len(metrics) == 1
        panels.append(
            Panel(
                slug if own else f"{slug}_{metric}",
                title if own else f"{title}: {label}",
                {name: s for name, s in series.items() if s[0]},
                xlabel=xlabel,
                colors=_run_colors(runs),
            )
        )
    return panels


def _run_colors(runs: Sequence[RunFiles]) -> dict[str, str]:
    return {run.name: COLORS[i % len(COLORS)] for i, run in enumerate(runs)}


def _supervised(runs: Sequence[RunFiles]) -> list[Panel]:
    stages = list(dict.fromkeys(stage for run in runs for stage in run.supervised))
    panels = []
    for stage in stages:
        metrics = list(dict.fromkeys(m for run in runs for m in run.metrics(stage) if m not in NOT_CURVES))
        for metric in metrics:
            title = f"{stage}: {metric}".replace("_", " ")
            panels += _lines(runs, stage, f"{stage}_{metric}", title, {metric: metric.replace("_", " ")})
    # A metric that was recorded once is a result; the table of stages shows it.
    return [panel for panel in panels if any(len(s[0]) > 1 for s in panel.series.values())]


def _rto(runs: Sequence[RunFiles]) -> list[Panel]:
    panels = []
    for metric, title in HELD_OUT.items():
        series = {run.name: _held_out(run, metric) for run in runs}
        series = {name: points for name, points in series.items() if points[0]}
        panels.append(Panel(f"held_out_{metric}", title, series, xlabel="iteration", colors=_run_colors(runs)))
    for slug, title, metrics in RTO_PANELS:
        if slug != "truncated" or any(value for run in runs for value in run.series("rto", metric_names.TRUNCATED)[1]):
            panels += _lines(runs, "rto", f"rto_{slug}", title, metrics, xlabel="iteration")
    frontier = {
        run.name: (run.series("rto", metric_names.KL)[1], run.series("rto", metric_names.SCORE)[1]) for run in runs
    }
    frontier = {name: (kl, score) for name, (kl, score) in frontier.items() if kl and len(kl) == len(score)}
    title = "Score against KL, an iteration a point"
    panels.append(Panel("rto_frontier", title, frontier, kind="points", xlabel="KL", colors=_run_colors(runs)))
    return panels


def _held_out(run: RunFiles, metric: str) -> Series:
    """The iterations and values of evaluations during training. The final ones, at step 0, are in the table of policies."""
    stages = [name for name in run.stages if name.startswith(EVALUATION)]
    points = [(x, y) for stage in stages for x, y in zip(*run.series(stage, metric)) if x > 0]
    points.sort()
    return [x for x, _ in points], [y for _, y in points]


def _rewards(runs: Sequence[RunFiles]) -> list[Panel]:
    panels = []
    if len(runs) > 1:
        labels = {metric: label for metric, _, _, label in REWARD_PARTS} | {metric_names.REWARD: "sum"}
        for metric, label in labels.items():
            title = f"Reward of a response: {label}".replace("− ", "")
            panels += _lines(runs, "rto", f"reward_{metric}", title, {metric: label}, xlabel="iteration")
    for index, run in enumerate(runs):
        of, suffix = (f" ({brief(run.name)})", f"_{index + 1}") if len(runs) > 1 else ("", "")
        series = {label: run.series("rto", metric) for metric, _, _, label in REWARD_PARTS}
        steps = sorted({step for x, _ in series.values() for step in x})
        if not steps:
            continue
        signed = {
            label: (x, [sign * v for v in series[label][1]])
            for (_, _, sign, label), (x, _) in zip(REWARD_PARTS, series.values())
            if x
        }
        # The sizes of the parts are measured for each response where the run recorded them. Older runs have only the means
        # over responses, in which signs cancel.
        recorded = {label: run.series("rto", share) for _, share, _, label in REWARD_PARTS}
        sizes = recorded if any(x for x, _ in recorded.values()) else signed
        total = run.series("rto", metric_names.REWARD)
        lines = signed | ({"sum": total} if total[0] else {})
        title = f"Reward of a response, by part{of}"
        panels.append(Panel(f"reward_parts{suffix}", title, lines, xlabel="iteration", colors=PART_COLORS))
        title, shares = f"Share of each part in the reward's size{of}", _shares(sizes, steps)
        panels.append(Panel(f"reward_shares{suffix}", title, shares, "stack", xlabel="iteration", colors=PART_COLORS))
    return panels


def _shares(parts: Mapping[str, Series], steps: list[float]) -> dict[str, Series]:
    """|part| / Σ |part| at each step, where a number that is missing or not finite counts as 0."""
    sizes = {}
    for label, (x, y) in parts.items():
        at = {step: abs(value) for step, value in zip(x, y) if math.isfinite(value)}
        sizes[label] = [at.get(step, 0.0) for step in steps]
    totals = [sum(column) for column in zip(*sizes.values())]
    return {label: (steps, [v / t if t else 0.0 for v, t in zip(size, totals)]) for label, size in sizes.items()}


def _throughput(runs: Sequence[RunFiles]) -> list[Panel]:
    panels = []
    for index, run in enumerate(runs):
        of, suffix = (f" ({brief(run.name)})", f"_{index + 1}") if len(runs) > 1 else ("", "")
        if series := _phases(run):
            title = f"Seconds of an iteration, by phase{of}"
            panels.append(Panel(f"seconds{suffix}", title, series, "stack", xlabel="iteration"))
    rates = {TOKENS_PER_SECOND: "whole iteration", metric_names.ROLLOUT_TOKENS_PER_SECOND: "rollout"}
    panels += _lines(runs, "rto", "rto_tokens_per_second", "RTO: response tokens a second", rates, xlabel="iteration")
    for stage in dict.fromkeys(stage for run in runs for stage in run.supervised):
        title = f"{stage}: tokens a second".replace("_", " ")
        panels += _lines(runs, stage, f"{stage}_tokens_per_second", title, {TOKENS_PER_SECOND: "tokens a second"})
    bars = {run.name: (list(run.seconds()), list(run.seconds().values())) for run in runs}
    panels.append(Panel("stages", "Seconds of each stage", bars, kind="bars", xlabel="seconds"))
    return panels


def _phases(run: RunFiles) -> dict[str, Series]:
    """{phase: its steps and seconds}. The rollout is split into its own phases where the engine measured them."""
    at = run.stages.get("rto", {})
    steps = [step for step, record in sorted(at.items()) if metric_names.SECONDS_UPDATE in record]

    def values(name: str) -> list[float]:
        found = [at[step].get(name, 0.0) for step in steps]
        return [value if math.isfinite(value) else 0.0 for value in found]

    prefill, decode = values(metric_names.SECONDS_PREFILL), values(metric_names.SECONDS_DECODE)
    rollout = values(metric_names.SECONDS_ROLLOUT)
    phases = {
        "prefill": prefill,
        "decode": decode,
        "rollout, rest": [max(0.0, r - p - d) for r, p, d in zip(rollout, prefill, decode)],
        "score": values(metric_names.SECONDS_SCORE),
        "update": values(metric_names.SECONDS_UPDATE),
    }
    return {name: (steps, seconds) for name, seconds in phases.items() if any(seconds)}
