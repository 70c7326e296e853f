"""Scores by any judge, and their normalisation."""

from dataclasses import dataclass

import torch

from rto_fast.models.model import ScoreStatistics
from rto_fast.rewards.completions import Completion, Judge
from rto_fast.rewards.function import RewardFunction, copies, numbers
from rto_fast.rewards.model import RewardModel
from rto_fast.system.process_state import users_settings


@dataclass(frozen=True)
class NormalizedScores:
    """(score − mean) / std of a reward source, with statistics over held-out chosen and rejected responses."""

    source: RewardModel | RewardFunction
    path: str  # the reward model's directory, or module:function
    mean: float = 0.0
    std: float = 1.0

    def __call__(self, completions: list[Completion]) -> torch.Tensor:
        return (judged(self.source, completions) - self.mean) / self.std


def score_statistics(scores: torch.Tensor) -> ScoreStatistics:
    """Returns the mean and the standard deviation of scores [N]; 1 for the deviation of constant scores."""
    std = scores.std(correction=0).item()
    return ScoreStatistics(scores.mean().item(), std if std > 1e-6 else 1.0)


def judged(judge: Judge, completions: list[Completion]) -> torch.Tensor:
    """Returns the scores [N] by any judge; one that is not of this package is called as a user's function is."""
    if isinstance(judge, (RewardModel, RewardFunction, NormalizedScores)):
        return judge(completions)
    with users_settings():
        scores = numbers(judge(copies(completions)), "judge")
    return scores.clone()
