"""Stop and padding tokens in the files of trained models, so that other programs use the models as they were trained."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rto_fast.models.lora import Adapter

NEW_PAD = "<|pad|>"  # for a vocabulary without an unused token


@contextlib.contextmanager
def plain_generation(model: PreTrainedModel | Adapter) -> Iterator[GenerationConfig]:
    """Yields the model's generation settings, and removes them from the model while it is written.

    transformers refuses to save some widespread settings that it loads (a temperature without do_sample).
    """
    owner = model.base if isinstance(model, Adapter) else model
    settings = owner.generation_config
    try:
        owner.generation_config = GenerationConfig()
        yield settings
    finally:
        owner.generation_config = settings


def write_stop_tokens(
    folder: Path, config_class: type[PreTrainedConfig], generation: GenerationConfig, stop_ids: Sequence[int]
) -> None:
    """Makes a policy's `generation_config.json` and `config.json` name every token that ends its responses.

    Args:
        folder: of the model.
        config_class: class of its configuration.
        generation: the model's generation settings, which are copied, not changed.
        stop_ids: the tokenizer's EOS first.
    """
    ids = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
    config, generation = config_class.from_pretrained(folder), copy.deepcopy(generation)
    config.eos_token_id = config.get_text_config().eos_token_id = ids
    config.save_pretrained(folder)
    generation.eos_token_id = ids
    vars(generation).pop("_from_model_config", None)  # else transformers may use config.json instead of this file
    # `save_pretrained` would refuse some settings, see `plain_generation`.
    generation.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])


def choose_pad(
    tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], vocabulary_size: int
) -> PreTrainedTokenizerBase:
    """Returns a copy of the tokenizer whose padding token is not a stop token.

    transformers' ...ForSequenceClassification scores the last token that is not padding. Many tokenizers pad with a stop
    token, which is the last token of a scored sequence. The padding token is the first of these that is not a stop token:
    the tokenizer's own; a special token that the chat template does not use (one named pad first, unk and bos last);
    `NEW_PAD`, a new token.

    Args:
        stop_ids: ids of the stop tokens.
        vocabulary_size: rows of the model's embedding.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in stop_ids:
        return tokenizer
    template, named = str(tokenizer.chat_template), (tokenizer.unk_token_id, tokenizer.bos_token_id)
    special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    spare = [
        (i in named, "pad" not in token.lower(), i, token)
        for i, token in special.items()
        if i < vocabulary_size and i not in stop_ids and (i in named or token not in template)
    ]
    tokenizer.add_special_tokens({"pad_token": min(spare)[-1] if spare else NEW_PAD})
    return tokenizer


def write_pad_token(folder: Path, config_class: type[PreTrainedConfig], pad: int, embedding: str) -> None:
    """Makes a scorer's `config.json` name its padding token, and adds rows to its embedding if that has none for it.

    Args:
        folder: of the model.
        config_class: class of its configuration.
        pad: id of the padding token.
        embedding: name of the input embedding's weight.
    """
    config = config_class.from_pretrained(folder)
    text = config.get_text_config()
    config.pad_token_id = text.pad_token_id = pad
    grows, text.vocab_size = text.vocab_size <= pad, max(text.vocab_size, pad + 1)
    config.save_pretrained(folder)
    ending = "." + ".".join(embedding.split(".")[-2:])  # the names in the files of some architectures begin differently
    for file in folder.glob("*.safetensors") if grows else ():
        with safe_open(file, "pt") as opened:
            metadata, names = opened.metadata(), [name for name in opened.keys() if f".{name}".endswith(ending)]  # noqa: SIM118
        for name in names:
            state = load_file(file)
            rows = state[name]
            mean = rows.float().mean(0, keepdim=True).to(rows.dtype)
            state[name] = torch.cat([rows, mean.expand(pad + 1 - len(rows), -1)])
            save_file(state, file, metadata)
