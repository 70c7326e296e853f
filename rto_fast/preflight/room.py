"""What a run says before its first step: the peak of its memory, what is free, and whether the disk has room."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rto_fast.config import Config
from rto_fast.data.run_data import RunData
from rto_fast.errors import ConfigError, error_text
from rto_fast.planning.budgets import described
from rto_fast.planning.machine import GIB, Machine, local_machine
from rto_fast.planning.memory import Items, Plan
from rto_fast.planning.phases import make_plan
from rto_fast.reporting.log import RunLog
from rto_fast.training import ranks
from rto_fast.training.budget import TokenBudget, unplanned_budget


def data_items(config: Config, data: RunData) -> dict[str, Items]:
    """The lengths of the loaded data, for each stage that this run trains."""
    items = {}
    if config.trains_sft:
        items["sft"] = _items([len(s.prompt_ids) for s in data.sft], [len(s.response_ids) for s in data.sft])
    if config.trains_on_pairs:
        prompts = [len(p.prompt_ids) for p in data.pairs]
        longer = [max(len(p.chosen_ids), len(p.rejected_ids)) for p in data.pairs]
        both = [(len(p.chosen_ids) + len(p.rejected_ids)) / 2 for p in data.pairs]
        items["reward_model"] = items["dpo"] = _items(prompts, longer, both)
    if config.rto.enabled:
        prompts = [len(p.prompt_ids) for p in data.prompts]
        items["rto"] = _items(prompts, [config.rollout.max_new_tokens] * len(prompts))
    return items


def _items(prompts: Sequence[int], responses: Sequence[int], means: Sequence[float] | None = None) -> Items:
    """
    Args:
        responses: tokens of each response.
        means: tokens that count in the mean instead.
    """
    count = len(prompts)
    return Items(sum(prompts) / count, sum(means or responses) / count, max(map(sum, zip(prompts, responses))), count)


def disk_bytes(plan: Plan, save_every: Mapping[Any, int], keep: int) -> float:
    """The least that models and checkpoints take on the disk at one time.

    These are the models of the stages done and, of the present stage, the checkpoints that are kept, or its model and those.
    (One more checkpoint is written before the oldest is removed.)

    Args:
        save_every: {stage: steps between its checkpoints}, 0 for none.
        keep: how many checkpoints are kept.
    """
    done, most = 0.0, 0.0
    for stage in plan.stages:
        every = save_every[stage.name]
        saved = (stage.steps - 1) // every if every and stage.steps else 0
        checkpoints = min(saved, keep + 1) * stage.checkpoint_bytes
        most = max(most, done + checkpoints, done + min(saved, keep) * stage.checkpoint_bytes + stage.model_bytes)
        done += stage.model_bytes
    return most


def free_memory(device: str) -> float:
    """Bytes that this process can still take."""
    if device == "cpu":
        return local_machine("cpu", ranks.world_size()).memory
    return torch.cuda.mem_get_info(device)[0]


def check_room(
    config: Config, data: RunData, device: str, folder: Path, log: RunLog, kept: Mapping[str, TokenBudget]
) -> dict[str, TokenBudget]:
    """Says what a run will need and how many tokens its passes get, and warns if there is too little room.

    The main rank looks, by the rank with the least memory, and all ranks stop together.

    Args:
        config: configuration of the run.
        data: its data, loaded.
        device: where this rank computes.
        folder: where the run writes.
        log: takes the lines and the warning.
        kept: the budgets with which a resumed run began.
    Returns:
        The budgets of the stages that this run trains: those it began with unless `model.micro_batch_tokens` has changed.
    Raises:
        ConfigError: the disk has not the room that models and checkpoints are certain to take.
    """
    bound, trained = config.model.micro_batch_tokens, config.trained_stages
    own = local_machine(device, ranks.world_size())
    machine = replace(own, whole=ranks.smallest(own.whole))
    begun: dict[str, TokenBudget] = {
        stage: kept[stage] for stage in trained if stage in kept and kept[stage].bound == bound
    }
    plan = _plan(config, machine, data, begun, log) if ranks.is_main() else None
    shortage = _look(plan, config, device, folder, log) if plan else None
    if ranks.any_rank(shortage is not None):
        raise ConfigError(shortage or "output_dir: rank 0 found too little room on the disk")
    if not trained:
        return {}
    chosen = plan.budgets if plan else {stage: begun.get(stage, unplanned_budget(config)) for stage in trained}
    tokens = ranks.from_main(torch.tensor([[chosen[stage].training, chosen[stage].scoring] for stage in trained]))
    budgets: dict[str, TokenBudget] = {
        stage: TokenBudget(training, scoring, bound) for stage, (training, scoring) in zip(trained, tokens.tolist())
    }
    log.say(described(budgets, plan, is_kept=budgets == begun))
    return budgets


def _plan(
    config: Config, machine: Machine, data: RunData, budgets: Mapping[str, TokenBudget], log: RunLog
) -> Plan | None:
    try:
        return make_plan(config, machine, data_items(config, data), budgets=budgets)
    except Exception as error:  # a prediction that fails costs a line and never the run
        log.say(f"plan: none ({error_text(error, with_type=True)})")
        return None


def _look(plan: Plan, config: Config, device: str, folder: Path, log: RunLog) -> str | None:
    """Says the plan's peak; returns the message of an error where the disk has not enough room."""
    machine = plan.machine
    free, peak = free_memory(device), plan.peak
    where = f"the {machine.gpu}'s memory" if machine.gpu else "memory a process"
    log.say(
        f"plan: at most {peak.memory.total / GIB:.3g} GiB of {where} in {peak.title}; {free / GIB:.3g} GiB are free"
    )
    if peak.memory.total > free:
        what = f"the plan's peak, {peak.memory.total / GIB:.3g} GiB in {peak.title}, is more than is free"
        log.warning("preflight", 0, "memory", what, "`python -m rto_fast.plan` with the same options says what fits")
    save_every: dict[str, int] = {stage: config.checkpoint_interval(stage) for stage in config.trained_stages}
    needed, room = disk_bytes(plan, save_every, config.keep_checkpoints), shutil.disk_usage(folder).free
    if needed > room and not config.resume:
        return (
            f"output_dir: {os.path.abspath(folder)} has {room / GIB:.3g} GiB free, and models and checkpoints take "
            f"{needed / GIB:.3g} GiB; give another one, lower keep_checkpoints or raise save_every"
        )
    return None
