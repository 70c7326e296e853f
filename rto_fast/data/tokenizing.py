"""Chat templates and tokenising (interface; being written)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Token budgets. Over-long prompts are dropped or lose their oldest tokens; over-long responses are cut."""

    max_prompt_tokens: int
    max_response_tokens: int
    overlong_prompt: str = "drop"  # or "truncate_left"


@dataclass(frozen=True)
class Sequence:
    prompt_ids: list[int]
    response_ids: list[int]  # ends with a stop token unless it was cut


@dataclass(frozen=True)
class Pair:
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True)
class Prompt:
    prompt_ids: list[int]
    prompt: str | tuple[dict, ...]  # text or messages, as in Example
    extra: dict  # the example's other columns, for reward functions
    origin: str = ""


@dataclass
class CutReport:
    """What a builder dropped and cut; `str()` is one line."""


def stop_token_ids(tokenizer, generation_config=None) -> list[int]:
    """Ids that end a response, EOS first: tokenizer's, generation config's, the chat template's turn end."""
    raise NotImplementedError


def encode_prompt(tokenizer, prompt, prompt_format="auto") -> list[int]:
    raise NotImplementedError


def encode_response(tokenizer, prompt, response, prompt_format, stop_ids) -> list[int]:
    raise NotImplementedError


def sft_sequences(examples, tokenizer, limits, prompt_format, stop_ids) -> tuple[list[Sequence], CutReport]:
    raise NotImplementedError


def preference_pairs(examples, tokenizer, limits, prompt_format, stop_ids) -> tuple[list[Pair], CutReport]:
    raise NotImplementedError


def prompts(examples, tokenizer, limits, prompt_format) -> tuple[list[Prompt], CutReport]:
    raise NotImplementedError
