"""What `config.json` and `generation_config.json` must hold, where transformers would fail without a name, or not at all."""

import json
import math
import os
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from rto_fast.errors import ModelError

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


def read_settings(path: str, name: str) -> dict[str, Any]:
    """The JSON object in a file of a model's directory; {} where there is none (a name on the hub, say).

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
    """The settings in a file, and those of its language model where they are apart."""
    settings = read_settings(path, name)
    return [place for place in (settings, settings.get("text_config")) if isinstance(place, dict)]


def check_sizes(path: str) -> None:
    """Raises ModelError where a size in a directory's `config.json` is a number below 1."""
    for place in _places(path, "config.json"):
        for key in SIZES:
            value = place.get(key)
            if isinstance(value, int | float) and not value >= 1:
                raise ModelError(f"{path}/config.json: {key} is {value}, expected a whole number from 1")


def check_rope(config: PreTrainedConfig, path: str) -> None:
    """Raises ModelError where a number among RoPE's parameters is none, or what divides by it would be infinite."""
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
    """The key, or path of keys, that has this value; None: none has."""
    for key, item in settings.items():
        if isinstance(item, dict):
            if inner := key_of(item, value):
                return f"{key}.{inner}"
        elif item == value and type(item) is type(value):
            return key
    return None


def ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """RoPE's parameters: one dict, or one for each kind of layers; [] of a model without."""
    rope = getattr(config.get_text_config(), "rope_parameters", None)
    if not isinstance(rope, dict) or not rope:
        return []
    return [each for each in rope.values() if isinstance(each, dict)] or [rope]


def _numbers(rope: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in rope.items():
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, int | float) and not isinstance(item, bool) or key in ("rope_theta", "factor"):
                if item is not None:
                    yield key, item


def check_tokens(path: str, vocab_size: int, generates: bool) -> None:
    """Raises ModelError where a directory's settings name a stop or padding token that the model does not have.

    Args:
        vocab_size: rows of the embedding. generates: whether `generation_config.json` is used, too.
    """
    # The stop tokens of generation_config.json are checked where they are read.
    for name, keys in (
        ("config.json", ("eos_token_id", "pad_token_id")),
        ("generation_config.json", ("pad_token_id",)),
    ):
        for place in _places(path, name) if generates or name == "config.json" else ():
            for key in keys:
                value = place.get(key)
                for token in value if isinstance(value, list) else [value]:
                    # -1: none, in old configurations.
                    if token is None or (key == "pad_token_id" and token == -1):
                        continue
                    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
                        raise ModelError(
                            f"{path}/{name}: {key} is {value!r}, the model has {vocab_size} tokens: give the id of one, or "
                            "take the setting out"
                        )
