"""The report's figures: what is drawn, from one run or several.

A `Panel` is one small figure; it becomes an SVG in the page, whose text takes the page's colour, and a PNG beside it.
"""

import math
from dataclasses import dataclass, field

from rto_fast.reporting.draw import COLORS, draw_bars, draw_lines, draw_points, draw_stack
from rto_fast.reporting.markup import brief
from rto_fast.reporting.run_files import EVALUATION

# What is not a learning curve: counts, rates and times have panels of their own.
NOT_CURVES = {"tokens", "tokens_per_second", "seconds", "skipped", "lr"}

# (file, title, {metric: label}); a panel of several metrics becomes one panel a metric when runs are compared.
RTO_PANELS = [
    ("score", "Sentence score of the rollouts", {"score": "score"}),
    ("kl", "KL to the reference, nats a response", {"kl": "KL"}),
    ("entropy", "Entropy, nats a token", {"entropy": "entropy"}),
    ("length", "Response length, tokens", {"length": "length"}),
    ("truncated", "Share of responses cut at the limit", {"truncated": "truncated"}),
    (
        "clip",
        "Share of tokens clipped",
        {"clip_fraction": "policy loss", "value_clip_fraction": "value loss", "dpo_clip_fraction": "DPO reward"},
    ),
    ("correlation", "Correlation of DPO reward and score, by response", {"dpo_score_correlation": "correlation"}),
    ("approx_kl", "KL of an update to its rollout policy, nats a token", {"approx_kl": "approx. KL"}),
    ("policy_loss", "Policy loss", {"policy_loss": "policy loss"}),
    ("value_loss", "Value loss", {"value_loss": "value loss"}),
    ("explained_variance", "Variance of returns explained by the critic", {"explained_variance": "explained variance"}),
    ("grad_norm", "Gradient norm", {"grad_norm": "policy", "critic_grad_norm": "critic"}),
]

HELD_OUT = {
    "score": "Score on held-out prompts",
    "kl": "KL on held-out prompts, nats a response",
    "length": "Length on held-out prompts, tokens",
}

# What a response earns: (metric, sign, label)
REWARD_PARTS = [("score_reward", 1, "score"), ("dpo_reward", 1, "DPO reward"), ("kl_penalty", -1, "− KL penalty")]
PART_COLORS = {"score": COLORS[0], "DPO reward": COLORS[2], "− KL penalty": COLORS[1], "sum": "#8b8f97"}

PHASES = ["prefill", "decode", "rollout, rest", "score", "update"]


@dataclass
class Panel:
    """`kind`: lines, points, stack or bars. `series`: {label: (x, y)}; of bars {label: {category: value}}."""

    slug: str  # the PNG's name
    title: str
    series: dict
    kind: str = "lines"
    xlabel: str = "step"
    colors: dict = field(default_factory=dict)

    def figure(self):
        return {"lines": draw_lines, "points": draw_points, "stack": draw_stack, "bars": draw_bars}[self.kind](self)

    @property
    def is_drawable(self):
        """Whether any number in it is finite."""
        values = [v.values() if self.kind == "bars" else v[1] for v in self.series.values()]
        return any(math.isfinite(value) for part in values for value in part)


def sections(runs):
    """[(title, [Panel])], without panels and sections that the runs have no numbers for."""
    found = [
        ("Reinforced Token Optimization" if _pays_dense(runs) else "Reinforcement learning", _rto(runs)),
        ("Where the reward comes from", _rewards(runs)),
        ("Supervised stages", _supervised(runs)),
        ("Throughput", _throughput(runs)),
    ]
    drawable = [(title, [panel for panel in panels if panel.is_drawable]) for title, panels in found]
    return [(title, panels) for title, panels in drawable if panels]


def _pays_dense(runs):
    return any(value for run in runs for value in run.series("rto", "dpo_reward")[1])


def _lines(runs, stage, slug, title, metrics, xlabel="step"):
    """Panels of a stage's metrics: one with a line a metric, or, of several runs, one a metric with a line a run."""
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


def _run_colors(runs):
    return {run.name: COLORS[i % len(COLORS)] for i, run in enumerate(runs)}


def _supervised(runs):
    stages = list(dict.fromkeys(stage for run in runs for stage in run.supervised))
    panels = []
    for stage in stages:
        metrics = list(dict.fromkeys(m for run in runs for m in run.metrics(stage) if m not in NOT_CURVES))
        for metric in metrics:
            title = f"{stage}: {metric}".replace("_", " ")
            panels += _lines(runs, stage, f"{stage}_{metric}", title, {metric: metric.replace("_", " ")})
    # One recorded number is a result, not a curve; it stands in the table of measurements.
    return [panel for panel in panels if any(len(s[0]) > 1 for s in panel.series.values())]


def _rto(runs):
    panels = []
    for metric, title in HELD_OUT.items():
        series = {run.name: _held_out(run, metric) for run in runs}
        series = {name: points for name, points in series.items() if points}
        panels.append(Panel(f"held_out_{metric}", title, series, xlabel="iteration", colors=_run_colors(runs)))
    for slug, title, metrics in RTO_PANELS:
        if slug != "truncated" or any(value for run in runs for value in run.series("rto", "truncated")[1]):
            panels += _lines(runs, "rto", f"rto_{slug}", title, metrics, xlabel="iteration")
    frontier = {run.name: (run.series("rto", "kl")[1], run.series("rto", "score")[1]) for run in runs}
    frontier = {name: (kl, score) for name, (kl, score) in frontier.items() if kl and len(kl) == len(score)}
    title = "Score against KL, an iteration a point"
    panels.append(Panel("rto_frontier", title, frontier, kind="points", xlabel="KL", colors=_run_colors(runs)))
    return panels


def _held_out(run, metric):
    """(iterations, values) of the evaluations while training; the final ones, at step 0, stand in the table of policies."""
    stages = [name for name in run.stages if name.startswith(EVALUATION)]
    points = [(x, y) for stage in stages for x, y in zip(*run.series(stage, metric)) if x > 0]
    return tuple(zip(*sorted(points)))


def _rewards(runs):
    panels = []
    if len(runs) > 1:
        for metric, _, label in [*REWARD_PARTS, ("reward", 1, "sum")]:
            title = f"Reward of a response: {label}".replace("− ", "")
            panels += _lines(runs, "rto", f"reward_{metric}", title, {metric: label}, xlabel="iteration")
    for index, run in enumerate(runs):
        of, suffix = (f" ({brief(run.name)})", f"_{index + 1}") if len(runs) > 1 else ("", "")
        series = {label: run.series("rto", metric) for metric, _, label in REWARD_PARTS}
        steps = sorted({step for x, _ in series.values() for step in x})
        if not steps:
            continue
        signed = {
            label: (x, [sign * v for v in series[label][1]])
            for (_, sign, label), (x, _) in zip(REWARD_PARTS, series.values())
            if x
        }
        # By response where the run recorded it; else of the means, in which signs cancel.
        recorded = {label: run.series("rto", f"{metric}_share") for metric, _, label in REWARD_PARTS}
        sizes = recorded if any(x for x, _ in recorded.values()) else signed
        total = run.series("rto", "reward")
        lines = signed | ({"sum": total} if total[0] else {})
        panels.append(
            Panel(
                f"reward_parts{suffix}",
                "Reward of a response, by part" + of,
                lines,
                xlabel="iteration",
                colors=PART_COLORS,
            )
        )
        panels.append(
            Panel(
                f"reward_shares{suffix}",
                "Share of each part in the reward's size" + of,
                _shares(sizes, steps),
                kind="stack",
                xlabel="iteration",
                colors=PART_COLORS,
            )
        )
    return panels


def _shares(signed, steps):
    """|part| / Σ |part| at each step; a number that is missing or not finite counts as 0."""
    sizes = {}
    for label, (x, y) in signed.items():
        at = {step: abs(value) for step, value in zip(x, y) if math.isfinite(value)}
        sizes[label] = [at.get(step, 0.0) for step in steps]
    totals = [sum(column) for column in zip(*sizes.values())]
    return {label: (steps, [v / t if t else 0.0 for v, t in zip(size, totals)]) for label, size in sizes.items()}


def _throughput(runs):
    panels = []
    for index, run in enumerate(runs):
        of, suffix = (f" ({brief(run.name)})", f"_{index + 1}") if len(runs) > 1 else ("", "")
        series = _phases(run)
        if series:
            panels.append(
                Panel(
                    f"seconds{suffix}",
                    "Seconds of an iteration, by phase" + of,
                    series,
                    kind="stack",
                    xlabel="iteration",
                )
            )
    rates = {"tokens_per_second": "whole iteration", "rollout_tokens_per_second": "rollout"}
    panels += _lines(runs, "rto", "rto_tokens_per_second", "RTO: response tokens a second", rates, xlabel="iteration")
    for stage in dict.fromkeys(stage for run in runs for stage in run.supervised):
        title = f"{stage}: tokens a second".replace("_", " ")
        panels += _lines(runs, stage, f"{stage}_tokens_per_second", title, {"tokens_per_second": "tokens a second"})
    bars = {run.name: run.seconds() for run in runs}
    panels.append(Panel("stages", "Seconds of each stage", bars, kind="bars", xlabel="seconds"))
    return panels


def _phases(run):
    """{phase: (steps, seconds)}: the rollout in its own phases where the engine knows them."""
    steps = [step for step, record in sorted(run.stages.get("rto", {}).items()) if "seconds_update" in record]
    at = run.stages.get("rto", {})

    def values(name):
        found = [at[step].get(f"seconds_{name}", 0.0) for step in steps]
        return [value if math.isfinite(value) else 0.0 for value in found]

    prefill, decode, rollout = values("prefill"), values("decode"), values("rollout")
    rest = [max(0.0, r - p - d) for r, p, d in zip(rollout, prefill, decode)]
    columns = [prefill, decode, rest, values("score"), values("update")]
    return {name: (steps, column) for name, column in zip(PHASES, columns) if any(column)}
