"""`python -m rto_fast.plan`: how much memory each phase of a run takes, before anything is downloaded or run.

It needs no network, no GPU and no weights: of models it reads only their shapes.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rto_fast.config import Config, load_config
from rto_fast.config.fields import Count, Location, Word, check_fields
from rto_fast.config.help import Command
from rto_fast.config.options import own_arguments, parse
from rto_fast.system.command_line import as_command
from rto_fast.system.terminal import Styled, one_line, say, styled, wants_styles

if TYPE_CHECKING:  # imported after the options: --help and mistakes in them need no torch
    from rto_fast.planning.advice import Planner
    from rto_fast.planning.memory import Plan, StagePlan

COLUMNS = ("weights", "optimizer", "gradients", "activations", "kv", "workspace")
GIB = 1 << 30

PLAN = Command(
    "rto_fast.plan",
    "Predicts how much memory each phase of a run takes, and says what to change where it does not fit. It needs no "
    "network, no GPU and no weights. All options of `python -m rto_fast.train` work here too.",
    {
        "--config llama3_8b_ultrafeedback --gpus 8xH200": "the paper's main setting on eight GPUs",
        "--gpus cpu": "the embedded default on this machine's CPU",
        "--sft.model DIR --data.preferences pairs.jsonl": "your model and data on this machine",
    },
    switches=("json",),
)


@dataclass
class PlanOptions:
    """What is planned for, beside the run's configuration."""

    gpus: Word | None = None
    """The GPUs: 8xH200, 1xRTX4090 or cpu. Default: those of this machine."""
    model_shape: Location | None = None
    """Directory with a config.json, or known hub id, whose shape is taken for models that are not here."""
    examples: Count | None = None
    """Examples in the data. Default: data.limit, or what is known of the data."""
    json: bool = False
    """Print the plan as JSON."""

    def __post_init__(self) -> None:
        check_fields(self)


def as_json(plan: "Plan") -> dict:
    """The plan as plain values, sizes in bytes."""
    machine = plan.machine
    return {
        "machine": {
            "gpus": machine.count,
            "name": machine.gpu,
            "usable_bytes": machine.memory,
            "planned_bytes": machine.planned,
        },
        "model": dataclasses.asdict(plan.shape),
        "setting": dataclasses.asdict(plan.setting),
        "fits": plan.fits,
        "peak": plan.peak.title,
        "phases": [
            {"stage": p.stage, "phase": p.name, "total": p.memory.total} | dataclasses.asdict(p.memory)
            for p in plan.phases
        ],
        "stages": [
            {
                "stage": s.name,
                "steps": s.steps,
                "checkpoint_bytes": s.checkpoint_bytes,
                "model_bytes": s.model_bytes,
                "training_tokens": s.budget.training,
                "scoring_tokens": s.budget.scoring,
            }
            for s in plan.stages
        ],
    }


def _gib(size: float) -> str:
    size /= GIB
    return "-" if not size else f"{size:.2f}" if size < 10 else f"{size:.1f}"


def _bold(text: str) -> Styled:
    return styled(text, "1") if wants_styles() else Styled(text)


def table(plan: "Plan") -> Styled:
    """The plan as text."""
    from rto_fast.planning.budgets import described

    setting, shape, machine = plan.setting, plan.shape, plan.machine
    dtype = "float32" if setting.itemsize == 4 else "bfloat16"
    process = "GPU" if setting.gpu else "process"
    has_host = any(phase.memory.host for phase in plan.phases)
    titles = [*COLUMNS, "total", *["host"] * has_host]
    lines = [
        f"{one_line(shape.name)}: {shape.parameters:,} parameters in {dtype}, on {machine} of {_gib(machine.memory)} GiB "
        "usable",
        f"ZeRO {setting.zero}, frozen models {setting.frozen}, gradient checkpointing "
        + ("on" if setting.checkpointing else "off"),
        "",
        f"{'GiB a ' + process:<19}" + "".join(f"{title:>12}" for title in titles),
    ]
    for phase in plan.phases:
        line = f"{phase.title:<19}" + "".join(f"{_gib(getattr(phase.memory, title)):>12}" for title in titles)
        lines.append(_bold(f"{line}  ← peak") if phase is plan.peak else line)
    verdict = "fits" if plan.fits else "does NOT fit"
    share = f"{_gib(plan.peak.memory.total)} of {_gib(machine.memory)} GiB"
    lines += ["", _bold(f"{verdict}: {share} a {process} in {plan.peak.title}"), ""]
    return Styled("\n").join([*lines, described(plan.budgets, plan), *map(_stage_line, plan.stages)])


def _stage_line(stage: "StagePlan") -> str:
    unit = "iterations" if stage.name == "rto" else "steps"
    steps = "?" if stage.steps is None else f"{stage.steps:,}"
    sizes = f"a checkpoint takes {_gib(stage.checkpoint_bytes)} GiB, the result {_gib(stage.model_bytes)} GiB"
    return f"{stage.name:<13}{steps:>7} {unit}; on the disk {sizes}"


def advice(config: Config, plan: "Plan", planner: "Planner") -> str:
    """What to change where the run does not fit."""
    from rto_fast.planning.advice import enough_machines, fitting, single_changes

    total, lines = plan.peak.memory.total, ["what each change alone saves, in GiB:"]
    for alternative in single_changes(config, plan, planner):
        fits = "  fits" if alternative.plan.fits else ""
        lines.append(f"  {_gib(total - alternative.plan.peak.memory.total):>6}  {alternative}{fits}")
    lines.append("")
    if found := fitting(config, plan, planner):
        lines.append("what fits, the fewest changes first (GiB at the peak, changes):")
        lines += [f"  {_gib(other.plan.peak.memory.total):>6}  {other}" for other in found[:4]]
    elif plan.machine.gpu and (more := enough_machines(config, plan, planner)):
        also = f" with {more}" if more.changes else ""
        lines.append(f"nothing fits here; {more.plan.machine} would do{also}")
    else:
        lines.append("nothing that is known fits: take a smaller model, or shorter sequences")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> "Plan":
    """Prints the plan of a run, and returns it."""
    own, rest = own_arguments(PlanOptions, sys.argv[1:] if arguments is None else list(arguments), PLAN)
    options = parse(PlanOptions, own, PLAN)
    config = load_config(rest, lambda text: None if options.json else say(text), beside=vars(options))
    from rto_fast.planning.machine import Machine, local_machine, parse_machine
    from rto_fast.planning.phases import make_plan

    def planner(config: Config, machine: Machine) -> "Plan":
        return make_plan(config, machine, model_shape=options.model_shape, examples=options.examples)

    plan = planner(config, parse_machine(options.gpus) if options.gpus else local_machine(config.device))
    if options.json:
        say(json.dumps(as_json(plan), indent=2))
        return plan
    say(table(plan))
    if not plan.fits:
        say("\n" + advice(config, plan, planner))
    return plan


def command() -> None:
    with as_command(only_prints=True):
        main()


if __name__ == "__main__":
    command()
