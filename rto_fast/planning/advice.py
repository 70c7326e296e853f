"""Changes of the configuration that save memory; each is planned like the run itself, with the smallest passes."""

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass

from rto_fast.config import Config
from rto_fast.errors import ConfigError
from rto_fast.planning.budgets import LEAST
from rto_fast.planning.machine import Machine
from rto_fast.planning.memory import Plan
from rto_fast.planning.phases import make_plan

Changes = dict[str, object]  # {configuration key: value}
Planner = Callable[[Config, Machine], Plan]


@dataclass(frozen=True)
class Alternative:
    """Changes, and the plan of the run with them."""

    changes: Changes
    plan: Plan

    def __str__(self) -> str:
        return ", ".join(f"{key}: {str(value).lower()}" for key, value in self.changes.items())


def changed(config: Config, changes: Changes) -> Config:
    """A copy of `config` with other values.

    Raises:
        ConfigError: the values do not go together.
    """
    sections: dict[str, Changes] = {}
    for key, value in changes.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    new = {section: dataclasses.replace(getattr(config, section), **values) for section, values in sections.items()}
    return dataclasses.replace(config, **new)


def _choices(config: Config, plan: Plan) -> list[list[Changes]]:
    """The changes that need less memory, of each kind; what costs the least time comes first."""
    setting, has_several = plan.setting, plan.machine.count > 1
    frozen = ["offloaded", "sharded"][: 1 + has_several] if config.rto.enabled and setting.gpu else []
    offload: Changes = {"deepspeed.offload": "optimizer"} | ({} if setting.zero else {"deepspeed.zero_stage": 2})
    offload_all: Changes = {"deepspeed.offload": "all", "deepspeed.zero_stage": 3}
    return [
        [{"deepspeed.zero_stage": zero} for zero in range(setting.zero + 1, 4) if has_several],
        [{"deepspeed.frozen": value} for value in frozen if value != config.deepspeed.frozen],
        [{"model.gradient_checkpointing": True}] * (not setting.checkpointing),
        [offload, offload_all] * (setting.gpu and not setting.offload_optimizer),
    ]


def _planned(config: Config, machine: Machine, changes: Changes, planner: Planner) -> Alternative | None:
    smallest = {"model.micro_batch_tokens": min(config.model.micro_batch_tokens or LEAST, LEAST)}
    try:
        return Alternative(changes, planner(changed(config, changes | smallest), machine))
    except ConfigError:  # the changes do not go together
        return None


def single_changes(config: Config, plan: Plan, planner: Planner = make_plan) -> list[Alternative]:
    """Each change alone that lowers the peak, the most effective one first."""
    found = [_planned(config, plan.machine, change, planner) for kind in _choices(config, plan) for change in kind]
    better = [a for a in found if a and a.plan.peak.memory.total < plan.peak.memory.total]
    return sorted(better, key=lambda a: a.plan.peak.memory.total)


def fitting(config: Config, plan: Plan, planner: Planner = make_plan) -> list[Alternative]:
    """Combinations of changes with which the run fits, the fewest changes first.

    A combination that only adds changes to another one is left out.
    """
    found: list[Alternative] = []
    kinds = _choices(config, plan)
    for count in range(1, len(kinds) + 1):
        for chosen in itertools.combinations(kinds, count):
            for parts in itertools.product(*chosen):
                changes = {key: value for part in parts for key, value in part.items()}
                if any(other.changes.items() <= changes.items() for other in found):
                    continue
                alternative = _planned(config, plan.machine, changes, planner)
                if alternative and alternative.plan.fits:
                    found.append(alternative)
    return found


def enough_machines(config: Config, plan: Plan, planner: Planner = make_plan) -> Alternative | None:
    """The fewest of the same GPUs, by powers of two up to 128 times as many, on which the run fits, perhaps with changes."""
    for doublings in range(1, 8):
        larger = planner(config, dataclasses.replace(plan.machine, count=plan.machine.count << doublings))
        if larger.fits:
            return Alternative({}, larger)
        if found := fitting(config, larger, planner):
            return found[0]
    return None
