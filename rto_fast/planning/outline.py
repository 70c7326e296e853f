"""What a plan consists of, and the lengths of the data that it is made for."""

from dataclasses import dataclass

from rto_fast.config import Config
from rto_fast.planning.machine import Machine
from rto_fast.planning.memory import Memory, Setting
from rto_fast.planning.shapes import Shape

# The number of examples in public data sets that the shipped configurations name, and in the generated ones.
KNOWN_EXAMPLES = {
    "HuggingFaceH4/ultrafeedback_binarized": 61_135,  # train_prefs
    "Anthropic/hh-rlhf": 160_800,
    "embedded:preferences": 3_072,
    "embedded:sft": 8_192,
}


@dataclass(frozen=True)
class Items:
    """The lengths, in tokens, of what a stage is trained on."""

    prompt: float  # mean
    response: float  # mean
    longest: int  # prompt and response together
    count: int | None = None  # examples, if known


@dataclass(frozen=True)
class Phase:
    """A part of a stage, and what each process holds at the phase's peak."""

    stage: str
    name: str
    memory: Memory

    @property
    def title(self) -> str:
        return f"{self.stage} {self.name}"


@dataclass(frozen=True)
class StagePlan:
    """The phases of a stage, and what it writes."""

    name: str
    phases: tuple[Phase, ...]
    steps: int | None  # optimizer steps; of RTO its iterations; None: the data's size is not known
    checkpoint_bytes: float  # of one checkpoint
    model_bytes: float  # of the models that the stage leaves on the disk


@dataclass(frozen=True)
class Plan:
    """The memory plan of a run."""

    machine: Machine
    setting: Setting
    shape: Shape  # of the policy
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


def largest_items(config: Config, stage: str, examples: int | None = None) -> Items:
    """An upper bound: every prompt and response of a stage is as long as the configuration allows.

    Args:
        examples: the number of examples in each data source; default: `data.limit`, or what is known of the source.
    """
    data = config.data
    source = (stage == "sft" and data.sft) or (stage == "rto" and data.prompts) or data.preferences
    count = examples or data.limit or KNOWN_EXAMPLES.get((source or "").partition("[")[0])
    response = config.rollout.max_new_tokens if stage == "rto" else data.max_response_tokens
    return Items(data.max_prompt_tokens, response, data.max_prompt_tokens + response, count)
