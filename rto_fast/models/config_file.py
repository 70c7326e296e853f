"""Checks of `config.json` and `generation_config.json` that transformers does not make, or whose errors name no setting."""

import json
import math
import os
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from rto_fast.errors import ModelError

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


def read_settings(path: str, name: str) -> dict[str, Any]:
    """Reads the JSON object in a file of a model's directory; {} if there is no such file, as for a hub id.

    Raises:
        ModelError: the file holds something else.
    """
    file = f"{path}/{name}"
    if not os.path.isfile(file):
        return {}
    try:
        with open(file, encoding="utf-8") as opened:
            settings = json.load(opened)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not JSON: {error}; copy the file again") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{file}: expected a JSON object, got {type(settings).__name__}; copy the file again")
    return settings


def _places(path: str, name: str) -> list[dict[str, Any]]:
    """Returns the settings in a file, and its settings of the language model if they are in a section of their own."""
    settings = read_settings(path, name)
    return [place for place in (settings, settings.get("text_config")) if isinstance(place, dict)]


def check_sizes(path: str) -> None:
    """Raises ModelError if a size in the `config.json` of a directory is a number below 1."""
    for place in _places(path, "config.json"):
        for key in SIZES:
            value = place.get(key)
            if isinstance(value, int | float) and not value >= 1:
                raise ModelError(f"{path}/config.json: {key} is {value}, expected a whole number from 1")


def check_rope(config: PreTrainedConfig, path: str) -> None:
    """Raises ModelError if a parameter of RoPE is not a finite number, or one that RoPE divides by is not above 0."""
    for rope in ropes(config):
        if not isinstance(rope.get("rope_type", ""), str):
            raise ModelError(
                f"{path}: config.json: rope_parameters: rope_type is {rope['rope_type']!r}, expected a name"
            )
        for key, value in _numbers(rope):
            is_divisor = key in ("rope_theta", "factor")
            if isinstance(value, str | bool) or not math.isfinite(value) or (is_divisor and value <= 0):
                expected = "a number above 0" if is_divisor else "a finite number"
                raise ModelError(f"{path}: config.json: rope_parameters: {key} is {value!r}, expected {expected}")


def key_of(settings: dict[str, Any], value: object) -> str | None:
    """Returns the key, or the path of keys, that has this value; None if none has."""
    for key, item in settings.items():
        if isinstance(item, dict):
            if inner := key_of(item, value):
                return f"{key}.{inner}"
        elif item == value and type(item) is type(value):
            return key
    return None


def ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Returns RoPE's parameters, one dict for each kind of layers; [] for a model without RoPE."""
    rope = getattr(config.get_text_config(), "rope_parameters", None)
    if not isinstance(rope, dict) or not rope:
        return []
    return [each for each in rope.values() if isinstance(each, dict)] or [rope]


def _numbers(rope: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields (key, value) of the numbers among RoPE's parameters, and of whatever stands where a divisor belongs."""
    for key, value in rope.items():
        for item in value if isinstance(value, list | tuple) else [value]:
            is_number = isinstance(item, int | float) and not isinstance(item, bool)
            if is_number or (key in ("rope_theta", "factor") and item is not None):
                yield key, item


def check_tokens(path: str, vocab_size: int, generates: bool) -> None:
    """Raises ModelError if the settings in a directory name a stop or padding token that the model does not have.

    Args:
        vocab_size: rows of the embedding.
        generates: whether `generation_config.json` is used too. `generation_config` checks the stop tokens in it.
    """
    for name, keys in (
        ("config.json", ("eos_token_id", "pad_token_id")),
        ("generation_config.json", ("pad_token_id",)),
    ):
        for place in _places(path, name) if generates or name == "config.json" else ():
            for key in keys:
                value = place.get(key)
                for token in value if isinstance(value, list) else [value]:
                    if token is None or (key == "pad_token_id" and token == -1):  # old configurations write -1 for none
                        continue
                    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
                        raise ModelError(
                            f"{path}/{name}: {key} is {value!r}, the model has {vocab_size} tokens: give the id of one, or "
                            "take the setting out"
                        )
