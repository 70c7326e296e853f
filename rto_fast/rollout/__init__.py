"""Rollouts: sampling responses from the policy's present weights."""

import warnings

from rto_fast.errors import ModelError
from rto_fast.rollout.base import RolloutBatch, Sampling
from rto_fast.rollout.hf import HFEngine
from rto_fast.rollout.native import NativeEngine

__all__ = ["HFEngine", "NativeEngine", "RolloutBatch", "Sampling", "build_engine"]


def build_engine(model, tokenizer, config):
    """The engine that `config.engine` names (`RolloutConfig`); it decodes with what `model`'s weights are at each call.

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
