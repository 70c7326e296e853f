"""Stop and padding tokens of the models that are written, so that other programs read them as they were trained."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rto_fast.models.lora import Adapter

NEW_PAD = "<|pad|>"  # where a vocabulary has no token to spare


@contextlib.contextmanager
def plain_generation(model: PreTrainedModel | Adapter) -> Iterator[GenerationConfig]:
    """Takes the model's generation settings away while it is written, and yields them: transformers refuses to save some
    that it reads, and that are widespread (a temperature without do_sample)."""
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
        folder: where the model was written. config_class: of its configuration. generation: the model's, which stays as it
            is. stop_ids: the tokenizer's EOS first.
    """
    ids = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
    config, generation = config_class.from_pretrained(folder), copy.deepcopy(generation)
    config.eos_token_id = config.get_text_config().eos_token_id = ids
    config.save_pretrained(folder)
    generation.eos_token_id = ids
    vars(generation).pop("_from_model_config", None)  # else transformers may put config.json's in its place
    # Not by `save_pretrained`, see `plain_generation`.
    generation.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])


def choose_pad(
    tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], vocabulary_size: int
) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer whose padding token ends no sequence.

    transformers' ...ForSequenceClassification scores the last token that is no padding token, and many tokenizers pad with
    a stop token, with which a scored sequence ends. The padding token is, of those that are no stop token: the tokenizer's
    own; a special token that the chat template does not use (one called pad before others, unk and bos last); else
    `NEW_PAD`, a new token.

    Args:
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
    """Makes a scorer's `config.json` name its padding token, and adds a row to its embedding where that has none for it.

    Args:
        folder: where the model was written. config_class: of its configuration. embedding: name of the input embedding's
            weight.
    """
    config = config_class.from_pretrained(folder)
    text = config.get_text_config()
    config.pad_token_id = text.pad_token_id = pad
    grows, text.vocab_size = text.vocab_size <= pad, max(text.vocab_size, pad + 1)
    config.save_pretrained(folder)
    ending = "." + ".".join(embedding.split(".")[-2:])  # on disk some architectures' names begin otherwise
    for file in folder.glob("*.safetensors") if grows else ():
        with safe_open(file, "pt") as opened:
            metadata, names = opened.metadata(), [name for name in opened.keys() if f".{name}".endswith(ending)]  # noqa: SIM118
        for name in names:
            state = load_file(file)
            rows = state[name]
            mean = rows.float().mean(0, keepdim=True).to(rows.dtype)
            state[name] = torch.cat([rows, mean.expand(pad + 1 - len(rows), -1)])
            save_file(state, file, metadata)
