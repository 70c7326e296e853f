"""What `--help` prints, and docs/configuration.md: the texts below the fields, with what each expects and its default."""

import ast
import dataclasses
import difflib
import inspect
import shutil
import textwrap
import typing
from dataclasses import dataclass, field
from typing import Any

from rto_fast.config.fields import LARGEST_COUNT, base_of, describe, hints_of, shown
from rto_fast.errors import ConfigError
from rto_fast.system.terminal import say


@dataclass(frozen=True)
class Command:
    """What `--help` says of a command.

    Args:
        module: what follows `python -m`.
        examples: {arguments: what they do}.
        others: {option: its text}, of the options that are no fields.
        positional: the field that is given without its name; a list takes several values.
        switches: the fields that are true where they are given, without a value.
    """

    module: str
    purpose: str
    examples: dict[str, str]
    others: dict[str, str] = field(default_factory=dict)
    positional: str | None = None
    switches: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A field as help and documentation show it."""

    key: str
    text: str
    kind: str  # what it expects; empty for ordinary text
    default: str


def entries(cls: type, prefix: str = "") -> list[Entry]:
    """A dataclass's own fields, without its sections."""
    texts, found = _texts(cls), []
    for item in dataclasses.fields(cls):
        hint = hints_of(cls)[item.name]
        if not dataclasses.is_dataclass(hint):
            default: Any = item.default_factory() if callable(item.default_factory) else item.default
            is_word = isinstance(default, str) and default.isprintable()
            text = texts.get(item.name, "")
            found.append(Entry(prefix + item.name, text, _kind(hint), default if is_word else shown(default)))
    return found


def _kind(hint: Any) -> str:
    """What a field expects, where its text and default do not say so."""
    if base_of(hint) in (str, bool) or typing.get_origin(hint) is list:
        return ""
    return describe(hint).replace(f" to {LARGEST_COUNT:,}", "")


def sections(cls: type) -> dict[str, type]:
    """{name: dataclass} of the sections."""
    return {name: typing.cast(type, hint) for name, hint in hints_of(cls).items() if dataclasses.is_dataclass(hint)}


def summary(cls: type) -> str:
    """A dataclass's docstring on one line."""
    return " ".join(inspect.cleandoc(cls.__doc__ or "").split())


def help_if_asked(cls: type, command: Command, arguments: list[str]) -> None:
    """Prints what follows `--help` in the arguments, and exits: a group of options, `all` of them, or else the first page.

    Raises:
        ConfigError: there is no such group.
    """
    if "--help" not in arguments and arguments[:1] != ["-h"]:
        return
    group = next(iter(arguments[arguments.index("--help") + 1 :]), "") if "--help" in arguments else ""
    groups = sections(cls)
    if not group or group.startswith("-"):
        lines = _first_page(cls, command)
    elif group == "all":
        parts = [(f"{name}: {summary(part)}", entries(part, f"{name}.")) for name, part in groups.items()]
        lines = _options(entries(cls), command)
        lines += [line for title, options in parts for line in ["", *_wrapped(title), *_options(options)]]
    elif group in groups:
        lines = [*_wrapped(summary(groups[group])), "", *_options(entries(groups[group], f"{group}."))]
    else:
        near = difflib.get_close_matches(group, groups, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"--help {group[:40]}: expected one of {', '.join([*groups, 'all'])}{hint}")
    say("\n".join(lines))
    raise SystemExit(0)


def _first_page(cls: type, command: Command) -> list[str]:
    program, groups = f"python -m {command.module}", sections(cls)
    argument = f" {command.positional.upper()}" if command.positional else ""
    lines = [f"usage: {program}{argument} [--OPTION VALUE ...]", "", *_wrapped(command.purpose), "", "examples:"]
    for options, text in command.examples.items():
        lines += [f"  {program} {options}".rstrip(), *_wrapped(text, 6)]
    if groups:
        lines += ["", "groups of options (--help GROUP shows one, --help all shows every option):"]
        first_sentences = {name: summary(part).partition(". ")[0].rstrip(".") for name, part in groups.items()}
        lines += [line for name, text in first_sentences.items() for line in _columns(name, text, 14)]
    return [*lines, "", "options:", *_options(entries(cls), command)]


def _options(options: list[Entry], command: Command | None = None) -> list[str]:
    lines = []
    for name, text in (command.others if command else {}).items():
        lines += [f"  --{name}", *_wrapped(text, 6)]
    for entry in options:
        is_positional = command is not None and entry.key == command.positional
        is_bare = is_positional or (command is not None and entry.key in command.switches)
        facts = [entry.kind] * bool(entry.kind)
        facts += [f"default: {entry.default}"] * (not is_bare and entry.default != "null")
        name = entry.key.upper() if is_positional else f"--{entry.key}"
        lines += [f"  {name}", *_wrapped(entry.text + f" ({'; '.join(facts)})" * bool(facts), 6)]
    return lines


def _wrapped(text: str, indent: int = 0) -> list[str]:
    width = max(40, min(100, shutil.get_terminal_size().columns - 1))
    return textwrap.wrap(text, width, initial_indent=" " * indent, subsequent_indent=" " * indent)


def _columns(name: str, text: str, width: int) -> list[str]:
    first, *rest = _wrapped(text, width + 2)
    return [f"  {name:<{width}}{first.lstrip()}", *rest]


def _texts(cls: type) -> dict[str, str]:
    """The strings below a dataclass's fields."""
    texts = {}
    for part in reversed(cls.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
        body = typing.cast(ast.ClassDef, tree).body
        for line, below in zip(body, body[1:]):
            if (
                isinstance(line, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                texts[typing.cast(ast.Name, line.target).id] = " ".join(str(below.value.value).split())
    return texts
