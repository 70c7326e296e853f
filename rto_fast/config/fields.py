"""What a field of a configuration may hold. The field's type declares it, and one function checks it.

`lr: LearningRate = 1e-6` is a float with a range. A range that only one field has is written at the field:
`temperature: Annotated[float, Range(1e-4, 1e4)] = 1.0`. Every number has a range, and a range is finite unless it says
`infinite=True`, so that NaN and infinity are refused everywhere else.
"""

import dataclasses
import functools
import math
import os
import reprlib
import types
import typing
import unicodedata
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from rto_fast.errors import FieldError


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included.

    Args:
        above: `low` itself is excluded.
        below: `high` itself is excluded.
        infinite: infinity is included; the text of the field says what it means.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False
    infinite: bool = False

    def __contains__(self, value: Any) -> bool:
        if value == math.inf:
            return self.infinite
        inside = self.low <= value <= self.high  # never true of NaN
        return inside and not (self.above and value == self.low) and not (self.below and value == self.high)

    def __str__(self) -> str:
        low, high = (f"{bound:,}" if isinstance(bound, int) else f"{bound:,.10g}" for bound in (self.low, self.high))
        if self.above or self.below:
            text = f"{'above' if self.above else 'at least'} {low} and {'below' if self.below else 'at most'} {high}"
        else:
            text = f"from {low} to {high}"
        return text + " or .inf" * self.infinite


LONGEST_PATH = 1000  # characters: messages quote paths, and systems take some 4,000 bytes


@dataclass(frozen=True)
class PathText:
    """The rule of a text that is a path or may be one (a model, a dataset). `~` becomes the home folder when it is read.

    Args:
        keep_home: `~` stays, for a folder that every user has for himself.
    """

    keep_home: bool = False

    def __contains__(self, value: Any) -> bool:
        has_home = not value.startswith("~") or os.path.expanduser(value) != value
        # What a terminal would obey, or not show: messages escape it, and a path has to be copied from them.
        is_clean = all(unicodedata.category(c)[0] != "C" and unicodedata.category(c) not in ("Zl", "Zp") for c in value)
        return bool(value.strip()) and len(value) <= LONGEST_PATH and is_clean and has_home

    def __str__(self) -> str:
        return (
            f"a path or name of at most {LONGEST_PATH:,} characters, without line breaks and control characters, "
            "whose ~ (if it begins so) is a home folder"
        )


class NotBlank:
    """The rule of a text that must not be blank, as it is in a script whose variable is not set."""

    def __contains__(self, value: Any) -> bool:
        return bool(value.strip())

    def __str__(self) -> str:
        return "text that is not blank"


# Counts are held as int32 somewhere on the way: lengths and offsets of sequences, by the kernels.
LARGEST_COUNT = 2**31 - 1
Count = Annotated[int, Range(1, LARGEST_COUNT)]
CountOr0 = Annotated[int, Range(0, LARGEST_COUNT)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # as NumPy has it; seeds of iterations are multiples that fit into 64 bits
Threads = Annotated[int, Range(1, 1024)]  # far more than are of use; see `use_threads`
Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(0, 1e6, above=True)]
Coefficient = Annotated[float, Range(0, 1e6)]
SignedCoefficient = Annotated[float, Range(-1e6, 1e6)]
LearningRate = Annotated[float, Range(0, 1, above=True)]
MomentDecay = Annotated[float, Range(0, 1, below=True)]
Location = Annotated[str, PathText()]
FolderAtHome = Annotated[str, PathText(keep_home=True)]
Word = Annotated[str, NotBlank()]


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """A dataclass's fields with their types, rules included."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def fields_of(cls: type, prefix: str = "") -> dict[str, Any]:
    """Every key of a dataclass and of its sections, with its type: {"rto": RTOConfig, "rto.gamma": Share, …}."""
    keys: dict[str, Any] = {}
    for name, hint in hints_of(cls).items():
        keys[prefix + name] = hint
        if dataclasses.is_dataclass(hint):
            keys |= fields_of(typing.cast(type, hint), f"{prefix}{name}.")
    return keys


def options_of(hint: Any) -> tuple:
    """The types of a union, or `hint` alone."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def base_of(hint: Any) -> Any:
    """A type without its rules and without null: float of `LearningRate | None`."""
    first = next(option for option in options_of(hint) if option is not type(None))
    return typing.get_args(first)[0] if typing.get_origin(first) is Annotated else first


def fits(hint: Any, value: Any) -> bool:
    """Whether a field of type `hint` can hold `value`."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return fits(parts[0], value) and all(value in rule for rule in parts[1:])
    if origin in (typing.Union, types.UnionType):
        return any(fits(option, value) for option in parts)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in parts)
    if origin is tuple:
        return isinstance(value, (tuple, list)) and len(value) == len(parts) and all(map(fits, parts, value))
    if origin is list:
        return isinstance(value, list) and all(fits(parts[0], item) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(parts[0], k) and fits(parts[1], v) for k, v in value.items())
    if hint is Any:
        return _is_plain(value)
    if hint is str:
        return isinstance(value, str) and "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def _is_plain(value: Any, depth: int = 20) -> bool:
    """Whether `value` is what YAML holds, with finite numbers of 64 bits."""
    if isinstance(value, (list, tuple, dict)):
        items = [*value.values(), *value] if isinstance(value, dict) else value
        return depth > 0 and all(_is_plain(item, depth - 1) for item in items)
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return value is None or fits(str, value)


def describe(hint: Any) -> str:
    """What a field of type `hint` expects: "a number from 0 to 1, or null"."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        rule = str(parts[1])
        return rule if parts[0] is str else f"{describe(parts[0])} {rule}"
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(map(describe, parts))
    if origin is Literal:
        return " or ".join(filter(None, [", ".join(map(str, parts[:-1])), str(parts[-1])]))
    if origin is tuple:
        return f"[{', '.join(map(describe, parts))}]"
    if origin is list:
        return describe(parts[0])
    if origin is dict:
        name = "name" if parts[0] is str else describe(parts[0])
        return f"{{{name}: {describe(parts[1])}, …}}"
    names = {
        int: "a whole number",
        float: "a number",
        str: "text in UTF-8 without NUL",
        bool: "true or false",
        type(None): "null",
        Any: "text, finite numbers of 64 bits, lists and mappings",
    }
    return names.get(hint) or f"a {hint.__name__}"


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def shown(value: Any) -> str:
    """`value` as error messages show it: on one line, and shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        return _short.repr(value)
    except ValueError:  # Python's limit for the digits of integers
        return "a number of thousands of digits"


def check_fields(config: Any, prefix: str = "") -> None:
    """Checks every field of a dataclass and of its sections.

    Raises:
        FieldError: a field cannot hold its value.
    """
    for name, hint in hints_of(typing.cast(type, type(config))).items():
        value, key = getattr(config, name), prefix + name
        if not fits(hint, value):
            raise FieldError(key, describe(hint), shown(value))
        if dataclasses.is_dataclass(value):
            check_fields(value, f"{key}.")
