"""Sentence scores: a reward model, a Python function, or none. (Token rewards are `rto_fast.ops.rto_advantages`.)"""

from rto_fast.rewards.choice import NormalizedScores, judged, score_statistics
from rto_fast.rewards.exact_answer import gsm8k
from rto_fast.rewards.function import RewardFunction
from rto_fast.rewards.model import (
    Completion,
    Judge,
    RewardModel,
    completions_of,
    completions_of_pairs,
    same_tokens,
    score_sequences,
)

__all__ = [
    "Completion",
    "Judge",
    "NormalizedScores",
    "RewardFunction",
    "RewardModel",
    "completions_of",
    "completions_of_pairs",
    "gsm8k",
    "judged",
    "same_tokens",
    "score_sequences",
    "score_statistics",
]
