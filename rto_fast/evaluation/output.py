"""The results of `python -m rto_fast.evaluate`: the table, and the JSON file."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from rto_fast.errors import ConfigError, UserError
from rto_fast.system.writing import check_target, write_file


def check_output(path: str | Path) -> None:
    """
    Raises:
        ConfigError: The file cannot be written; better said before hours of work.
    """
    try:
        check_target(path)
    except OSError as error:
        raise ConfigError(f"--output: {path} cannot be written ({error.strerror}); name a file") from None


def write_json(results: dict, path: str | Path) -> None:
    """Writes the results as JSON, with null for NaN.

    Raises:
        UserError: The file cannot be written.
    """
    plain = json.loads(json.dumps(results), parse_constant=lambda name: None)
    try:
        write_file(path, json.dumps(plain, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"--output: cannot write {path}: {error.strerror}") from None


def rows(results: dict) -> Iterator[tuple[str, dict, str]]:
    """Yields name, estimate and unit of everything that was measured, in the order of the table."""
    for name, sections in (("model", "responses"), ("reference", "reference_responses")):
        if part := results.get(sections):
            yield f"{name}: length", part["length"], "tokens"
            yield f"{name}: ended by itself", part["finished"], "%"
    for source, part in results["rewards"].items():
        for key, label, unit in (
            ("score", "mean score", ""),
            ("reference_score", "reference's mean score", ""),
            ("win_rate", "win rate over the reference", "%"),
            ("length_controlled_win_rate", "win rate, length controlled", "%"),
            ("preference_accuracy", "pairs ranked right", "%"),
        ):
            if key in part:
                yield f"{source}: {label}", part[key], unit
    if "dpo" in results:
        yield "DPO's implicit reward: pairs ranked right", results["dpo"]["preference_accuracy"], "%"
        yield "DPO's implicit reward: mean margin", results["dpo"]["margin"], "nats"
    for key, label in (("k1", "mean log-ratio (k1)"), ("k3", "k3")):
        if "kl" in results:
            yield f"KL to the reference: {label}", results["kl"][key], "nats"


def table(results: dict) -> str:
    """The results as text."""
    entries = list(rows(results))
    width = max([len(name) for name, *_ in entries], default=0) + 2
    lines = [f"{'':<{width}}{'mean':>9}   {'95 % interval':<18}{'unit':<7}{'n':>6}"]
    for name, estimate, unit in entries:
        scale, digits = (100, 1) if unit == "%" else (1, 3 if unit == "" else 2)
        value, low, high = (
            "-" if not math.isfinite(v) else f"{scale * v:.{digits}f}"
            for v in (estimate["value"], estimate["low"], estimate["high"])
        )
        lines.append(f"{name:<{width}}{value:>9}   {f'[{low}, {high}]':<18}{unit:<7}{estimate['count']:>6}")
    return "\n".join(lines)
