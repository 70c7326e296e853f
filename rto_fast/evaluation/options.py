"""The options of `python -m rto_fast.evaluate`. Needs no torch."""

from dataclasses import dataclass, field
from typing import Literal

from rto_fast.config import Config, DataConfig, ModelConfig, RolloutConfig
from rto_fast.config.fields import Count, CountOr0, Location, Seed, Threads, Word, check_fields
from rto_fast.errors import ConfigError


@dataclass
class EvaluateConfig:
    """What an evaluation measures, and how."""

    model: Location | None = None
    """Directory or hub id of the policy that is evaluated."""
    data: Location | None = None
    """Prompts: a file, a folder, the name of an HF dataset or `embedded:eval_prompts`; `name[test]` names a split."""
    prompts: Count = 256
    """Number of prompts that are used, the first of the data."""
    reward: Word | None = None
    """`module:function`, which is called with (prompts, responses) and with the columns of the data that it names. The
    exact-answer reward of GSM8K is rto_fast.rewards:gsm8k."""
    reward_model: Location | None = None
    """HF sequence classification model with one label, of any tokenizer. It may be given beside `reward`."""
    reference: Location | None = None
    """The policy to compare with, and the reference of the KL: a model of the same vocabulary."""
    preferences: Location | None = None
    """Preference pairs (a source as `data`) on which the rewards' rankings are judged. No model should have been trained on
    them."""
    held_out: CountOr0 = 0
    """Use only the pairs that a training run with this data.held_out kept out of `preferences`; 0 uses all pairs."""
    dpo_model: Location | None = None
    """A model that was trained with DPO, to judge its implicit reward."""
    dpo_reference: Location | None = None
    """The reference against which `dpo_model` was trained. Default: `reference`."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    greedy: bool = False
    """Take the most likely token instead of sampling (temperature 0). The KL, which needs samples, is then not estimated."""
    seed: Seed | None = None
    """Seed of sampling. Default: that of the evaluations during training, the same for every policy."""
    output: Location | None = None
    """JSON file to write. With `-` the JSON goes to stdout and everything else to stderr."""
    show: CountOr0 = 2
    """Number of responses that are printed."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of your columns where they are not detected: {"prompt": "question"}."""
    prompt_format: Literal["auto", "chat", "text"] = "auto"
    """How a prompt that is given as text is used, see data.prompt_format of rto_fast.train."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Whether the model thinks first, see data.thinking of rto_fast.train. auto looks at the responses of `preferences`, or
    else of `data`."""
    max_prompt_tokens: Count = 1024
    """Longer prompts are left out."""
    max_response_tokens: Count = 1024
    """Longer responses of `preferences` are cut."""
    limit: Count | None = None
    """Read at most this many rows of `data` and of `preferences`."""
    tokenizer: Location | None = None
    """Directory or hub id of the tokenizer. Default: the model's own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is the GPU when there is one."""
    threads: Threads | None = None
    """CPU threads. Default: torch's choice."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto is bfloat16 on a GPU and float32 on a CPU."""
    micro_batch_tokens: Count = 16384
    """The most tokens in one forward pass."""
    trust_remote_code: bool = False
    """Allow a model directory to run its own Python code. Leave it off for models that you did not write."""

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
            device=self.device,
            threads=self.threads,
            rollout=self.rollout,
        )
