"""The plan of a run: which models each stage holds, and what each of its phases adds.

SFT, the reward model and DPO hold the model that is trained (DPO's reference is that model before its first step). RTO holds
policy, critic, reference, DPO model and reward model all along.

The tokens of a stage's passes come first: as many as fit if every item is as long as the longest. The phases are then
planned with items of the mean length.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from rto_fast.config import Config, Stage
from rto_fast.planning import memory, passes
from rto_fast.planning.budgets import choices, choose
from rto_fast.planning.graphs import Passes, held_by_graphs
from rto_fast.planning.layers import forward_activations
from rto_fast.planning.machine import GIB, Machine
from rto_fast.planning.memory import (
    Items,
    Memory,
    Phase,
    Plan,
    Setting,
    StagePlan,
    largest_items,
    setting_of,
    shared_base,
    trained_parameters,
    training_state,
)
from rto_fast.planning.passes import step_work, training_moments
from rto_fast.planning.shapes import Shape, find_shape
from rto_fast.rollout.cache import POOL_SHARE
from rto_fast.rollout.scheduler import PREFILL_TOKENS
from rto_fast.rto.experience import frozen_paths
from rto_fast.training.budget import TokenBudget
from rto_fast.training.optimizer import count_steps, stage_steps

# Stand for the directories of the models that this run trains.
SFT, DPO = "this run's SFT model", "this run's DPO model"


def make_plan(
    config: Config,
    machine: Machine,
    items: dict[str, Items] | None = None,
    *,
    budgets: Mapping[str, TokenBudget] | None = None,
    model_shape: str | None = None,
    examples: int | None = None,
) -> Plan:
    """The plan of a run of `config`.

    Args:
        items: {stage: Items} where the data is known; default: as long as the configuration allows.
        budgets: {stage: TokenBudget} where the tokens of its passes are not to be chosen.
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
        planner: StagePlanner
        if name == "rto":
            planner = RTOPlanner(name, config, machine, setting, shape, found, model_shape)
        else:
            planner = SupervisedPlanner(name, config, machine, setting, shape, found, model_shape)
        stages.append(planner.plan((budgets or {}).get(name) or planner.choose_budget()))
    return Plan(machine, setting, shape, tuple(stages))


@dataclass(frozen=True)
class StagePlanner:
    """Plans a stage; the two kinds of stages are subclasses."""

    name: Stage
    config: Config
    machine: Machine
    setting: Setting
    shape: Shape  # of the policy
    items: Items
    model_shape: str | None  # see `substitute` of `find_shape`

    def plan(self, budget: TokenBudget) -> StagePlan:
        raise NotImplementedError

    def training(self, tokens: int) -> Memory:
        """The peak of optimizer steps whose passes have `tokens`."""
        raise NotImplementedError

    def scoring(self, tokens: int) -> Memory:
        """The peak of passes without gradients that have `tokens`."""
        raise NotImplementedError

    def choose_budget(self) -> TokenBudget:
        bound = self.config.model.micro_batch_tokens
        tokens = choices(self.setting.gpu, bound)
        longest = replace(self, items=self.items.all_longest())
        training, scoring = (choose(peak, tokens, self.machine) for peak in (longest.training, longest.scoring))
        return TokenBudget(training, scoring, bound)


class SupervisedPlanner(StagePlanner):
    """Plans SFT, the reward model or DPO."""

    def plan(self, budget: TokenBudget) -> StagePlan:
        name, setting = self.name, self.setting
        phases = [Phase(name, "step", self.training(budget.training))]
        if name != "sft":
            phases.append(Phase(name, "score", self.scoring(budget.scoring)))
        stage, count = getattr(self.config, name), self.items.count
        steps = stage.max_steps if count is None else stage_steps(stage, count)
        written = setting.itemsize * self._parameters
        return StagePlan(name, tuple(phases), budget, steps, 12 * self._trained, written)

    @property
    def _parameters(self) -> int:
        return self.shape.scorer_parameters if self.name == "reward_model" else self.shape.parameters

    @property
    def _trained(self) -> int:
        return trained_parameters(self.shape, self._parameters, self.setting)

    @property
    def _state(self) -> Memory:
        copied = Memory(weights=passes.mapped_projections(self.shape, self.setting))
        return training_state(self._trained, self.setting) + shared_base(self.shape, self.setting) + copied

    @property
    def _sides(self) -> int:
        """Sequences of an item: a pair has chosen and rejected."""
        return 1 if self.name == "sft" else 2

    @property
    def _labelled(self) -> float:
        """Tokens of an item that get a log-prob."""
        if self.name == "reward_model":
            return 0.0
        return self._sides * self.items.response + self.items.prompt * (
            self.name == "sft" and self.config.sft.loss_on_prompt
        )

    def training(self, tokens: int) -> Memory:
        setting, items, sides = self.setting, self.items, self._sides
        batch = getattr(self.config, self.name).batch_size / setting.ranks
        work = step_work(sides * items.mean, sides * items.longest, self._labelled, batch, tokens, setting)
        moments = training_moments(self.shape, self._trained, work, setting).values()
        state = self._state + Memory(workspace=self._graphs(work.tokens).workspace)
        return max((state + moment for moment in moments), key=lambda memory: memory.total)

    def _graphs(self, tokens: float) -> Memory:
        labelled = self._labelled / (self._sides * self.items.mean) * tokens
        return held_by_graphs([Passes(self.shape, tokens, labelled, "linear_token_logps", self._trained)], self.setting)

    def scoring(self, tokens: int) -> Memory:
        """DPO's reference and the held-out pairs, beside the optimizer."""
        setting, items = self.setting, self.items
        share = math.inf if items.count is None else items.count / setting.ranks * self._sides * items.mean
        tokens = min(max(tokens, self._sides * items.longest), share)
        layers = forward_activations(self.shape, tokens, setting)
        labelled = self._labelled / (self._sides * items.mean) * tokens
        head = passes.head_forward(self.shape, labelled, setting) if labelled else 0.0
        own = memory.gathered(self._parameters, setting) if setting.zero == 3 else 0.0
        left = 0.0 if setting.zero else memory.gradients(self._trained, setting)  # our optimizer's buffer
        held = Memory(weights=own, gradients=left, workspace=self._graphs(tokens).workspace)
        return self._state + held + passes.largest_part(layers, head)


class RTOPlanner(StagePlanner):
    def plan(self, budget: TokenBudget) -> StagePlan:
        config, setting = self.config, self.setting
        graphs = self._graphs(max(budget.training, budget.scoring))
        phases = (
            Phase("rto", "rollout", self._states + graphs + self._rollout(graphs)),
            Phase("rto", "score", self.scoring(budget.scoring)),
            Phase("rto", "update", self.training(budget.training)),
        )
        steps = config.rto.iterations
        if steps is None and self.items.count is not None:
            steps = count_steps(config.rto.epochs * self.items.count, config.rto.prompts_per_rollout)
        written = (1 + config.eval.keep_best) * self.shape.parameters
        if self._critic:
            written += self._critic.scorer_parameters
        trained = sum(parameters for _, parameters in self._trained)
        return StagePlan("rto", phases, budget, steps, 12 * trained, setting.itemsize * written)

    # The models, and what all phases hold

    @cached_property
    def _critic(self) -> Shape | None:
        if not self.config.has_critic:
            return None
        return self._shape_of(self.config.rto.critic or self.config.reward_model.model)

    def _shape_of(self, path: str | None) -> Shape:
        return find_shape(path, self.model_shape) if path and path not in (SFT, DPO) else self.shape

    @cached_property
    def _trained(self) -> list[tuple[Shape, int]]:
        """The shape of the policy and of the critic, and how many parameters of each are trained."""
        models = [(self.shape, self.shape.parameters)]
        if self._critic:
            models.append((self._critic, self._critic.scorer_parameters))
        return [(shape, memory.trained_parameters(shape, parameters, self.setting)) for shape, parameters in models]

    @cached_property
    def _frozen(self) -> list[tuple[Shape, int, bool]]:
        """For each frozen model: its shape, the parameters that it does not share with others, whether it is a scorer."""
        config = self.config
        sft, dpo = config.sft.model or SFT, config.dpo.model or DPO
        frozen = []
        for path in frozen_paths(config, sft, dpo).values():
            shape = self._shape_of(path)
            frozen.append((shape, self._own_parameters(shape, shape.parameters, path in (sft, DPO)), False))
        source = config.reward_model
        if config.needs_reward_model and not source.function:
            shape = self._shape_of(source.model)
            frozen.append((shape, self._own_parameters(shape, shape.scorer_parameters, not source.model), True))
        return frozen

    def _own_parameters(self, shape: Shape, parameters: int, is_of_this_run: bool) -> int:
        """With LoRA a model of this run is the shared base under two small matrices a layer."""
        if self.setting.lora.rank and is_of_this_run:
            return 2 * memory.trained_parameters(shape, 0, self.setting)
        return parameters

    @property
    def _responses(self) -> int:
        """Of one iteration, on all ranks together."""
        return self.config.rto.prompts_per_rollout * self.config.rto.samples_per_prompt

    @cached_property
    def _states(self) -> Memory:
        """What every phase holds: all models, and the rollout's tokens."""
        setting, shape = self.setting, self.shape
        loaded = [shape] if setting.lora.rank else [*(s for s, _ in self._trained), *(s for s, *_ in self._frozen)]
        copied = sum(passes.mapped_projections(model, setting) for model in loaded)
        states = memory.shared_base(shape, setting) + Memory(
            weights=copied,
            workspace=passes.ROLLOUT_TOKEN_BYTES * self._responses * self.items.mean,
        )
        for _, parameters in self._trained:
            states += memory.training_state(parameters, setting)
        for _, parameters, _ in self._frozen:
            states += memory.frozen_state(parameters, setting)
        return states

    # What each phase adds

    def _graphs(self, tokens: int) -> Memory:
        """Of passes of up to `tokens`."""
        items, share = self.items, self._responses / self.setting.ranks
        step = min(self.config.rto.batch_size / self.setting.ranks, share) * items.mean
        models = []
        for number, (shape, parameters) in enumerate(self._trained):
            size, op = min(max(tokens, items.longest), step), "linear_ppo_loss"
            models.append(Passes(shape, size, size * items.response / items.mean * (number == 0), op, parameters))
        for shape, _, is_scorer in self._frozen:
            size = min(max(tokens, items.longest), share * items.mean)
            models.append(Passes(shape, size, size * items.response / items.mean * (not is_scorer)))
        return held_by_graphs(models, self.setting)

    def _rollout(self, graphs: Memory) -> Memory:
        """The pool takes no more than its share of the free memory; with less than all slots want, fewer are busy."""
        config, setting, shape, items = self.config, self.setting, self.shape, self.items
        rollout = config.rollout
        samples = max(1, round(self._responses / setting.ranks))
        slots = min(rollout.batch_size, samples)
        longest = items.longest - round(items.response) + rollout.max_new_tokens
        wanted, least = (
            passes.cache_bytes(shape, longest, n, config.rto.samples_per_prompt, setting) for n in (slots, 1)
        )
        has_copy = setting.zero == 3 or rollout.engine == "vllm"
        copy = setting.itemsize * shape.parameters if has_copy else 0.0
        budget = POOL_SHARE["cuda" if setting.gpu else "cpu"] * (
            self.machine.memory - self._states.total - graphs.total - copy
        )
        if rollout.kv_cache_gib is not None:
            budget = rollout.kv_cache_gib * GIB
        return Memory(
            weights=copy,
            activations=forward_activations(shape, min(PREFILL_TOKENS, slots * items.prompt), setting),
            kv=min(wanted, budget) if budget >= least else wanted,
            workspace=passes.decode_bytes(shape, slots, samples, rollout.max_new_tokens, setting),
        )

    def scoring(self, tokens: int) -> Memory:
        """The models score one after another, each in micro-batches; the largest of them counts."""
        setting, mean = self.setting, self.items.mean
        tokens = min(max(tokens, self.items.longest), self._responses / setting.ranks * mean)
        labelled = tokens * self.items.response / mean
        uses = []
        for shape, parameters, is_scorer in self._frozen:
            head = 0.0 if is_scorer else passes.head_forward(shape, labelled, setting)
            uses.append((forward_activations(shape, tokens, setting), head, memory.frozen_use(parameters, setting)))
        for shape, parameters in self._trained:
            own = memory.gathered(parameters, setting) if setting.zero == 3 else 0.0
            uses.append((forward_activations(shape, tokens, setting), 0.0, own))
        layers, head, own = max(uses, key=lambda use: max(use[:2]) + use[2])
        return self._states + self._graphs(int(tokens)) + Memory(weights=own) + passes.largest_part(layers, head)

    def training(self, tokens: int) -> Memory:
        """The peak of an update.

        The passes of policy and critic alternate: while one is in its passes, the other one's gradients are there. Those of
        DeepSpeed are gone after each step; then the policy's are there from the first micro-batch on and the critic's from
        the second.
        """
        rto, setting, items = self.config.rto, self.setting, self.items
        batch = rto.batch_size / setting.ranks
        policy = passes.step_work(items.mean, items.longest, items.response, batch, tokens, setting, "linear_ppo_loss")
        kept = [memory.gradients(parameters, setting) for _, parameters in self._trained]
        candidates, graphs = [], Memory(workspace=self._graphs(tokens).workspace)
        for number, (shape, parameters) in enumerate(self._trained):
            is_policy = number == 0
            work = policy if is_policy else replace(policy, labelled=0.0)
            for name, moment in passes.training_moments(shape, parameters, work, setting).items():
                if not setting.zero:
                    has_others = True
                elif name == "step":  # the policy's comes first
                    has_others = is_policy
                else:
                    has_others = not is_policy or work.micro_batches > 1
                others = sum(kept) - kept[number] if has_others else 0.0
                candidates.append(self._states + graphs + moment + Memory(gradients=others))
        return max(candidates, key=lambda candidate: candidate.total)
