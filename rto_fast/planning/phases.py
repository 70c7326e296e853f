"""The phases of a run, stage by stage: which models are there, what each phase adds, and how long it takes.

What lives at once follows `rto_fast/stages`: SFT, the reward model and DPO hold the model that is trained (DPO's
reference is that model before its first step); RTO holds policy, critic, reference, DPO and reward model all along.
"""

from dataclasses import replace

from rto_fast.config import Config
from rto_fast.planning import costs, memory
from rto_fast.planning.hardware import GIB, Machine
from rto_fast.planning.memory import Memory, Work
from rto_fast.planning.outline import Items, Phase, Plan, StagePlan, configured_items, setting_of
from rto_fast.planning.shapes import find_shape
from rto_fast.rollout.scheduler import PREFILL_TOKENS
from rto_fast.training.steps import count_steps

CACHE_SHARE = {True: 0.85, False: 0.5}  # of a GPU's and a CPU's free memory: see rto_fast/rollout/cache.py
MONITORED = 1 / 16  # of a rollout's responses: see rto_fast/rto/behaviour.py


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
        items: {stage: Items} where the data is known; default: as long as the configuration allows. model_shape: see
            `find_shape`. examples: of each data source.
    Raises:
        ConfigError: a model of which nothing is known here.
    """
    return _Planner(config, machine, items or {}, model_shape, examples).plan()


class _Planner:
    def __init__(self, config, machine, items, model_shape, examples):
        self.config, self.machine, self.given, self.examples = config, machine, items, examples
        self.model_shape = model_shape
        self.setting, self.lora = setting_of(config, machine), config.lora
        self.shape = self._shape(config.sft.model or config.model.path)

    def _shape(self, path):
        return find_shape(path, self.model_shape)

    def _trained(self, shape, parameters):
        """How many are trained: all, or those of adapters (and of a score head, as few as nothing)."""
        return shape.adapter_parameters(self.lora.rank, self.lora.targets) if self.lora.rank else parameters

    def _base(self, shape):
        """The frozen weights under the adapters."""
        return Memory(weights=self.setting.itemsize * shape.parameters * bool(self.lora.rank))

    def plan(self) -> Plan:
        config, stages = self.config, []
        if config.trains_sft:
            stages.append(self._supervised("sft", self.shape.parameters, sides=1))
        if config.trains_reward_model:
            stages.append(self._supervised("reward_model", self.shape.scorer_parameters, sides=2))
        if config.trains_dpo:
            stages.append(self._supervised("dpo", self.shape.parameters, sides=2))
        if config.rto.enabled:
            stages.append(self._rto())
        return Plan(self.machine, self.setting, self.shape, tuple(stages))

    def _items(self, stage):
        return self.given.get(stage) or configured_items(self.config, stage, self.examples)

    def _work(self, mean, longest, labelled, batch, max_tokens, op):
        """`Work` of a rank whose share of a step is `batch` items of `mean` tokens."""
        whole = max(mean * batch, longest)
        tokens = min(whole, max(max_tokens, longest))
        micro_batches = max(1, round(-(-whole // tokens)))
        return Work(tokens, labelled / mean * tokens, micro_batches, op, not self.lora.rank)

    def _supervised(self, name, parameters, sides):
        stage, items = getattr(self.config, name), self._items(name)
        is_scorer = name == "reward_model"
        mean = sides * (items.prompt + items.response)
        labelled = 0.0 if is_scorer else sides * items.response + items.prompt * getattr(stage, "loss_on_prompt", False)
        batch = stage.batch_size / self.machine.count
        longest = sides * items.longest
        work = self._work(mean, longest, labelled, batch, self.config.model.micro_batch_tokens, "linear_token_logps")
        trained = self._trained(self.shape, parameters)
        state = memory.training_state(trained, self.setting) + self._base(self.shape)
        peak = max(
            (state + extra for extra in memory.training_peak(self.shape, trained, work, self.setting)),
            key=lambda m: m.total,
        )
        sequences = costs.Pass(sides * batch, mean / sides, batch * labelled)
        seconds = self._training_seconds(trained, sequences, work, 0 if is_scorer else 4)
        steps = stage.max_steps
        if items.count is not None:
            steps = count_steps(items.count * stage.epochs, stage.batch_size, stage.max_steps)
        model_bytes = self.setting.itemsize * parameters
        phase = Phase(name, "step", peak, seconds)
        return StagePlan(name, (phase,), mean * stage.batch_size, steps, 12 * trained, model_bytes)

    def _training_seconds(self, parameters, sequences, work, gemms):
        device, setting = self.machine.device, self.setting
        if device is None or not device.flops:
            return None
        passes = costs.training_seconds(
            self.shape, sequences, device, gemms, setting.itemsize, setting.checkpointing, bool(self.lora.rank)
        )
        communication = costs.communication_seconds(
            parameters, self.machine, setting.zero, setting.itemsize, work.micro_batches, setting.checkpointing
        )
        update = costs.optimizer_seconds(
            parameters, self.machine, setting.zero, setting.itemsize, setting.offload_optimizer
        )
        fetched = 2 * setting.itemsize * parameters / self.machine.count * work.micro_batches
        return passes + communication + update + setting.offload_parameters * fetched / device.host_link

    # RTO

    def _frozen(self):
        """[(name, shape, parameters)] of the models that are only evaluated; with LoRA those of this run are the base, under
        adapters or not."""
        config, shape = self.config, self.shape
        reference = config.rto.ref_model
        models = [("reference", self._shape(reference) if reference else shape)]
        if config.pays_dense_reward:
            models.append(("dpo", self._shape(config.dpo.model) if config.dpo.model else shape))
            other = config.dpo.ref_model
            if config.rto.compat == "none" and (other or reference) and other != reference:
                models.append(("dpo_reference", self._shape(other) if other else shape))
        supplied = {"reference": reference, "dpo": config.dpo.model, "dpo_reference": config.dpo.ref_model}
        frozen = [(name, s, self._own(s, s.parameters, supplied[name])) for name, s in models]
        source = config.reward_model
        if config.needs_reward_model and not source.function:
            scorer = self._shape(source.model) if source.model else shape
            frozen.append(("reward_model", scorer, self._own(scorer, scorer.scorer_parameters, source.model)))
        return frozen

    def _own(self, shape, parameters, path):
        """Of a model's weights, those that it does not share."""
        return 2 * self._trained(shape, 0) if self.lora.rank and not path else parameters

    def _rto(self):
        config, setting, shape = self.config, self.setting, self.shape
        rto, rollout, items = config.rto, config.rollout, self._items("rto")
        responses = rto.prompts_per_rollout * rto.samples_per_prompt
        mean, share = items.prompt + items.response, responses / self.machine.count
        critic = None
        if rto.advantage == "gae":
            own = rto.critic or config.reward_model.model
            critic = self._shape(own) if own else shape
        trained = [(shape, self._trained(shape, shape.parameters))]
        if critic:
            trained.append((critic, self._trained(critic, critic.scorer_parameters)))
        frozen = self._frozen()
        states = self._base(shape) + Memory(
            # With LoRA the rollout engine has the layers' merged weights, at the same addresses all along.
            weights=setting.itemsize * shape.layer_weights * bool(self.lora.rank)
            + memory.mapped_projections(shape, setting) * (rollout.engine == "native"),
            workspace=memory.ROLLOUT_TOKEN_BYTES * responses * mean,
        )
        for _, parameters in trained:
            states += memory.training_state(parameters, self.setting)
        for _, _, parameters in frozen:
            states += memory.frozen_state(parameters, setting)

        extra, busy = self._rollout_memory(items, share, self.machine.memory - states.total)
        phases = (
            Phase("rto", "rollout", states + extra, self._rollout_seconds(items, share, busy)),
            Phase(
                "rto", "score", states + self._score_memory(frozen, trained, items), self._score_seconds(frozen, items)
            ),
            self._update(states, trained, items),
        )
        steps = rto.iterations
        if steps is None and items.count is not None:
            steps = count_steps(rto.epochs * items.count, rto.prompts_per_rollout)
        parameters = sum(parameters for _, parameters in trained)
        models = (1 + config.eval.keep_best) * shape.parameters + (critic.scorer_parameters if critic else 0)
        models *= setting.itemsize
        return StagePlan("rto", phases, responses * items.response, steps, 12 * parameters, models)

    def _rollout_memory(self, items, share, room):
        """(Memory, responses decoded at once): a pool of pages takes no more than a share of what is free, and where that
        is less than all slots want, fewer are busy."""
        config, setting, shape = self.config, self.setting, self.shape
        rollout, samples = config.rollout, max(1, round(share))
        slots = min(rollout.batch_size, samples)
        longest = items.longest - round(items.response) + rollout.max_new_tokens
        kv, least = (memory.cache_bytes(shape, longest, n, config.rto.samples_per_prompt, setting) for n in (slots, 1))
        weights = setting.itemsize * shape.parameters
        copies = weights if setting.zero == 3 or rollout.engine == "vllm" else 0.0
        budget = CACHE_SHARE[setting.gpu] * (room - copies)
        if rollout.kv_cache_gib is not None:
            budget = rollout.kv_cache_gib * GIB
        given = min(kv, budget) if budget >= least else kv
        prompts = min(PREFILL_TOKENS, slots * items.prompt)
        decode = memory.decode_bytes(shape, slots, samples, rollout.max_new_tokens, setting)
        layers = memory.forward_activations(shape, prompts, setting)
        return Memory(weights=copies, activations=layers, kv=given, workspace=decode), slots * given / kv

    def _score_memory(self, frozen, trained, items):
        """Models score one after another, each in micro-batches."""
        setting, max_tokens = self.setting, self.config.model.micro_batch_tokens
        share = self.config.rto.prompts_per_rollout * self.config.rto.samples_per_prompt / self.machine.count
        mean = items.prompt + items.response
        tokens = min(max(max_tokens, items.longest), share * mean)
        labelled = tokens * items.response / mean
        uses = []
        for name, shape, parameters in frozen:
            head = 0.0 if name == "reward_model" else memory.head_forward(shape, labelled, setting)
            own = memory.frozen_use(parameters, setting)
            uses.append((memory.forward_activations(shape, tokens, setting), head, own))
        for shape, parameters in trained:
            own = memory.gathered(parameters, setting.itemsize) if setting.zero == 3 else 0.0
            uses.append((memory.forward_activations(shape, tokens, setting), 0.0, own))
        layers, head, own = max(uses, key=lambda use: max(use[:2]) + use[2])
        return Memory(
            weights=own, activations=layers if layers >= head else 0.0, workspace=head if head > layers else 0.0
        )

    def _update(self, states, trained, items):
        """The micro-batches of both models follow each other: while one is in its passes the other's gradients are there,
        the policy's from the first micro-batch on, the critic's from the second."""
        config, setting, machine = self.config, self.setting, self.machine
        rto = config.rto
        mean, batch = items.prompt + items.response, rto.batch_size / machine.count
        work = self._work(
            mean, items.longest, items.response, batch, config.model.micro_batch_tokens, "linear_ppo_loss"
        )
        responses = rto.prompts_per_rollout * rto.samples_per_prompt
        updates = rto.ppo_epochs * count_steps(responses, rto.batch_size)
        kept = [memory.gradients(parameters, setting) for _, parameters in trained]
        candidates, times = [], []
        for number, (shape, parameters) in enumerate(trained):
            own = work if number == 0 else replace(work, labelled=0.0)
            others = sum(kept) - kept[number]
            for moment, extra in enumerate(memory.training_peak(shape, parameters, own, setting)):
                is_step = moment == 3
                there = (is_step and number == 0) or (not is_step and (number == 1 or own.micro_batches > 1))
                candidates.append(states + extra + Memory(gradients=others if there else 0.0))
            sequences = costs.Pass(batch, mean, batch * own.labelled / max(own.tokens, 1) * mean)
            times.append(self._training_seconds(parameters, sequences, own, 3 if number == 0 else 0))
        seconds = None if None in times else updates * sum(times)
        return Phase("rto", "update", max(candidates, key=lambda m: m.total), seconds)

    def _timed(self):
        return self.machine.device is not None and self.machine.device.flops

    def _rollout_seconds(self, items, share, busy):
        if not self._timed():
            return None
        setting, config = self.setting, self.config.rollout
        work = costs.Pass(share, items.prompt + items.response, share * items.response)
        graphs = config.cuda_graphs and setting.zero != 3 and config.engine == "native"
        seconds = costs.rollout_seconds(
            self.shape, work, items.prompt, max(1, int(busy)), self.machine.device, setting.itemsize, graphs
        )
        whole = setting.itemsize * self.shape.parameters / self.machine.link if setting.zero == 3 else 0.0
        return seconds + whole

    def _score_seconds(self, frozen, items):
        if not self._timed():
            return None
        config, setting, device = self.config, self.setting, self.machine.device
        share = config.rto.prompts_per_rollout * config.rto.samples_per_prompt / self.machine.count
        work = costs.Pass(share, items.prompt + items.response, share * items.response)

        def seconds(shape, has_head, part=1.0):
            head = costs.head_seconds(shape, work, device, 1, setting.itemsize) if has_head else 0.0
            return part * (costs.forward_seconds(shape, work, device, setting.itemsize) + head)

        total = seconds(self.shape, True, 1.0 if config.rto.old_logps == "recompute" else MONITORED)
        if config.rto.advantage == "gae":
            total += seconds(self.shape, False)
        for name, shape, parameters in frozen:
            total += seconds(shape, name != "reward_model")
            moved = {"offloaded": device.host_link, "sharded": self.machine.link}.get(setting.frozen)
            total += setting.itemsize * parameters / moved if moved else 0.0
        return total
