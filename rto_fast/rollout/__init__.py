"""Rollouts: sampling responses from the policy's present weights."""

import warnings

from torch import nn
from transformers import PreTrainedTokenizerBase

from rto_fast.config import RolloutConfig
from rto_fast.errors import ModelError
from rto_fast.rollout.base import Engine, RolloutBatch, Sampling
from rto_fast.rollout.hf import HFEngine
from rto_fast.rollout.native import NativeEngine

__all__ = ["Engine", "HFEngine", "NativeEngine", "RolloutBatch", "Sampling", "build_engine"]


def build_engine(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, config: RolloutConfig) -> Engine:
    """The engine that `config.engine` names; it decodes with what `model`'s weights are at each call.

    A model that the native engine cannot decode gets transformers' `generate`, with a warning.
    """
    if config.engine == "vllm":
        from rto_fast.rollout.vllm import VLLMEngine

        return VLLMEngine(model, tokenizer, config)
    if config.engine == "native":
        try:
            return NativeEngine(model, tokenizer, config)
        except ModelError as error:
            warnings.warn(f"rollout.engine: falls back to hf (slower): {error}", stacklevel=2)
    return HFEngine(model, tokenizer, config)
