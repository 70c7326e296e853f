"""What scores and judges the responses of a run, and where the critic starts: read off the configuration."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from rto_fast.config import Config
from rto_fast.errors import ConfigError
from rto_fast.models.directory import load_tokenizer
from rto_fast.models.model import ScoreStatistics
from rto_fast.rewards.function import RewardFunction, copies, numbers
from rto_fast.rewards.model import Completion, Judge, RewardModel, completions_of_pairs
from rto_fast.session import TrainingSession
from rto_fast.system.process_state import users_settings
from rto_fast.training.loader import Loader


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


class Functions(NamedTuple):
    """The user's functions."""

    reward: RewardFunction | None  # reward_model.function
    judge: RewardFunction | None  # eval.function


def import_functions(config: Config, device: str) -> Functions:
    """Imports the functions that the configuration names.

    Raises:
        ConfigError: One cannot be imported or called.
    """

    def function(key: str, path: str | None) -> RewardFunction | None:
        return RewardFunction(path, key, device, config.reward_model.timeout) if path else None

    return Functions(
        function("reward_model.function", config.reward_model.function), function("eval.function", config.eval.function)
    )


def choose_scorer(
    session: TrainingSession, loader: Loader, function: RewardFunction | None, reward_model: str | None
) -> NormalizedScores | None:
    """What scores the responses in RTO; None where the reward is dense only.

    Args:
        session: The run.
        loader: Loads the reward model.
        function: The user's reward function; it goes before a reward model.
        reward_model: The reward model's directory or hub id.

    Raises:
        ConfigError: The scores are to be normalised, and there is nothing to measure their mean and deviation on.
    """
    config = session.config
    if not config.needs_reward_model:
        return None
    source: RewardFunction | RewardModel
    statistics = None
    if function:
        source, path = function, function.path
    else:
        assert reward_model  # supplied or trained where there is no function
        path = reward_model
        source = RewardModel(
            loader.frozen("scorer", path),
            load_tokenizer(path, trust_remote_code=config.model.trust_remote_code),
            session.tokenizer,
            prompt_format=config.data.prompt_format,
            max_tokens=session.budget("rto").scoring,
        )
        statistics = source.model.scores
    if not config.rto.normalize_scores:
        return NormalizedScores(source, path)
    return NormalizedScores(source, path, *(statistics or _measured_statistics(session, source)))


def _measured_statistics(session: TrainingSession, source: RewardFunction | RewardModel) -> ScoreStatistics:
    """Mean and standard deviation of the scores of the preference pairs' responses."""
    if not session.config.data.preferences:
        raise ConfigError(
            "rto.normalize_scores: the scores' mean and std are measured on data.preferences, "
            "which is not given; give it, or set this to false"
        )
    pairs = session.data.held_out_pairs or session.data.pairs
    statistics = score_statistics(source(completions_of_pairs(pairs, session.stop_ids, session.tokenizer)))
    session.log.say(f"scores: mean {statistics.mean:.3g}, std {statistics.std:.3g} over {len(pairs)} pairs")
    return statistics


def choose_judge(
    session: TrainingSession, function: RewardFunction | None, scorer: NormalizedScores | None
) -> tuple[Judge | None, str]:
    """What policies are compared by, and its name in the table; (None, "") where nothing can compare them."""
    if not session.config.has_judge or not session.data.eval_prompts:
        session.log.say("evaluation: skipped, there is nothing to judge by (eval.function) or on (data.eval_prompts)")
        return None, ""
    if function:
        return function, function.path.partition(":")[2]
    return scorer, "normalised score"


def choose_critic(session: TrainingSession, sft: str, reward_model: str | None, scorer: NormalizedScores | None) -> str:
    """The directory or hub id of the model that the critic starts from."""
    if session.config.rto.critic:
        return session.config.rto.critic
    if reward_model and scorer is not None:
        if isinstance(scorer.source, RewardModel) and scorer.source.same_vocabulary:
            return reward_model
        session.log.say("critic: starts from the SFT model, since the reward model has another vocabulary")
    return sft
