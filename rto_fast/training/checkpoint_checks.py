"""Refuses what a run cannot have written: a `progress.json`, the memory of a run, and the state of a trainer."""

import json
import math
import re
import secrets
from pathlib import Path
from typing import Any

import torch

from rto_fast.errors import CheckpointError

STAGES = ("sft", "reward_model", "dpo", "rto")
LOGS = ("metrics.jsonl", "samples.jsonl", "tokens.jsonl", "warnings.jsonl")
CHECKPOINT = re.compile(rf"({'|'.join(STAGES)})-\d{{8,18}}")  # the name of a checkpoint's folder
RUN = re.compile(r"[0-9a-f]{16}")
LARGEST = 2**24  # bytes; the file has a few hundred


def new_run() -> str:
    """Makes a name for a run, by which it recognises what it wrote."""
    return secrets.token_hex(8)


def read_progress(path: Path) -> dict[str, Any]:
    """Reads the file.

    Returns:
        {"run": the run's name, "budgets": {stage: fields of a `TokenBudget`}, "done": [stages],
        "points": [points, at least one]}, see `Checkpoints`.
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
        progress = {"run": new_run(), "budgets": {}} | progress  # older versions wrote neither
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
    run, budgets, done, points = progress["run"], progress["budgets"], progress.get("done"), progress.get("points")
    for is_right, fault in (
        (isinstance(run, str) and RUN.fullmatch(run), '"run" is not the name of a run'),
        (
            isinstance(budgets, dict) and all(stage in STAGES and _is_budget(b) for stage, b in budgets.items()),
            '"budgets" does not hold the tokens of a pass in each stage',
        ),
        (
            isinstance(done, list) and all(stage in STAGES for stage in done),
            f'"done" is not a list of stages ({", ".join(STAGES)})',
        ),
        (isinstance(points, list) and points, '"points" is not a list of at least one point'),
    ):
        if not is_right:
            return fault
    for number, point in enumerate(points or []):
        if not isinstance(point, dict):
            return f"point {number} is not an object"
        if fault := _fault_of_point(point, is_first=number == 0):
            return f"point {number}: {fault}"
    return None


def _is_budget(values: object) -> bool:
    if not isinstance(values, dict) or values.keys() != {"training", "scoring", "bound"}:
        return False
    return all(
        (is_count(tokens) and tokens > 0) or (tokens is None and name == "bound") for name, tokens in values.items()
    )


def _fault_of_point(point: dict[str, Any], is_first: bool) -> str | None:
    name, logs, best = point.get("checkpoint"), point.get("logs"), point.get("best")
    for is_right, fault in (
        (
            "checkpoint" in point and is_first == (name is None),
            '"checkpoint" is null for the first point, and a name for the others',
        ),
        (
            name is None or (isinstance(name, str) and CHECKPOINT.fullmatch(name)),
            '"checkpoint" is not the name of one',
        ),
        (
            isinstance(logs, dict) and all(log in LOGS and is_count(size) for log, size in logs.items()),
            '"logs" does not hold the sizes of logs',
        ),
        (is_number(point.get("seconds"), at_least=0), '"seconds" is not a number of seconds'),
        ("best" in point and (best is None or is_number(best)), '"best" is not a score'),
        (isinstance(point.get("unfinished", False), bool), '"unfinished" is neither true nor false'),
    ):
        if not is_right:
            return fault
    return None


def find_misfit(state: object, own: object, place: str = "") -> str | None:
    """Says what is wrong with `state`, or returns None.

    Args:
        state: as `load_state` returns it.
        own: the trainer's present state, of the same structure, with a function in the place of a tensor that is gathered
            from all ranks. Keys that only one of the two has are left to `load_state_dict`.
        place: the path of `state` in the whole, for the message.
    """
    if isinstance(own, dict):
        if not isinstance(state, dict):
            return _expected(place, "names and values", state)
        for key, value in state.items():
            inner = f"{place}.{key}".removeprefix(".")
            # Moments exist after the first step only; they have the weights' names and shapes.
            like = own[key] if key in own else own.get("weights", value)
            if misfit := find_misfit(value, like, inner):
                return misfit
        return None
    if callable(own) or isinstance(own, torch.Tensor):
        return _misfit_of_tensor(state, own if isinstance(own, torch.Tensor) else None, place)
    if isinstance(own, str):
        return None if isinstance(state, str) else _expected(place, "text", state)
    if isinstance(own, int):
        return None if is_count(state) else _expected(place, "a count", state)
    if isinstance(own, float):
        return None if is_number(state, at_least=0) else _expected(place, "a finite number of at least 0", state)
    return None


def _misfit_of_tensor(state: object, own: torch.Tensor | None, place: str) -> str | None:
    if not isinstance(state, torch.Tensor):
        return _expected(place, "a tensor", state)
    if own is not None and state.shape != own.shape:
        return f"{place}: expected shape {tuple(own.shape)}, got {tuple(state.shape)}"
    if not state.is_floating_point():
        return _expected(place, "a tensor of floating-point numbers", state.dtype)
    return None if state.isfinite().all() else f"{place}: it has numbers that are not finite"


def _expected(place: str, what: str, got: object) -> str:
    text = repr(got) if isinstance(got, (int, float, str)) else type(got).__name__
    return f"{place}: expected {what}, got {text[:40]}"
