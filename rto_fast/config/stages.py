"""The configuration of training: what the four stages share; SFT, the reward model and DPO. RTO has its own file."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeVar

from rto_fast.config.fields import Coefficient, Count, LearningRate, Location, MomentDecay, Positive, Range, Share, Word

Stage = Literal["sft", "reward_model", "dpo", "rto"]
STAGES: tuple[Stage, ...] = ("sft", "reward_model", "dpo", "rto")
T = TypeVar("T")

# The defaults of what all stages have, stage by stage: the paper's for Llama-3-8B on UltraFeedback.
LEARNING_RATE = {"sft": 2e-5, "reward_model": 1e-6, "dpo": 5e-7, "rto": 5e-7, "critic": 9e-6}
BATCH_SIZE = {"sft": 128, "reward_model": 128, "dpo": 256, "rto": 128}
WARMUP_RATIO, MIN_LR_RATIO = 0.03, 0.1


def of_stage(value: T | dict[Stage, T], stage: Stage, default: T) -> T:
    """One stage's value of a field that holds one value for all stages, or values of some of them.

    Args:
        default: the value of a stage that is not named.
    """
    return value.get(stage, default) if isinstance(value, dict) else value


@dataclass
class OptimizerConfig:
    """AdamW and the course of its learning rate, in all four stages. The peaks are the stages' own: sft.lr and so on."""

    warmup_ratio: Share | dict[Stage, Share] = WARMUP_RATIO
    """Share of the optimizer steps over which the learning rate rises linearly from 0. One number holds for all stages;
    {sft: 0.1} is that of one stage and leaves the others at the default."""
    min_lr_ratio: Share | dict[Stage, Share] = MIN_LR_RATIO
    """The learning rate falls along a cosine to this share of its peak; 1 keeps it constant. One number, or {sft: 0.05}."""
    adam_betas: tuple[MomentDecay, MomentDecay] = (0.9, 0.95)
    """AdamW's decay rates of the moments."""
    weight_decay: Coefficient = 0.0
    """Decoupled weight decay of matrices. Norms and biases have none."""
    max_grad_norm: Annotated[float, Range(0, 1e9, above=True, infinite=True)] = 1.0
    """Gradients are scaled down to this global norm; .inf leaves them as they are."""

    def schedule(self, stage: Stage) -> tuple[float, float]:
        """(warmup_ratio, min_lr_ratio) of one stage."""
        warmup_ratio = of_stage(self.warmup_ratio, stage, WARMUP_RATIO)
        return warmup_ratio, of_stage(self.min_lr_ratio, stage, MIN_LR_RATIO)


@dataclass
class TrainingConfig:
    """What every stage has."""

    stage: ClassVar[Stage]
    lr: LearningRate
    """Peak learning rate (AdamW)."""
    batch_size: Count
    """Examples in one optimizer step."""
    epochs: Count = 1
    """Passes over all of the stage's data. The last step takes what is left and may be smaller."""


@dataclass
class SupervisedConfig(TrainingConfig):
    """What a stage has that learns from a fixed set of examples."""

    max_steps: Count | None = None
    """Stop after this many optimizer steps. The schedule ends there too."""


@dataclass
class SFTConfig(SupervisedConfig):
    """Stage 1: supervised fine-tuning. It is skipped when a model is supplied."""

    stage = "sft"
    lr: LearningRate = LEARNING_RATE["sft"]
    batch_size: Count = BATCH_SIZE["sft"]
    model: Location | None = None
    """A model that needs no SFT. Its directory or hub id skips the stage."""
    loss_on_prompt: bool = False
    """Train on the tokens of the prompt too, not only on those of the response."""


@dataclass
class RewardModelConfig(SupervisedConfig):
    """Stage 2: a Bradley-Terry reward model, trained from the SFT model. It is skipped when a model or a function is
    supplied, and when `rto.score_scale` is 0."""

    stage = "reward_model"
    lr: LearningRate = LEARNING_RATE["reward_model"]
    batch_size: Count = BATCH_SIZE["reward_model"]
    model: Location | None = None
    """An HF sequence classification model with one label, of any tokenizer. It skips the stage."""
    function: Word | None = None
    """`module:function`, which is called with two lists of text, (prompts, responses), and returns one score for each pair.
    It skips the stage."""
    timeout: Positive | None = None
    """Seconds that one call of `function` (or of eval.function) may take. When a call takes longer, the run saves its state
    and ends. Default: no limit."""


@dataclass
class DPOConfig(SupervisedConfig):
    """Stage 3: direct preference optimisation of the SFT model. It is skipped when a model is supplied, and when
    `rto.dpo_reward_scale` is 0."""

    stage = "dpo"
    lr: LearningRate = LEARNING_RATE["dpo"]
    batch_size: Count = BATCH_SIZE["dpo"]
    model: Location | None = None
    """A model that was trained with DPO. It skips the stage."""
    ref_model: Location | None = None
    """The reference against which `model` was trained. Default: the SFT model."""
    beta: Positive = 0.1
    """β of the DPO loss. The scale of the RTO reward is rto.dpo_reward_scale."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid is DPO (arXiv 2305.18290), ipo is identity preference optimisation (arXiv 2310.12036)."""
    label_smoothing: Annotated[float, Range(0, 0.5, below=True)] = 0.0
    """Assumed share of wrong labels, in [0, .5) (conservative DPO)."""


@dataclass
class DeepSpeedConfig:
    """Training on several GPUs, with one process each, as torchrun and deepspeed start them."""

    zero_stage: Literal[0, 1, 2, 3] | None = None
    """What ZeRO spreads over the processes. 1: optimizer states; 2: gradients too; 3: weights too; 0: nothing, and torch
    sums the gradients without DeepSpeed. Default: 2 with several processes, 0 with one."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What is kept in the CPU's memory. optimizer: float32 weights and moments, which are updated there (ZeRO 1 to 3); all:
    the weights too, while they are not needed (ZeRO 3)."""
    frozen: Literal["resident", "offloaded", "sharded"] = "resident"
    """Where the reference, DPO and reward models are. resident: on every GPU; offloaded: in the CPU's memory except during
    their phase; sharded: spread over the GPUs as with ZeRO 3. Models that are adapters (lora.rank) stay with their base."""

    @property
    def offloads_optimizer(self) -> bool:
        return self.offload != "none"

    @property
    def offloads_parameters(self) -> bool:
        return self.offload == "all"

    def stage_for(self, processes: int) -> int:
        """The ZeRO stage of a run of this many processes; 0: without DeepSpeed."""
        if self.zero_stage is not None:
            return self.zero_stage
        return 2 if processes > 1 else 0
