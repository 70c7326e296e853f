"""Tokenising: prompts and responses as the ids that the model sees, prompt_ids + response_ids.

Prompt formats: `auto` (messages through the chat template; plain text as one user message if the tokenizer has a
template, else as it is), `chat` (plain text always as a user message), `text` (plain text always as it is). Text that is
chat-templated already, from the first turn's marks to the generation prompt, is used as it is, special tokens included,
unless the format is `chat`; a warning says so.

A response is what the policy would sample after the generation prompt: what the template renders behind it
(`rto_fast.data.templates`), up to and including one stop token. It is tokenised on its own, because the policy's first
token never merges with the prompt's last. Stop tokens that the data spell out at its end are not part of it, nor are the
space around them and special tokens behind them, such as padding. Without a template a response is its text and
the EOS token.

Special tokens that stand in data stay text, in messages, tools and plain text (`rto_fast.data.special_tokens`), but for a
BOS token that a plain text begins with.

Tokenizers without template get FALLBACK_TEMPLATE, Anthropic HH's transcript; a warning says so.
BOS: a chat template is the authority on it, as in transformers; plain text gets it if the tokenizer adds it to text.
"""

import re
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rto_fast.data.encoding import ConversationEncoder
from rto_fast.data.layouts import DataError, Example
from rto_fast.data.notes import notes
from rto_fast.data.templates import FALLBACK_TEMPLATE as FALLBACK_TEMPLATE
from rto_fast.data.templates import NO_THOUGHTS, ChatTemplate, Thinking
from rto_fast.system.notices import notify
from rto_fast.system.progress import advance, progress


class NothingLeft(DataError):
    """No example can be used: each was left out, as `data.invalid` or the limits allow, or their layout lacks a column."""


@dataclass(frozen=True)
class Limits:
    """Token budgets. Over-long prompts are dropped or lose their oldest tokens (not BOS); responses lose their end."""

    max_prompt_tokens: int
    max_response_tokens: int
    overlong_prompt: str = "drop"  # or "truncate_left"

    def __post_init__(self):
        if self.max_prompt_tokens < 1 or self.max_response_tokens < 1:
            raise DataError(f"max_prompt_tokens and max_response_tokens must be at least 1: {self}")
        if self.overlong_prompt not in ("drop", "truncate_left"):
            raise DataError(f"overlong_prompt: {self.overlong_prompt!r} is not 'drop' or 'truncate_left'")


@dataclass(frozen=True)
class Sequence:
    prompt_ids: list[int]
    response_ids: list[int]  # ends with a stop token unless it was cut


@dataclass(frozen=True)
class Pair:
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    example: Example  # where it came from

    @property
    def num_tokens(self):
        """Of both sides together."""
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


@dataclass(frozen=True)
class Prompt:
    prompt_ids: list[int]
    prompt: str | tuple[dict, ...]  # text or messages, as in Example
    extra: dict  # the example's other columns, for reward functions
    origin: str = ""
    tools: tuple[dict, ...] | None = None  # function schemas


@dataclass
class CutReport:
    """What a builder dropped and cut; `str()` is one line. Counts of tokens are those before cutting."""

    source: str
    limits: Limits
    examples: int
    kept: int = 0
    unusable: int = 0  # rows that the chat template refuses, or whose prompt and response cannot be told apart
    first_unusable: str = ""
    prompts_dropped: int = 0
    prompts_cut: int = 0
    prompt_tokens: int = 0  # of the examples that were not dropped for their prompt
    prompt_tokens_cut: int = 0
    responses_cut: int = 0
    response_tokens: int = 0
    response_tokens_cut: int = 0
    identical_dropped: int = 0  # pairs without a difference (left) between chosen and rejected

    def __str__(self):
        parts = [f"{self.source}: {self.examples} examples"]
        limits = self.limits
        if self.unusable:
            parts.append(f"{self.unusable} unusable skipped (the first: {self.first_unusable})")
        if self.prompts_dropped:
            parts.append(f"{self.prompts_dropped} prompts dropped (> {limits.max_prompt_tokens} tokens)")
        if self.prompts_cut:
            share = 100 * self.prompt_tokens_cut / self.prompt_tokens
            parts.append(
                f"{self.prompts_cut} prompts cut to their last {limits.max_prompt_tokens} tokens "
                f"({share:.1f} % of prompt tokens)"
            )
        if self.responses_cut:
            share = 100 * self.response_tokens_cut / self.response_tokens
            parts.append(
                f"{self.responses_cut} responses cut to {limits.max_response_tokens} tokens "
                f"({share:.1f} % of response tokens)"
            )
        if self.identical_dropped:
            parts.append(f"{self.identical_dropped} pairs dropped (chosen and rejected identical)")
        return ", ".join(parts if len(parts) > 1 else [*parts, "nothing cut"])


def stop_token_ids(tokenizer, generation_config=None) -> list[int]:
    """Ids that end a response, EOS first: the tokenizer's, the generation config's, the chat template's turn end."""
    configured = getattr(generation_config, "eos_token_id", None)
    ids = [tokenizer.eos_token_id] + (configured if isinstance(configured, list) else [configured])
    if tokenizer.chat_template is not None:
        stop = ChatTemplate(tokenizer).turn.stop
        ids.append(tokenizer.convert_tokens_to_ids(stop) if stop else None)
    ids = list(dict.fromkeys(i for i in ids if i is not None))
    if not ids:
        raise DataError("no stop token: set eos_token of the tokenizer or eos_token_id of the generation config")
    return ids


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | SequenceOf[dict],
    prompt_format: str = "auto",
    tools: Any = None,
    thinking: Thinking = NO_THOUGHTS,
) -> list[int]:
    """Ids of a prompt (text or messages), up to where the response begins. thinking: how it ends."""
    encoder = ConversationEncoder(tokenizer, prompt_format, (), thinking)
    return encoder.prompt_ids([encoder.read(prompt, (), tools)])[0]


def encode_response(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | SequenceOf[dict],
    response: str | dict,
    prompt_format: str,
    stop_ids: SequenceOf[int],
    tools: Any = None,
    thinking: Thinking = NO_THOUGHTS,
) -> list[int]:
    """Ids that follow `encode_prompt(tokenizer, prompt, prompt_format, tools, thinking)`, ending with one of `stop_ids`.

    Raises:
        DataError: the response cannot follow that prompt, such as one with a thought, which `NO_THOUGHTS` rules out.
    """
    encoder = ConversationEncoder(tokenizer, prompt_format, stop_ids, thinking)
    return encoder.response_ids([encoder.read(prompt, [response], tools)], 0)[0]


def sft_sequences(
    examples: SequenceOf[Example],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    prompt_format: str,
    stop_ids: SequenceOf[int],
    **options: Any,
) -> tuple[list[Sequence], CutReport]:
    """Prompts with `response`, or with `chosen` where there is none. DataError if no example remains.

    options: see `_Reading`.
    """
    responses = [example.chosen if example.response is None else example.response for example in examples]
    _need(examples, responses, "response or chosen")
    sides = [[response] for response in responses]
    reading = _Reading(examples, sides, tokenizer, limits, prompt_format, stop_ids, **options)
    return [Sequence(*ids) for ids in zip(reading.prompt_ids, reading.responses(0), strict=True)], reading.report


def preference_pairs(
    examples: SequenceOf[Example],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    prompt_format: str,
    stop_ids: SequenceOf[int],
    **options: Any,
) -> tuple[list[Pair], CutReport]:
    """Prompts with `chosen` and `rejected`. Pairs that do not differ (any more) are dropped. DataError if none remain.

    options: see `_Reading`.
    """
    for name in ("chosen", "rejected"):
        _need(examples, [getattr(example, name) for example in examples], name)
    sides = [[example.chosen, example.rejected] for example in examples]
    reading = _Reading(examples, sides, tokenizer, limits, prompt_format, stop_ids, **options)
    parts = zip(reading.prompt_ids, reading.responses(0), reading.responses(1), reading.examples, strict=True)
    pairs = [Pair(*part) for part in parts if part[1] != part[2]]
    report = reading.report
    report.identical_dropped = report.kept - len(pairs)
    report.kept = len(pairs)
    if not pairs:
        raise NothingLeft(f"{report.source}: chosen and rejected are identical in all pairs (within {limits})")
    return pairs, report


def prompts(
    examples: SequenceOf[Example],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    prompt_format: str,
    **options: Any,
) -> tuple[list[Prompt], CutReport]:
    """Prompts alone, with what reward functions need. DataError if no example remains. options: see `_Reading`."""
    reading = _Reading(examples, [[] for _ in examples], tokenizer, limits, prompt_format, (), **options)
    ids_and_examples = zip(reading.prompt_ids, reading.examples, strict=True)
    return [Prompt(ids, e.prompt, e.extra, e.origin, e.tools) for ids, e in ids_and_examples], reading.report


def responses_of(examples: SequenceOf[Example]) -> list[str | dict]:
    """All responses of examples."""
    sides = (side for example in examples for side in (example.response, example.chosen, example.rejected))
    return [side for side in sides if side is not None]


def _need(examples, values, name):
    for example, value in zip(examples, values, strict=True):
        if value is None:
            raise NothingLeft(
                f"{example.origin}: no {name}; this stage needs it: use other data, or map it with columns"
            )


class _Reading:
    """What is common to the builders: examples that can be used, with the ids of their prompts and responses.

    Args:
        sides: of each example, the responses to read. invalid: what a row does that the chat template refuses, "error" or
            "skip" (and count). thinking: how prompts end; None: as the examples' own responses ask for. noted: what was
            warned of; what is in it is not said again.
    """

    def __init__(
        self,
        examples: SequenceOf[Example],
        sides: SequenceOf[SequenceOf[Any]],
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        prompt_format: str,
        stop_ids: SequenceOf[int],
        *,
        invalid: str = "error",
        thinking: Thinking | None = None,
        noted: set[str] | None = None,
    ):
        self.limits, self._noted = limits, set() if noted is None else noted
        origins = (re.sub(r"(:\d+|\[\d+\])$", "", example.origin) for example in examples)
        sources = list(dict.fromkeys(Path(origin).name or "data" for origin in origins))
        source = sources[0] + f" and {len(sources) - 1} more" * (len(sources) > 1) if sources else "data"
        self.report = CutReport(source, limits, len(examples))
        template = ChatTemplate(tokenizer)
        thinking = thinking or template.choose_thinking(responses_of(examples))
        self._encoder = ConversationEncoder(tokenizer, prompt_format, stop_ids, thinking)
        with progress("reading conversations", len(examples), "examples"):
            self._read(examples, sides, invalid)
        self._say()
        self._fit_prompts(tokenizer.bos_token_id)

    def _read(self, examples, sides, invalid):
        self.examples, self._rows = [], []
        for example, responses in zip(examples, sides, strict=True):
            advance()
            try:
                row = self._encoder.read(example.prompt, responses, example.tools)
            except DataError as error:
                message = f"{example.origin}: {error}"
                if invalid == "error":
                    raise DataError(message) from error
                self.report.unusable += 1
                self.report.first_unusable = self.report.first_unusable or message
                continue
            self.examples.append(example)
            self._rows.append(row)
        if examples and not self._rows:
            raise NothingLeft(f"{self.report}; none is left")

    def _say(self) -> None:
        """Warns, once each, of what users should know of their rows."""
        for kind, text in notes(self.report.source, self._encoder, self._rows, self.examples):
            if kind not in self._noted:
                self._noted.add(kind)
                notify("data", kind.rpartition(" ")[2], text)

    def _fit_prompts(self, bos):
        """Drops or cuts what is too long; sets `prompt_ids`."""
        report, most = self.report, self.limits.max_prompt_tokens
        fitting = []
        for index, ids in enumerate(self._encoder.prompt_ids(self._rows)):
            if len(ids) > most and self.limits.overlong_prompt == "drop":
                report.prompts_dropped += 1
                continue
            report.prompt_tokens += len(ids)
            if len(ids) > most:
                report.prompts_cut += 1
                report.prompt_tokens_cut += len(ids) - most
                head = ids[:1] if ids[0] == bos and most > 1 else []
                ids = head + ids[len(ids) - most + len(head) :]
            fitting.append((index, ids))
        self.prompt_ids = [ids for _, ids in fitting]
        self.examples = [self.examples[index] for index, _ in fitting]
        self._rows = [self._rows[index] for index, _ in fitting]
        report.kept = len(fitting)
        if not fitting:
            raise NothingLeft(
                f"{report}; none is left: raise max_prompt_tokens or set overlong_prompt to truncate_left"
            )

    def responses(self, side: int) -> list[list[int]]:
        """Responses within the limit. A cut one has no stop token: the policy would not have ended there."""
        report, most = self.report, self.limits.max_response_tokens
        encoded = self._encoder.response_ids(self._rows, side)
        for ids in encoded:
            report.response_tokens += len(ids)
            if len(ids) > most:
                report.responses_cut += 1
                report.response_tokens_cut += len(ids) - most
        return [ids[:most] for ids in encoded]
