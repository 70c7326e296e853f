"""Sentence scores: a reward model, a Python function, or none. (Token rewards are `rto_fast.ops.rto_advantages`.)"""

import importlib
import inspect
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rto_fast.batch import pack_whole
from rto_fast.data.encoding import ConversationEncoder
from rto_fast.data.layouts import Example
from rto_fast.data.tokenizing import Pair, Prompt, stop_token_ids
from rto_fast.errors import ConfigError, DataError, Interrupted, RewardError
from rto_fast.gsm8k import gsm8k as gsm8k  # shipped, as `rto_fast.rewards:gsm8k`
from rto_fast.models.context import context_of
from rto_fast.models.directory import same_vocabulary
from rto_fast.models.loading import read_position, token_scores
from rto_fast.models.placement import device_of, resident
from rto_fast.training import deepspeed_import, ranks


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
        model: from `load_scorer`. tokenizer: the reward model's. policy_tokenizer: responses are re-tokenised from their
            text if the reward model has another vocabulary, or a chat template of its own. max_tokens: packed into one
            forward pass.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, policy_tokenizer: PreTrainedTokenizerBase, *,
        prompt_format: str, max_tokens: int,
    ):  # fmt: skip
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
            raise RewardError(f"reward model: {longest} of its tokens for a prompt and its response, its context is "
                              f"{context}; lower max_prompt_tokens or rollout.max_new_tokens")  # fmt: skip
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
    model: PreTrainedModel, sequences: list[list[int]], max_tokens: int, read: Sequence[int] | None = None
) -> torch.Tensor:
    """Scores of sequences, [N] float32, packed `max_tokens` at a time.

    Args:
        read: the position in each sequence whose score is taken; default: the last.
    """
    with resident(model):
        device = device_of(model)

        def scores(run):
            batch = pack_whole([sequences[i] for i in run], device)
            last = batch.last
            if read is not None:
                last = batch.cu_seqlens[:-1] + torch.tensor([read[i] for i in run], device=device)
            return token_scores(model, batch)[last]

        return ranks.map_items(scores, [len(ids) for ids in sequences], [1] * len(sequences), max_tokens)


def _told(error: BaseException) -> str:
    """Somebody else's error: its kind, what it says, and the line of code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = "" if not frames or frames[-1].filename.startswith("<") else f" ({frames[-1].filename}:{frames[-1].lineno})"
    said = f": {error}" if str(error) else ""
    return f"{type(error).__name__}{said}{where}"


def import_function(path: str, key: str) -> Callable:
    """The function that `module:function` names; `key` is the configuration key for messages."""
    module_name, _, name = path.partition(":")
    try:
        with deepspeed_import.revealed():
            function = getattr(importlib.import_module(module_name), name)
    except Interrupted:
        raise
    except BaseException as error:  # the module is somebody else's code, and a script may end itself
        raise ConfigError(f"{key}: cannot import {path!r} (expected module:function): {_told(error)}") from error
    if not callable(function):
        raise ConfigError(f"{key}: {path!r} is not a function")
    return function


class RewardFunction:
    """Scores by a Python function (prompts, responses) → one number each.

    Prompts come as in the data (text, or a list of messages), responses as text. A function that also takes `finished`, or
    the name of another column of the data (such as `answer`), is given those lists by keyword. One that scores right or
    wrong, 1 or 0, says so by an attribute, `function.is_rate = True`: its mean then has a rate's confidence interval.
    """

    def __init__(self, path: str, key: str, device: torch.device | str = "cpu", timeout: float | None = None):
        self.path, self.key, self.device, self.timeout = path, key, device, timeout
        self.function = import_function(path, key)
        try:
            parameters = [*inspect.signature(self.function).parameters.values()]
        except ValueError as error:
            raise ConfigError(f"{key}: {error}; give a function written in Python") from None
        self.is_rate = bool(getattr(self.function, "is_rate", False))
        self.takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
        self.names = {p.name for p in parameters}
        self.required = [p.name for p in parameters[2:] if p.default is p.empty and p.kind != p.VAR_POSITIONAL]

    def check_columns(self, examples: Sequence[Prompt | Example]) -> None:
        """A column that the function cannot do without shows now, not when the first responses are there.

        Args:
            examples: one of each source that is scored.
        """
        for name in [] if self.takes_all else self.required:
            for example in examples:
                if name not in {*example.extra, "finished"}:
                    has = ", ".join(example.extra) or "none beside those that are read as text"
                    function = self.path.partition(":")[2]
                    raise DataError(f"{self.key}: {function} takes the column `{name}`, which the data does not have "
                                    f"({example.origin}; its columns: {has})")  # fmt: skip

    def __call__(self, completions: list[Completion]) -> torch.Tensor:
        columns = {name for c in completions for name in c.prompt.extra} - {"prompts", "responses"}
        extra = {name: [c.prompt.extra.get(name) for c in completions] for name in columns}
        extra["finished"] = [c.finished for c in completions]
        extra = {name: values for name, values in extra.items() if self.takes_all or name in self.names}
        prompts = [p if isinstance(p, str) else list(p) for p in (c.prompt.prompt for c in completions)]
        scores, failure = torch.zeros(len(completions)), None
        if ranks.is_main():  # once, with all responses: it may compare them, cost money, or count its calls
            try:
                scores = self._call(prompts, completions, extra)
            except RewardError as error:
                failure = error
        if ranks.any_rank(failure is not None):
            raise failure or RewardError(f"{self.path} failed on rank 0")
        return ranks.from_main(scores).to(self.device)

    def _call(self, prompts, completions, extra):
        try:
            with deepspeed_import.revealed():
                scores = self._in_time(prompts, [c.text for c in completions], extra)
            scores = torch.as_tensor(scores, dtype=torch.float32).cpu()
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

    def _in_time(self, prompts, responses, extra):
        if self.timeout is None:
            return self.function(prompts, responses, **extra)
        outcome, grad = {}, torch.is_grad_enabled()

        def call():
            try:
                with torch.set_grad_enabled(grad):  # a setting of each thread
                    outcome["scores"] = self.function(prompts, responses, **extra)
            except BaseException as error:  # handed to the thread that waits
                outcome["error"] = error

        thread = threading.Thread(target=call, daemon=True)  # one that hangs must not keep the process alive
        thread.start()
        thread.join(self.timeout)
        if thread.is_alive():
            raise RewardError(f"{self.path}: no scores for {len(responses)} responses within {self.timeout:g} s "
                              "(reward_model.timeout)")  # fmt: skip
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
        return (self.source(completions) - self.mean) / self.std


def score_statistics(scores: torch.Tensor) -> tuple[float, float]:
    """(mean, std) of [N] scores; a constant score is only centred."""
    std = scores.std(correction=0).item()
    return scores.mean().item(), std if std > 1e-6 else 1.0
