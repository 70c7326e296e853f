"""The models that a configuration names, and checks of their files."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from rto_fast.config import Config
from rto_fast.errors import ModelError
from rto_fast.models.directory import Kind, check_fit, check_vocabulary, generation_config, load_tokenizer, model_config


@dataclass(frozen=True)
class Supplied:
    """A model that the configuration names."""

    key: str  # of the configuration
    path: str  # directory or hub id
    kind: Kind
    reads_ids: bool  # whether it reads the policy's token ids; otherwise text, which its own tokenizer encodes
    trust_remote_code: bool = False

    def config(self) -> PreTrainedConfig:
        return model_config(self.path, trust_remote_code=self.trust_remote_code)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.path, trust_remote_code=self.trust_remote_code)

    def generation_config(self) -> GenerationConfig | None:
        return generation_config(self.path, trust_remote_code=self.trust_remote_code)


def supplied_models(config: Config, base: str) -> list[Supplied]:
    """Returns the models of a run's configuration; the one that the run starts from (`base`) comes first."""
    key = "sft.model" if config.sft.model else "model.path"
    named: list[tuple[str, str | None, Kind, bool]] = [
        (key, base, "causal_lm", bool(config.sft.model or config.model.tokenizer)),
        ("dpo.model", config.dpo.model, "causal_lm", True),
        ("dpo.ref_model", config.dpo.ref_model, "causal_lm", True),
        ("rto.ref_model", config.rto.ref_model, "causal_lm", True),
        ("rto.critic", config.rto.critic, "scorer", True),
        ("reward_model.model", config.reward_model.model, "scorer", False),
    ]
    trust = config.model.trust_remote_code
    return [Supplied(key, path, kind, reads_ids, trust) for key, path, kind, reads_ids in named if path]


def check_models(models: Sequence[Supplied], tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks the files of supplied models without loading their weights.

    Args:
        models: The models.
        tokenizer: The policy's tokenizer.

    Raises:
        ModelError: A model is missing, is not of its kind, or is given the policy's token ids but has another vocabulary.
    """
    for model in models:
        if model.reads_ids:
            check_vocabulary(model.path, tokenizer, model.key, trust_remote_code=model.trust_remote_code)
        else:
            model.tokenizer()
    for model in models:
        try:
            if model.kind == "causal_lm":
                model.generation_config()
            check_fit(model.path, model.kind, trust_remote_code=model.trust_remote_code)
        except ModelError as error:
            raise ModelError(f"{model.key}: {error}") from error
