"""What a run says of its models before they are loaded: how their responses end, and dropout that is turned off."""

from collections.abc import Callable, Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from rto_fast.config import Config
from rto_fast.data.encoding import ConversationEncoder
from rto_fast.data.tokenizing import stop_token_ids
from rto_fast.errors import DataError, ModelError
from rto_fast.models.directory import generation_config, load_tokenizer, model_config
from rto_fast.models.dropout import dropout_rates
from rto_fast.models.supplied import Supplied
from rto_fast.reporting.log import Finding
from rto_fast.rewards import same_tokens


def check_endings(
    config: Config,
    models: Sequence[Supplied],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    warn: Callable[[Finding], object],
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


def stop_finding(key, path, stop_ids, end, tokenizer) -> Finding | None:
    """Whether a supplied model ends its responses with the token that the policy's end with.

    Args:
        stop_ids: that the model at `path` (a configuration's `key`) knows, as far as its files say. end, tokenizer: of
            the policy.
    """
    if not stop_ids or end in stop_ids:
        return None
    own = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in stop_ids)
    return Finding(
        f"{key} ends otherwise",
        f"{key}: {path} ends responses with {own}, the policy's end with {tokenizer.convert_ids_to_tokens(end)!r} ({end}): "
        "its numbers for the last token, and for what comes after it, mean little",
        "give both the same chat template and eos_token (tokenizer_config.json, generation_config.json)",
    )


def tell_dropout(models: Iterable[Supplied], say: Callable[[str], object], trust_remote_code: bool) -> None:
    """Says which dropout rates of models to be trained are set to 0 when they are loaded.

    Args:
        say: called with a line of text.
    """
    for model in models:
        if rates := dropout_rates(model_config(model.path, trust_remote_code=trust_remote_code)):
            told = ", ".join(f"{key} ({rate:g})" for key, rate in rates.items())
            say(f"{model.key}: {model.path}: config.json's {told} set to 0: dropout would make log-probs random")
