"""A run's folder as the report reads it: whatever is there, however the run ended."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from rto_fast.errors import DataError

EVALUATION = "eval_"  # the stages of evaluations: eval_SFT, eval_RTO


@dataclass
class RunFiles:
    folder: Path
    name: str
    # {stage: {step: {metric: number}}} in the order of the file; a step's later records add to it
    stages: dict[str, dict[int, dict[str, float]]]
    results: dict[str, dict] = field(default_factory=dict)  # {policy: its evaluation}
    samples: list[dict] = field(default_factory=list)
    tokens: list[dict] = field(default_factory=list)
    warnings: list[dict] | None = None  # None: the run was not checked
    config: str = ""
    notes: list[str] = field(default_factory=list)  # what is missing or could not be read

    @property
    def supervised(self):
        return [name for name in self.stages if name != "rto" and not name.startswith(EVALUATION)]

    def series(self, stage, metric):
        """(steps, values) of the steps at which the metric was recorded; NaN where it was not finite."""
        steps = sorted(self.stages.get(stage, {}).items())
        pairs = [(step, record[metric]) for step, record in steps if metric in record]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def metrics(self, stage):
        """Names of a stage's metrics, in the order in which they first appear."""
        return list(dict.fromkeys(name for record in self.stages.get(stage, {}).values() for name in record))

    def seconds(self):
        """{stage: wall-clock seconds}: each record's time since the one before it, given to its stage."""
        records = [(name, record) for name, steps in self.stages.items() for record in steps.values()]
        timed = [
            (record["seconds"], name) for name, record in records if math.isfinite(record.get("seconds", math.nan))
        ]
        totals, before = {}, 0.0
        for seconds, name in sorted(timed):
            totals[name] = totals.get(name, 0.0) + seconds - before
            before = seconds
        return totals


def read_run(folder):
    """Reads a run's folder.

    Raises:
        DataError: there is no run in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the output_dir of a run")
    if not (folder / "metrics.jsonl").is_file():
        raise DataError(f"{folder}: no metrics.jsonl in it; give the output_dir of a run that has begun training")
    notes = []
    stages = _stages(read_records(folder / "metrics.jsonl", notes))
    if not stages:
        raise DataError(f"{folder / 'metrics.jsonl'}: no record of a training step in it")
    run = RunFiles(folder, folder.resolve().name or str(folder), stages, notes=notes)
    run.results = _results(folder / "results.json", notes)
    samples = [s for s in read_records(folder / "samples.jsonl", notes) if {"stage", "prompt", "response"} <= set(s)]
    run.samples = [_plain(sample) for sample in samples]
    run.tokens = _latest(read_records(folder / "tokens.jsonl", notes))
    if (folder / "warnings.jsonl").is_file():
        run.warnings = _warnings(read_records(folder / "warnings.jsonl", notes))
    if (folder / "config.yaml").is_file():
        run.config = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
    return run


def read_runs(folders):
    """Reads runs and gives them names that differ: a folder's name, with as many of its parents as it takes."""
    runs = [read_run(folder) for folder in folders]
    paths = [run.folder.resolve() for run in runs]
    if len(set(paths)) < len(paths):
        raise DataError("a run cannot be compared with itself; give different folders")
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    for run, name in zip(runs, names):
        run.name = name
    return runs


def read_records(path, notes):
    """The objects of a JSON Lines file. A line that is none (an interrupted run's last one) is counted in `notes`, not
    fatal."""
    if not path.is_file():
        return []
    records, bad = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            bad += 1
    if bad:
        notes.append(f"{path.name}: {bad} line{'s' * (bad > 1)} could not be read")
    return records


def _stages(records):
    stages = {}
    for record in records:
        stage, step = record.get("stage"), number(record.get("step"))
        if isinstance(stage, str) and math.isfinite(step):
            # null stands for NaN and infinity, which JSON does not have.
            values = {k: number(v) for k, v in record.items() if k not in ("stage", "step") and not isinstance(v, str)}
            stages.setdefault(stage, {}).setdefault(int(step), {}).update(values)
    return stages


def _plain(record):
    """The record with its numbers as floats, NaN where they are not finite."""
    return {k: number(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else v for k, v in record.items()}


def number(value):
    """A finite float, or NaN for anything else."""
    try:
        value = float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:  # an integer beyond floats
        return math.nan
    return value if math.isfinite(value) else math.nan


def _results(path, notes):
    if not path.is_file():
        notes.append("no results.json: the run was interrupted, or there was nothing to judge its policies by")
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        return {name: _plain(values) for name, values in results.items() if isinstance(values, dict)}
    except (ValueError, RecursionError, AttributeError):
        notes.append("results.json could not be read")
        return {}


def _warnings(records):
    """What was wrong, since which step, until which (None: to the end), and what to do; in the order of the file."""
    found = []
    for record in records:
        step, key = number(record.get("step")), (record.get("stage"), record.get("name"))
        if not math.isfinite(step):
            continue
        if record.get("over") is True:
            for warning in found:
                if warning["key"] == key and warning["until"] is None:
                    warning["until"] = int(step)
        elif all(isinstance(record.get(field), str) for field in ("stage", "name", "what", "remedy")):
            found.append(_plain(record) | {"key": key, "since": int(step), "until": None})
    return found


TOKEN_NUMBERS = ("dpo_reward", "kl_penalty", "score_reward", "advantage", "value")


def _latest(records):
    """Token records whose lists fit together, the last of each step and index (a resumed run may repeat some)."""
    latest = {}
    for record in records:
        tokens = record.get("tokens")
        columns = [record.get(name) for name in TOKEN_NUMBERS]
        if isinstance(tokens, list) and all(isinstance(c, list) and len(c) == len(tokens) for c in columns):
            clean = {name: [number(v) for v in column] for name, column in zip(TOKEN_NUMBERS, columns)}
            key = number(record.get("step")), number(record.get("index"))
            if all(map(math.isfinite, key)):
                latest[key] = _plain(record) | clean | {"step": int(key[0]), "tokens": [str(token) for token in tokens]}
    return [latest[key] for key in sorted(latest)]
