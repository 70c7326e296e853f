"""What a plan consists of, and what of a run's configuration it is made for."""

from dataclasses import dataclass

from rto_fast.config import Config
from rto_fast.planning.hardware import Machine
from rto_fast.planning.memory import Memory, Setting
from rto_fast.planning.shapes import Shape

# Public data sets that the shipped configurations name, and the generated ones: examples.
KNOWN_EXAMPLES = {
    "HuggingFaceH4/ultrafeedback_binarized": 61_135,  # train_prefs
    "Anthropic/hh-rlhf": 160_800,
    "embedded:preferences": 3_072,
    "embedded:sft": 8_192,
}


@dataclass(frozen=True)
class Items:
    """What a stage is trained on: mean and largest tokens of a prompt and of a response; examples, if known."""

    prompt: float
    response: float
    longest: int
    count: int | None = None


@dataclass(frozen=True)
class Phase:
    """The peak of a phase on each GPU, and its seconds: of an optimizer step, in RTO of an iteration (None: not known)."""

    stage: str
    name: str
    memory: Memory
    seconds: float | None = None

    @property
    def title(self) -> str:
        return f"{self.stage} {self.name}"


def _sum(times):
    return None if None in times else sum(times)


@dataclass(frozen=True)
class StagePlan:
    """tokens: of all ranks in a step (RTO: an iteration's responses). state_bytes: of one checkpoint; model_bytes: of what
    the stage leaves on the disk."""

    name: str
    phases: tuple[Phase, ...]
    tokens: float
    steps: int | None
    state_bytes: float
    model_bytes: float

    @property
    def step_seconds(self) -> float | None:
        return _sum([phase.seconds for phase in self.phases])

    @property
    def seconds(self) -> float | None:
        each = self.step_seconds
        return None if self.steps is None or each is None else self.steps * each


@dataclass(frozen=True)
class Plan:
    machine: Machine
    setting: Setting
    shape: Shape
    stages: tuple[StagePlan, ...]

    @property
    def phases(self) -> list[Phase]:
        return [phase for stage in self.stages for phase in stage.phases]

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.memory.total)

    @property
    def fits(self) -> bool:
        return self.peak.memory.total <= self.machine.memory

    @property
    def seconds(self) -> float | None:
        """Of all stages; where their steps are not known, of one of each."""
        return _sum([stage.step_seconds if self.steps_unknown else stage.seconds for stage in self.stages])

    @property
    def steps_unknown(self) -> bool:
        return any(stage.steps is None for stage in self.stages)


def configured_items(config: Config, stage: str, examples: int | None = None) -> Items:
    """As long as the configuration allows each to be: an upper bound."""
    data = config.data
    source = (stage == "sft" and data.sft) or (stage == "rto" and data.prompts) or data.preferences
    known = KNOWN_EXAMPLES.get((source or "").partition("[")[0])
    count = examples or data.limit or known
    response = config.rollout.max_new_tokens if stage == "rto" else data.max_response_tokens
    return Items(data.max_prompt_tokens, response, data.max_prompt_tokens + response, count)


def setting_of(config: Config, machine: Machine) -> Setting:
    deepspeed, gpu = config.deepspeed, machine.device is not None
    zero = deepspeed.stage_for(machine.count)
    is_wide = config.model.dtype == "float32" or (config.model.dtype == "auto" and not gpu)
    return Setting(
        machine.count,
        zero,
        4 if is_wide else 2,
        gpu,
        config.model.gradient_checkpointing,
        deepspeed.offloads_optimizer and zero > 0,
        deepspeed.offloads_parameters and zero == 3,
        deepspeed.frozen,
    )
