"""Users' reward functions: called apart from the rest of the process, and their scores checked."""

import asyncio
import copy
import inspect
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import torch

from rto_fast.data.layouts import Example
from rto_fast.data.tokenizing import Prompt
from rto_fast.errors import DataError, Interrupted, RewardError, said
from rto_fast.rewards.completions import Completion, check_finite
from rto_fast.rewards.imported import import_function, parameters_of, told
from rto_fast.system import deepspeed_import
from rto_fast.system.process_state import users_settings
from rto_fast.training import ranks


def _in_event_loop() -> bool:
    """Whether this thread is running coroutines, as a notebook's does."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _awaited(result: Any) -> Any:
    return await result


class RewardFunction:
    """Scores by a Python function (prompts, responses) → one number each.

    Prompts come as in the data (text, or a list of messages), responses as text. A function that also takes `finished`, or
    the name of another column of the data (such as `answer`), is given those lists by keyword. It may edit all that it is
    given. One that scores right or wrong, 1 or 0, says so by an attribute, `function.is_rate = True`: its mean then has a
    rate's confidence interval.

    It is called without gradients, and what it changes of the process is put back (`rto_fast.system.process_state`). One
    that is `async`, or returns a coroutine, is awaited, in an event loop of its own that lasts as long as this object.
    """

    def __init__(self, path: str, key: str, device: torch.device | str = "cpu", timeout: float | None = None):
        self.path, self.key, self.device, self.timeout = path, key, device, timeout
        self.function = import_function(path, key)
        self.parameters = parameters_of(self.function, path, key)
        self.is_rate = bool(getattr(self.function, "is_rate", False))
        self.loop = asyncio.Runner(loop_factory=asyncio.new_event_loop)  # clients keep connections from call to call

    def check_columns(self, examples: Sequence[Prompt | Example]) -> None:
        """A column that the function cannot do without shows now, not when the first responses are there.

        Args:
            examples: one of each source that is scored.
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
        taken = self.parameters
        columns: dict[str, list[Any]] = {"finished": [c.finished for c in completions]}
        for name in {name: None for c in completions for name in c.prompt.extra}:
            if name not in ("finished", *taken.places):
                columns[name] = [c.prompt.extra.get(name) for c in completions]
        columns = {name: values for name, values in columns.items() if taken.takes_all or name in taken.columns}
        prompts = [p if isinstance(p, str) else list(p) for p in (c.prompt.prompt for c in completions)]
        scores, failure = torch.zeros(len(completions)), None
        if ranks.is_main():  # once, with all responses: it may compare them, cost money, or count its calls
            try:
                scores = self._call(prompts, completions, columns)
            except RewardError as error:
                failure = error
        if ranks.any_rank(failure is not None):
            raise failure or RewardError(f"{self.path} failed on rank 0")
        return ranks.from_main(scores).to(self.device)

    def _call(self, prompts, completions, columns):
        try:
            prompts, columns = copies(prompts), {name: copies(values) for name, values in columns.items()}
            with users_settings() as settings, deepspeed_import.revealed():
                scores = self._in_time(settings, prompts, [c.text for c in completions], columns)
            scores = scores.clone()  # outside of the context: not in an inference mode of theirs
        except (RewardError, Interrupted):
            raise
        except BaseException as error:  # somebody else's code: `asyncio.CancelledError` is no Exception, nor SystemExit
            raise RewardError(f"{self.path}: {told(error)}") from error
        if scores.shape != (len(completions),):
            raise RewardError(f"{self.path}: returned {tuple(scores.shape)} scores for {len(completions)} responses")
        scores = check_finite(scores, completions, self.path)
        if self.is_rate and len(odd := scores[(scores < 0) | (scores > 1)]):
            raise RewardError(f"{self.path}: its is_rate promises scores from 0 to 1, and one is {odd[0].item():g}")
        return scores

    def _scores(self, prompts, responses, columns):
        result = self.function(prompts, responses, **columns)
        return numbers(self.loop.run(_awaited(result)) if inspect.isawaitable(result) else result, self.path)

    def _in_time(self, settings, prompts, responses, columns):
        if self.timeout is None and not _in_event_loop():
            return self._scores(prompts, responses, columns)
        outcome = {}

        def call():
            try:
                with users_settings(of_caller=settings):
                    outcome["scores"] = self._scores(prompts, responses, columns)
            except BaseException as error:  # handed to the thread that waits
                outcome["error"] = error

        thread = threading.Thread(target=call, daemon=True)  # one that hangs must not keep the process alive
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


def numbers(scores: Any, source: str) -> torch.Tensor:
    """What a user's function returned, as float32 on the CPU.

    Args:
        source: for messages.
    Raises:
        RewardError: it is something else, complex numbers and masked ones included.
    """
    kind = type(scores).__name__
    try:
        if isinstance(scores, (Iterator, AsyncIterator)):
            raise TypeError("it can be read only once")
        if isinstance(scores, torch.Tensor):
            if scores.is_complex() or scores.layout != torch.strided or scores.is_quantized or scores.is_nested:
                raise TypeError(f"its type is {scores.dtype}, its layout {scores.layout}")
            return scores.detach().to("cpu", torch.float32, copy=True)
        # Other libraries' arrays and series become lists: objects, missing values and an index of their own among them.
        if hasattr(scores, "tolist"):
            scores = scores.tolist()
        if isinstance(scores, (list, tuple)):
            scores = [score.detach() if isinstance(score, torch.Tensor) else score for score in scores]
        return torch.tensor(scores, dtype=torch.float32, device="cpu")
    except Exception as error:  # each kind of object fails somewhere else in torch, and none of them names it
        raise RewardError(
            f"{source}: returned a {kind}, expected a list of one number a response: {said(error)}"
        ) from error


def copies(values: list[Any]) -> list[Any]:
    """Each by itself: rows that share an object get one each."""
    return [copy.deepcopy(value) for value in values]
