"""Importing a user's reward function by its name, `module:function`, and reading which columns of the data it takes."""

import importlib
import inspect
import traceback
from collections.abc import Callable
from typing import NamedTuple

from rto_fast.errors import ConfigError, Interrupted, error_text
from rto_fast.system import deepspeed_import
from rto_fast.system.process_state import users_settings


def describe(error: BaseException) -> str:
    """The type and message of an error in a user's code, and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = "" if not frames or frames[-1].filename.startswith("<") else f" ({frames[-1].filename}:{frames[-1].lineno})"
    return f"{error_text(error, with_type=True)}{where}"


def import_function(path: str, key: str) -> Callable:
    """Returns the function that `path` (`module:function`) names.

    Raises:
        ConfigError: There is no such function, or its module fails; begins with the configuration's `key`.
    """
    module_name, _, name = path.partition(":")
    if not (module_name and name):
        dotted, _, last = path.rpartition(".")
        hint = f"; did you mean {dotted}:{last}?" if dotted and last.isidentifier() and last != "py" else ""
        raise ConfigError(
            f"{key}: expected module:function, such as mine:score for the function score of mine.py, got {path!r}{hint}"
        )
    try:
        with users_settings(), deepspeed_import.revealed():
            module = importlib.import_module(module_name)
            found = hasattr(module, name)
            function = getattr(module, name) if found else None
    except Interrupted:
        raise
    except BaseException as error:  # a user's module may raise anything; a script may call sys.exit
        absent = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        reason = f"{type(error).__name__}: {error} in this folder or on PYTHONPATH" if absent else describe(error)
        raise ConfigError(f"{key}: cannot import {path!r} (expected module:function): {reason}") from error
    if not found:
        file = getattr(module, "__file__", None) or module_name
        raise ConfigError(f"{key}: cannot import {path!r} (expected module:function): {file} has no {name}")
    if not callable(function):
        raise ConfigError(f"{key}: {path!r} is not a function")
    return function


class Parameters(NamedTuple):
    """The parameters of a reward function."""

    places: set[str]  # names of the parameters that take the prompts and the responses
    columns: set[str]  # names of the other parameters
    required: list[str]  # those of `columns` that have no default
    takes_all: bool  # it takes any column (**columns)


def parameters_of(function: Callable, path: str, key: str) -> Parameters:
    """Reads a function's signature.

    Raises:
        ConfigError: The function cannot be called as f(prompts, responses, column=…), or is a generator.
    """
    shown = f"{key}: {path}"
    for code in (function, type(function).__call__):
        if inspect.isgeneratorfunction(code) or inspect.isasyncgenfunction(code):
            raise ConfigError(
                f"{shown} is a generator (it has a `yield`); return a list of one number a response instead"
            )
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # it is not written in Python: mistakes show in its first call
        return Parameters(set(), set(), [], False)
    try:
        places = {*signature.bind_partial([], []).arguments}
    except TypeError as error:
        raise ConfigError(
            f"{shown} cannot be called with a list of prompts and a list of responses ({error}); it must take "
            "these two in this order, and columns of the data by their names"
        ) from None
    others = [p for name, p in signature.parameters.items() if name not in places]
    named = [p for p in others if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for parameter in others:
        if parameter.kind == parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise ConfigError(
                f"{shown} takes `{parameter.name}` by its place only, and columns of the data are given by "
                "name; leave the `/` out of its parameters"
            )
    required = [p.name for p in named if p.default is p.empty]
    return Parameters(places, {p.name for p in named}, required, any(p.kind == p.VAR_KEYWORD for p in others))
