"""Rollouts: sampling responses from the policy's present weights."""

from rto_fast.rollout.base import RolloutBatch, Sampling
from rto_fast.rollout.hf import HFEngine

__all__ = ["RolloutBatch", "Sampling", "build_engine"]

ENGINES = {"hf": HFEngine}


def build_engine(model, tokenizer, config):
    """The engine that `config.engine` names (`RolloutConfig`); it decodes with what `model`'s weights are at each call."""
    return ENGINES[config.engine](model, tokenizer, config)
