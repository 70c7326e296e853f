"""Checks of the models that a run or an evaluation is given, by their files and lengths, before anything runs."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from rto_fast.config import Config
from rto_fast.data.encoding import ConversationEncoder
from rto_fast.data.tokenizing import Pair, Prompt, stop_token_ids
from rto_fast.errors import DataError, ModelError
from rto_fast.models.context import context_of, varying_rope
from rto_fast.models.directory import (
    check_fit,
    check_vocabulary,
    generation_config,
    load_tokenizer,
    model_config,
)
from rto_fast.models.dropout import dropout_rates
from rto_fast.models.model import ScoreStatistics
from rto_fast.rewards import same_tokens
from rto_fast.rto.first_update import CHECKED_PAIRS, stop_finding
from rto_fast.rto.health import Finding

if TYPE_CHECKING:
    from rto_fast.run import Run


# As they are called in a run (data.max_prompt_tokens) and in an evaluation (--max_prompt_tokens).
DATA_LIMITS = "lower max_prompt_tokens or max_response_tokens"
ROLLOUT_LIMITS = "lower max_prompt_tokens or rollout.max_new_tokens"
ROLLOUT = "the longest prompt with rollout.max_new_tokens"


@dataclass(frozen=True)
class Supplied:
    """A model that somebody names: the configuration's key, a directory or hub id, what it is read as, and whether it is
    given the policy's token ids (else text, which its own tokenizer reads)."""

    key: str
    path: str
    kind: str  # of `rto_fast.models.directory.KINDS`
    reads_ids: bool


def supplied_models(config: Config, base: str) -> list[Supplied]:
    """The models of a run's configuration, the one where it starts (`base`) first."""
    key = "sft.model" if config.sft.model else "model.path"
    found = [Supplied(key, base, "causal_lm", bool(config.sft.model or config.model.tokenizer))]
    for key, path, kind, reads_ids in (
        ("dpo.model", config.dpo.model, "causal_lm", True),
        ("dpo.ref_model", config.dpo.ref_model, "causal_lm", True),
        ("rto.ref_model", config.rto.ref_model, "causal_lm", True),
        ("rto.critic", config.rto.critic, "scorer", True),
        ("reward_model.model", config.reward_model.model, "scorer", False),
    ):
        if path:
            found.append(Supplied(key, path, kind, reads_ids))
    return found


def check_models(
    models: Sequence[Supplied], tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool = False
) -> None:
    """Raises ModelError unless all models are there, are of the kind that they are read as, and know the policy's tokens
    as the policy does if they are given them.

    Args:
        tokenizer: the policy's.
    """
    trusted = {"trust_remote_code": trust_remote_code}
    for model in models:
        if model.reads_ids:
            check_vocabulary(model.path, tokenizer, model.key, **trusted)
        else:
            load_tokenizer(model.path, **trusted)
    for model in models:
        with _named(model.key):
            if model.kind == "causal_lm":
                generation_config(model.path, **trusted)
            check_fit(model.path, model.kind, **trusted)


@contextlib.contextmanager
def _named(key: str) -> Iterator[None]:
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{key}: {error}") from error


def check_endings(
    config: Config,
    models: Sequence[Supplied],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    warn: Callable[[Finding], Any],
) -> None:
    """Warns of models that are given the policy's tokens and do not know the one that its responses end with.

    Args:
        tokenizer, stop_ids: the policy's.
    """
    trusted = {"trust_remote_code": config.model.trust_remote_code}
    end = ConversationEncoder(tokenizer, config.data.prompt_format, stop_ids, None).usual_end()
    for model in models:
        try:
            own = load_tokenizer(model.path, **trusted)
            own_stop_ids = stop_token_ids(own, generation_config(model.path, **trusted))
        except (ModelError, DataError):  # no tokenizer or no stop token of its own: taken to have the policy's
            continue
        if model.reads_ids or same_tokens(own, tokenizer):
            if finding := stop_finding(model.key, model.path, own_stop_ids, end, tokenizer):
                warn(finding)


def tell_dropout(models: Iterable[Supplied], say: Callable[[str], Any], trust_remote_code: bool) -> None:
    """Says which dropout rates of models to be trained are set to 0 when they are loaded.

    Args:
        say: called with a line of text.
    """
    for model in models:
        if rates := dropout_rates(model_config(model.path, trust_remote_code=trust_remote_code)):
            told = ", ".join(f"{key} ({rate:g})" for key, rate in rates.items())
            say(f"{model.key}: {model.path}: config.json's {told} set to 0: dropout would make log-probs random")


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
    say: Callable[[str], Any],
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


def check_contexts(run: "Run") -> None:
    """Compares what each model of a run is going to read with its context: the longest data, and the longest responses
    that can be sampled.

    Args:
        run: its data loaded.
    Raises:
        ModelError: a model's context is too short.
    """
    config, data, trust = run.config, run.data, run.config.model.trust_remote_code
    base, models = run.models[0], {model.key: model for model in run.models}

    def refuse(keys, longest, what, remedy):
        refuse_long([models[key] for key in keys if key in models], longest, what, remedy, trust)

    if not config.sft.model:
        longest = max(len(s.prompt_ids) + len(s.response_ids) for s in data.sft)
        refuse([base.key], longest, "the longest demonstration", DATA_LIMITS)
    if run._trains_reward_model or run._trains_dpo:
        refuse(
            [base.key], longest_pair([*data.pairs, *data.held_out_pairs]), "the longest preference pair", DATA_LIMITS
        )
    dpo_models = ["dpo.model", "dpo.ref_model" if config.dpo.ref_model else base.key]
    if config.dpo.model and config.pays_dense_reward:
        longest = longest_pair(data.held_out_pairs[:CHECKED_PAIRS])
        refuse(dpo_models, longest, "the longest held-out preference pair", DATA_LIMITS)

    judged = data.eval_prompts[: config.eval.prompts] if run._judged else []
    start = models["dpo.model"] if config.rto.init_from == "dpo" and config.dpo.model else base
    compared = [model for model in (base, models.get("dpo.model")) if model and model is not start]
    sampling = config.rollout.max_new_tokens, run.log.say, trust
    written = longest_written([start], [*(data.prompts if config.rto.enabled else []), *judged], *sampling)
    if config.rto.enabled:
        readers = ["rto.ref_model" if config.rto.ref_model else base.key]
        readers += dpo_models if config.pays_dense_reward else []
        readers += ["rto.critic"] if config.rto.advantage == "gae" else []
        refuse(readers, written, ROLLOUT, ROLLOUT_LIMITS)
    longest = max(written, longest_written(compared, judged, *sampling))
    scorer = models.get("reward_model.model")
    if scorer and config.needs_reward_model:
        if config.rto.normalize_scores and config.data.preferences and not has_statistics(scorer, trust):
            longest = max(longest, longest_pair(data.held_out_pairs or data.pairs))
        check_judge(scorer, run.tokenizer, longest, run.warn_of_model, trust)


def has_statistics(scorer: Supplied, trust_remote_code: bool) -> bool:
    """Whether a reward model brings the mean and std of its scores along, as those that are trained here do."""
    config = model_config(scorer.path, trust_remote_code=trust_remote_code)
    return ScoreStatistics.of(config) is not None


def check_judge(
    model: Supplied,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    warn: Callable[[Finding], Any],
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
