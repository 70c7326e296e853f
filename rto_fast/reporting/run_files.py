"""Reads a run's folder for the report: whatever is there, however the run ended."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rto_fast.errors import DataError
from rto_fast.reporting.metric_names import ADVANTAGE, DPO_REWARD, KL_PENALTY, SCORE_REWARD, SECONDS, VALUE

# The most bytes that are read of a log and of another file of a run, so that a damaged file cannot fill the memory. A log of
# a million steps has less than half a GiB.
LARGEST, LARGEST_TEXT = 2**30, 2**24
LONGEST_LINE = 2**26
EVALUATION = "eval_"  # with this begin the stages of evaluations, such as eval_SFT

Record = dict[str, Any]  # an object of a JSON Lines file
Series = tuple[Sequence[float], Sequence[float]]  # steps and values


@dataclass
class RunFiles:
    """What the files of a run hold."""

    folder: Path
    name: str
    # {stage: {step: {metric: number}}} in the order of the file; several records of a step are merged
    stages: dict[str, dict[int, dict[str, float]]]
    results: dict[str, Record] = field(default_factory=dict)  # {policy: its evaluation}
    samples: list[Record] = field(default_factory=list)
    tokens: list[Record] = field(default_factory=list)
    warnings: list[Record] | None = None  # None where the run was not checked
    config: str = ""  # the text of config.yaml
    notes: list[str] = field(default_factory=list)  # what is missing or could not be read

    @property
    def supervised(self) -> list[str]:
        """The stages but RTO and evaluations, in order."""
        return [name for name in self.stages if name != "rto" and not name.startswith(EVALUATION)]

    def series(self, stage: str, metric: str) -> Series:
        """The steps at which the metric was recorded, and its values there, NaN where it was not finite."""
        steps = sorted(self.stages.get(stage, {}).items())
        pairs = [(step, record[metric]) for step, record in steps if metric in record]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def metrics(self, stage: str) -> list[str]:
        """Names of a stage's metrics, in the order in which they first appear."""
        return list(dict.fromkeys(name for record in self.stages.get(stage, {}).values() for name in record))

    def seconds(self) -> dict[str, float]:
        """{stage: wall-clock seconds}. The time between two records belongs to the stage of the later one."""
        records = [(name, record) for name, steps in self.stages.items() for record in steps.values()]
        timed = [(record[SECONDS], name) for name, record in records if math.isfinite(record.get(SECONDS, math.nan))]
        totals: dict[str, float] = {}
        before = 0.0
        for seconds, name in sorted(timed):
            totals[name] = totals.get(name, 0.0) + seconds - before
            before = seconds
        return totals


def read_run(folder: str | Path) -> RunFiles:
    """Reads a run's folder.

    Raises:
        DataError: the folder holds no run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the output_dir of a run")
    if not (folder / "metrics.jsonl").is_file():
        raise DataError(f"{folder}: no metrics.jsonl in it; give the output_dir of a run that has begun training")
    notes: list[str] = []
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
        run.config = read_text(folder / "config.yaml", notes)
    return run


def read_runs(folders: Sequence[str | Path]) -> list[RunFiles]:
    """Reads runs and gives them names that differ: the folder's name behind as many of its parents as that takes.

    Raises:
        DataError: a folder holds no run, or appears twice.
    """
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


def read_text(path: Path, notes: list[str]) -> str:
    """The text of a file. Of one larger than `LARGEST_TEXT` only the beginning is read, and `notes` gets a line about it."""
    with open(path, "rb") as file:
        content = file.read(LARGEST_TEXT + 1)
    if len(content) > LARGEST_TEXT:
        notes.append(f"{path.name}: of {path.stat().st_size:,} bytes the first {LARGEST_TEXT:,} were read")
    return content[:LARGEST_TEXT].decode("utf-8", errors="replace")


def read_lines(path: Path, notes: list[str]) -> Iterator[str]:
    """The lines of a log, split after `LONGEST_LINE` bytes. Of a log larger than `LARGEST` only the beginning is read, and
    `notes` gets a line about it."""
    left = LARGEST
    with open(path, "rb") as file:
        while left > 0 and (line := file.readline(min(left, LONGEST_LINE))):
            left -= len(line)
            yield line.decode("utf-8", errors="replace")
    if path.stat().st_size > LARGEST:
        notes.append(f"{path.name}: of {path.stat().st_size:,} bytes the first {LARGEST:,} were read")


def read_records(path: Path, notes: list[str]) -> list[Record]:
    """The objects of a JSON Lines file, none where there is no file. Other lines, such as the last one of a run that was
    killed, are skipped, and `notes` gets a line with their number."""
    if not path.is_file():
        return []
    records, bad = [], 0
    for line in read_lines(path, notes):
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


def _stages(records: list[Record]) -> dict[str, dict[int, dict[str, float]]]:
    stages: dict[str, dict[int, dict[str, float]]] = {}
    for record in records:
        stage, step = record.get("stage"), number(record.get("step"))
        if isinstance(stage, str) and math.isfinite(step):
            # null stands for NaN and infinity, which JSON does not have.
            values = {k: number(v) for k, v in record.items() if k not in ("stage", "step") and not isinstance(v, str)}
            stages.setdefault(stage, {}).setdefault(int(step), {}).update(values)
    return stages


def _plain(record: Record) -> Record:
    """The record with its numbers as floats, NaN where they are not finite."""
    return {k: number(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else v for k, v in record.items()}


def number(value: object) -> float:
    """The value as a finite float; NaN for anything else."""
    try:
        found = float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:  # an integer beyond floats
        return math.nan
    return found if math.isfinite(found) else math.nan


def _results(path: Path, notes: list[str]) -> dict[str, Record]:
    if not path.is_file():
        notes.append("no results.json: the run was interrupted, or there was nothing to judge its policies by")
        return {}
    try:
        results = json.loads(read_text(path, notes))
        return {name: _plain(values) for name, values in results.items() if isinstance(values, dict)}
    except (ValueError, RecursionError, AttributeError):
        notes.append("results.json could not be read")
        return {}


def _warnings(records: list[Record]) -> list[Record]:
    """The warnings in the order of the file, each with the first step (`since`) and the last step (`until`; None for the end
    of the run) for which it held."""
    found: list[Record] = []
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


TOKEN_NUMBERS = (DPO_REWARD, KL_PENALTY, SCORE_REWARD, ADVANTAGE, VALUE)


def _latest(records: list[Record]) -> list[Record]:
    """Token records whose lists fit together, the last one of each step and index: a resumed run may repeat some."""
    latest = {}
    for record in records:
        tokens = record.get("tokens")
        columns: list[Any] = [record.get(name) for name in TOKEN_NUMBERS]
        if isinstance(tokens, list) and all(isinstance(c, list) and len(c) == len(tokens) for c in columns):
            clean = {name: [number(v) for v in column] for name, column in zip(TOKEN_NUMBERS, columns)}
            key = number(record.get("step")), number(record.get("index"))
            if all(map(math.isfinite, key)):
                latest[key] = _plain(record) | clean | {"step": int(key[0]), "tokens": [str(token) for token in tokens]}
    return [latest[key] for key in sorted(latest)]
