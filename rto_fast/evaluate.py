"""`python -m rto_fast.evaluate`: how good a policy is, by every measure at hand, each with its 95 % confidence interval.

    python -m rto_fast.evaluate --model runs/default/rto --reference runs/default/sft --data embedded:eval_prompts \\
        --reward rto_fast.data.world:gold_reward --rollout.max_new_tokens 60 --output evaluation.json

| given                        | measured                                                                        |
|------------------------------|---------------------------------------------------------------------------------|
| model, data                  | length of the responses, share that ended                                       |
| reward and/or reward_model   | mean score of the responses                                                     |
| … and reference              | win rate over the reference's responses to the same prompts, ties half;         |
|                              | the same with length controlled for                                             |
| reference                    | KL(model ‖ reference)                                                           |
| preferences, and a reward    | share of the pairs that the reward ranks right, ties half                       |
| preferences, and dpo_model   | the same of the implicit reward Σ log(π_dpo/π_ref) over a response              |

`rto_fast.estimates` and `rto_fast.evaluation` say what each is exactly.
"""

import functools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

from rto_fast.config.help import Command
from rto_fast.config.options import parse
from rto_fast.errors import ConfigError, UserError
from rto_fast.evaluation.options import EvaluateConfig
from rto_fast.system.command_line import as_command
from rto_fast.system.terminal import say
from rto_fast.system.writing import check_target, own_descriptor, write_file

EVALUATE = Command(
    "rto_fast.evaluate",
    "Measures how good a policy is on held-out prompts: scores, win rates, preference accuracies and KL, each with its 95 % "
    "confidence interval.",
    {
        "--model runs/own/rto --reference runs/own/sft --data prompts.jsonl --reward_model runs/own/reward_model": "mean "
        "score, win rate over the SFT model and KL to it",
        "--model DIR --data questions.jsonl --reward rto_fast.rewards:gsm8k": "exact answers, judged by a function",
        "--preferences pairs.jsonl --model DIR --reward_model DIR": "the share of pairs that a reward model ranks right",
    },
)


def load_options(arguments: list[str]) -> EvaluateConfig:
    """Parses and validates command-line `arguments`."""
    return parse(EvaluateConfig, arguments, EVALUATE)


def check_output(path: str | Path) -> None:
    """Refuses, before hours of work, a file that cannot be written."""
    try:
        check_target(path)
    except OSError as error:
        raise ConfigError(f"--output: {path} cannot be written ({error.strerror}); name a file") from None


def write_json(results: dict, path: str | Path) -> None:
    """Writes results as `write_file` does. JSON has no NaN, it becomes null."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    try:
        write_file(path, json.dumps(plain(results), indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"--output: cannot write {path}: {error.strerror}") from None


def rows(results: dict) -> Iterator[tuple[str, dict, str]]:
    """(name, estimate, unit) of everything that was measured, in the order of the table."""
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


def main(arguments: list[str] | None = None) -> dict:
    """Measures what the options ask for; prints the table, writes the JSON, returns the results."""
    options = load_options(sys.argv[1:] if arguments is None else list(arguments))
    if options.output and options.output != "-":
        check_output(options.output)
    from rto_fast.evaluation.measure import measure  # after the options: --help and mistakes in them need no torch

    output = "/dev/stdout" if options.output == "-" else options.output
    is_stdout = output is not None and own_descriptor(output) == 1
    tell = functools.partial(say, err=is_stdout)
    results = measure(options, say=tell)
    tell("\n" + table(results))
    if output:
        write_json(results, output)
        tell(f"\nwritten to {options.output}")
    return results


def command() -> None:
    with as_command(interrupted="interrupted, nothing is written"):
        main()


if __name__ == "__main__":
    command()
