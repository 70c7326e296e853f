"""Writes a run's report: report.html, which needs no other file, and its figures as PNG beside it."""

import re
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import yaml

from rto_fast.errors import DataError
from rto_fast.reporting import draw, figures, token_picture
from rto_fast.reporting.markup import conversation, escape, show, table
from rto_fast.reporting.metric_names import (
    ACCURACY,
    FINISHED,
    HELD_OUT_ACCURACY,
    KL,
    LOSS,
    MARGIN,
    SCORE,
    SKIPPED,
    STANDARD_ERROR,
)
from rto_fast.reporting.run_files import EVALUATION, Record, RunFiles, number, read_runs
from rto_fast.system.progress import progress
from rto_fast.system.writing import check_own, check_target, is_file, own_folder, write_file, write_own


def write_report(folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Writes the report of a run, or one page that compares several.

    Args:
        folders: the runs' output folders.
        output: the page's file; by default report.html in the run's folder, or compare.html in the first of several runs.
            The PNG files go into figures/ beside report.html and into NAME_figures/ beside another file. A pipe or a device
            gets none.
    Returns:
        The path of the page.
    Raises:
        DataError: a folder holds no run, or the page cannot be written.
    """
    runs = read_runs(folders)
    path = Path(output) if output else runs[0].folder / ("report.html" if len(runs) == 1 else "compare.html")
    pictures = path.parent / ("figures" if path.stem == "report" else f"{path.stem}_figures")
    drawn: list[tuple[str, list[tuple[str, str]]]] = []
    try:
        if output:
            write: Callable[[Path, str | bytes], None] = write_file
            has_pictures = is_file(path)
            check_target(path)
            if has_pictures:
                pictures.mkdir(parents=True, exist_ok=True)
        else:
            write, has_pictures = write_own, True
            check_own(path)
            own_folder(pictures)
        sections = figures.sections(runs)
        with progress("drawing the report", sum(len(panels) for _, panels in sections), "figures") as phase:
            for title, panels in sections:
                shown = []
                for panel in panels:
                    svg, png = draw.render(panel)
                    shown.append((panel.title, svg))
                    if has_pictures:
                        write(pictures / f"{_file_name(panel.slug)}.png", png)
                    phase.advance()
                drawn.append((title, shown))
        write(path, page(runs, drawn))
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be written ({error.strerror}); see --output") from error
    return path


def _file_name(slug: str) -> str:
    """A plain file name: stages and metrics in metrics.jsonl may have any name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", slug).lstrip(".")[:120]


def page(runs: Sequence[RunFiles], drawn: Sequence[tuple[str, list[tuple[str, str]]]]) -> str:
    """The whole HTML page.

    Args:
        runs: the runs, of which the first is the one that others are compared with.
        drawn: the sections of figures, each a title and the (title, SVG) of its panels.
    """
    names = " against ".join(run.name for run in runs)
    sections = [
        ("Policies", _policies(runs)),
        ("Health", _health(runs)),
        ("What differs", _differences(runs) if len(runs) > 1 else ""),
        ("Which tokens earned what", _tokens(runs)),
        ("Before and after", _samples(runs)),
        *((title, _figures(panels)) for title, panels in drawn),
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


def _resource(name: str) -> str:
    return resources.files("rto_fast.reporting").joinpath(name).read_text(encoding="utf-8")


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower())


def _summary(runs: Sequence[RunFiles]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs compared · rto-fast"
    run = runs[0]
    seconds = sum(run.seconds().values())
    stages = ", ".join(name for name in run.stages if not name.startswith(EVALUATION))
    return f"{stages.replace('_', ' ')} · {seconds:,.1f} s · rto-fast"


def _policies(runs: Sequence[RunFiles]) -> str:
    """The table of policies: all numbers of results.json. The score has its standard error, and the best is bold."""
    rows = [(run, name, values) for run in runs for name, values in run.results.items()]
    if not rows:
        return ""
    keys = list(
        dict.fromkeys(key for *_, values in rows for key, v in values.items() if not isinstance(v, (dict, list)))
    )
    shown = [key for key in keys if key != STANDARD_ERROR and any(v.get(key) is not None for *_, v in rows)]
    cells = []
    for run, name, values in rows:
        line = [run.name] * (len(runs) > 1) + [name]
        for key in shown:
            error = values.get(STANDARD_ERROR) if key == SCORE else None
            cell = show(values.get(key))
            if key == FINISHED and number(values.get(key)) == values.get(key):
                cell = f"{100 * values[key]:.1f} %"
            line.append(f"{cell} ± {show(error)}" if isinstance(error, (int, float)) else cell)
        cells.append(line)
    lead = ["run"] * (len(runs) > 1) + ["policy"]
    scores = [number(values.get(SCORE)) for *_, values in rows]
    scores = [score if score == score else float("-inf") for score in scores]
    best = {(scores.index(max(scores)), len(lead) + shown.index(SCORE))} if SCORE in shown and len(rows) > 1 else set()
    explanation = '<p class="soft">Judged on the same held-out prompts; score ± its standard error.</p>'
    return table([*lead, *(key.replace("_", " ") for key in shown)], cells, names=len(lead), best=best) + explanation


def _health(runs: Sequence[RunFiles]) -> str:
    """The table of warnings: when each held, what was wrong and what to do about it."""
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


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a tree of settings: {key with dots: value}."""
    if not isinstance(tree, dict) or not tree:
        return {prefix.removesuffix("."): tree}
    return {key: value for name, part in tree.items() for key, value in _flat(part, f"{prefix}{name}.").items()}


def _differences(runs: Sequence[RunFiles]) -> str:
    """The table of the settings in which the runs differ."""
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


def _tokens(runs: Sequence[RunFiles]) -> str:
    groups = []
    for run in runs:
        steps = sorted({record["step"] for record in run.tokens})
        of = f"{run.name}, iteration" if len(runs) > 1 else "Iteration"
        for step in steps[-1:] if len(runs) > 1 else steps:  # of several runs only the last records are compared
            groups.append((f"{of} {step}", [record for record in run.tokens if record["step"] == step]))
    explanation = (
        "<p>Responses of the rollouts; their score is the one that was paid. Hover a token for its numbers.</p>"
    )
    body = token_picture.picture(groups)
    return explanation + body if body else ""


def _samples(runs: Sequence[RunFiles]) -> str:
    """Responses to the same prompts side by side. A column that is the same in several runs appears once."""
    columns: dict[tuple[str, str], tuple[dict[str, Record], list[str]]] = {}  # the value: {prompt: sample}, labels
    for run in runs:
        policies: dict[str, dict[str, Record]] = {}
        for sample in run.samples:  # those of a later evaluation replace those of an earlier one
            policies.setdefault(str(sample["stage"]), {})[conversation(sample["prompt"])] = sample
        order = [name for name in run.results if name in policies]  # the order of training
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


def _side(sample: Record, label: str) -> str:
    score = f" · score {show(sample['score'])}" if isinstance(sample.get("score"), (int, float)) else ""
    cut = "" if sample.get("finished", True) else " · cut at the limit"
    return (
        f'<div class="card side"><b>{escape(label)}</b><span class="soft">{escape(score + cut)}</span>'
        f'<p class="text" dir="auto">{escape(sample["response"])}</p></div>'
    )


def _figures(panels: Sequence[tuple[str, str]]) -> str:
    figures = (f'<figure aria-label="{escape(title)}">{svg}</figure>' for title, svg in panels)
    return f'<div class="figures">{"".join(figures)}</div>'


def _stages(runs: Sequence[RunFiles]) -> str:
    """The table of stages: their steps, seconds and last metrics."""
    wanted = [LOSS, ACCURACY, MARGIN, HELD_OUT_ACCURACY, SCORE, KL, SKIPPED]
    rows = []
    for run in runs:
        seconds = run.seconds()
        for stage in [*run.supervised, *(["rto"] if "rto" in run.stages else [])]:
            last = [values[-1] if values else None for values in (run.series(stage, key)[1] for key in wanted[:-1])]
            skipped = run.series(stage, SKIPPED)[1]
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
    # Columns without a number are left out.
    used = [i for i in range(len(header)) if i < len(lead) or any(row[i] != "–" for row in rows)]
    return table([header[i] for i in used], [[row[i] for i in used] for row in rows], len(lead)) if rows else ""


def _configuration(runs: Sequence[RunFiles]) -> str:
    return "".join(
        f"<details><summary>{escape(run.name)}/config.yaml</summary><pre>{escape(run.config)}</pre></details>"
        for run in runs
        if run.config
    )
