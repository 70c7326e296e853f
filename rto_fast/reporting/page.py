"""The report's page: what stands in it, and in which order. Figures come in as SVG, the rest is made here."""

import re
from importlib import resources
from string import Template

import yaml

from rto_fast.reporting import token_picture
from rto_fast.reporting.markup import conversation, escape, show, table
from rto_fast.reporting.run_files import EVALUATION, number


def page(runs, figures):
    """The whole HTML page.

    Args:
        runs: [RunFiles]. figures: [(section title, [(panel title, SVG)])].
    """
    names = " against ".join(run.name for run in runs)
    sections = [
        ("Policies", _policies(runs)),
        ("Health", _health(runs)),
        ("What differs", _differences(runs) if len(runs) > 1 else ""),
        ("Which tokens earned what", _tokens(runs)),
        ("Before and after", _samples(runs)),
        *((title, _figures(panels)) for title, panels in figures),
        ("Stages", _stages(runs)),
        ("Configuration", _configuration(runs)),
    ]
    sections = [(title, body) for title, body in sections if body]
    links = "".join(f'<a href="#{_anchor(title)}">{escape(title)}</a>' for title, _ in sections)
    notes = [f"{run.name}: {note}" if len(runs) > 1 else note for run in runs for note in run.notes]
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    body = [
        f"<header><h1>{escape(names)}</h1>",
        f'<p class="soft">{escape(_summary(runs))}</p>',
        f'<ul class="notes">{listed}</ul>' if notes else "",
        f"<nav>{links}</nav></header><main>",
        *(f'<section id="{_anchor(title)}"><h2>{escape(title)}</h2>\n{body}</section>' for title, body in sections),
        "</main>",
    ]
    return Template(_resource("report_template.html")).substitute(
        title=escape(f"{names} · rto-fast"),
        style=_resource("report.css") + token_picture.style(),
        body="\n".join(filter(None, body)),
    )


def _resource(name):
    return resources.files("rto_fast.reporting").joinpath(name).read_text(encoding="utf-8")


def _anchor(title):
    return re.sub(r"\W+", "-", title.lower())


def _summary(runs):
    if len(runs) > 1:
        return f"{len(runs)} runs compared · rto-fast"
    run = runs[0]
    seconds = sum(run.seconds().values())
    stages = ", ".join(name for name in run.stages if not name.startswith(EVALUATION))
    return f"{stages.replace('_', ' ')} · {seconds:,.1f} s · rto-fast"


def _policies(runs):
    """The table of policies: every number of results.json, the score with its standard error, the best in bold."""
    rows = [(run, name, values) for run in runs for name, values in run.results.items()]
    if not rows:
        return ""
    keys = list(
        dict.fromkeys(key for *_, values in rows for key, v in values.items() if not isinstance(v, (dict, list)))
    )
    shown = [key for key in keys if key != "standard_error" and any(v.get(key) is not None for *_, v in rows)]
    cells = []
    for run, name, values in rows:
        line = [run.name] * (len(runs) > 1) + [name]
        for key in shown:
            error = values.get("standard_error") if key == "score" else None
            cell = show(values.get(key))
            if key == "finished" and number(values.get(key)) == values.get(key):
                cell = f"{100 * values[key]:.1f} %"
            line.append(f"{cell} ± {show(error)}" if isinstance(error, (int, float)) else cell)
        cells.append(line)
    lead = ["run"] * (len(runs) > 1) + ["policy"]
    scores = [number(values.get("score")) for *_, values in rows]
    scores = [score if score == score else float("-inf") for score in scores]
    best = (
        {(scores.index(max(scores)), len(lead) + shown.index("score"))} if "score" in shown and len(rows) > 1 else set()
    )
    explanation = '<p class="soft">Judged on the same held-out prompts; score ± its standard error.</p>'
    return table([*lead, *(key.replace("_", " ") for key in shown)], cells, names=len(lead), best=best) + explanation


def _health(runs):
    """What was wrong, when, and what to do about it."""
    if all(run.warnings is None for run in runs):
        return ""
    rows = []
    for run in runs:
        for warning in run.warnings or []:
            since, until = warning["since"], warning["until"]
            steps = f"from {since}" if until is None else f"{since}–{until}"
            where = f"{warning['stage']} {steps}" if since else "before the first step"
            rows.append([run.name] * (len(runs) > 1) + [where, warning["what"], warning["remedy"]])
    if not rows:
        return "<p>No warnings.</p>"
    header = ["run"] * (len(runs) > 1) + ["when", "what", "what to do"]
    return table(header, rows, names=len(header))


def _flat(tree, prefix=""):
    if not isinstance(tree, dict) or not tree:
        return {prefix.removesuffix("."): tree}
    return {key: value for name, part in tree.items() for key, value in _flat(part, f"{prefix}{name}.").items()}


def _differences(runs):
    """The settings in which the runs differ."""
    try:
        settings = [_flat(yaml.safe_load(run.config) or {}) for run in runs]
    except (yaml.YAMLError, RecursionError):
        return ""
    keys = [key for key in dict.fromkeys(k for s in settings for k in s) if key and key != "output_dir"]
    absent = object()
    differing = [key for key in keys if any(s.get(key, absent) != settings[0].get(key, absent) for s in settings)]
    rows = [[key, *(str(s.get(key, "–")) for s in settings)] for key in differing]
    if not all(run.config for run in runs):
        return ""
    return table(["setting", *(run.name for run in runs)], rows) if rows else "<p>The settings are the same.</p>"


def _tokens(runs):
    groups = []
    for run in runs:
        steps = sorted({record["step"] for record in run.tokens})
        of = f"{run.name}, iteration" if len(runs) > 1 else "Iteration"
        for step in steps[-1:] if len(runs) > 1 else steps:  # side by side, the ends are what compares
            groups.append((f"{of} {step}", [record for record in run.tokens if record["step"] == step]))
    explanation = (
        "<p>Responses of the rollouts; their score is the one that was paid. Hover a token for its numbers.</p>"
    )
    body = token_picture.picture(groups)
    return explanation + body if body else ""


def _samples(runs):
    """Completions of the same prompts side by side; columns that are the same in several runs appear once."""
    columns = {}  # {(policy, its {prompt: sample}): labels}
    for run in runs:
        policies = {}
        for sample in run.samples:  # a later evaluation's completions take the place of an earlier one's
            policies.setdefault(str(sample["stage"]), {})[conversation(sample["prompt"])] = sample
        order = [name for name in run.results if name in policies]  # as they were trained, before and after
        for policy in dict.fromkeys([*order, *policies]):
            found = policies[policy]
            key = policy, repr(sorted((prompt, sample["response"]) for prompt, sample in found.items()))
            columns.setdefault(key, (found, []))[1].append(f"{run.name} · {policy}" if len(runs) > 1 else policy)
    prompts = dict.fromkeys(prompt for found, _ in columns.values() for prompt in found)
    parts = []
    for prompt in prompts:
        sides = [_side(found[prompt], ", ".join(labels)) for found, labels in columns.values() if prompt in found]
        parts.append(
            f'<div class="sample"><p class="prompt" dir="auto">{escape(prompt)}</p>'
            f'<div class="sides">{"".join(sides)}</div></div>'
        )
    return "\n".join(parts)


def _side(sample, label):
    score = f" · score {show(sample['score'])}" if isinstance(sample.get("score"), (int, float)) else ""
    cut = "" if sample.get("finished", True) else " · cut at the limit"
    return (
        f'<div class="card side"><b>{escape(label)}</b><span class="soft">{escape(score + cut)}</span>'
        f'<p class="text" dir="auto">{escape(sample["response"])}</p></div>'
    )


def _figures(panels):
    figures = (f'<figure aria-label="{escape(title)}">{svg}</figure>' for title, svg in panels)
    return f'<div class="figures">{"".join(figures)}</div>'


def _stages(runs):
    """Where each stage ended: its last numbers, steps and seconds."""
    wanted = ["loss", "accuracy", "margin", "held_out_accuracy", "score", "kl", "skipped"]
    rows = []
    for run in runs:
        seconds = run.seconds()
        for stage in [*run.supervised, *(["rto"] if "rto" in run.stages else [])]:
            last = [values[-1] if values else None for values in (run.series(stage, key)[1] for key in wanted[:-1])]
            skipped = run.series(stage, "skipped")[1]
            lead = [run.name] * (len(runs) > 1) + [stage.replace("_", " ")]
            steps = len(run.stages[stage])
            rows.append(
                [
                    *lead,
                    show(steps),
                    f"{seconds.get(stage, 0.0):,.1f}",
                    *map(show, last),
                    show(sum(v for v in skipped if v == v)) if skipped else "–",
                ]
            )
    lead = ["run"] * (len(runs) > 1) + ["stage"]
    header = [*lead, "steps", "seconds", *(key.replace("_", " ") for key in wanted)]
    # Columns that no stage has a number for say nothing.
    used = [i for i in range(len(header)) if i < len(lead) or any(row[i] != "–" for row in rows)]
    return table([header[i] for i in used], [[row[i] for i in used] for row in rows], len(lead)) if rows else ""


def _configuration(runs):
    return "".join(
        f"<details><summary>{escape(run.name)}/config.yaml</summary><pre>{escape(run.config)}</pre></details>"
        for run in runs
        if run.config
    )
