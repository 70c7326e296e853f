"""What a run says before its first step: the peak that is predicted, what is free, and whether the disk has room."""

import os
import shutil

import torch

from rto_fast.errors import ConfigError, error_text
from rto_fast.planning.hardware import GIB, local_machine
from rto_fast.planning.outline import Items, Plan
from rto_fast.planning.phases import make_plan
from rto_fast.training import ranks


def run_items(run) -> dict[str, Items]:
    """Lengths of a run's data, of the stages that it trains."""
    config, data, items = run.config, run.data, {}
    if not config.sft.model:
        items["sft"] = _items([len(s.prompt_ids) for s in data.sft], [len(s.response_ids) for s in data.sft])
    if run._trains_reward_model or run._trains_dpo:
        prompts = [len(p.prompt_ids) for p in data.pairs]
        longer = [max(len(p.chosen_ids), len(p.rejected_ids)) for p in data.pairs]
        both = [(len(p.chosen_ids) + len(p.rejected_ids)) / 2 for p in data.pairs]
        items["reward_model"] = items["dpo"] = _items(prompts, longer, both)
    if config.rto.enabled:
        prompts = [len(p.prompt_ids) for p in data.prompts]
        items["rto"] = _items(prompts, [config.rollout.max_new_tokens] * len(prompts))
    return items


def _items(prompts, responses, means=None):
    count, means = len(prompts), responses if means is None else means
    longest = max(map(sum, zip(prompts, responses)))
    return Items(sum(prompts) / count, sum(means) / count, longest, count)


def disk_bytes(plan: Plan, save_every: dict[str, int], keep: int) -> float:
    """The least that the run's models and checkpoints take on the disk at one time: models of the stages done, and of the
    present one the checkpoints that are kept, or the model that it ends with. (A further checkpoint is written before the
    oldest goes.)"""
    done, most = 0.0, 0.0
    for stage in plan.stages:
        every = save_every[stage.name]
        saved = (stage.steps - 1) // every if every and stage.steps else 0
        checkpoints = min(saved, keep + 1) * stage.state_bytes
        most = max(most, done + checkpoints, done + min(saved, keep) * stage.state_bytes + stage.model_bytes)
        done += stage.model_bytes
    return most


def free_memory(device: str) -> float:
    """Bytes that this process can still take."""
    if device == "cpu":
        return local_machine("cpu", ranks.world_size()).memory
    return torch.cuda.mem_get_info(device)[0]


def check_room(run) -> None:
    """Says on one line what a run will need, and on a second one if that is more than there is.

    Args:
        run: `rto_fast.run.Run`, its data loaded. The main rank looks, and all ranks stop together.
    Raises:
        ConfigError: the disk has not the room that models and checkpoints are certain to take.
    """
    shortage = _look(run) if ranks.is_main() else None
    if ranks.any_rank(shortage is not None):
        raise ConfigError(shortage or "output_dir: rank 0 found too little room on the disk")


def _look(run):
    config, device = run.config, run.placement["device"]
    try:
        machine = local_machine(device, ranks.world_size())
        plan = make_plan(config, machine, run_items(run))
    except Exception as error:  # a prediction that fails costs a line and never the run
        run.log.say(f"plan: none ({error_text(error, with_type=True)})")
        return None
    free, peak = free_memory(device), plan.peak
    where = f"the {machine.device.name}'s memory" if machine.device else "memory a process"
    run.log.say(
        f"plan: at most {peak.memory.total / GIB:.3g} GiB of {where} in {peak.title}; {free / GIB:.3g} GiB are free"
    )
    if peak.memory.total > free:
        what = f"the plan's peak, {peak.memory.total / GIB:.3g} GiB in {peak.title}, is more than is free"
        run.log.warning(
            "preflight", 0, "memory", what, "`python -m rto_fast.plan` with the same options says what fits"
        )
    stages = ("sft", "reward_model", "dpo", "rto")
    save_every = {name: getattr(config, name).save_every for name in stages}
    needed, room = disk_bytes(plan, save_every, config.keep_checkpoints), shutil.disk_usage(run.folder).free
    if needed > room and not config.resume:
        return (
            f"output_dir: {os.path.abspath(run.folder)} has {room / GIB:.3g} GiB free, and models and checkpoints take "
            f"{needed / GIB:.3g} GiB; give another one, lower keep_checkpoints or raise save_every"
        )
    return None
