r"""Chat templates and tokenising: prompts and responses as the ids that the model sees, prompt_ids + response_ids.

Prompt formats: `auto` (messages through the chat template; plain text as one user message if the tokenizer has a
template, else as it is), `chat` (plain text always as a user message), `text` (plain text always as it is).

A response is what the policy would sample after the generation prompt: its text tokenised on its own, then one stop
token, the one with which the template ends a turn. On its own, because the policy's first token never merges with the
prompt's last, and because special tokens spelled out in data stay plain text: nobody's data can end a turn.
What the template appends after the stop token (often "\n") is not part of it.

Templates with a thinking switch are rendered with `enable_thinking=False`: responses in data carry no thoughts, and so
prompt and response make up the whole conversation as the template renders it (Qwen3: an empty think block, in the
prompt). Tokenizers without template get FALLBACK_TEMPLATE, Anthropic HH's transcript; a warning says so.
BOS: a chat template is the authority on it, as in transformers; plain text gets it if the tokenizer adds it to text.
"""

import re
import warnings
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import jinja2

from rto_fast.data.layouts import DataError, Example

FALLBACK_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] | trim }}"
    "{% elif message['role'] == 'assistant' %}{{ '\n\nAssistant: ' + message['content'] | trim }}{{ eos_token }}"
    "{% else %}{{ '\n\nHuman: ' + message['content'] | trim }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)


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


@dataclass
class CutReport:
    """What a builder dropped and cut; `str()` is one line. Counts of tokens are those before cutting."""

    source: str
    limits: Limits
    examples: int
    kept: int = 0
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
        ids.append(_turn(tokenizer, True).stop)
    ids = list(dict.fromkeys(i for i in ids if i is not None))
    if not ids:
        raise DataError("no stop token: set eos_token of the tokenizer or eos_token_id of the generation config")
    return ids


def encode_prompt(tokenizer, prompt, prompt_format="auto") -> list[int]:
    """Ids of a prompt (text or messages), up to where the response begins."""
    return _encode_prompts(tokenizer, [prompt], prompt_format, ["prompt"])[0]


def encode_response(tokenizer, prompt, response, prompt_format, stop_ids) -> list[int]:
    """Ids that follow `encode_prompt(tokenizer, prompt, prompt_format)`, ending with one of `stop_ids`."""
    return _encode_responses(tokenizer, [prompt], [response], prompt_format, stop_ids)[0]


def sft_sequences(examples, tokenizer, limits, prompt_format, stop_ids) -> tuple[list[Sequence], CutReport]:
    """Prompts with `response`, or with `chosen` where there is none. DataError if no example remains."""
    responses = [example.response or example.chosen for example in examples]
    _need(examples, responses, "response or chosen")
    kept, prompt_ids, report = _fitting_prompts(examples, tokenizer, limits, prompt_format)
    prompts_, responses = [examples[i].prompt for i in kept], [responses[i] for i in kept]
    response_ids = _encode_responses(tokenizer, prompts_, responses, prompt_format, stop_ids)
    response_ids = [_cut(ids, limits, report) for ids in response_ids]
    return [Sequence(*ids) for ids in zip(prompt_ids, response_ids, strict=True)], report


def preference_pairs(examples, tokenizer, limits, prompt_format, stop_ids) -> tuple[list[Pair], CutReport]:
    """Prompts with `chosen` and `rejected`. Pairs that do not differ (any more) are dropped. DataError if none remain."""
    for name in ("chosen", "rejected"):
        _need(examples, [getattr(example, name) for example in examples], name)
    kept, prompt_ids, report = _fitting_prompts(examples, tokenizer, limits, prompt_format)
    prompts_ = [examples[i].prompt for i in kept]
    sides = [[getattr(examples[i], name) for i in kept] for name in ("chosen", "rejected")]
    sides = [_encode_responses(tokenizer, prompts_, side, prompt_format, stop_ids) for side in sides]
    sides = [[_cut(ids, limits, report) for ids in side] for side in sides]
    kept_examples = [examples[i] for i in kept]
    pairs = [Pair(*parts) for parts in zip(prompt_ids, *sides, kept_examples, strict=True) if parts[1] != parts[2]]
    report.identical_dropped = report.kept - len(pairs)
    report.kept = len(pairs)
    if not pairs:
        raise DataError(f"{report.source}: chosen and rejected are identical in all pairs (within {limits})")
    return pairs, report


def prompts(examples, tokenizer, limits, prompt_format) -> tuple[list[Prompt], CutReport]:
    """Prompts alone, with what reward functions need. DataError if no example remains."""
    kept, prompt_ids, report = _fitting_prompts(examples, tokenizer, limits, prompt_format)
    chosen = [examples[i] for i in kept]
    return [Prompt(ids, e.prompt, e.extra, e.origin) for ids, e in zip(prompt_ids, chosen, strict=True)], report


def _need(examples, values, name):
    for example, value in zip(examples, values, strict=True):
        if value is None:
            raise DataError(f"{example.origin}: no {name}; this stage needs it: use other data, or map it with columns")


def _fitting_prompts(examples, tokenizer, limits, prompt_format):
    """(indices of examples kept, their prompt ids within the limit, the report so far)."""
    origins = [example.origin for example in examples]
    sources = list(dict.fromkeys(Path(re.sub(r"(:\d+|\[\d+\])$", "", origin)).name for origin in origins))
    source = sources[0] + f" and {len(sources) - 1} more" * (len(sources) > 1) if sources else "data"
    report = CutReport(source, limits, len(examples))
    kept, fitting, most = [], [], limits.max_prompt_tokens
    encoded = _encode_prompts(tokenizer, [example.prompt for example in examples], prompt_format, origins)
    for index, ids in enumerate(encoded):
        if len(ids) > most and limits.overlong_prompt == "drop":
            report.prompts_dropped += 1
            continue
        report.prompt_tokens += len(ids)
        if len(ids) > most:
            report.prompts_cut += 1
            report.prompt_tokens_cut += len(ids) - most
            head = ids[:1] if ids[0] == tokenizer.bos_token_id and most > 1 else []
            ids = head + ids[len(ids) - most + len(head) :]
        kept.append(index)
        fitting.append(ids)
    report.kept = len(kept)
    if not kept:
        raise DataError(f"{report}; none is left: raise max_prompt_tokens or set overlong_prompt to truncate_left")
    return kept, fitting, report


def _cut(ids, limits, report):
    """A response within the limit. A cut one has no stop token: the policy would not have ended there."""
    report.response_tokens += len(ids)
    if len(ids) > limits.max_response_tokens:
        report.responses_cut += 1
        report.response_tokens_cut += len(ids) - limits.max_response_tokens
    return ids[: limits.max_response_tokens]


def _is_chat(tokenizer, prompt, prompt_format):
    if prompt_format not in ("auto", "chat", "text"):
        raise DataError(f"prompt_format: {prompt_format!r} is not 'auto', 'chat' or 'text'")
    if not isinstance(prompt, str):
        return True
    return prompt_format == "chat" or (prompt_format == "auto" and tokenizer.chat_template is not None)


def _encode_prompts(tokenizer, prompts_, prompt_format, origins):
    chat = [_is_chat(tokenizer, prompt, prompt_format) for prompt in prompts_]
    texts = list(prompts_)
    if any(chat) and tokenizer.chat_template is None:
        warnings.warn(
            "the tokenizer has no chat template: messages become a 'Human: ... Assistant:' transcript", stacklevel=2
        )
    for index in (index for index, is_chat in enumerate(chat) if is_chat):
        prompt = prompts_[index]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        try:
            texts[index] = _render(tokenizer, messages, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(f"{origins[index]}: the chat template refuses roles {roles}: {error}") from error
    encoded = _encode(tokenizer, texts)
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("").input_ids[:1] == [bos]:
        as_text = [not (is_chat and tokenizer.chat_template is not None) for is_chat in chat]
        encoded = [
            [bos, *ids] if text and ids[:1] != [bos] else ids for ids, text in zip(encoded, as_text, strict=True)
        ]
    return encoded


def _encode_responses(tokenizer, prompts_, responses, prompt_format, stop_ids):
    chat = [_is_chat(tokenizer, prompt, prompt_format) for prompt in prompts_]
    turns = {is_chat: _turn(tokenizer, is_chat) for is_chat in set(chat)}
    endings = tuple(tokenizer.convert_ids_to_tokens(i) for i in stop_ids)
    # SentencePiece style sets a space before text on its own: there, tokenise after an anchor that merges with nothing
    prefixes_space = (tokenizer.tokenize("a") or [""])[0].startswith("▁")
    anchor_sizes = {anchor: len(_encode(tokenizer, [anchor])[0]) for anchor in ("", "a", "\n")}
    texts, skips = [], []
    for response, is_chat in zip(responses, chat, strict=True):
        for ending in endings:  # spelled out already, as in data made for other trainers
            response = response.removesuffix(ending)
        turn = turns[is_chat]
        text = turn.separator + response.lstrip(turn.strip_left).rstrip(turn.strip_right)
        anchor = ("a" if text.startswith("\n") else "\n") if prefixes_space else ""
        texts.append(anchor + text)
        skips.append(anchor_sizes[anchor])
    encoded = _encode(tokenizer, texts, split_special_tokens=True)
    stops = {is_chat: turn.stop if turn.stop in stop_ids else stop_ids[0] for is_chat, turn in turns.items()}
    return [[*ids[skip:], stops[is_chat]] for ids, skip, is_chat in zip(encoded, skips, chat, strict=True)]


def _encode(tokenizer, texts, **options):
    # verbose=False: no warning about model_max_length; the limits say what is too long
    return tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False,
        **options,
    ).input_ids  # fmt: skip


def _render(tokenizer, messages, **options):
    template = None if tokenizer.chat_template is not None else FALLBACK_TEMPLATE
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, enable_thinking=False, **options
    )


# How a template sets a response: text before it; characters stripped off either side (None: all whitespace, as in
# str.strip); the id that ends the turn.
_Turn = namedtuple("_Turn", "separator strip_left strip_right stop")


def _turn(tokenizer, is_chat):
    """What a template does to a response, read off a probe conversation; for plain text, nothing."""
    separator, left, right, stop = "", "", "", tokenizer.eos_token_id
    if is_chat:
        user = {"role": "user", "content": "question"}
        opening = _render(tokenizer, [user], add_generation_prompt=True)
        whole = _render(tokenizer, [user, {"role": "assistant", "content": "\n\tprobe\t\n"}])
        before, _, after = whole.rpartition("probe")
        if before.startswith(opening):  # not so if the generation prompt opens a thought, which answers do not have
            between = before[len(opening) :]
            left = "" if between.endswith("\n\t") else "\n" if between.endswith("\t") else None
            right = "" if after.startswith("\t\n") else "\n" if after.startswith("\t") else None
            separator = between.removesuffix({"": "\n\t", "\n": "\t", None: ""}[left])
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        stop = next((i for i in _encode(tokenizer, [after])[0] if i in special or i == stop), stop)
    return _Turn(separator, left, right, stop)
