"""What a run says of its models before they are loaded: how their responses end, and dropout that is turned off."""

from collections.abc import Callable, Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from rto_fast.config import Config
from rto_fast.data.encoding import ConversationEncoder
from rto_fast.data.tokenizing import stop_token_ids
from rto_fast.errors import DataError, ModelError
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
