"""What a plan consists of, and the bytes that a model takes in one process, outside of its passes.

Every term, here and in `rto_fast.planning.passes`, is what the code allocates: ours, transformers' layers under autograd,
torch's AdamW, DeepSpeed 0.19. No factor is fitted.
"""

from dataclasses import dataclass, field, fields

from rto_fast.config import Config, LoraConfig
from rto_fast.models.loading import resolve_dtype
from rto_fast.planning.machine import Machine
from rto_fast.planning.shapes import Shape
from rto_fast.training.budget import TokenBudget
from rto_fast.training.zero import BUCKET

# The number of examples in public data sets that the shipped configurations name, and in the generated ones.
KNOWN_EXAMPLES = {
    "HuggingFaceH4/ultrafeedback_binarized": 61_135,  # train_prefs
    "Anthropic/hh-rlhf": 160_800,
    "embedded:preferences": 3_072,
    "embedded:sft": 8_192,
}


# DeepSpeed's defaults for ZeRO 3, in elements: `stage3_max_live_parameters` and `stage3_prefetch_bucket_size`.
LIVE_PARAMETERS, PREFETCH_BUCKET = 1e9, 5e7


@dataclass(frozen=True)
class Memory:
    """The bytes of one process at one moment."""

    weights: float = 0.0
    optimizer: float = 0.0  # float32 weights and moments
    gradients: float = 0.0
    activations: float = 0.0  # kept for the backward pass; in a pass without gradients, those of one layer
    kv: float = 0.0
    workspace: float = 0.0  # logits, buffers, temporary copies
    host: float = 0.0  # in the CPU's memory, beside a GPU's

    @property
    def total(self) -> float:
        """All but `host`."""
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "host")

    def __add__(self, other: "Memory") -> "Memory":
        return Memory(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Setting:
    """How a run holds its models."""

    ranks: int
    zero: int  # ZeRO stage; 0: our own optimizer
    itemsize: int  # bytes of a weight
    gpu: bool  # the GPU's kernels run, else the CPU's
    checkpointing: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False  # only beside offload_optimizer
    frozen: str = "resident"
    lora: LoraConfig = field(default_factory=LoraConfig)
    graphs: bool = False  # passes that are bound by launches are CUDA graphs


def setting_of(config: Config, machine: Machine) -> Setting:
    deepspeed, has_gpu = config.deepspeed, machine.gpu is not None
    zero = deepspeed.stage_for(machine.count)
    return Setting(
        ranks=machine.count,
        zero=zero,
        itemsize=resolve_dtype(config.model.dtype, "cuda" if has_gpu else "cpu").itemsize,
        gpu=has_gpu,
        checkpointing=config.model.gradient_checkpointing,
        offload_optimizer=deepspeed.offloads_optimizer and zero > 0,
        offload_parameters=deepspeed.offloads_parameters and zero == 3,
        frozen=deepspeed.frozen,
        lora=config.lora,
        graphs=has_gpu
        and config.rollout.cuda_graphs
        and not (zero or config.lora.rank or config.model.gradient_checkpointing),
    )


def trained_parameters(shape: Shape, parameters: int, setting: Setting) -> int:
    """How many of a model's `parameters` are trained: all, or those of adapters."""
    lora = setting.lora
    return shape.adapter_parameters(lora.rank, lora.targets) if lora.rank else parameters


def shared_base(shape: Shape, setting: Setting) -> Memory:
    """The frozen weights under adapters."""
    return Memory(weights=setting.itemsize * shape.parameters if setting.lora.rank else 0.0)


def training_state(parameters: float, setting: Setting) -> Memory:
    """A trained model between its passes: weights, their float32 copies where they are not float32, two moments.

    ZeRO 1 and 2 always keep a float32 copy of this rank's part, in a flat buffer; ZeRO 3 where the weights are not float32.
    ZeRO 3 also keeps this rank's gradients and one bucket. An offloaded optimizer has in the CPU's memory, of this rank's
    part: float32 weights, moments, gradients, their sum over micro-batches, and weights on their way back.
    """
    b, part = setting.itemsize, parameters / setting.ranks
    if setting.zero == 0:
        return Memory(weights=b * parameters, optimizer=(8 + 4 * (b < 4)) * parameters)
    is_sharded = setting.zero == 3
    weights = b * (part if is_sharded else parameters)
    optimizer = (8 + 4 * (b < 4 or not is_sharded)) * part
    gradient = 4 * part if is_sharded else 0.0
    workspace = _bucket(parameters) if is_sharded else 0.0
    if not setting.offload_optimizer:
        return Memory(weights=weights, optimizer=optimizer, gradients=gradient, workspace=workspace)
    host = optimizer + (8 + b) * part
    if setting.offload_parameters:
        return Memory(workspace=workspace, host=host + weights)
    return Memory(weights=weights, workspace=workspace, host=host)


def _bucket(parameters: float) -> float:
    """The buffer in which DeepSpeed reduces float32 gradients."""
    return 4 * min(BUCKET, parameters)


def gradients(parameters: float, setting: Setting) -> float:
    """Float32 gradients between a backward pass and the step, beyond what `training_state` has.

    ZeRO 1 keeps all of them until the step, ZeRO 2 this rank's part.
    """
    if setting.zero in (0, 1):
        return 4 * parameters
    return 4 * parameters / setting.ranks if setting.zero == 2 and not setting.offload_optimizer else 0.0


def backward_buffers(parameters: float, setting: Setting) -> float:
    """Buffers of a backward pass: ZeRO 2 reduces gradients in buckets, ZeRO 3 gathers the weights of each module."""
    if setting.zero == 2:
        own = 0.0 if setting.itemsize < 4 else 4 * parameters / setting.ranks  # float32 gradients are copied once more
        return _bucket(parameters) + own
    return gathered(parameters, setting) if setting.zero == 3 else 0.0


def gathered(parameters: float, setting: Setting) -> float:
    """The weights that ZeRO 3 has whole at one time: those in use and those fetched ahead."""
    return setting.itemsize * min(parameters, LIVE_PARAMETERS + PREFETCH_BUCKET)


def step_buffers(parameters: float, setting: Setting) -> float:
    """Buffers of the optimizer's step. Ours is fused and in place.

    DeepSpeed's adds up gradients in buckets (ZeRO 1) or copies a part's into one piece (ZeRO 2, float32 weights); torch's
    foreach AdamW, which runs on a GPU, takes the square roots of all moments at once.
    """
    if setting.zero == 0 or setting.offload_optimizer:
        return 0.0
    part = 4 * parameters / setting.ranks
    flat = {1: part + _bucket(parameters), 2: part * (setting.itemsize == 4), 3: 0.0}[setting.zero]
    return flat + part * setting.gpu


def frozen_state(parameters: float, setting: Setting) -> Memory:
    """A model that is only evaluated, while it is not used."""
    whole = setting.itemsize * parameters
    if setting.frozen == "offloaded":
        return Memory(host=whole) if setting.gpu else Memory(weights=whole)
    return Memory(weights=whole / (setting.ranks if setting.frozen == "sharded" else 1))


def frozen_use(parameters: float, setting: Setting) -> float:
    """The further weights of such a model while it is used."""
    if setting.frozen == "offloaded" and setting.gpu:
        return setting.itemsize * parameters
    return gathered(parameters, setting) if setting.frozen == "sharded" and setting.ranks > 1 else 0.0


@dataclass(frozen=True)
class Items:
    """The lengths, in tokens, of what a stage is trained on."""

    prompt: float  # mean
    response: float  # mean
    longest: int  # prompt and response together
    count: int | None = None  # examples, if known

    @property
    def mean(self) -> float:
        return self.prompt + self.response

    def all_longest(self) -> "Items":
        """As many items, each as long as the longest one, with the same share of tokens in responses."""
        factor = self.longest / self.mean
        return Items(factor * self.prompt, factor * self.response, self.longest, self.count)


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
    budget: TokenBudget  # with which the phases are planned
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
    def passes_peak(self) -> float:
        """The bytes of the largest phase but rollouts, whose cache takes what is left."""
        return max((phase.memory.total for phase in self.phases if phase.name != "rollout"), default=0.0)

    @property
    def budgets(self) -> dict[str, TokenBudget]:
        """The tokens of a pass in each stage."""
        return {stage.name: stage.budget for stage in self.stages}

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
