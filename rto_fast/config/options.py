"""Fills a dataclass from command-line options and YAML files. Every field is an option: `--rto.kl_coef 0.02`.

Values are collected by key, each with the place where it was given, and later ones override earlier ones. Error messages
begin with that place: `run.yaml:12: rto.gamma: expected …`, `--rto.gamma: expected …`.
"""

import dataclasses
import difflib
import itertools
import os
import sys
import typing
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rto_fast.config.fields import PathText, base_of, describe, fields_of, fits, hints_of, options_of, shown
from rto_fast.config.help import Command, help_if_asked
from rto_fast.config.removed import INSTEAD, refusal
from rto_fast.config.yaml_text import Given, Value, read, resolve
from rto_fast.errors import ConfigError, FieldError

Settings = TypeVar("Settings")


def value_of_text(hint: Any, text: str) -> Any:
    """What a field of type `hint` holds where an option has this text.

    Raises:
        ValueError: the field cannot hold it; says what is expected.
    """
    value = converted(hint, of_command_line(text, "value", hint))
    if not fits(hint, value):
        raise ValueError(f"expected {describe(hint)}, got {shown(value)}")
    return value


def split_arguments(
    arguments: list[str],
    cls: type,
    *,
    others: Iterable[str] = (),
    switches: Iterable[str] = (),
    positional: str | None = None,
) -> Iterator[tuple[str, str]]:
    """Yields (key, text) of each option, which is written `--key value` or `--key=value`.

    Args:
        others: options that are no field of the dataclass, such as config.
        switches: options that take no value.
        positional: the field that is given without its name.
    Raises:
        ConfigError: an option is unknown (the nearest one is suggested) or has no value.
    """
    switches = {*switches, "help"}
    known = sorted(f"--{key}" for key in {*fields_of(cls), *others, *switches} - {positional})
    rest = iter(arguments)
    for option in rest:
        name, has_value, text = option.partition("=")
        if not option.startswith("--"):
            if positional is None:
                raise ConfigError(
                    f"command line: unexpected {shown(option)}; options are --key value, and --help shows them"
                )
            yield positional, option
            if not _takes_several(cls, positional):
                positional = None
            continue
        check_known(name, "command line", known)
        if name[2:] in switches:
            if has_value:
                raise ConfigError(f"{name}: expected no value, got {shown(text)}")
        elif not has_value:
            text = next(rest, "--")
            if text.startswith("--"):
                raise ConfigError(f"{name}: expected a value after it (write {name}=VALUE for one that begins with --)")
        yield name[2:], text


def check_known(name: str, where: str, known: Iterable[str]) -> None:
    """Raises ConfigError unless a key (or an option, --key) exists, and says what replaces a key of older versions."""
    if name not in known:
        if name.removeprefix("--") in INSTEAD:
            raise refusal(name.removeprefix("--"), where)
        key = name[:100].removeprefix("--").replace("-", "_")
        options = {option.removeprefix("--"): option for option in known}
        section, dot, last = key.rpartition(".")
        initials = "".join(word[:1] for word in last.split("_"))  # learning_rate is lr here
        same = [option for option in options if key and option.endswith((f".{key}", f".{initials}"))]
        near = [short] if (short := section + dot + initials) in options else same
        near = near or difflib.get_close_matches(key, options, n=1, cutoff=0.5)
        hint = f"; did you mean {' or '.join(options[option] for option in near)}?" if near else ""
        given = name[:100] if name and name.isprintable() else shown(name)
        raise ConfigError(f"{where}: unknown key {given}{hint}")


def from_option(cls: type, key: str, text: str) -> Given:
    """The value of one option, or the values of a section: `--rto '{lr: 1e-6, kl_coef: 0.02}'`."""
    value = of_command_line(text, f"--{key}", hint := fields_of(cls)[key])
    return flattened(cls, value, f"{key}.") if dataclasses.is_dataclass(hint) else {key: value}


def of_command_line(text: str, place: str, hint: Any) -> Value:
    """Reads an option's text: as YAML where the field can hold several values, and `null` as null where it can be null."""
    if dataclasses.is_dataclass(hint) or any(typing.get_origin(option) in (tuple, dict) for option in options_of(hint)):
        return dataclasses.replace(read(text, place), place=place)
    is_null = text == "null" and type(None) in options_of(hint)
    return Value(text, place, None if is_null else text)


def flattened(cls: type, tree: Value, prefix: str = "", removed: Iterable[str] = ()) -> Given:
    """The values of a mapping and of its sections, by key.

    Args:
        removed: keys of older versions, which are accepted here.
    Raises:
        ConfigError: a key does not exist or is given twice, or a section holds something else than keys and values.
    """
    keys, given = fields_of(cls), {}

    def walk(tree: Value, prefix: str) -> None:
        if not isinstance(tree.content, dict):
            found = "nothing" if tree.is_null else shown(tree.as_python())
            example = next((key for key in keys if prefix and key.startswith(prefix)), "").removeprefix(prefix)
            give = f"give {{{example}: …}}, or " * bool(example)
            raise ConfigError(
                named(
                    prefix[:-1],
                    tree.place,
                    f"expected keys and values, got {found}; {give}leave a section out to keep its defaults",
                )
            )
        for name, value in tree.content.items():
            key = prefix + name
            if key not in removed:
                check_known(key, value.place, keys)
            if dataclasses.is_dataclass(keys.get(key)):
                walk(value, f"{key}.")
            elif key in given:
                raise ConfigError(named(key, value.place, "given twice; keep one of them"))
            else:
                given[key] = value

    walk(tree, prefix)
    return given


def parse(cls: type[Settings], arguments: list[str] | None, command: Command) -> Settings:
    """Fills the dataclass from command-line `arguments`, by default this process's; `--help` prints its options and exits.

    Raises:
        ConfigError: there is a mistake in the arguments.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    help_if_asked(cls, command, arguments)
    given: Given = {}
    for key, text in split_arguments(arguments, cls, switches=command.switches, positional=command.positional):
        if key == command.positional:
            value = Value(text, key.upper(), text)
            before = [*given[key].content] if key in given else []
            given[key] = Value([*before, value], key.upper()) if _takes_several(cls, key) else value
        else:
            given |= from_option(cls, key, "true" if key in command.switches else text)
    return build(cls, given)


def _takes_several(cls: type, key: str) -> bool:
    return typing.get_origin(fields_of(cls)[key]) is list


def own_arguments(cls: type, arguments: list[str], command: Command) -> tuple[list[str], list[str]]:
    """Splits the arguments of a command that also takes a run's options: (the options of `cls`, the others)."""
    own, others, words = [], [], iter(arguments)
    for word in words:
        name, has_value, _ = word.removeprefix("--").partition("=")
        is_own = word.startswith("--") and (name in fields_of(cls) or name == "help")
        (own if is_own else others).append(word)
        if is_own and not has_value and name not in {*command.switches, "help"}:
            own += itertools.islice(words, 1)
    return own, others


def named(key: str, place: str, message: str) -> str:
    return f"{place}: {message}" if place.lower() in (key, f"--{key}") else f"{place}: {key}: {message}"


def converted(hint: Any, value: Value) -> Any:
    """Converts `value` to what a field of type `hint` holds; a value that does not fit stays as YAML has it.

    Raises:
        ValueError: a number is too long to be read.
    """
    if value.is_null:
        return None
    base = base_of(hint)
    origin, parts = typing.get_origin(base), typing.get_args(base)
    content = value.content
    if isinstance(content, dict):
        mappings = [option for option in options_of(hint) if typing.get_origin(option) is dict]
        each = typing.get_args(mappings[0])[1] if mappings else Any
        return {name: converted(each, item) for name, item in content.items()}
    if isinstance(content, list):
        if origin is list:
            return [converted(parts[0], item) for item in content]
        items = [converted(each, item) for each, item in zip(parts, content)] if origin is tuple else None
        return tuple(items) if items and len(items) == len(content) else value.as_python()
    is_text = base is str or origin is typing.Literal and isinstance(parts[0], str)
    if is_text:  # on, 2026 and 1e3 are text here, quoted or not
        rules = [rule for option in options_of(hint) for rule in getattr(option, "__metadata__", ())]
        has_home = any(isinstance(rule, PathText) and not rule.keep_home for rule in rules)
        return os.path.expanduser(content) if has_home else content
    plain = value.plain
    if isinstance(plain, str) and base is not Any:
        plain = resolve(content.strip())
        plain = content if plain is None else plain
    return float(plain) if base is float and type(plain) is int else plain


def build(cls: type[Settings], given: Given) -> Settings:
    """The dataclass with the given values, and with defaults for the others.

    Raises:
        ConfigError: a value does not fit its field, or does not go with another one. It begins with the value's place.
    """

    def make(cls: type, prefix: str) -> Any:
        values = {}
        for name, hint in hints_of(cls).items():
            key = prefix + name
            if dataclasses.is_dataclass(hint):
                values[name] = make(typing.cast(type, hint), f"{key}.")
            elif key in given:
                try:
                    values[name] = converted(hint, given[key])
                except ValueError as error:
                    raise ConfigError(named(key, given[key].place, f"expected {describe(hint)}, got {error}")) from None
        return cls(**values)

    try:
        return make(cls, "")
    except FieldError as error:
        if error.key not in given:
            raise
        raise ConfigError(named(error.key, given[error.key].place, error.reason)) from None
