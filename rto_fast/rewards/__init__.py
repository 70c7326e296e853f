"""Sentence scores: a reward model, a Python function, or none. (Token rewards are `rto_fast.ops.rto_advantages`.)"""

import asyncio
import copy
import importlib
import inspect
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from rto_fast.batch import pack_whole
from rto_fast.data.encoding import ConversationEncoder
from rto_fast.data.layouts import Example
from rto_fast.data.tokenizing import Pair, Prompt, stop_token_ids
from rto_fast.errors import ConfigError, DataError, Interrupted, RewardError, said
from rto_fast.models.context import context_of
from rto_fast.models.directory import same_vocabulary
from rto_fast.models.loading import read_position, token_scores
from rto_fast.models.model import Model, ScoreStatistics
from rto_fast.rewards.gsm8k import gsm8k as gsm8k  # shipped, as `rto_fast.rewards:gsm8k`
from rto_fast.system import deepspeed_import
from rto_fast.system.process_state import users_settings
from rto_fast.training import ranks


@dataclass(frozen=True)
class Completion:
    """A prompt and one response to it."""

    prompt: Prompt
    response_ids: list[int]
    text: str  # without special tokens
    finished: bool  # ended by a stop token


Judge = Callable[[list[Completion]], torch.Tensor]  # [N] scores


def completions_of(
    prompts: Sequence[Prompt], response_ids: list[list[int]], finished: list[bool], tokenizer: PreTrainedTokenizerBase
) -> list[Completion]:
    texts = tokenizer.batch_decode(response_ids, skip_special_tokens=True)
    return [Completion(*fields) for fields in zip(prompts, response_ids, texts, finished, strict=True)]


def completions_of_pairs(
    pairs: Sequence[Pair], stop_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[Completion]:
    """The chosen and the rejected response of each pair as completions."""
    prompts = [
        Prompt(p.prompt_ids, p.example.prompt, p.example.extra, p.example.origin, p.example.tools)
        for p in pairs
        for _ in range(2)
    ]
    responses = [ids for p in pairs for ids in (p.chosen_ids, p.rejected_ids)]
    return completions_of(prompts, responses, [ids[-1] in stop_ids for ids in responses], tokenizer)


def same_tokens(tokenizer: PreTrainedTokenizerBase, policy_tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a reward model can be given the policy's ids as they are."""
    own_template = tokenizer.chat_template not in (None, policy_tokenizer.chat_template)
    return same_vocabulary(tokenizer, policy_tokenizer) and not own_template


class RewardModel:
    """Scores whole conversations with a sequence classification model of one label, as its own forward pass does: by the
    last token that is no padding token of its config.

    Args:
        model: a scorer. tokenizer: the reward model's. policy_tokenizer: responses are re-tokenised from their
            text if the reward model has another vocabulary, or a chat template of its own. max_tokens: packed into one
            forward pass.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        policy_tokenizer: PreTrainedTokenizerBase,
        *,
        prompt_format: str,
        max_tokens: int,
    ):
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        self.same_vocabulary = same_vocabulary(tokenizer, policy_tokenizer)
        self.same_tokens = same_tokens(tokenizer, policy_tokenizer)
        stop_ids = [] if self.same_tokens else stop_token_ids(tokenizer)
        self.encoder = None if self.same_tokens else ConversationEncoder(tokenizer, prompt_format, stop_ids, None)

    def _ids(self, completion):
        prompt = completion.prompt
        if self.encoder is None:
            return prompt.prompt_ids + completion.response_ids
        # not strict: a whole conversation is scored, and the policy may sample what no prompt of this template goes before
        row = [self.encoder.read(prompt.prompt, [completion.text], prompt.tools, strict=False)]
        return self.encoder.prompt_ids(row)[0] + self.encoder.response_ids(row, 0, completion.finished)[0]

    def __call__(self, completions: list[Completion]) -> torch.Tensor:
        """[N] float32 scores on the model's device."""
        sequences, context = [self._ids(c) for c in completions], context_of(self.model.config)
        longest = max(map(len, sequences), default=0)
        if context and longest > context:
            raise RewardError(
                f"reward model: {longest} of its tokens for a prompt and its response, its context is "
                f"{context}; lower max_prompt_tokens or rollout.max_new_tokens"
            )
        read = [read_position(ids, self.model.config) for ids in sequences]
        scores = score_sequences(self.model, sequences, self.max_tokens, read)
        return _finite(scores, completions, "reward model")


def _finite(scores, completions, source):
    if not scores.isfinite().all():
        index = int((~scores.isfinite()).nonzero()[0])
        raise RewardError(f"{source}: score {scores[index].item()} for the response {completions[index].text[:80]!r}")
    return scores


@torch.no_grad()
def score_sequences(
    model: Model, sequences: list[list[int]], max_tokens: int, read: Sequence[int] | None = None
) -> torch.Tensor:
    """Scores of sequences, [N] float32, packed `max_tokens` at a time.

    Args:
        read: the position in each sequence whose score is taken; default: the last.
    """
    with model.resident():
        device = model.device

        def scores(run):
            batch = pack_whole([sequences[i] for i in run], device)
            last = batch.last
            if read is not None:
                last = batch.cu_seqlens[:-1] + torch.tensor([read[i] for i in run], device=device)
            return model.forward(token_scores, batch)[last]

        return ranks.map_items(scores, [len(ids) for ids in sequences], [1] * len(sequences), max_tokens)


def _told(error: BaseException) -> str:
    """Somebody else's error: its kind, what it says, and the line of code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = "" if not frames or frames[-1].filename.startswith("<") else f" ({frames[-1].filename}:{frames[-1].lineno})"
    text = said(error)
    return f"{type(error).__name__}{text and f': {text}'}{where}"


def import_function(path: str, key: str) -> Callable:
    """The function that `module:function` names; `key` is the configuration key for messages."""
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
    except BaseException as error:  # the module is somebody else's code, and a script may end itself
        absent = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        told = f"{type(error).__name__}: {error} in this folder or on PYTHONPATH" if absent else _told(error)
        raise ConfigError(f"{key}: cannot import {path!r} (expected module:function): {told}") from error
    if not found:
        file = getattr(module, "__file__", None) or module_name
        raise ConfigError(f"{key}: cannot import {path!r} (expected module:function): {file} has no {name}")
    if not callable(function):
        raise ConfigError(f"{key}: {path!r} is not a function")
    return function


class Parameters(NamedTuple):
    """Of a reward function."""

    places: set[str]  # taken by the prompts and the responses
    columns: set[str]  # that it can be given by name
    required: list[str]  # of these, those that it cannot do without
    takes_all: bool  # any column


def parameters_of(function: Callable, path: str, key: str) -> Parameters:
    """
    Raises:
        ConfigError: it cannot be called as f(prompts, responses, column=…), or returns nothing but a generator.
    """
    shown = f"{key}: {path}"
    for code in (function, type(function).__call__):
        if inspect.isgeneratorfunction(code) or inspect.isasyncgenfunction(code):
            raise ConfigError(
                f"{shown} is a generator (it has a `yield`); return a list of one number a response instead"
            )
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # one that is not written in Python: its first call shows
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


def _numbers(scores: Any, source: str) -> torch.Tensor:
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


def judged(judge: Judge, completions: list[Completion]) -> torch.Tensor:
    """[N] scores by any judge: one that is not of this module is somebody's function, and is called like one, with
    completions that are its own to edit."""
    if isinstance(judge, (RewardModel, RewardFunction, NormalizedScores)):
        return judge(completions)
    with users_settings():
        scores = _numbers(judge(_copies(completions)), "judge")
    return scores.clone()


def _copies(values: list[Any]) -> list[Any]:
    """Each by itself: rows that share an object get one each."""
    return [copy.deepcopy(value) for value in values]


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
            prompts, columns = _copies(prompts), {name: _copies(values) for name, values in columns.items()}
            with users_settings() as settings, deepspeed_import.revealed():
                scores = self._in_time(settings, prompts, [c.text for c in completions], columns)
            scores = scores.clone()  # outside of the context: not in an inference mode of theirs
        except (RewardError, Interrupted):
            raise
        except BaseException as error:  # somebody else's code: `asyncio.CancelledError` is no Exception, nor SystemExit
            raise RewardError(f"{self.path}: {_told(error)}") from error
        if scores.shape != (len(completions),):
            raise RewardError(f"{self.path}: returned {tuple(scores.shape)} scores for {len(completions)} responses")
        scores = _finite(scores, completions, self.path)
        if self.is_rate and len(odd := scores[(scores < 0) | (scores > 1)]):
            raise RewardError(f"{self.path}: its is_rate promises scores from 0 to 1, and one is {odd[0].item():g}")
        return scores

    def _scores(self, prompts, responses, columns):
        result = self.function(prompts, responses, **columns)
        return _numbers(self.loop.run(_awaited(result)) if inspect.isawaitable(result) else result, self.path)

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


@dataclass(frozen=True)
class NormalizedScores:
    """(score − mean) / std of a reward source, the statistics over held-out chosen and rejected responses."""

    source: RewardModel | RewardFunction
    path: str  # the reward model's directory, or module:function
    mean: float = 0.0
    std: float = 1.0

    def __call__(self, completions: list[Completion]) -> torch.Tensor:
        return (judged(self.source, completions) - self.mean) / self.std


def score_statistics(scores: torch.Tensor) -> ScoreStatistics:
    """Of [N] scores; a constant score is only centred."""
    std = scores.std(correction=0).item()
    return ScoreStatistics(scores.mean().item(), std if std > 1e-6 else 1.0)
