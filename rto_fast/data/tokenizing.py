"""Tokenises prompts and responses: the model sees prompt_ids + response_ids.

Prompt formats: `auto` renders messages with the chat template, and plain text as one user message if the tokenizer has a
template, else as it is; `chat` takes plain text for a user message always, `text` never. Text that a chat template has
rendered already, from the marks of the first turn to the generation prompt, is used as it is, special tokens included,
unless the format is `chat`; a warning says so.

A response is what the policy would sample after the generation prompt: what the template renders behind it
(`rto_fast.data.templates`), up to and including one stop token. It is tokenised on its own, because the policy's first
token never merges with the prompt's last. Stop tokens that the data spells out at the end are not part of it, nor are the
space around them and special tokens behind them, such as padding. Without a template a response is its text and
the EOS token.

Special tokens that the data spells out stay text, in messages, tools and plain text (`rto_fast.data.special_tokens`). The
only exception is a BOS token at the beginning of a plain text.

A tokenizer without a template gets FALLBACK_TEMPLATE, the transcript of Anthropic's HH; a warning says so. A chat template
decides about BOS, as in transformers; plain text gets it if the tokenizer adds it to text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import GenerationConfig, PreTrainedTokenizerBase

from rto_fast.data.encoding import ConversationEncoder, Row, notes
from rto_fast.data.layouts import Example, Text
from rto_fast.data.templates import ChatTemplate, Thinking
from rto_fast.errors import DataError
from rto_fast.system.notices import notify
from rto_fast.system.progress import advance, progress


class NothingLeft(DataError):
    """No example can be used: `data.invalid` or the limits leave out all of them, or their layout lacks a column."""


@dataclass(frozen=True)
class Limits:
    """The most tokens of a prompt and of a response. Longer prompts are dropped, or lose their oldest tokens (but not BOS);
    longer responses lose their end."""

    max_prompt_tokens: int
    max_response_tokens: int
    overlong_prompt: Literal["drop", "truncate_left"] = "drop"

    def __post_init__(self) -> None:
        if self.max_prompt_tokens < 1 or self.max_response_tokens < 1:
            raise DataError(f"max_prompt_tokens and max_response_tokens must be at least 1: {self}")
        if self.overlong_prompt not in ("drop", "truncate_left"):
            raise DataError(f"overlong_prompt: {self.overlong_prompt!r} is not 'drop' or 'truncate_left'")


@dataclass(frozen=True)
class Demonstration:
    """A prompt and its response, for SFT."""

    prompt_ids: list[int]
    response_ids: list[int]  # ends with a stop token unless it was cut


@dataclass(frozen=True)
class Pair:
    """A prompt with a chosen and a rejected response."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    example: Example  # the source of the pair

    @property
    def num_tokens(self) -> int:
        """Tokens of the two sequences, of which each has the prompt."""
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


@dataclass(frozen=True)
class Prompt:
    """A prompt, with what reward functions need."""

    prompt_ids: list[int]
    prompt: Text  # as in `Example`
    extra: dict  # the example's other columns, for reward functions
    origin: str = ""
    tools: tuple[dict, ...] | None = None  # function schemas


@dataclass
class CutReport:
    """What a builder dropped and cut, as counts; `str()` is one line. Tokens are counted before cutting."""

    source: str
    limits: Limits
    examples: int
    unread: int = 0  # further examples, to which the stage's steps do not come
    positions: list[int] = field(default_factory=list)  # of those that are kept, among the examples
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

    @property
    def kept(self) -> int:
        return len(self.positions)

    def __str__(self) -> str:
        read = f"{self.examples} of {self.examples + self.unread} examples read, the steps visit no more"
        parts = [f"{self.source}: {read if self.unread else f'{self.examples} examples'}"]
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


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None) -> list[int]:
    """The ids that end a response: EOS first, then those of the generation config, then the chat template's end of a turn.

    Raises:
        DataError: there is none.
    """
    configured = getattr(generation_config, "eos_token_id", None)
    ids = [tokenizer.eos_token_id] + (configured if isinstance(configured, list) else [configured])
    if tokenizer.chat_template is not None:
        stop = ChatTemplate(tokenizer).turn.stop
        ids.append(tokenizer.convert_tokens_to_ids(stop) if stop else None)
    ids = list(dict.fromkeys(i for i in ids if i is not None))
    if not ids:
        raise DataError("no stop token: set eos_token of the tokenizer or eos_token_id of the generation config")
    return ids


def sft_sequences(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    prompt_format: str,
    stop_ids: Sequence[int],
    **options: Any,
) -> tuple[list[Demonstration], CutReport]:
    """Prompts with `response`, or with `chosen` where there is none.

    Args:
        options: see `_Reading`.
    Raises:
        NothingLeft: no example can be used.
    """
    responses = [example.chosen if example.response is None else example.response for example in examples]
    _need(examples, responses, "response or chosen")
    sides = [[response] for response in responses]
    reading = _Reading(examples, sides, tokenizer, limits, prompt_format, stop_ids, **options)
    return [Demonstration(*ids) for ids in zip(reading.prompt_ids, reading.responses(0), strict=True)], reading.report


def preference_pairs(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    prompt_format: str,
    stop_ids: Sequence[int],
    **options: Any,
) -> tuple[list[Pair], CutReport]:
    """Prompts with `chosen` and `rejected`. Pairs that do not differ, perhaps because they were cut, are dropped.

    Args:
        options: see `_Reading`.
    Raises:
        NothingLeft: no pair can be used.
    """
    for name in ("chosen", "rejected"):
        _need(examples, [getattr(example, name) for example in examples], name)
    sides = [[example.chosen, example.rejected] for example in examples]
    reading = _Reading(examples, sides, tokenizer, limits, prompt_format, stop_ids, **options)
    parts = zip(reading.prompt_ids, reading.responses(0), reading.responses(1), reading.examples, strict=True)
    made = [Pair(*part) for part in parts]
    report = reading.report
    different = [(at, pair) for at, pair in zip(report.positions, made) if pair.chosen_ids != pair.rejected_ids]
    pairs = [pair for _, pair in different]
    report.identical_dropped = report.kept - len(pairs)
    report.positions = [at for at, _ in different]
    if not pairs:
        raise NothingLeft(f"{report.source}: chosen and rejected are identical in all pairs (within {limits})")
    return pairs, report


def prompts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    prompt_format: str,
    **options: Any,
) -> tuple[list[Prompt], CutReport]:
    """Prompts without responses.

    Args:
        options: see `_Reading`.
    Raises:
        NothingLeft: no prompt can be used.
    """
    reading = _Reading(examples, [[] for _ in examples], tokenizer, limits, prompt_format, (), **options)
    ids_and_examples = zip(reading.prompt_ids, reading.examples, strict=True)
    return [Prompt(ids, e.prompt, e.extra, e.origin, e.tools) for ids, e in ids_and_examples], reading.report


def responses_of(examples: Sequence[Example]) -> list[str | dict]:
    """All responses of the examples."""
    sides = (side for example in examples for side in (example.response, example.chosen, example.rejected))
    return [side for side in sides if side is not None]


def _need(examples: Sequence[Example], values: Sequence[Any], name: str) -> None:
    for example, value in zip(examples, values, strict=True):
        if value is None:
            raise NothingLeft(
                f"{example.origin}: no {name}; this stage needs it: use other data, or map it with columns"
            )


class _Reading:
    """The part that all builders share: the examples that can be used, with the ids of their prompts and responses.

    Args:
        sides: the responses to read, for each example.
        invalid: "error" raises where the chat template refuses an example, "skip" leaves it out and counts it.
        thinking: how prompts end; None chooses the way that the examples' own responses can follow.
        noted: the warnings that were given before and are not repeated; new ones are added.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        sides: Sequence[Sequence[Any]],
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        prompt_format: str,
        stop_ids: Sequence[int],
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

    def _read(self, examples: Sequence[Example], sides: Sequence[Sequence[Any]], invalid: str) -> None:
        self.examples: list[Example] = []
        self._rows: list[Row] = []
        for position, (example, responses) in enumerate(zip(examples, sides, strict=True)):
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
            self.report.positions.append(position)
        if examples and not self._rows:
            raise NothingLeft(f"{self.report}; none is left")

    def _say(self) -> None:
        """Gives each warning about the rows once."""
        for kind, text in notes(self.report.source, self._encoder, self._rows, self.examples):
            if kind not in self._noted:
                self._noted.add(kind)
                notify("data", kind.rpartition(" ")[2], text)

    def _fit_prompts(self, bos: int | None) -> None:
        """Drops or cuts prompts that are too long, and sets `prompt_ids`."""
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
        report.positions = [report.positions[index] for index, _ in fitting]
        if not fitting:
            raise NothingLeft(
                f"{report}; none is left: raise max_prompt_tokens or set overlong_prompt to truncate_left"
            )

    def responses(self, side: int) -> list[list[int]]:
        """The responses within the limit. One that was cut has no stop token, because it does not end there."""
        report, most = self.report, self.limits.max_response_tokens
        encoded = self._encoder.response_ids(self._rows, side)
        for ids in encoded:
            report.response_tokens += len(ids)
            if len(ids) > most:
                report.responses_cut += 1
                report.response_tokens_cut += len(ids) - most
        return [ids[:most] for ids in encoded]
