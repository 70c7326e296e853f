"""The plan of a run: which models each stage holds, and what each of its phases adds.

SFT, the reward model and DPO hold the model that is trained (DPO's reference is that model before its first step). RTO holds
policy, critic, reference, DPO model and reward model all along: see `rto_fast.planning.rto_phases`.
"""

from rto_fast.config import Config
from rto_fast.planning.machine import Machine
from rto_fast.planning.memory import Setting, setting_of, shared_base, trained_parameters, training_state
from rto_fast.planning.outline import Items, Phase, Plan, StagePlan, largest_items
from rto_fast.planning.passes import step_work, training_moments
from rto_fast.planning.rto_phases import RTOPlanner
from rto_fast.planning.shapes import Shape, find_shape
from rto_fast.training.steps import stage_steps


def make_plan(
    config: Config,
    machine: Machine,
    items: dict[str, Items] | None = None,
    *,
    model_shape: str | None = None,
    examples: int | None = None,
) -> Plan:
    """The plan of a run of `config`.

    Args:
        items: {stage: Items} where the data is known; default: as long as the configuration allows.
        model_shape: see `substitute` of `find_shape`.
        examples: the number of examples in each data source.
    Raises:
        ConfigError: the shape of a model is not known.
    """
    setting = setting_of(config, machine)
    shape = find_shape(config.sft.model or config.model.path or "", model_shape)
    stages = []
    for name in config.trained_stages:
        found = (items or {}).get(name) or largest_items(config, name, examples)
        if name == "rto":
            stages.append(RTOPlanner(config, machine, setting, shape, found, model_shape).plan())
        else:
            stages.append(_supervised(name, config, setting, shape, found))
    return Plan(machine, setting, shape, tuple(stages))


def _supervised(name: str, config: Config, setting: Setting, shape: Shape, items: Items) -> StagePlan:
    """The plan of SFT, the reward model or DPO."""
    stage, sides = getattr(config, name), 1 if name == "sft" else 2  # of a pair: chosen and rejected
    labelled, parameters = sides * items.response, shape.parameters
    if name == "sft":
        labelled += items.prompt * config.sft.loss_on_prompt
    if name == "reward_model":
        labelled, parameters = 0.0, shape.scorer_parameters
    mean, longest = sides * (items.prompt + items.response), sides * items.longest
    work = step_work(
        mean, longest, labelled, stage.batch_size / setting.ranks, config.model.micro_batch_tokens, setting
    )
    trained = trained_parameters(shape, parameters, setting)
    state = training_state(trained, setting) + shared_base(shape, setting)
    moments = training_moments(shape, trained, work, setting).values()
    peak = max((state + moment for moment in moments), key=lambda memory: memory.total)
    steps = stage.max_steps if items.count is None else stage_steps(stage, items.count)
    return StagePlan(name, (Phase(name, "step", peak),), steps, 12 * trained, setting.itemsize * parameters)
