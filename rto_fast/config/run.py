"""The configuration of a run: its sections, what follows from them, and which settings do not go together."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from rto_fast.config.data import DataConfig
from rto_fast.config.fields import Count, CountOr0, Location, Seed, Threads, check_fields, shown
from rto_fast.config.model import LoraConfig, ModelConfig
from rto_fast.config.outputs import EvalConfig, HubConfig, TrackConfig
from rto_fast.config.rollout import RolloutConfig
from rto_fast.config.rto import RTOConfig
from rto_fast.config.stages import (
    DeepSpeedConfig,
    DPOConfig,
    OptimizerConfig,
    RewardModelConfig,
    SFTConfig,
    Stage,
    of_stage,
)
from rto_fast.errors import FieldError


@dataclass
class Config:
    """The run as a whole."""

    output_dir: Location = "runs/default"
    """Folder of everything that the run writes. It must be new or empty."""
    resume: Location | None = None
    """Folder of an interrupted run to continue. Its configuration is used; options on the command line override it."""
    save_every: CountOr0 | dict[Stage, CountOr0] = 0
    """Optimizer steps (in RTO: iterations) between checkpoints to resume from; 0 saves only when the run is stopped. One
    number holds for all stages; {rto: 10} is that of one stage and leaves the others at 0."""
    keep_checkpoints: Count = 2
    """How many checkpoints of the present stage are kept. If one is found damaged, the one before it is used."""
    seed: Seed = 0
    """Seed of initial weights, data order and sampling."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is the GPU when there is one."""
    threads: Threads | None = None
    """CPU threads. Default: torch's choice. A run repeats to the last bit on the same machine with the same versions and the
    same number of threads. Another CPU or number of threads rounds differently, and samples then differ."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    rto: RTOConfig = field(default_factory=RTOConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    hub: HubConfig = field(default_factory=HubConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        for holds, key, expected in _rules(self):
            if not holds:
                raise FieldError(key, expected, shown(functools.reduce(getattr, key.split("."), self)))
        if self.hub.repo:
            check_repo(self.hub.repo, "hub.repo")

    @property
    def needs_reward_model(self) -> bool:
        """Whether responses get a sentence score, from a reward model or a function."""
        return self.rto.enabled and self.rto.score_scale != 0

    @property
    def pays_dense_reward(self) -> bool:
        """Whether RTO pays log(π_dpo/π_ref) for each token; without it the stage is plain PPO."""
        return self.rto.enabled and self.rto.dense_reward_scale != 0

    @property
    def needs_dpo_model(self) -> bool:
        """Whether the run uses a DPO model: as the dense reward, as the first policy or as the final model."""
        return self.pays_dense_reward or self.rto.init_from == "dpo" or not self.rto.enabled

    @property
    def trains_sft(self) -> bool:
        return not self.sft.model

    @property
    def trains_reward_model(self) -> bool:
        return self.needs_reward_model and not self.reward_model.model and not self.reward_model.function

    @property
    def trains_dpo(self) -> bool:
        return self.needs_dpo_model and not self.dpo.model

    @property
    def trains_on_pairs(self) -> bool:
        """Whether a stage learns from preference pairs."""
        return self.trains_reward_model or self.trains_dpo

    @property
    def trained_stages(self) -> tuple[Stage, ...]:
        """The names of the stages that this run trains, in their order; a stage left out is supplied or not needed."""
        trained: dict[Stage, bool] = {
            "sft": self.trains_sft,
            "reward_model": self.trains_reward_model,
            "dpo": self.trains_dpo,
            "rto": self.rto.enabled,
        }
        return tuple(name for name, is_trained in trained.items() if is_trained)

    @property
    def final_policy(self) -> str:
        """What the run's result is called in tables: RTO, PPO without a dense reward, or DPO where RTO is off."""
        return "DPO" if not self.rto.enabled else "RTO" if self.pays_dense_reward else "PPO"

    @property
    def has_judge(self) -> bool:
        """Whether anything can score the policies in an evaluation."""
        return bool(self.eval.function) or self.needs_reward_model

    @property
    def has_critic(self) -> bool:
        """Whether RTO trains a value model."""
        return self.rto.enabled and self.rto.advantage == "gae"

    @property
    def critic_starts_from_policy(self) -> bool:
        """Whether the critic starts from a language model, as far as the configuration tells: a supplied reward model may
        still turn out to have another vocabulary than the policy."""
        return self.has_critic and not self.rto.critic and not self.reward_model.model

    @property
    def dpo_reference(self) -> str | None:
        """The reference of the dense reward, a directory or hub id; None is the SFT model."""
        follows_kl_reference = self.rto.ignores_dpo_reference or not self.pays_dense_reward
        return self.rto.ref_model if follows_kl_reference else self.dpo.ref_model

    def checkpoint_interval(self, stage: Stage) -> int:
        """`save_every` of one stage."""
        return of_stage(self.save_every, stage, 0)


def _rules(config: Config) -> Iterator[tuple[object, str, str]]:
    """What the range of a field does not say: (whether it holds, key, what is expected of it)."""
    rto, rollout, dpo, deepspeed = config.rto, config.rollout, config.dpo, config.deepspeed
    fastest = max(config.sft.lr, config.reward_model.lr, dpo.lr, rto.lr, rto.critic_lr)
    yield (
        fastest * config.optimizer.weight_decay < 1,
        "optimizer.weight_decay",
        f"less than 1 / {fastest:g}: a step takes the learning rate times this off every weight",
    )
    yield (
        not config.lora.rank or deepspeed.zero_stage != 3,
        "deepspeed.zero_stage",
        "0, 1 or 2 with lora.rank: the base is frozen, and whole on every GPU",
    )
    yield (
        not deepspeed.offloads_optimizer or deepspeed.zero_stage != 0,
        "deepspeed.offload",
        "none with deepspeed.zero_stage: 0",
    )
    yield (
        not deepspeed.offloads_parameters or deepspeed.zero_stage == 3,
        "deepspeed.offload",
        "none or optimizer without deepspeed.zero_stage: 3",
    )
    yield (
        not config.data.streaming or config.data.limit,
        "data.limit",
        "a number with data.streaming: the number of examples that are read",
    )
    yield (
        config.model.path or config.sft.model,
        "model.path",
        "a model to start from, or sft.model; `embedded` is the tiny model of the package",
    )
    yield (
        not (config.reward_model.model and config.reward_model.function),
        "reward_model.function",
        "null when reward_model.model is given: one of the two scores the responses",
    )
    yield dpo.loss != "ipo" or not dpo.label_smoothing, "dpo.label_smoothing", "0 with dpo.loss: ipo"
    yield (
        not dpo.ref_model or dpo.model,
        "dpo.ref_model",
        "null without dpo.model: the DPO stage trains against the SFT model",
    )
    yield (
        not (rto.advantage == "reinforce_pp" and rto.truncation == "bootstrap"),
        "rto.truncation",
        "'penalty' or 'score' when rto.advantage is reinforce_pp (there is no critic to bootstrap)",
    )
    yield (
        rollout.min_new_tokens <= rollout.max_new_tokens,
        "rollout.min_new_tokens",
        f"at most rollout.max_new_tokens ({rollout.max_new_tokens})",
    )


def check_rollout(rollout: RolloutConfig) -> None:
    """Raises ConfigError where a setting is out of range or does not go with another."""
    Config(model=ModelConfig(path="given"), rollout=rollout)


def check_repo(name: str, key: str) -> None:
    """Raises ConfigError unless `name` is OWNER/NAME as the Hub allows it."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
        valid = "/" in name
    except HFValidationError:
        valid = False
    if not valid:
        raise FieldError(key, "OWNER/NAME (letters, digits, '-', '_' and '.')", shown(name))
