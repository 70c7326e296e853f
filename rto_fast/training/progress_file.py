"""Reads `progress.json`, the memory of a run, and refuses what the run cannot have written."""

import json
import math
import re
import secrets
from pathlib import Path
from typing import Any

from rto_fast.errors import CheckpointError

STAGES = ("sft", "reward_model", "dpo", "rto")
LOGS = ("metrics.jsonl", "samples.jsonl", "tokens.jsonl", "warnings.jsonl")
UNSTARTED = ".unstarted"  # a file that marks a run which cannot be resumed yet; the files beside it are that run's
CHECKPOINT = re.compile(rf"({'|'.join(STAGES)})-\d{{8,18}}")  # the name of a checkpoint's folder
RUN = re.compile(r"[0-9a-f]{16}")
LARGEST = 2**24  # bytes; the file has a few hundred


def new_run() -> str:
    """Makes a name for a run, by which it recognises what it wrote."""
    return secrets.token_hex(8)


def read_progress(path: Path) -> dict[str, Any]:
    """Reads the file.

    Returns:
        {"run": the run's name, "done": [stages], "points": [points, at least one]}, see `Checkpoints`.
    Raises:
        CheckpointError: it cannot be read, or `Checkpoints` did not write it.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would never end
            raise ValueError("it is not a file")
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"it is larger than {LARGEST:,} bytes")
        progress = json.loads(content)
        if not isinstance(progress, dict):
            raise ValueError(f"expected an object, got {type(progress).__name__}")
        progress = {"run": new_run()} | progress  # older versions wrote no name
        if fault := _fault(progress):
            raise ValueError(fault)
        return progress
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"--resume: {path} cannot be read ({reason}): nothing to go on from") from error


def is_number(value: object, at_least: float = -math.inf) -> bool:
    """Whether `value` is a finite number; JSON also has NaN and infinity."""
    if type(value) is int:
        return at_least <= value < 2**63
    return isinstance(value, float) and math.isfinite(value) and value >= at_least


def is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _fault(progress: dict[str, Any]) -> str | None:
    """Says what is wrong with the content; None if nothing is."""
    if not isinstance(progress["run"], str) or not RUN.fullmatch(progress["run"]):
        return '"run" is not the name of a run'
    done, points = progress.get("done"), progress.get("points")
    if not isinstance(done, list) or not all(stage in STAGES for stage in done):
        return f'"done" is not a list of stages ({", ".join(STAGES)})'
    if not isinstance(points, list) or not points:
        return '"points" is not a list of at least one point'
    for number, point in enumerate(points):
        if not isinstance(point, dict):
            return f"point {number} is not an object"
        if fault := _fault_of_point(point, is_first=number == 0):
            return f"point {number}: {fault}"
    return None


def _fault_of_point(point: dict[str, Any], is_first: bool) -> str | None:
    name, logs = point.get("checkpoint"), point.get("logs")
    if "checkpoint" not in point or is_first != (name is None):
        return '"checkpoint" is null for the first point, and a name for the others'
    if name is not None and not (isinstance(name, str) and CHECKPOINT.fullmatch(name)):
        return '"checkpoint" is not the name of one'
    if not isinstance(logs, dict) or not all(log in LOGS and is_count(size) for log, size in logs.items()):
        return '"logs" does not hold the sizes of logs'
    if not is_number(point.get("seconds"), at_least=0):
        return '"seconds" is not a number of seconds'
    if not ("best" in point and (point["best"] is None or is_number(point["best"]))):
        return '"best" is not a score'
    if not isinstance(point.get("unfinished", False), bool):
        return '"unfinished" is neither true nor false'
    return None
