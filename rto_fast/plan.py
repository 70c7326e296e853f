"""`python -m rto_fast.plan --config X --gpus 8xH200`: memory and time of each phase, before anything is downloaded or run.

Needs no network, no GPU and no weights: of models only their shapes. Options besides these are those of a run.
"""

import argparse
import dataclasses
import json
import sys

from rto_fast.config import load_config
from rto_fast.config.fields import Count, Location
from rto_fast.config.options import argument
from rto_fast.system.command_line import as_command
from rto_fast.system.progress import duration
from rto_fast.system.terminal import ArgumentParser, Styled, one_line, say, styled, wants_styles

COLUMNS = ("weights", "optimizer", "gradients", "activations", "kv", "workspace")


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options of this command, those of a run)."""
    parser = ArgumentParser(
        prog="python -m rto_fast.plan",
        allow_abbrev=False,
        description=__doc__.splitlines()[0],
        epilog="All options of `python -m rto_fast.train` work here too.",
    )
    parser.add_argument("--gpus", type=argument(str), help="such as 8xH200, 1xRTX4090 or cpu; default: what is here")
    parser.add_argument(
        "--model_shape",
        type=argument(Location),
        help="directory with a config.json, or known hub id, whose shape stands for models that are not here",
    )
    parser.add_argument(
        "--examples", type=argument(Count), help="examples in the data; default: data.limit, or what is known of it"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="run all phases on a small random model here, and compare predicted with measured peaks (minutes)",
    )
    return parser.parse_known_args(arguments)


def make(options: argparse.Namespace, config):
    """(Plan, what else `make_plan` was told)."""
    from rto_fast.planning.hardware import local_machine, parse_machine
    from rto_fast.planning.phases import make_plan

    machine = parse_machine(options.gpus) if options.gpus else local_machine(config.device)
    given = {"model_shape": options.model_shape, "examples": options.examples}
    return make_plan(config, machine, **given), given


def as_json(plan) -> dict:
    """The plan as plain values, in bytes and seconds."""
    setting = dataclasses.asdict(plan.setting)
    return {
        "machine": {
            "gpus": plan.machine.count,
            "name": plan.machine.device and plan.machine.device.name,
            "usable_bytes": plan.machine.memory,
        },
        "model": dataclasses.asdict(plan.shape),
        "setting": setting,
        "fits": plan.fits,
        "peak": plan.peak.title,
        "phases": [
            {"stage": p.stage, "phase": p.name, "seconds": p.seconds, "total": p.memory.total}
            | dataclasses.asdict(p.memory)
            for p in plan.phases
        ],
        "stages": [
            {
                "stage": s.name,
                "steps": s.steps,
                "tokens_per_step": s.tokens,
                "step_seconds": s.step_seconds,
                "seconds": s.seconds,
                "checkpoint_bytes": s.state_bytes,
                "model_bytes": s.model_bytes,
            }
            for s in plan.stages
        ],
    }


def _size(value):
    """GiB."""
    value /= 1 << 30
    return "-" if not value else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _bold(text):
    return styled(text, "1") if wants_styles() else text


def table(plan) -> str:
    """The plan as text."""
    setting, shape, machine = plan.setting, plan.shape, plan.machine
    dtype = "float32" if setting.itemsize == 4 else "bfloat16"
    gpu = "GPU" if setting.gpu else "process"
    lines = [
        f"{one_line(shape.name)}: {shape.parameters:,} parameters in {dtype}, on {machine} of {_size(machine.memory)} GiB "
        "usable",
        f"ZeRO {setting.zero}, frozen models {setting.frozen}, gradient checkpointing "
        + ("on" if setting.checkpointing else "off"),
        "",
        f"{'GiB a ' + gpu:<19}" + "".join(f"{name:>12}" for name in (*COLUMNS, "total")),
    ]
    host = any(phase.memory.host for phase in plan.phases)
    lines[-1] += f"{'host':>9}" * host
    for phase in plan.phases:
        values = [getattr(phase.memory, name) for name in COLUMNS] + [phase.memory.total]
        line = f"{phase.title:<19}" + "".join(f"{_size(value):>12}" for value in values)
        line += f"{_size(phase.memory.host):>9}" * host
        lines.append(_bold(line + "  ← peak") if phase is plan.peak else line)
    total, verdict = plan.peak.memory.total, "fits" if plan.fits else "does NOT fit"
    share = f"{_size(total)} of {_size(machine.memory)} GiB"
    lines += ["", _bold(f"{verdict}: {share} a {gpu} in {plan.peak.title}")]
    return Styled("\n").join(lines + ["", *times(plan)])


def times(plan) -> list[str]:
    """Lines about time, and the disk."""
    lines = []
    if plan.seconds is None:
        why = (
            "no time is predicted for a CPU" if plan.machine.device is None else "nothing is known of this GPU's speed"
        )
        lines.append(f"time: {why}; sequences as long as the configuration allows")
    else:
        lines.append("time, by arithmetic, with every sequence as long as the configuration allows:")
    for stage in plan.stages:
        what = "iteration" if stage.name == "rto" else "step"
        line = f"  {stage.name:<13}" + (f"{stage.steps:>7,} {what}s" if stage.steps else f"      ? {what}s")
        if stage.step_seconds is not None:
            line += f" of {duration(stage.step_seconds)}, {stage.tokens / stage.step_seconds:,.0f} tokens/s"
            if len(stage.phases) > 1:
                line += " (" + ", ".join(f"{p.name} {duration(p.seconds)}" for p in stage.phases) + ")"
        if stage.seconds is not None:
            line += f": {duration(stage.seconds)}"
        lines.append(line)
    return lines


def _whole(plan):
    if plan.seconds is None:
        return ""
    return f": {duration(plan.seconds)}" + (" for a step of each stage" if plan.steps_unknown else "")


def advice(config, plan, given) -> str:
    """What to change where it does not fit."""
    from rto_fast.planning.advice import enough_machines, fitting, single_changes

    total, lines = plan.peak.memory.total, ["what each change alone saves, in GiB:"]
    for alternative in single_changes(config, plan, **given):
        less = total - alternative.plan.peak.memory.total
        mark = "  fits" if alternative.plan.fits else ""
        lines.append(f"  {_size(less):>6}  {alternative}{mark}")
    found = fitting(config, plan, **given)[:4]
    if found:
        lines += ["", "what fits, the fastest first (peak, change, all stages):" if plan.seconds else "what fits:"]
        for alternative in found:
            lines.append(f"  {_size(alternative.plan.peak.memory.total):>6}  {alternative}{_whole(alternative.plan)}")
        return "\n".join(lines)
    more = enough_machines(config, plan, **given) if plan.machine.device else None
    if more:
        also = f" with {more}" if more.changes else ""
        lines += ["", f"nothing fits here; {more.plan.machine} would do{also}{_whole(more.plan)}"]
    else:
        lines += ["", "nothing that is known fits: take a smaller model, or shorter sequences"]
    return "\n".join(lines)


def main(arguments: list[str] | None = None):
    """Prints the plan; returns it (with --measure: predicted and measured bytes of each phase)."""
    options, rest = parse(sys.argv[1:] if arguments is None else list(arguments))
    if options.measure:
        from rto_fast.planning import measure

        needed, as_it_is = (
            measure.compare(rest, give_back=give_back, what=f"measuring, run {number} of 2")
            for number, give_back in enumerate((True, False), 1)
        )
        say(json.dumps(needed) if options.json else measure.table(needed, as_it_is))
        return needed
    config = load_config(rest, say=lambda text: None if options.json else say(text))
    plan, given = make(options, config)
    if options.json:
        say(json.dumps(as_json(plan), indent=2))
        return plan
    say(table(plan))
    if not plan.fits:
        say("\n" + advice(config, plan, given))
    return plan


def command() -> None:
    with as_command(only_prints=True):
        main()


if __name__ == "__main__":
    command()
