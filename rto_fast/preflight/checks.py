"""All checks of a run, or of an evaluation, that can be made before its first step."""

from collections.abc import Callable, Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from rto_fast.config import Config
from rto_fast.config.shipped import DATA, is_embedded
from rto_fast.data.encoding import ConversationEncoder
from rto_fast.data.layouts import Example
from rto_fast.data.run_data import RunData
from rto_fast.data.tokenizing import Prompt, stop_token_ids
from rto_fast.errors import DataError, ModelError
from rto_fast.evaluation.measure import Inputs
from rto_fast.models.directory import check_becomes_scorer
from rto_fast.models.dropout import dropout_rates
from rto_fast.models.supplied import Supplied
from rto_fast.preflight.contexts import (
    DATA_LIMITS,
    ROLLOUT,
    ROLLOUT_LIMITS,
    check_contexts,
    check_judge,
    longest_pair,
    longest_written,
    refuse_long,
)
from rto_fast.preflight.room import check_room
from rto_fast.reporting.log import Finding, RunLog
from rto_fast.rewards import same_tokens
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


def check_endings(
    config: Config,
    models: Sequence[Supplied],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    warn: Callable[[Finding], object],
) -> None:
    """Looks for models that read the policy's tokens and end a response with another token than the policy does.

    Args:
        config: The run's configuration.
        models: The models.
        tokenizer: The policy's tokenizer.
        stop_ids: The tokens that end the policy's responses.
        warn: Is called with what is found.
    """
    end = ConversationEncoder(tokenizer, config.data.prompt_format, stop_ids, None).usual_end()
    for model in models:
        try:
            own = model.tokenizer()
            own_stop_ids = stop_token_ids(own, model.generation_config())
        except (ModelError, DataError):  # without a tokenizer or stop token of its own it is taken to have the policy's
            continue
        reads_ids = model.reads_ids or same_tokens(own, tokenizer)
        if reads_ids and own_stop_ids and end not in own_stop_ids:
            warn(_other_ending(model, own_stop_ids, end, tokenizer))


def _other_ending(
    model: Supplied, own_stop_ids: Sequence[int], end: int, tokenizer: PreTrainedTokenizerBase
) -> Finding:
    own = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in own_stop_ids)
    return Finding(
        f"{model.key} ends otherwise",
        f"{model.key}: {model.path} ends responses with {own}, the policy's end with "
        f"{tokenizer.convert_ids_to_tokens(end)!r} ({end}): its numbers for the last token, and for what comes after it, "
        "mean little",
        "give both the same chat template and eos_token (tokenizer_config.json, generation_config.json)",
    )


def say_dropout(models: Iterable[Supplied], say: Callable[[str], object]) -> None:
    """Says which dropout rates of models to be trained are set to 0 when they are loaded.

    Args:
        models: The models.
        say: Is called with a line of text.
    """
    for model in models:
        if rates := dropout_rates(model.config()):
            keys = ", ".join(f"{key} ({rate:g})" for key, rate in rates.items())
            say(f"{model.key}: {model.path}: config.json's {keys} set to 0: dropout would make log-probs random")


def check_pairs_given(config: Config) -> None:
    """Checks that preference data is given if a stage of the run needs it.

    Raises:
        DataError: None is given; names the stages, and what each takes instead.
    """
    data = config.data
    needs = [
        (config.trains_sft and not data.sft, "SFT (or data.sft, or sft.model)"),
        (config.trains_reward_model, "the reward model (or reward_model.model, or reward_model.function)"),
        (config.trains_dpo, "DPO (or dpo.model)"),
        (config.rto.enabled and not data.prompts, "RTO's prompts (or data.prompts)"),
    ]
    missing = [stage for is_needed, stage in needs if is_needed]
    if missing and not data.preferences:
        raise DataError(
            f"data.preferences: no preference data is given, and this run needs some for {', '.join(missing)}; "
            "give a file, a folder or the name of an HF dataset"
        )


def say_sources(config: Config, log: RunLog) -> None:
    """Says what is used in place of each source and judge that is not given; warns of embedded data beside other data."""
    data, say, scorer = config.data, log.say, config.reward_model.function or config.reward_model.model
    if config.trains_sft and not data.sft:
        say(f"SFT: on the chosen responses of {data.preferences}, since data.sft is not given")
    if config.rto.enabled and not data.prompts:
        say(f"RTO: on the prompts of {data.preferences}, since data.prompts is not given")
    if config.has_judge and not data.eval_prompts and (source := data.preferences or data.prompts):
        say(f"evaluation: on prompts held out of {source}, since data.eval_prompts is not given")
    if config.has_judge and not config.eval.function:
        say(
            f"evaluation: judged by {scorer or 'the reward model that this run trains'}, since eval.function is not given"
        )
    given = {key: source for key in DATA if (source := getattr(data, key.partition(".")[2]))}
    embedded = [f"{key} ({source})" for key, source in given.items() if is_embedded(source)]
    others = [key for key, source in given.items() if not is_embedded(source)]
    if embedded and others:
        what = f"{', '.join(embedded)}: of the generated world, and {', '.join(others)} is not"
        log.warning("data", 0, "mixed data", what, "name data that belongs together, or null")


def check_before_evaluation(inputs: Inputs) -> None:
    """Checks the columns that the reward function takes, and the models' contexts.

    Raises:
        DataError: A column is missing.
        ModelError: A model's context is too short.
    """
    options, session, prompts = inputs.options, inputs.session, inputs.prompts
    if inputs.function:
        inputs.function.check_columns(prompts[:1] + [pair.example for pair in inputs.pairs[:1]])

    def given(*keys: str) -> list[Supplied]:
        return [model for key in keys for model in session.models if model.key == f"--{key}"]

    def warn(finding: Finding) -> None:
        inputs.say(f"{finding.what}; {finding.remedy}")

    limit, pairs = options.rollout.max_new_tokens, longest_pair(inputs.pairs)
    totals = [longest_written([policy], prompts, limit, inputs.say) for policy in given("model", "reference")]
    refuse_long(given("reference"), totals[0], ROLLOUT, ROLLOUT_LIMITS)  # it reads the model's responses
    refuse_long(given("dpo_model", "dpo_reference"), pairs, "the longest of --preferences", DATA_LIMITS)
    for scorer in given("reward_model"):
        check_judge(scorer, session.tokenizer, max(*totals, pairs), warn)
