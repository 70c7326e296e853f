"""The models that a configuration names, and whether their files are what they are read as."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from rto_fast.config import Config
from rto_fast.errors import ModelError
from rto_fast.models.directory import check_fit, check_vocabulary, generation_config, load_tokenizer, model_config


@dataclass(frozen=True)
class Supplied:
    """A model that the configuration names."""

    key: str  # of the configuration
    path: str  # directory or hub id
    kind: str  # a key of `rto_fast.models.directory.KINDS`
    reads_ids: bool  # it is given the policy's token ids; else text, which its own tokenizer reads
    trust_remote_code: bool = False

    def config(self) -> PreTrainedConfig:
        return model_config(self.path, trust_remote_code=self.trust_remote_code)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.path, trust_remote_code=self.trust_remote_code)

    def generation_config(self) -> GenerationConfig | None:
        return generation_config(self.path, trust_remote_code=self.trust_remote_code)


def supplied_models(config: Config, base: str) -> list[Supplied]:
    """The models of a run's configuration; the one where the run starts (`base`) comes first."""
    key = "sft.model" if config.sft.model else "model.path"
    named = (
        (key, base, "causal_lm", bool(config.sft.model or config.model.tokenizer)),
        ("dpo.model", config.dpo.model, "causal_lm", True),
        ("dpo.ref_model", config.dpo.ref_model, "causal_lm", True),
        ("rto.ref_model", config.rto.ref_model, "causal_lm", True),
        ("rto.critic", config.rto.critic, "scorer", True),
        ("reward_model.model", config.reward_model.model, "scorer", False),
    )
    trust = config.model.trust_remote_code
    return [Supplied(key, path, kind, reads_ids, trust) for key, path, kind, reads_ids in named if path]


def check_models(models: Sequence[Supplied], tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks the files of supplied models without loading their weights.

    Args:
        models: The models.
        tokenizer: The policy's tokenizer.

    Raises:
        ModelError: A model is missing, is not of its kind, or is given the policy's token ids and reads them otherwise.
    """
    for model in models:
        if model.reads_ids:
            check_vocabulary(model.path, tokenizer, model.key, trust_remote_code=model.trust_remote_code)
        else:
            model.tokenizer()
    for model in models:
        with _named(model.key):
            if model.kind == "causal_lm":
                model.generation_config()
            check_fit(model.path, model.kind, trust_remote_code=model.trust_remote_code)


@contextlib.contextmanager
def _named(key: str) -> Iterator[None]:
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{key}: {error}") from error
