"""All checks of a training run that can be made before its first step."""

from rto_fast.config import Config
from rto_fast.data.layouts import Example
from rto_fast.data.run_data import RunData
from rto_fast.data.tokenizing import Prompt
from rto_fast.models.directory import check_becomes_scorer
from rto_fast.preflight.contexts import check_contexts
from rto_fast.preflight.models import check_endings, say_dropout
from rto_fast.preflight.room import check_room
from rto_fast.preflight.sources import say_sources
from rto_fast.rewards.choice import Functions
from rto_fast.session import TrainingSession


def check_before_training(session: TrainingSession, functions: Functions) -> None:
    """Loads the run's data and checks all that is known before the first step.

    Raises:
        UserError: A mistake in the models, the data or the user's functions, or too little room on the disk.
    """
    config, log, models = session.config, session.log, session.models
    say_sources(config, log)
    trained = [model for model in models if model.key == "rto.critic" or model is models[0]]
    say_dropout(trained, log.say)
    if config.trains_reward_model or config.critic_starts_from_policy:
        check_becomes_scorer(session.base, trust_remote_code=config.model.trust_remote_code)
    check_endings(config, models[1:], session.tokenizer, session.stop_ids, session.warn_of_model)
    load_data(config, session.data)
    check_columns(config, session.data, functions)
    check_contexts(session)
    check_room(config, session.data, session.device, session.folder, log)


def load_data(config: Config, data: RunData) -> None:
    """Loads all data that the run uses, so that mistakes in it show before the first step."""
    used = [(config.trains_sft, "sft"), (config.rto.enabled, "prompts"), (config.has_judge, "eval_prompts")]
    used += [(config.trains_on_pairs, name) for name in ("pairs", "held_out_pairs")]
    for is_used, name in used:
        if is_used:
            getattr(data, name)


def check_columns(config: Config, data: RunData, functions: Functions) -> None:
    """Checks that the user's functions find their columns in every source that they score.

    Raises:
        DataError: A column is missing.
    """
    if functions.judge:
        functions.judge.check_columns(data.eval_prompts[:1])
    if functions.reward and config.needs_reward_model:
        scored: list[Prompt | Example] = [*data.prompts[:1], *([] if functions.judge else data.eval_prompts[:1])]
        if config.rto.normalize_scores and config.data.preferences:  # the scores' statistics are measured on pairs
            scored += [pair.example for pair in (data.held_out_pairs or data.pairs)[:1]]
        functions.reward.check_columns(scored)
