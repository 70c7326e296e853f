"""The configuration of a run: dataclasses, a YAML file, command-line overrides.

`load_config(["--config", "run.yaml", "--rto.kl_coef", "0.02"])` gives a validated `Config`; every field below is both a
YAML key and a command-line option. Rewards, learning rates and batches default to the paper's for Llama-3-8B on
UltraFeedback (arXiv 2404.18922). Without `--config` it is `configs/default.yaml`, the embedded world's, and where a model or
data is given `configs/own.yaml`.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import yaml

from rto_fast.config.fields import (
    Coefficient,
    Count,
    CountOr0,
    FolderAtHome,
    LearningRate,
    Location,
    MomentDecay,
    Positive,
    PowerOf2,
    Range,
    Seed,
    Share,
    SignedCoefficient,
    Threads,
    Word,
    check_fields,
    describe,
    fits,
    shown,
)
from rto_fast.config.options import Given, asks_for_help, build, flattened, from_option, print_help, split_arguments
from rto_fast.config.shipped import config_file, implied_config, shipped_configs
from rto_fast.config.yaml_text import Dumper, Value, read, read_file
from rto_fast.errors import ConfigError, FieldError
from rto_fast.system import terminal


@dataclass
class ModelConfig:
    """The language model that is aligned."""

    path: Location | None = None
    """Directory or hub id of a causal language model, where SFT starts; not used when sft.model is given.
    `embedded` is a tiny one, trained from scratch."""
    tokenizer: Location | None = None
    """Directory or hub id of the tokenizer; default: the model's."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights and activations; auto is bfloat16 on a GPU (with float32 master weights), float32 on a CPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Allow a model directory to run its own Python code. Leave off for models you did not write."""


@dataclass
class DataConfig:
    """Preference data, prompts and how they become tokens."""

    preferences: Location | None = None
    """Pairs for the reward model and DPO: a file, a directory, or the name of an HF dataset (`name:config`); each source
    may name its split, `name[test]`. `embedded:preferences` is the generated world's."""
    sft: Location | None = None
    """Demonstrations for the SFT stage; default: the chosen responses of `preferences`."""
    prompts: Location | None = None
    """Prompts of the RTO stage; default: those of `preferences`."""
    eval_prompts: Location | None = None
    """Prompts on which policies are compared; default: some held out of `preferences`, or of `prompts`."""
    split: Word = "train"
    """Split of `preferences`; the other sources' is train unless they name one."""
    invalid: Literal["error", "skip"] = "error"
    """What an unusable row does (a missing value, another layout than most, a malformed line, one that the chat template
    refuses): stop the run, or be left out and counted."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of your columns where they are not detected, e.g. {"prompt": "question", "chosen": "best"}."""
    limit: Count | None = None
    """Read at most this many examples of each source. No more of a local file is read than that takes, but always its
    first 1,000 rows, which tell the layout."""
    streaming: bool = False
    """Read HF datasets as a stream: only the first `limit` examples are downloaded, but always the first 1,000 rows."""
    deduplicate: bool = True
    """Drop all but the first of examples whose prompt and responses are equal to the letter."""
    prompt_format: Literal["auto", "chat", "text"] = "auto"
    """chat: a prompt given as text becomes one user message; text: it is used as it is; auto: chat if the tokenizer
    has a chat template. Text that is chat-templated already stays as it is, unless this is chat."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Of chat templates that know thoughts: whether the model thinks before it answers. on, off: the template's
    `enable_thinking`; off also leaves out a `<think>` with which prompts would end. auto: on if responses that are
    trained on have thoughts."""
    max_prompt_tokens: Count = 1024
    """Longer prompts are handled as `overlong_prompt` says."""
    max_response_tokens: Count = 1024
    """Longer responses of the data are cut (and get no end-of-sequence token)."""
    overlong_prompt: Literal["drop", "truncate_left"] = "drop"
    """Drop examples with too long prompts, or keep the prompt's last tokens."""
    held_out: CountOr0 = 256
    """Pairs held out of `preferences` (at most about a tenth) for preference accuracy and the reward model's mean and std.
    Prompts are held out with all their pairs, so where prompts are repeated the number is only approached."""
    cache_dir: FolderAtHome | None = "~/.cache/rto_fast"
    """Folder where token ids are kept by content, for the next run on the same texts; null: tokenise every time."""
    max_unpacked_gib: Positive = 4.0
    """A packed file (.gz, .parquet, a saved data set) whose rows would take more memory is refused."""


@dataclass
class TrainingConfig:
    """What every training stage has."""

    lr: LearningRate = 1e-6
    """Peak learning rate (AdamW)."""
    warmup_ratio: Share = 0.03
    """Share of the steps over which the learning rate rises linearly from 0."""
    min_lr_ratio: Share = 0.1
    """The learning rate follows a cosine down to this share of its peak."""
    adam_betas: tuple[MomentDecay, MomentDecay] = (0.9, 0.95)
    """AdamW's moment decay rates."""
    weight_decay: Coefficient = 0.0
    """Decoupled weight decay of matrices (norms and biases have none)."""
    max_grad_norm: Annotated[float, Range(0, 1e9, above=True, infinite=True)] = 1.0
    """Gradients are scaled down to this global norm; .inf: they are not."""
    epochs: Count = 1
    """Passes over all of the stage's data. Its last step takes what is left (RTO: its last rollout), and may be smaller."""
    batch_size: Count = 128
    """Examples in one optimizer step."""
    micro_batch_tokens: Count = 16384
    """Tokens in one forward and backward pass: sequences are packed, never padded, up to this many."""
    save_every: CountOr0 = 0
    """Steps (RTO: iterations) between checkpoints to resume from; 0: only where the run is stopped."""


@dataclass
class StageConfig(TrainingConfig):
    """A stage that learns from a fixed set of examples."""

    max_steps: Count | None = None
    """Stop after this many optimizer steps (the schedule ends there too)."""


@dataclass
class SFTConfig(StageConfig):
    """Stage 1: supervised fine-tuning. Skipped when a model is supplied."""

    model: Location | None = None
    """A model that needs no SFT: its directory or hub id skips the stage."""
    lr: LearningRate = 2e-5
    """Peak learning rate (AdamW)."""
    loss_on_prompt: bool = False
    """Train on the tokens of the prompt too, not only on the response."""


@dataclass
class RewardModelConfig(StageConfig):
    """Stage 2: Bradley-Terry reward model on the SFT model. Skipped when supplied or when `rto.score_scale` is 0."""

    model: Location | None = None
    """HF sequence classification model with one label, of any tokenizer; skips the stage."""
    function: Word | None = None
    """`module:function`, called with (prompts, responses), lists of text, returning one score each; skips the stage."""
    timeout: Positive | None = None
    """Seconds that `function` (and eval.function) may take for one call; one that hangs then ends the run, its state saved.
    The function runs in a thread of its own."""
    lr: LearningRate = 1e-6
    """Peak learning rate (AdamW)."""


@dataclass
class DPOConfig(StageConfig):
    """Stage 3: direct preference optimisation of the SFT model. Skipped when supplied or when
    `rto.dpo_reward_scale` is 0."""

    model: Location | None = None
    """A model trained with DPO; skips the stage."""
    ref_model: Location | None = None
    """The reference that `model` was trained against; default: the SFT model."""
    lr: LearningRate = 5e-7
    """Peak learning rate (AdamW)."""
    batch_size: Count = 256
    """Pairs in one optimizer step."""
    beta: Positive = 0.1
    """β of the DPO loss (not of the RTO reward: see rto.dpo_reward_scale)."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid: DPO (arXiv 2305.18290); ipo: identity preference optimisation (arXiv 2310.12036)."""
    label_smoothing: Annotated[float, Range(0, 0.5, below=True)] = 0.0
    """Assumed share of wrong labels, in [0, .5) (conservative DPO)."""


@dataclass
class RTOConfig(TrainingConfig):
    """Stage 4: Reinforced Token Optimization."""

    enabled: bool = True
    """Run the stage; off: stop after DPO."""
    init_from: Literal["sft", "dpo"] = "sft"
    """The policy's first weights."""
    ref_model: Location | None = None
    """The reference of the KL penalty; default: the SFT model."""
    critic: Location | None = None
    """HF sequence classification model to start the critic from; default: the reward model if it has the policy's
    vocabulary, else the SFT model."""
    lr: LearningRate = 5e-7
    """Peak learning rate of the policy (AdamW)."""
    critic_lr: LearningRate = 9e-6
    """Peak learning rate of the critic (AdamW)."""
    iterations: Count | None = None
    """Rollouts, on the prompts as often as that takes; default: as many as `epochs` passes over the prompts take."""
    prompts_per_rollout: Count = 1024
    """Prompts in one rollout."""
    samples_per_prompt: Count = 1
    """Responses sampled for each prompt."""
    ppo_epochs: Count = 1
    """Passes over each rollout."""
    batch_size: Count = 128
    """Responses in one optimizer step."""
    dpo_reward_scale: SignedCoefficient = 0.05
    """β1: scale of the dense reward log(π_dpo/π_ref); 0 gives plain PPO."""
    dpo_reward_clip: Coefficient = 0.05
    """The scaled dense reward is clipped to ± this; 0: not clipped."""
    kl_coef: Coefficient = 0.01
    """β2: scale of the penalty log(π/π_ref)."""
    kl_target: Positive | None = None
    """Adapt kl_coef to hold the KL of a response (nats) near this (arXiv 1909.08593); default: kl_coef is fixed."""
    kl_horizon: Count = 10000
    """Responses over which the adaptive kl_coef reacts."""
    score_scale: SignedCoefficient = 1.0
    """β3: scale of the sentence score; 0: no reward model."""
    score_clip: Coefficient = 10.0
    """The normalised sentence score is clipped to ± this; 0: not clipped."""
    normalize_scores: bool = True
    """Score → (score − mean)/std with the reward model's statistics (for a function: of the held-out responses)."""
    granularity: Literal["token", "sentence", "sequence"] = "token"
    """Where the dense reward is paid: at each token (RTO), at sentence ends (Semi-RTO), at the end (DDPO)."""
    delimiters: str = ".!?\n"
    """Characters that end a sentence (granularity: sentence)."""
    shaping: bool = False
    """Subtract the dense reward's sum at the end, which leaves PPO's optimum unchanged (RS-PPO)."""
    advantage: Literal["gae", "reinforce_pp"] = "gae"
    """gae: with a critic; reinforce_pp: without, whitened discounted return-to-go (RTO(RPP))."""
    gamma: Share = 1.0
    """Discount per token."""
    gae_lambda: Share = 0.95
    """λ of generalised advantage estimation."""
    whiten: bool = True
    """Scale the advantages of a rollout to mean 0 and variance 1."""
    old_logps: Literal["auto", "sampler", "recompute"] = "auto"
    """Log-probs of the policy that sampled: the sampler's while PPO with this clip does not notice how far they are from
    those of a forward pass, else recomputed and the loss importance-weighted (auto); always one of the two."""
    importance_cap: Positive = 2.0
    """Largest importance weight (truncated importance sampling)."""
    clip_eps: Annotated[float, Range(0, 1, below=True)] = 0.2
    """The probability ratio is clipped at 1 − this …"""
    clip_eps_high: Coefficient | None = None
    """… and at 1 + this; default: clip_eps."""
    dual_clip: Annotated[float, Range(1, 1e6, above=True)] | None = None
    """Bound the loss of negative advantages at this many times |advantage|; above 1, or none."""
    value_clip_eps: Positive | None = 0.2
    """The value may move by this from its old one (the loss is clipped), or none."""
    value_coef: Coefficient = 1.0
    """Scale of the value loss."""
    entropy_coef: Coefficient = 0.0
    """Scale of the entropy bonus."""
    loss_normalization: Literal["token", "sequence"] = "token"
    """Mean over all tokens of a batch, or mean over responses of their token means (the paper's code)."""
    truncation: Literal["penalty", "bootstrap", "score"] = "penalty"
    """A response cut at max_new_tokens gets its score, but at most 0, less truncation_penalty; or no score and the
    critic's value of what would have followed; or the score of the cut text."""
    truncation_penalty: Coefficient = 1.0
    """In units of the (normalised) score."""
    compat: Literal["none", "paper_code"] = "none"
    """paper_code repeats what the authors' code does differently: per-sequence loss, truncated responses get an EOS and
    are scored as finished, dpo.ref_model is ignored, dpo_reward_scale ≤ 0 leaves the reward unscaled."""

    # What `compat: paper_code` changes, all of it: the algorithm asks these properties and never reads `compat`.

    @property
    def is_paper_code(self) -> bool:
        return self.compat == "paper_code"

    @property
    def loss_per_sequence(self) -> bool:
        """The loss is a mean over responses of their token means, not over tokens."""
        return self.loss_normalization == "sequence" or self.is_paper_code

    @property
    def ends_truncated_responses(self) -> bool:
        """A truncated response gets an end-of-sequence token in place of its last one and is scored as finished."""
        return self.is_paper_code

    @property
    def ignores_dpo_reference(self) -> bool:
        """The dense reward is taken against the reference of the KL penalty, whatever the DPO model was trained against."""
        return self.is_paper_code

    @property
    def dense_reward_scale(self) -> float:
        """β1 as it is used: the authors' code leaves the dense reward unscaled where dpo_reward_scale is not positive."""
        return 1.0 if self.is_paper_code and self.dpo_reward_scale <= 0 else self.dpo_reward_scale


@dataclass
class RolloutConfig:
    """How responses are sampled, in training and evaluation."""

    engine: Literal["native", "hf", "vllm"] = "native"
    """native: on the training weights, in this process; hf: `generate` of transformers, which native falls back to where it
    does not know the architecture; vllm: a vLLM instance, given the weights before every rollout."""
    max_new_tokens: Count = 1024
    """Longest response."""
    min_new_tokens: Count = 1
    """Tokens before a stop token can be drawn."""
    temperature: Annotated[float, Range(1e-4, 1e4)] = 1.0
    """Of sampling, and of the policy that PPO optimises."""
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Nucleus sampling; the paper samples from the whole distribution (1)."""
    top_k: CountOr0 = 0
    """Only the most likely tokens, so many; 0: all."""
    min_p: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Only tokens with at least this share of the most likely token's probability."""
    batch_size: Count = 256
    """Responses decoded at once."""
    kv_cache_gib: Positive | None = None
    """Memory for keys and values; default: what the responses need, of what is free. native."""
    page_size: Annotated[int, PowerOf2(16, 2**20)] | None = None
    """Tokens in a page of that memory, a power of two; default: 64, and on a CPU a whole sequence. native."""
    prefill_tokens: Count = 16384
    """Prompt tokens computed at once. native."""
    cuda_graphs: bool = True
    """Decode steps as CUDA graphs (not with ZeRO-3, whose weights move). native."""
    vllm: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `vllm.LLM`, such as {tensor_parallel_size: 2}. vllm."""


@dataclass
class EvalConfig:
    """Comparison of the SFT, DPO and RTO policies on held-out prompts."""

    function: Word | None = None
    """`module:function` that judges (prompts, responses); default: the reward model's normalised score."""
    prompts: Count = 256
    """Prompts judged."""
    every: CountOr0 = 0
    """Also evaluate the RTO policy every this many iterations; 0: only at the end."""
    show: CountOr0 = 2
    """Completions printed per evaluation."""
    keep_best: bool = False
    """Keep the RTO policy with the best evaluation so far in `rto_best` (needs eval.every)."""


@dataclass
class LoraConfig:
    """Train low-rank adapters (LoRA, arXiv 2106.09685) instead of all weights; needs PEFT."""

    rank: CountOr0 = 0
    """Rank of the adapters; 0: all weights are trained. Each model that is written has its adapter merged; RTO's models are
    adapters of one copy of the SFT model."""
    alpha: Positive = 32.0
    """An adapter's output is scaled by alpha / rank."""
    targets: Word = "all-linear"
    """Layers with adapters, by the ends of their names (`q_proj,v_proj`); all-linear: all but the output layer."""


@dataclass
class DeepSpeedConfig:
    """Training on several GPUs, one process each, as torchrun or deepspeed start them."""

    zero_stage: Literal[0, 1, 2, 3] | None = None
    """What is spread over the processes (ZeRO): 1: optimizer states; 2: gradients too; 3: weights too. 0: nothing, and no
    DeepSpeed: torch adds up the gradients. Default: 2, with a single process 0."""
    offload_optimizer: bool = False
    """Keep float32 weights and moments in the CPU's memory and update there (ZeRO 1 to 3)."""
    offload_parameters: bool = False
    """Keep weights in the CPU's memory while they are not needed (ZeRO 3)."""
    sequence_parallel: Count = 1
    """1: a sequence is computed on one GPU. There is no other way here; see "Several GPUs" in the README."""
    frozen: Literal["resident", "offloaded", "sharded"] = "resident"
    """Reference, DPO and reward model: on every GPU; in the CPU's memory but for their phase; spread over the GPUs as
    with ZeRO 3. Those that are adapters (lora.rank) are with their base."""

    def stage_for(self, processes: int) -> int:
        """The ZeRO stage of a run of this many processes; 0: without DeepSpeed."""
        if self.zero_stage is not None:
            return self.zero_stage
        return 2 if processes > 1 else 0


@dataclass
class TrackConfig:
    """Where metrics go besides the run's folder (metrics.jsonl, TensorBoard's event files)."""

    service: Literal["wandb", "trackio"] | None = None
    """Weights & Biases, or trackio, which needs no account; to be installed by you."""
    project: Word = "rto-fast"
    """The project there; the run is named after output_dir."""


@dataclass
class HubConfig:
    """The final model on the Hugging Face Hub."""

    repo: Word | None = None
    """OWNER/NAME where the model is pushed when the run ends; `python -m rto_fast.push` does it later."""
    private: bool = True
    """A repository that is made for it is private."""


@dataclass
class Config:
    """A run."""

    output_dir: Location = "runs/default"
    """Folder of everything the run writes; must be new or empty."""
    resume: Location | None = None
    """Folder of an interrupted run to go on with. Its configuration is the run's; options given besides override it."""
    keep_checkpoints: Count = 2
    """Checkpoints of the stage under way that are kept; one that is found damaged gives way to the one before it."""
    seed: Seed = 0
    """Seed of initial weights, data order and sampling."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU when there is one."""
    threads: Threads | None = None
    """CPU threads; default: torch's choice. A run repeats to the last bit on the same machine with the same versions and the
    same number of threads; another CPU, or another number of threads, rounds differently, and samples then differ."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
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

    def __post_init__(self):
        check_fields(self)
        _validate(self)

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
    def trained_stages(self) -> tuple[str, ...]:
        """The names of the stages that this run trains, in their order; a stage left out is supplied or not needed."""
        trained = {
            "sft": self.trains_sft,
            "reward_model": self.trains_reward_model,
            "dpo": self.trains_dpo,
            "rto": self.rto.enabled,
        }
        return tuple(name for name, is_trained in trained.items() if is_trained)

    @property
    def final_stage(self) -> str:
        """The stage whose model is the run's result: rto, or dpo where RTO is off."""
        return "rto" if self.rto.enabled else "dpo"

    @property
    def final_policy(self) -> str:
        """The result's name in tables: RTO, PPO (without a dense reward) or DPO (where RTO is off)."""
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


def _validate(config):
    """What a range does not say: settings that do not go together."""

    def require(condition, key, expected):
        if not condition:
            raise FieldError(key, expected, shown(functools.reduce(getattr, key.split("."), config)))

    for stage in ("sft", "reward_model", "dpo", "rto"):
        settings = getattr(config, stage)
        fastest = max(settings.lr, getattr(settings, "critic_lr", 0.0))
        require(
            fastest * settings.weight_decay < 1,
            f"{stage}.weight_decay",
            f"less than 1 / {fastest:g}: a step takes the learning rate times this off every weight",
        )
    rto, rollout, dpo, deepspeed = config.rto, config.rollout, config.dpo, config.deepspeed
    require(
        not config.lora.rank or deepspeed.zero_stage != 3,
        "deepspeed.zero_stage",
        "0, 1 or 2 with lora.rank: the base is frozen, and whole on every GPU",
    )
    require(
        deepspeed.sequence_parallel == 1,
        "deepspeed.sequence_parallel",
        "1: a sequence is computed on one GPU (lower data.max_prompt_tokens and rollout.max_new_tokens, or set "
        "model.gradient_checkpointing)",
    )
    require(
        not deepspeed.offload_optimizer or deepspeed.zero_stage != 0,
        "deepspeed.offload_optimizer",
        "false with deepspeed.zero_stage: 0",
    )
    require(
        not deepspeed.offload_parameters or deepspeed.zero_stage == 3,
        "deepspeed.offload_parameters",
        "false without deepspeed.zero_stage: 3",
    )
    require(
        not config.data.streaming or config.data.limit,
        "data.limit",
        "a number with data.streaming: so many examples are read",
    )
    require(
        config.model.path or config.sft.model,
        "model.path",
        "a model to start from (or sft.model); `embedded` is the package's",
    )
    require(
        not (config.reward_model.model and config.reward_model.function),
        "reward_model.function",
        "null when reward_model.model is given: one of the two scores the responses",
    )
    require(dpo.loss != "ipo" or not dpo.label_smoothing, "dpo.label_smoothing", "0 with dpo.loss: ipo")
    require(
        not dpo.ref_model or dpo.model,
        "dpo.ref_model",
        "null without dpo.model: the DPO stage trains against the SFT model",
    )
    require(
        not (rto.advantage == "reinforce_pp" and rto.truncation == "bootstrap"),
        "rto.truncation",
        "'penalty' or 'score' when rto.advantage is reinforce_pp (there is no critic to bootstrap)",
    )
    require(
        rollout.min_new_tokens <= rollout.max_new_tokens,
        "rollout.min_new_tokens",
        f"at most rollout.max_new_tokens ({rollout.max_new_tokens})",
    )
    if config.hub.repo:
        check_repo(config.hub.repo, "hub.repo")


def check_rollout(rollout: RolloutConfig) -> None:
    """Raises ConfigError where a setting cannot be."""
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


LONG = 1000  # characters of a value; ordinary ones cannot fill a configuration
# Keys that older versions had: {key: (its default then, what takes its place)}. A saved config.yaml holds every key.
REMOVED = {
    "rto.max_mismatch": (
        0.02,
        "the limit follows from rto.clip_eps; rto.old_logps: sampler or recompute decides otherwise",
    )
}


def read_config(path: str) -> Given:
    """The values that a configuration file gives; of removed keys only those that have another than the old default count.

    Raises:
        ConfigError: a file that cannot be read, no YAML, or a key that does not exist.
    """
    given = flattened(Config, read_file(path), removed=REMOVED)
    for key in REMOVED.keys() & given.keys():
        value, (default, instead) = given.pop(key), REMOVED[key]
        if value.plain != default:
            raise ConfigError(f"{value.place}: {key} is no more: {instead}")
    return given


def _resumed(folder: str) -> Given:
    """The values of the run in `folder`, which is to go on."""
    if not fits(Location, folder):
        raise FieldError("--resume", describe(Location), shown(folder))
    files = [os.path.join(folder, name) for name in ("config.yaml", "progress.json")]
    if not all(map(os.path.isfile, files)):
        raise ConfigError(f"--resume {folder}: no run to go on with (no progress.json and config.yaml there)")
    return read_config(files[0])


def load_config(arguments: list[str], say: Callable[[str], object] = lambda text: None) -> Config:
    """Parses command-line `arguments`.

    Args:
        say: called with a line of text where a model or data is given without --config: which configuration that takes.
    Raises:
        ConfigError: for an unknown key (the nearest valid one is suggested), a value of the wrong type or range, or an
            unreadable file. `--help` prints every key and exits; `--print_config` prints the configuration and exits.
    """
    if asks_for_help(arguments):
        print_help(
            Config,
            "python -m rto_fast.train",
            "SFT → reward model → DPO → RTO, from preference data to an aligned Hugging "
            "Face checkpoint. Without --config: the embedded default, or `own` if a model or data is given.",
            {
                "config": f"YAML file, or one of {', '.join(shipped_configs())}; later options override it.",
                "print_config": "Print the configuration and exit.",
            },
        )
        raise SystemExit(0)
    for key, (_, instead) in REMOVED.items():
        if any(argument.partition("=")[0] == f"--{key}" for argument in arguments):
            raise ConfigError(f"command line: {key} is no more: {instead}")
    options = [*split_arguments(arguments, Config, others={"config"}, switches={"print_config"})]
    folder = os.path.expanduser(dict(options).get("resume", ""))
    given = _resumed(folder) if folder else {}
    if not folder and "config" not in dict(options):
        stated = [from_option(Config, key, text) for key, text in options if key != "print_config"]
        name, why = implied_config({key: value.plain for values in stated for key, value in values.items()})
        given = read_config(config_file(name))
        if why:
            say(why)
    for key, text in options:
        if key == "config":
            given |= read_config(config_file(text))
        elif key != "print_config":
            given |= from_option(Config, key, text)
    if folder:
        given["output_dir"] = given["resume"] = Value(folder, "--resume", folder)
    config = build(Config, given)
    _check_model_is_used(config, given)
    if config.resume and not folder:
        place = given["resume"].place
        raise ConfigError(
            f"{place}: resume: expected on the command line: --resume FOLDER goes on with that folder's run"
        )
    if any(not isinstance(value.content, str) or len(value.content) > LONG for value in given.values()):
        _check_saved(config)
    if "print_config" in dict(options):
        terminal.say(dump_config(config).rstrip("\n"))
        raise SystemExit(0)
    return config


def _check_model_is_used(config: Config, given: Given) -> None:
    """Raises ConfigError where the command line names a model that the file's sft.model would leave unused."""
    if not (config.model.path and config.sft.model):
        return
    path, start = given["model.path"], given["sft.model"]
    if path.place.startswith("--") and not start.place.startswith("--"):
        raise ConfigError(
            f"--model.path: {start.place} gives sft.model ({shown(config.sft.model)}), where the run starts instead; give "
            "--sft.model for another such model, or add --sft.model null to train SFT first"
        )


def _check_saved(config: Config) -> None:
    """Raises ConfigError where the run's config.yaml, which holds every field, could not be read: --resume does so."""
    try:
        read(dump_config(config), "config.yaml")
    except ConfigError as error:
        raise ConfigError(f"the configuration is too long to be saved and read again: {error}") from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML text that `--config` reads back."""

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return yaml.dump(plain(dataclasses.asdict(config)), Dumper=Dumper, sort_keys=False)
