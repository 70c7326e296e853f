"""Whether the models' contexts are long enough for the data and for the responses that are sampled."""

from collections.abc import Callable, Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from rto_fast.data.tokenizing import Pair, Prompt
from rto_fast.errors import ModelError
from rto_fast.models.context import context_of, varying_rope
from rto_fast.models.model import ScoreStatistics
from rto_fast.models.supplied import Supplied
from rto_fast.reporting.log import Finding
from rto_fast.rewards import same_tokens
from rto_fast.session import TrainingSession
from rto_fast.stages import CHECKED_PAIRS

# What a message advises, in a run (data.max_prompt_tokens) and in an evaluation (--max_prompt_tokens).
DATA_LIMITS = "lower max_prompt_tokens or max_response_tokens"
ROLLOUT_LIMITS = "lower max_prompt_tokens or rollout.max_new_tokens"
ROLLOUT = "the longest prompt with rollout.max_new_tokens"


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
        what = "the longest prompt with the first token of a response"
        refuse_long([policy], longest + 1, what, "lower max_prompt_tokens")
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
