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

What each is exactly is in `rto_fast.estimates`, `rto_fast.evaluation` and `rto_fast.evaluation.measure`.
"""

import functools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rto_fast.config import Config, DataConfig, ModelConfig, RolloutConfig, RTOConfig
from rto_fast.config.fields import Count, CountOr0, Location, Seed, Threads, Word, check_fields
from rto_fast.config.options import parse
from rto_fast.errors import ConfigError, UserError
from rto_fast.system.command_line import run_command
from rto_fast.system.terminal import say
from rto_fast.system.writing import check_target, own_descriptor, write_file


@dataclass
class EvaluateConfig:
    """What is measured, and how."""

    model: Location | None = None
    """Directory or hub id of the policy that is evaluated."""
    data: Location | None = None
    """Prompts: a file, a folder, the name of an HF dataset or `embedded:eval_prompts`; `name[test]` names a split."""
    prompts: Count = 256
    """Prompts used, the first of the data."""
    reward: Word | None = None
    """`module:function`, called with (prompts, responses) and the columns of the data that it names; GSM8K's exact-answer
    reward is rto_fast.rewards:gsm8k."""
    reward_model: Location | None = None
    """HF sequence classification model with one label, of any tokenizer. May be given beside `reward`."""
    reference: Location | None = None
    """The policy to win against, and of the KL; a model of the same vocabulary."""
    preferences: Location | None = None
    """Pairs (as `data`) on which the rewards' rankings are judged: such as no model was trained on."""
    held_out: CountOr0 = 0
    """Use only the pairs that a training run with this data.held_out kept out of `preferences`; 0: all pairs."""
    dpo_model: Location | None = None
    """Model trained with DPO, for its implicit reward."""
    dpo_reference: Location | None = None
    """The reference that `dpo_model` was trained against; default: `reference`."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    greedy: bool = False
    """Take the most likely token instead of sampling (temperature 0). The KL is then not estimated: it needs samples."""
    seed: Seed | None = None
    """Of sampling; default: that of the evaluations during training, the same for every policy."""
    output: Location | None = None
    """JSON file to write; `-` is stdout, and what is printed goes to stderr."""
    show: CountOr0 = 2
    """Responses printed."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of your columns where they are not detected, e.g. {"prompt": "question"}."""
    prompt_format: Literal["auto", "chat", "text"] = "auto"
    """See data.prompt_format of rto_fast.train."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """See data.thinking of rto_fast.train; auto looks at the responses of `preferences`, else of `data`."""
    max_prompt_tokens: Count = 1024
    """Longer prompts are left out."""
    max_response_tokens: Count = 1024
    """Longer responses of `preferences` are cut."""
    limit: Count | None = None
    """Read at most this many rows of `data` and of `preferences`."""
    tokenizer: Location | None = None
    """Directory or hub id of the tokenizer; default: the model's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU when there is one."""
    threads: Threads | None = None
    """CPU threads; default: torch's choice."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto is bfloat16 on a GPU, float32 on a CPU."""
    micro_batch_tokens: Count = 16384
    """Tokens in one forward pass."""
    trust_remote_code: bool = False
    """Allow a model directory to run its own Python code. Leave off for models you did not write."""

    def __post_init__(self) -> None:
        check_fields(self)

        def require(condition: object, key: str, expected: str) -> None:
            if not condition:
                raise ConfigError(f"--{key}: expected {expected}")

        require(self.model, "model", "the directory or hub id of the model to evaluate")
        require(self.data or self.preferences, "data", "prompts to respond to (or --preferences, to rank)")
        require(not self.reference or self.data or self.dpo_model, "reference", "--data: prompts to compare on")
        require(not self.dpo_model or self.preferences, "dpo_model", "--preferences beside it: pairs to rank")
        require(
            not self.dpo_model or self.dpo_reference or self.reference,
            "dpo_model",
            "--reference or --dpo_reference beside it: the model that its DPO started from",
        )
        require(not self.dpo_reference or self.dpo_model, "dpo_reference", "--dpo_model beside it")
        if self.preferences and not (self.reward or self.reward_model or self.dpo_model):
            raise ConfigError("--preferences: expected --reward, --reward_model or --dpo_model, which rank the pairs")
        self.as_config()

    def as_config(self) -> Config:
        """The part of a run's `Config` that the data and the rollout are made from; validates it."""
        data = DataConfig(
            preferences=self.preferences,
            eval_prompts=self.data,
            columns=self.columns,
            limit=self.limit,
            prompt_format=self.prompt_format,
            thinking=self.thinking,
            max_prompt_tokens=self.max_prompt_tokens,
            max_response_tokens=self.max_response_tokens,
            held_out=self.held_out,
        )
        return Config(
            model=ModelConfig(path=self.model),
            data=data,
            rollout=self.rollout,
            rto=RTOConfig(micro_batch_tokens=self.micro_batch_tokens),
        )


def load_options(arguments: list[str]) -> EvaluateConfig:
    """Parses and validates command-line `arguments`."""
    description = "Scores, win rates, preference accuracies and KL of a policy, with 95 % confidence intervals."
    return parse(EvaluateConfig, arguments, prog="python -m rto_fast.evaluate", description=description)


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
    run_command(main, interrupted="interrupted, nothing is written")


if __name__ == "__main__":
    command()
