"""The options of `python -m rto_fast.evaluate`. Needs no torch."""

from dataclasses import dataclass, field
from typing import Literal

from rto_fast.config import Config, DataConfig, ModelConfig, RolloutConfig
from rto_fast.config.fields import Count, CountOr0, Location, Seed, Threads, Word, check_fields
from rto_fast.errors import ConfigError


@dataclass
class EvaluateConfig:
    """What is measured, and how."""

    model: Location | None = None
    """Directory or hub id of the policy that is evaluated."""
    data: Location | None = None
    """Prompts: a file, a folder, the name of an HF dataset or `embedded:eval_prompts`; `name[test]` names a split."""
    prompts: Count = 256
    """Prompts used, the first of the data."""
    reward: Word | None = None
    """`module:function`, called with (prompts, responses) and the columns of the data that it names; GSM8K's exact-answer
    reward is rto_fast.rewards:gsm8k."""
    reward_model: Location | None = None
    """HF sequence classification model with one label, of any tokenizer. May be given beside `reward`."""
    reference: Location | None = None
    """The policy to win against, and of the KL; a model of the same vocabulary."""
    preferences: Location | None = None
    """Pairs (as `data`) on which the rewards' rankings are judged: such as no model was trained on."""
    held_out: CountOr0 = 0
    """Use only the pairs that a training run with this data.held_out kept out of `preferences`; 0: all pairs."""
    dpo_model: Location | None = None
    """Model trained with DPO, for its implicit reward."""
    dpo_reference: Location | None = None
    """The reference that `dpo_model` was trained against; default: `reference`."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    greedy: bool = False
    """Take the most likely token instead of sampling (temperature 0). The KL is then not estimated: it needs samples."""
    seed: Seed | None = None
    """Of sampling; default: that of the evaluations during training, the same for every policy."""
    output: Location | None = None
    """JSON file to write; `-` is stdout, and what is printed goes to stderr."""
    show: CountOr0 = 2
    """Responses printed."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of your columns where they are not detected, e.g. {"prompt": "question"}."""
    prompt_format: Literal["auto", "chat", "text"] = "auto"
    """See data.prompt_format of rto_fast.train."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """See data.thinking of rto_fast.train; auto looks at the responses of `preferences`, else of `data`."""
    max_prompt_tokens: Count = 1024
    """Longer prompts are left out."""
    max_response_tokens: Count = 1024
    """Longer responses of `preferences` are cut."""
    limit: Count | None = None
    """Read at most this many rows of `data` and of `preferences`."""
    tokenizer: Location | None = None
    """Directory or hub id of the tokenizer; default: the model's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU when there is one."""
    threads: Threads | None = None
    """CPU threads; default: torch's choice."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto is bfloat16 on a GPU, float32 on a CPU."""
    micro_batch_tokens: Count = 16384
    """Tokens in one forward pass."""
    trust_remote_code: bool = False
    """Allow a model directory to run its own Python code. Leave off for models you did not write."""

    def __post_init__(self) -> None:
        check_fields(self)

        def require(condition: object, key: str, expected: str) -> None:
            if not condition:
                raise ConfigError(f"--{key}: expected {expected}")

        require(self.model, "model", "the directory or hub id of the model to evaluate")
        require(self.data or self.preferences, "data", "prompts to respond to (or --preferences, to rank)")
        require(not self.reference or self.data or self.dpo_model, "reference", "--data: prompts to compare on")
        require(not self.dpo_model or self.preferences, "dpo_model", "--preferences beside it: pairs to rank")
        require(
            not self.dpo_model or self.dpo_reference or self.reference,
            "dpo_model",
            "--reference or --dpo_reference beside it: the model that its DPO started from",
        )
        require(not self.dpo_reference or self.dpo_model, "dpo_reference", "--dpo_model beside it")
        if self.preferences and not (self.reward or self.reward_model or self.dpo_model):
            raise ConfigError("--preferences: expected --reward, --reward_model or --dpo_model, which rank the pairs")
        self.as_config()

    def as_config(self) -> Config:
        """The configuration of a training run with this model, data and rollout."""
        data = DataConfig(
            preferences=self.preferences,
            eval_prompts=self.data,
            columns=self.columns,
            limit=self.limit,
            prompt_format=self.prompt_format,
            thinking=self.thinking,
            max_prompt_tokens=self.max_prompt_tokens,
            max_response_tokens=self.max_response_tokens,
            held_out=self.held_out,
        )
        return Config(
            model=ModelConfig(
                path=self.model,
                tokenizer=self.tokenizer,
                dtype=self.dtype,
                micro_batch_tokens=self.micro_batch_tokens,
                trust_remote_code=self.trust_remote_code,
            ),
            data=data,
            rollout=self.rollout,
        )
