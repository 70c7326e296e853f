"""Users' reward functions: their import by name, their call, isolated from the rest of the process, and their scores."""

import asyncio
import copy
import importlib
import inspect
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from rto_fast.data.layouts import Example
from rto_fast.data.tokenizing import Prompt
from rto_fast.errors import ConfigError, DataError, Interrupted, RewardError, error_text
from rto_fast.rewards.model import Completion, check_finite
from rto_fast.system import deepspeed_import
from rto_fast.system.process_state import users_settings
from rto_fast.training import ranks


class RewardFunction:
    """Scores responses by a user's Python function: f(prompts, responses) returns one number a response.

    Prompts are given as they are in the data (text, or a list of messages), responses as text. A function that also takes
    `finished`, or the name of another column of the data (such as `answer`), gets those lists by keyword. It may edit all
    that it is given. A function that scores right or wrong, 1 or 0, says so by the attribute `function.is_rate = True`; its
    mean then gets the confidence interval of a rate.

    The function is called without gradients, and its changes of the process's settings are undone
    (`rto_fast.system.process_state`). A coroutine is awaited in an event loop that lasts as long as this object.

    Args:
        path: The function's name, `module:function`.
        key: The configuration key that names it.
        device: The device of the scores.
        timeout: The longest that a call may take, in seconds.
    """

    def __init__(self, path: str, key: str, device: torch.device | str = "cpu", timeout: float | None = None):
        self.path, self.key, self.device, self.timeout = path, key, device, timeout
        self.function = import_function(path, key)
        self.parameters = parameters_of(self.function, path, key)
        self.is_rate = bool(getattr(self.function, "is_rate", False))
        self.loop = asyncio.Runner(loop_factory=asyncio.new_event_loop)  # clients keep connections from call to call

    def check_columns(self, examples: Sequence[Prompt | Example]) -> None:
        """Checks that the data has the columns that the function requires.

        Args:
            examples: One of each source that is scored.

        Raises:
            DataError: A column is missing.
        """
        for name in self.parameters.required:
            for example in examples:
                if name not in {*example.extra, "finished"}:
                    has = ", ".join(example.extra) or "none beside those that are read as text"
                    function = self.path.partition(":")[2]
                    raise DataError(
                        f"{self.key}: {function} takes the column `{name}`, which the data does not have "
                        f"({example.origin}; its columns: {has})"
                    )

    def __call__(self, completions: list[Completion]) -> torch.Tensor:
        """Returns the scores, [N] float32 on `device`.

        Raises:
            RewardError: The function failed, took too long, or did not return one finite number a response.
        """
        taken = self.parameters
        columns: dict[str, list[Any]] = {"finished": [c.finished for c in completions]}
        for name in {name: None for c in completions for name in c.prompt.extra}:
            if name not in ("finished", *taken.places):
                columns[name] = [c.prompt.extra.get(name) for c in completions]
        columns = {name: values for name, values in columns.items() if taken.takes_all or name in taken.columns}
        prompts = [p if isinstance(p, str) else list(p) for p in (c.prompt.prompt for c in completions)]
        scores, failure = torch.zeros(len(completions)), None
        if ranks.is_main():  # one call with all responses: it may compare them, cost money or count its calls
            try:
                scores = self._call(prompts, completions, columns)
            except RewardError as error:
                failure = error
        if ranks.any_rank(failure is not None):
            raise failure or RewardError(f"{self.path} failed on rank 0")
        return ranks.from_main(scores).to(self.device)

    def _call(self, prompts: list[Any], completions: list[Completion], columns: dict[str, list[Any]]) -> torch.Tensor:
        try:
            prompts, columns = copies(prompts), {name: copies(values) for name, values in columns.items()}
            with users_settings() as settings, deepspeed_import.revealed():
                scores = self._in_time(settings, prompts, [c.text for c in completions], columns)
            scores = scores.clone()  # outside of the context: the function may have turned inference mode on
        except (RewardError, Interrupted):
            raise
        except BaseException as error:  # of a user's code also SystemExit and asyncio.CancelledError
            raise RewardError(f"{self.path}: {describe(error)}") from error
        if scores.shape != (len(completions),):
            raise RewardError(f"{self.path}: returned {tuple(scores.shape)} scores for {len(completions)} responses")
        scores = check_finite(scores, completions, self.path)
        if self.is_rate and len(odd := scores[(scores < 0) | (scores > 1)]):
            raise RewardError(f"{self.path}: its is_rate promises scores from 0 to 1, and one is {odd[0].item():g}")
        return scores

    def _in_time(
        self, settings: dict[str, Any], prompts: list[Any], responses: list[str], columns: dict[str, list[Any]]
    ) -> torch.Tensor:
        """Calls the function, in a thread where there is a timeout or where this thread has an event loop (a notebook's)."""
        if self.timeout is None and not _in_event_loop():
            return self._scores(prompts, responses, columns)
        outcome: dict[str, Any] = {}

        def call() -> None:
            try:
                with users_settings(of_caller=settings):
                    outcome["scores"] = self._scores(prompts, responses, columns)
            except BaseException as error:  # raised in the thread that waits
                outcome["error"] = error

        thread = threading.Thread(target=call, daemon=True)  # if it hangs it does not keep the process alive
        thread.start()
        thread.join(self.timeout)
        if thread.is_alive():
            raise RewardError(
                f"{self.path}: no scores for {len(responses)} responses within {self.timeout:g} s "
                "(reward_model.timeout)"
            )
        if "error" in outcome:
            raise outcome["error"]
        return outcome["scores"]

    def _scores(self, prompts: list[Any], responses: list[str], columns: dict[str, list[Any]]) -> torch.Tensor:
        result = self.function(prompts, responses, **columns)
        return numbers(self.loop.run(_awaited(result)) if inspect.isawaitable(result) else result, self.path)


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _awaited(result: Any) -> Any:
    return await result


def numbers(scores: Any, source: str) -> torch.Tensor:
    """Converts what a user's function returned to a float32 tensor on the CPU.

    Args:
        scores: Any object.
        source: The function's name for messages.

    Raises:
        RewardError: The object is not a list, array or tensor of real numbers; complex and masked numbers are not.
    """
    kind = type(scores).__name__
    try:
        if isinstance(scores, (Iterator, AsyncIterator)):
            raise TypeError("it can be read only once")
        if isinstance(scores, torch.Tensor):
            if scores.is_complex() or scores.layout != torch.strided or scores.is_quantized or scores.is_nested:
                raise TypeError(f"its type is {scores.dtype}, its layout {scores.layout}")
            return scores.detach().to("cpu", torch.float32, copy=True)
        # Arrays and series of other libraries become lists: they may hold objects or missing values, or have an index.
        if hasattr(scores, "tolist"):
            scores = scores.tolist()
        if isinstance(scores, (list, tuple)):
            scores = [score.detach() if isinstance(score, torch.Tensor) else score for score in scores]
        return torch.tensor(scores, dtype=torch.float32, device="cpu")
    except Exception as error:  # each kind of object fails elsewhere in torch, and no message names the kind
        raise RewardError(
            f"{source}: returned a {kind}, expected a list of one number a response: {error_text(error, with_type=False)}"
        ) from error


def copies(values: list[Any]) -> list[Any]:
    """Copies each value by itself, so that rows which share an object get one each."""
    return [copy.deepcopy(value) for value in values]


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
