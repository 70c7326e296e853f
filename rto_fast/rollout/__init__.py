"""Rollouts: engines that sample responses with the present weights of the policy."""

from typing import cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from rto_fast.config import RolloutConfig
from rto_fast.errors import ModelError
from rto_fast.models.model import Model
from rto_fast.rollout.base import Engine, Exactness, RolloutBatch, Sampling
from rto_fast.rollout.hf import HFEngine
from rto_fast.rollout.native import NativeEngine
from rto_fast.system.notices import notify
from rto_fast.training.ranks import any_rank

__all__ = ["Engine", "Exactness", "HFEngine", "NativeEngine", "RolloutBatch", "Sampling", "build_engine"]


def build_engine(model: Model | nn.Module, tokenizer: PreTrainedTokenizerBase | None, config: RolloutConfig) -> Engine:
    """The engine that `config.engine` names. It samples with the weights that `model` has at each call.

    For a model that the native engine cannot decode, this is transformers' `generate`, with a warning.
    """
    if config.engine == "vllm":
        from rto_fast.rollout.vllm import VLLMEngine

        return VLLMEngine(model, tokenizer, config)
    if config.engine == "native":
        engine, reason = None, "another rank's does"
        try:
            engine = NativeEngine(model, tokenizer, config)
        except ModelError as error:
            reason = str(error)
        if not any_rank(engine is None):  # all ranks have the same one
            native = cast(NativeEngine, engine)
            if any_rank(not native.exactness.holds) and native.exactness.holds:
                native.exactness = Exactness(reason="another rank's do")
            return native
        notify("rollout", "engine_falls_back", f"rollout.engine: falls back to hf (slower): {reason}")
    return HFEngine(model, tokenizer, config)
