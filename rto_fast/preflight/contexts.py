"""Whether the models' contexts are long enough for the data and for the responses that are sampled."""

from collections.abc import Callable, Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from rto_fast.data.tokenizing import Pair, Prompt
from rto_fast.errors import ModelError
from rto_fast.models.context import context_of, varying_rope
from rto_fast.models.directory import load_tokenizer, model_config
from rto_fast.models.model import ScoreStatistics
from rto_fast.models.supplied import Supplied
from rto_fast.reporting.log import Finding
from rto_fast.rewards import same_tokens
from rto_fast.session import TrainingSession
from rto_fast.stages.dpo import CHECKED_PAIRS

# As they are called in a run (data.max_prompt_tokens) and in an evaluation (--max_prompt_tokens).
DATA_LIMITS = "lower max_prompt_tokens or max_response_tokens"
ROLLOUT_LIMITS = "lower max_prompt_tokens or rollout.max_new_tokens"
ROLLOUT = "the longest prompt with rollout.max_new_tokens"


def refuse_long(models: Iterable[Supplied], longest: int, what: str, remedy: str, trust_remote_code: bool) -> None:
    """Raises ModelError if one of the models has not the positions for `longest` tokens.

    Args:
        what: has so many tokens. remedy: what makes it shorter.
    """
    for model in models:
        if told := _too_long(model, longest, what, trust_remote_code):
            raise ModelError(f"{told}; {remedy}")


def _too_long(model: Supplied, longest: int, what: str, trust_remote_code: bool) -> str | None:
    context = _context(model, trust_remote_code)
    if not context or longest <= context:
        return None
    rope = varying_rope(model_config(model.path, trust_remote_code=trust_remote_code))
    why = f" (past it, its RoPE, {rope}, changes with the longest sequence of a batch)" if rope else ""
    return f"{model.key}: {model.path} has a context of {context} tokens{why}, {what} has {longest}"


def _context(model: Supplied, trust_remote_code: bool) -> int | None:
    return context_of(model_config(model.path, trust_remote_code=trust_remote_code))


def longest_written(
    policies: Iterable[Supplied],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    say: Callable[[str], object],
    trust_remote_code: bool,
) -> int:
    """The most tokens, prompt and response together, that one of the policies can write; says where its context ends them.

    Args:
        prompts: that each policy is given. say: called with a line of text.
    Raises:
        ModelError: a prompt leaves no room for a response.
    """
    longest, totals = max((len(p.prompt_ids) for p in prompts), default=0), [0]
    for policy in policies if prompts else ():
        what = "the longest prompt with the first token of a response"
        refuse_long([policy], longest + 1, what, "lower max_prompt_tokens", trust_remote_code)
        context = _context(policy, trust_remote_code) or longest + max_new_tokens
        totals.append(min(longest + max_new_tokens, context))
        if longest + max_new_tokens > context:
            say(
                f"{policy.key}: of its context of {context} tokens the longest prompt leaves {context - longest}: responses "
                f"to it are cut there, before rollout.max_new_tokens ({max_new_tokens})"
            )
    return max(totals)


def longest_pair(pairs: Iterable[Pair]) -> int:
    """Tokens of the longest prompt with one of its responses."""
    return max((len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs), default=0)


def check_contexts(session: TrainingSession) -> None:
    """Compares each model's context with what it is going to read: the longest data, and the longest responses that can be
    sampled.

    Raises:
        ModelError: A model's context is too short.
    """
    config, data, trust = session.config, session.data, session.config.model.trust_remote_code
    base, models = session.models[0], {model.key: model for model in session.models}

    def refuse(keys: list[str], longest: int, what: str, remedy: str) -> None:
        refuse_long([models[key] for key in keys if key in models], longest, what, remedy, trust)

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
    sampling = config.rollout.max_new_tokens, session.log.say, trust
    written = longest_written([start], [*(data.prompts if config.rto.enabled else []), *judged], *sampling)
    if config.rto.enabled:
        readers = ["rto.ref_model" if config.rto.ref_model else base.key]
        readers += dpo_models if config.pays_dense_reward else []
        readers += ["rto.critic"] if config.has_critic else []
        refuse(readers, written, ROLLOUT, ROLLOUT_LIMITS)
    longest = max(written, longest_written(compared, judged, *sampling))
    scorer = models.get("reward_model.model")
    if scorer and config.needs_reward_model:
        if config.rto.normalize_scores and config.data.preferences and not has_statistics(scorer, trust):
            longest = max(longest, longest_pair(data.held_out_pairs or data.pairs))
        check_judge(scorer, session.tokenizer, longest, session.warn_of_model, trust)


def has_statistics(scorer: Supplied, trust_remote_code: bool) -> bool:
    """Whether a reward model brings the mean and std of its scores along, as those that are trained here do."""
    config = model_config(scorer.path, trust_remote_code=trust_remote_code)
    return ScoreStatistics.of(config) is not None


def check_judge(
    model: Supplied,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    warn: Callable[[Finding], object],
    trust_remote_code: bool,
) -> None:
    """Raises ModelError if a reward model's context is too short for `longest` tokens of the policy's; only warns where it
    has a tokenizer of its own, by which there may be fewer."""
    told = _too_long(model, longest, "the longest text that it may have to score", trust_remote_code)
    if told is None:
        return
    if same_tokens(load_tokenizer(model.path, trust_remote_code=trust_remote_code), tokenizer):
        raise ModelError(f"{told}; {ROLLOUT_LIMITS}")
    told += " by the policy's tokenizer, and a text that is too long by its own stops the run"
    warn(Finding("reward_model_context", told, ROLLOUT_LIMITS))
