"""All checks of a run, or of an evaluation, that can be made before its first step."""

from collections.abc import Callable, Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from rto_fast.config import Config
from rto_fast.config.load import DATA, is_embedded
from rto_fast.data.encoding import ConversationEncoder
from rto_fast.data.layouts import Example
from rto_fast.data.run_data import RunData
from rto_fast.data.tokenizing import Pair, Prompt, stop_token_ids
from rto_fast.errors import DataError, ModelError
from rto_fast.evaluation.measure import Inputs
from rto_fast.models.context import context_of, varying_rope
from rto_fast.models.directory import check_becomes_scorer
from rto_fast.models.dropout import dropout_rates
from rto_fast.models.model import ScoreStatistics
from rto_fast.models.supplied import Supplied
from rto_fast.preflight.room import check_room
from rto_fast.reporting.log import Finding, RunLog
from rto_fast.rewards import same_tokens
from rto_fast.rewards.choice import Functions
from rto_fast.session import TrainingSession
from rto_fast.stages import CHECKED_PAIRS

# What a message advises, in a run (data.max_prompt_tokens) and in an evaluation (--max_prompt_tokens).
DATA_LIMITS = "lower max_prompt_tokens or max_response_tokens"
ROLLOUT_LIMITS = "lower max_prompt_tokens or rollout.max_new_tokens"
ROLLOUT = "the longest prompt with rollout.max_new_tokens"


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
    checkpoints = session.checkpoints
    checkpoints.budgets |= check_room(config, session.data, session.device, session.folder, log, checkpoints.budgets)


def load_data(config: Config, data: RunData) -> None:
    """Loads all data that the run uses, so that mistakes in it show before the first step."""
    for is_used, name in (
        (config.trains_sft, "sft"),
        (config.rto.enabled, "prompts"),
        (config.has_judge, "eval_prompts"),
        (config.trains_on_pairs, "pairs"),
        (config.trains_on_pairs, "held_out_pairs"),
    ):
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
        if (model.reads_ids or same_tokens(own, tokenizer)) and own_stop_ids and end not in own_stop_ids:
            others = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in own_stop_ids)
            what = (
                f"{model.key}: {model.path} ends responses with {others}, the policy's end with "
                f"{tokenizer.convert_ids_to_tokens(end)!r} ({end}): its numbers for the last token, and for what comes "
                "after it, mean little"
            )
            remedy = "give both the same chat template and eos_token (tokenizer_config.json, generation_config.json)"
            warn(Finding(f"{model.key} ends otherwise", what, remedy))


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


def refuse_long(models: Iterable[Supplied], longest: int, what: str, remedy: str) -> None:
    """Checks that each model's context holds `longest` tokens.

    Args:
        models: The models.
        longest: A number of tokens.
        what: What has that many tokens, for the message.
        remedy: What makes it shorter, for the message.

    Raises:
        ModelError: A model's context is shorter.
    """
    for model in models:
        if fault := _too_long(model, longest, what):
            raise ModelError(f"{fault}; {remedy}")


def _too_long(model: Supplied, longest: int, what: str) -> str | None:
    context = context_of(model.config())
    if not context or longest <= context:
        return None
    rope = varying_rope(model.config())
    why = f" (past it, its RoPE, {rope}, changes with the longest sequence of a batch)" if rope else ""
    return f"{model.key}: {model.path} has a context of {context} tokens{why}, {what} has {longest}"


def longest_written(
    policies: Iterable[Supplied], prompts: Sequence[Prompt], max_new_tokens: int, say: Callable[[str], object]
) -> int:
    """The tokens of the longest sequence, prompt and response together, that the policies can write.

    Args:
        policies: The policies.
        prompts: The prompts that each of them is given.
        max_new_tokens: The limit of a response.
        say: Is called with a line of text where a policy's context is shorter than the prompt and that limit.

    Raises:
        ModelError: A prompt leaves no room for a response.
    """
    longest, totals = max((len(p.prompt_ids) for p in prompts), default=0), [0]
    for policy in policies if prompts else ():
        refuse_long(
            [policy], longest + 1, "the longest prompt with the first token of a response", "lower max_prompt_tokens"
        )
        context = context_of(policy.config()) or longest + max_new_tokens
        totals.append(min(longest + max_new_tokens, context))
        if longest + max_new_tokens > context:
            say(
                f"{policy.key}: of its context of {context} tokens the longest prompt leaves {context - longest}: responses "
                f"to it are cut there, before rollout.max_new_tokens ({max_new_tokens})"
            )
    return max(totals)


def longest_pair(pairs: Iterable[Pair]) -> int:
    """The tokens of the longest prompt with one of its responses."""
    return max((len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs), default=0)


def check_contexts(session: TrainingSession) -> None:
    """Checks that each model's context holds the longest data and the longest responses that it is going to read.

    Raises:
        ModelError: A model's context is too short.
    """
    config, data = session.config, session.data
    base, models = session.models[0], {model.key: model for model in session.models}

    def refuse(keys: list[str], longest: int, what: str, remedy: str) -> None:
        refuse_long([models[key] for key in keys if key in models], longest, what, remedy)

    if config.trains_sft:
        longest = max(len(s.prompt_ids) + len(s.response_ids) for s in data.sft)
        refuse([base.key], longest, "the longest demonstration", DATA_LIMITS)
    if config.trains_on_pairs:
        refuse(
            [base.key], longest_pair([*data.pairs, *data.held_out_pairs]), "the longest preference pair", DATA_LIMITS
        )
    dpo_models = ["dpo.model", "dpo.ref_model" if config.dpo.ref_model else base.key]
    if config.dpo.model and config.pays_dense_reward:
        longest = longest_pair(data.held_out_pairs[:CHECKED_PAIRS])
        refuse(dpo_models, longest, "the longest held-out preference pair", DATA_LIMITS)

    judged = data.eval_prompts[: config.eval.prompts] if config.has_judge else []
    start = models["dpo.model"] if config.rto.init_from == "dpo" and config.dpo.model else base
    compared = [model for model in (base, models.get("dpo.model")) if model and model is not start]
    sampling = config.rollout.max_new_tokens, session.log.say
    written = longest_written([start], [*(data.prompts if config.rto.enabled else []), *judged], *sampling)
    if config.rto.enabled:
        readers = ["rto.ref_model" if config.rto.ref_model else base.key]
        readers += dpo_models if config.pays_dense_reward else []
        readers += ["rto.critic"] if config.has_critic else []
        refuse(readers, written, ROLLOUT, ROLLOUT_LIMITS)
    longest = max(written, longest_written(compared, judged, *sampling))
    scorer = models.get("reward_model.model")
    if scorer and config.needs_reward_model:
        if config.rto.normalize_scores and config.data.preferences and not ScoreStatistics.of(scorer.config()):
            longest = max(longest, longest_pair(data.held_out_pairs or data.pairs))
        check_judge(scorer, session.tokenizer, longest, session.warn_of_model)


def check_judge(
    model: Supplied, tokenizer: PreTrainedTokenizerBase, longest: int, warn: Callable[[Finding], object]
) -> None:
    """Checks that a reward model's context holds the longest text that it may have to score.

    Args:
        model: The reward model.
        tokenizer: The policy's tokenizer.
        longest: The tokens of that text by the policy's tokenizer.
        warn: Is called where the text is too long but the reward model has another tokenizer, by which it may be shorter.

    Raises:
        ModelError: The text is too long, and the reward model has the policy's tokenizer.
    """
    fault = _too_long(model, longest, "the longest text that it may have to score")
    if fault is None:
        return
    if same_tokens(model.tokenizer(), tokenizer):
        raise ModelError(f"{fault}; {ROLLOUT_LIMITS}")
    fault += " by the policy's tokenizer, and a text that is too long by its own stops the run"
    warn(Finding("reward_model_context", fault, ROLLOUT_LIMITS))
