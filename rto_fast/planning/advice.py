"""What to change where a plan does not fit: every alternative is planned like the run itself."""

import dataclasses
import itertools
from dataclasses import dataclass

from rto_fast.config import Config
from rto_fast.errors import ConfigError
from rto_fast.planning.hardware import Machine
from rto_fast.planning.outline import Plan
from rto_fast.planning.phases import make_plan

STAGES = ("sft", "reward_model", "dpo", "rto")


@dataclass(frozen=True)
class Alternative:
    """`changes`: {configuration key: value}; its plan, and whether the machine is another one."""

    changes: dict[str, object]
    plan: Plan

    def __str__(self) -> str:
        grouped: dict[tuple, list[str]] = {}
        for key, value in self.changes.items():
            section, name = key.split(".")
            grouped.setdefault((name, value), []).append(section)
        return ", ".join(
            f"{'|'.join(sections)}.{name}: {str(value).lower()}" for (name, value), sections in grouped.items()
        )


def changed(config: Config, changes: dict[str, object]) -> Config:
    """A validated copy of `config` with other values."""
    sections: dict[str, dict] = {}
    for key, value in changes.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    new = {section: dataclasses.replace(getattr(config, section), **values) for section, values in sections.items()}
    return dataclasses.replace(config, **new)


def _choices(config: Config, plan: Plan) -> list[list[dict[str, object]]]:
    """Of each kind, the changes that need less memory; each list begins with no change."""
    setting, ranks = plan.setting, plan.machine.count
    kinds: list[list[dict[str, object]]] = [[{}], [{}], [{}], [{}], [{}]]
    for divisor in (2, 4, 8):
        tokens = config.model.micro_batch_tokens // divisor
        if tokens >= 1024:
            kinds[0].append({"model.micro_batch_tokens": tokens})
    if not setting.checkpointing:
        kinds[1].append({"model.gradient_checkpointing": True})
    if config.rto.enabled:
        for frozen in ("offloaded", "sharded")[: 1 + (ranks > 1)] if setting.gpu else ():
            if config.deepspeed.frozen != frozen:
                kinds[2].append({"deepspeed.frozen": frozen})
    kinds[3] += [{"deepspeed.zero_stage": zero} for zero in range(setting.zero + 1, 4) if ranks > 1]
    if setting.gpu and not setting.offload_optimizer:
        kinds[4].append({"deepspeed.offload": "optimizer"} | ({} if setting.zero else {"deepspeed.zero_stage": 2}))
        kinds[4].append({"deepspeed.offload": "all", "deepspeed.zero_stage": 3})
    return kinds


def _planned(config, machine, changes, options):
    try:
        return Alternative(changes, make_plan(changed(config, changes), machine, **options))
    except ConfigError:  # the two do not go together
        return None


def single_changes(config: Config, plan: Plan, **options) -> list[Alternative]:
    """Each change alone that lowers the peak, the most effective first. options: of `make_plan`."""
    found = [_planned(config, plan.machine, change, options) for kind in _choices(config, plan) for change in kind[1:]]
    better = [a for a in found if a and a.plan.peak.memory.total < plan.peak.memory.total]
    return sorted(better, key=lambda a: a.plan.peak.memory.total)


def fitting(config: Config, plan: Plan, **options) -> list[Alternative]:
    """Combinations of changes that fit, the fastest first (without predicted times: the fewest changes); none that only adds
    changes to another one."""
    found = []
    for combination in itertools.product(*_choices(config, plan)):
        changes: dict[str, object] = {}
        for part in combination:
            changes |= part
        alternative = _planned(config, plan.machine, changes, options) if changes else None
        if alternative and alternative.plan.fits:
            found.append(alternative)
    whole = plan.seconds or 1.0
    found.sort(key=lambda a: (round((a.plan.seconds or 0.0) / whole, 2), len(a.changes), a.plan.peak.memory.total))
    kept: list[Alternative] = []
    for alternative in found:
        if not any(other.changes.items() <= alternative.changes.items() for other in kept):
            kept.append(alternative)
    return kept


def enough_machines(config: Config, plan: Plan, **options) -> Alternative | None:
    """The fewest of the same GPUs, by powers of two, on which something fits."""
    for doublings in range(1, 8):
        count = plan.machine.count << doublings
        machine = Machine(count, plan.machine.device, plan.machine.memory)
        larger = make_plan(config, machine, **options)
        if larger.fits:
            return Alternative({}, larger)
        if found := fitting(config, larger, **options):
            return found[0]
    return None
