r"""Rows of any common layout to `Example`s. `detection.find_layout` finds a source's layout from what its first rows hold.

| layout            | columns                                    | prompt                     | responses                   |
|-------------------|--------------------------------------------|----------------------------|-----------------------------|
| explicit prompt   | prompt, chosen, rejected: text or messages | prompt                     | text, or one assistant      |
| UltraFeedback     | prompt: text; chosen, rejected: whole      | chosen without its last    | message (a whole            |
|                   | conversations; messages, score_*           | message                    | conversation loses its      |
| implicit prompt   | chosen, rejected: whole conversations      | their common prefix        | prompt)                     |
|                   | chosen, rejected: plain text               | common prefix, whole words | the rest                    |
| HH transcript     | chosen, rejected: "\n\nHuman: ...          | all but the last turn, as  | the last turn, stripped     |
|                   | \n\nAssistant: ...", prompt likewise or no | messages                   |                             |
| messages          | messages                                   | all but the last message   | last message, if assistant  |
| prompt/response   | prompt, response (or completion)           | prompt                     | text or one message         |
| prompt only       | prompt                                     | prompt                     | none                        |

Anything else is mapped: `columns={"prompt": "question", "response": "answer"}` (ours: theirs). Remaining columns go to
`Example.extra`. Of the common prefix of two plain texts the trailing space belongs to the responses, as in TRL.

Text and messages may mix within a layout, from row to row. Messages that a text column spells out, as JSON or as Python
prints them, are read as messages. A row that the layout would misread is unusable.
"""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from rto_fast.data.encoded import decoded
from rto_fast.data.transcripts import is_transcript, transcript_messages
from rto_fast.errors import DataError

ROLES = ("prompt", "response", "completion", "chosen", "rejected", "messages")
PAIR_LAYOUTS = ("HH transcript", "explicit prompt", "UltraFeedback", "implicit prompt")


@dataclass(frozen=True)
class Example:
    """One row of any layout. `prompt` is plain text, or chat messages of which the last is from the user."""

    prompt: str | tuple[dict, ...]
    response: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    origin: str = ""  # "file:line" or "name[index]", for messages
    extra: dict = field(default_factory=dict)  # other columns, for reward functions


def check_columns(columns):
    """Refuse a mapping whose keys are not ours."""
    unknown = [key for key in columns or {} if key not in ROLES]
    if unknown:
        raise DataError(f"columns: {unknown[0]!r} is not one of {', '.join(ROLES)}; write {{ours: theirs}}")


def layout_of(values: Mapping[str, Any], unknown: Collection[str] = ()) -> str | None:
    """The layout of one row by itself: a name of the first column of the module's table, or None.

    Args:
        values: what the row holds under our names.
        unknown: our names of columns that the row has without a value. The layout is None if it depends on them.
    """
    if "chosen" in values and "rejected" in values:
        if is_transcript(values["chosen"]) and is_transcript(values["rejected"]):
            return "HH transcript"
        if "prompt" not in values:
            return None if "prompt" in unknown else "implicit prompt"
        whole = isinstance(values["prompt"], str) and isinstance(values["chosen"], list)
        return "UltraFeedback" if whole and len(values["chosen"]) > 1 else "explicit prompt"
    if "chosen" in values or "rejected" in values:
        return None
    if "messages" in values:
        return "messages"
    if "prompt" not in values:
        return None
    if "response" in values or "completion" in values:
        return "prompt/response"
    return None if unknown else "prompt only"


def to_example(row, layout, origin, columns=None):
    """One row (dict) of a detected layout as an `Example`; `DataError` names `origin` and what was found."""
    present = _mapped(row, columns or {}, origin)
    used = {*ROLES, *(columns or {}).values()}
    extra = {key: value for key, value in row.items() if key not in used}
    response = chosen = rejected = None
    if layout in PAIR_LAYOUTS:
        _need(present, ("chosen", "rejected") + (("prompt",) if layout == "explicit prompt" else ()), row, origin)
        _check_layout(present, layout, origin)
        prompt, chosen, rejected = _preference(present, layout, origin)
    elif layout == "messages":
        _need(present, ("messages",), row, origin)
        messages = _messages(present["messages"], "messages", origin)
        if messages[-1]["role"] == "assistant":
            prompt, response = messages[:-1], _text(messages[-1:], "messages", origin)
        else:
            prompt = messages
    else:
        _need(present, ("prompt",), row, origin)
        prompt = _prompt(present["prompt"], origin)
        if layout == "prompt/response":
            name = next((name for name in ("response", "completion") if name in present), "response")
            _need(present, (name,), row, origin)
            response = _text(_after(prompt, present[name], name, origin), name, origin)
    _check_prompt(prompt, origin)
    for name, text in (("response", response), ("chosen", chosen), ("rejected", rejected)):
        _check_unicode(text or "", name, origin)
    return Example(prompt, response, chosen, rejected, origin, extra)


def _check_layout(present: Mapping[str, Any], layout: str, origin: str) -> None:
    """Refuse a pair that the layout of other rows would misread."""
    own, chosen = layout_of(present), present["chosen"]
    both_text = isinstance(chosen, str) and isinstance(present["rejected"], str)
    one_message = isinstance(chosen, list) and len(chosen) == 1
    misread = {
        "HH transcript": own != "HH transcript",
        "explicit prompt": own == "HH transcript",  # the responses would be whole transcripts
        "UltraFeedback": both_text or (own == "explicit prompt" and one_message),  # the prompt would be ignored
        "implicit prompt": own != "implicit prompt",  # the prompt would be ignored, or a transcript split inside a turn
    }
    if misread[layout]:
        raise DataError(
            f"{origin}: the row's layout is {own}, but most of the first rows' is {layout}; mend or remove the row"
        )


def _preference(present, layout, origin):
    """(prompt, chosen, rejected) of the pair layouts."""
    chosen, rejected = present["chosen"], present["rejected"]
    if layout == "HH transcript":
        chosen, rejected = transcript_messages(chosen), transcript_messages(rejected)
    else:
        chosen = chosen if isinstance(chosen, str) else _messages(chosen, "chosen", origin)
        rejected = rejected if isinstance(rejected, str) else _messages(rejected, "rejected", origin)
    if layout == "explicit prompt":
        prompt = _prompt(present["prompt"], origin)
        chosen, rejected = _after(prompt, chosen, "chosen", origin), _after(prompt, rejected, "rejected", origin)
        if is_transcript(present["prompt"]):
            chosen, rejected = (side.strip() if isinstance(side, str) else side for side in (chosen, rejected))
    elif isinstance(chosen, str) != isinstance(rejected, str):
        kinds = ["text" if isinstance(side, str) else "messages" for side in (chosen, rejected)]
        raise DataError(f"{origin}: chosen is {kinds[0]} but rejected is {kinds[1]}; make them alike")
    elif isinstance(chosen, str):
        prompt, chosen, rejected = _split_text(chosen, rejected, origin)
    else:
        prompt = chosen[:-1]
        if rejected[:-1] != prompt:
            raise DataError(f"{origin}: chosen and rejected differ before their last message; only it may differ")
        chosen, rejected = chosen[-1:], rejected[-1:]
    return prompt, _text(chosen, "chosen", origin), _text(rejected, "rejected", origin)


def _split_text(chosen, rejected, origin):
    """Common prefix of two plain texts, cut before a space so that it ends with a whole word."""
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        _text(text, name, origin)
    size = len(os.path.commonprefix([chosen, rejected]))
    inside = [match.start() for match in re.finditer(r"(?<=\S)\s+(?=\S)", chosen[: size + 1])]
    if not inside:
        raise DataError(f"{origin}: chosen and rejected share no prompt; add a prompt column, or map it with columns")
    cut = inside[-1]
    return chosen[:cut], chosen[cut:], rejected[cut:]


def role_values(row: Mapping[str, Any], columns: Mapping[str, str], origin: str) -> dict[str, Any]:
    """The row's values under our names, nulls included; `decoded` has read messages in text columns."""
    for ours, theirs in columns.items():
        if theirs not in row:
            raise DataError(f"{origin}: no column {theirs!r} for {ours}; found {listing(row)}")
    taken = set(columns.values())
    natural = {name: row[name] for name in ROLES if name in row and name not in taken}
    named = natural | {ours: row[theirs] for ours, theirs in columns.items()}
    return {name: decoded(value, name, origin) if isinstance(value, str) else value for name, value in named.items()}


def _mapped(row: Mapping[str, Any], columns: Mapping[str, str], origin: str) -> dict[str, Any]:
    """`role_values` without nulls."""
    return {name: value for name, value in role_values(row, columns, origin).items() if value is not None}


def _need(present: Mapping[str, Any], names: Collection[str], row: Mapping[str, Any], origin: str) -> None:
    for name in names:
        if name not in present:
            raise DataError(f"{origin}: {name} is missing or null; found {listing(row)}")
        if isinstance(present[name], DataError):  # see encoded.decoded
            raise present[name]


def _prompt(value, origin):
    if is_transcript(value):
        messages = transcript_messages(value)
        return messages[:-1] if messages[-1] == {"role": "assistant", "content": ""} else messages
    return value if isinstance(value, str) else _messages(value, "prompt", origin)


def _after(prompt, value, name, origin):
    """A response without the prompt that whole conversations repeat."""
    if isinstance(value, str):
        return value
    messages = _messages(value, name, origin)
    before = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    return messages[len(before) :] if messages[: len(before)] == tuple(before) else messages


def _messages(value, name, origin):
    """Validated messages, reduced to role and content."""
    if not isinstance(value, list | tuple):
        raise DataError(f"{origin}: {name} must be text or a list of chat messages, found {_kind(value)}")
    if not value:
        raise DataError(f"{origin}: {name} is an empty list of messages; remove the row")
    for message in value:
        if not (
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise DataError(
                f"{origin}: {name}: a message needs text under 'role' and 'content', found {_kind(message)}"
            )
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _text(value, name, origin):
    """The text of a response: itself, or the content of its single assistant message."""
    if isinstance(value, tuple):
        if len(value) != 1 or value[0]["role"] != "assistant":
            found = ", ".join(message["role"] for message in value) or "none"
            raise DataError(f"{origin}: {name} must add one assistant message to the prompt, found {found}")
        value = value[0]["content"]
    if not isinstance(value, str):
        raise DataError(f"{origin}: {name} must be text or a list of chat messages, found {_kind(value)}")
    if not value.strip():
        raise DataError(f"{origin}: empty response: {name} is {value!r}; remove the row")
    return value


def _check_prompt(prompt, origin):
    if isinstance(prompt, tuple) and (not prompt or prompt[-1]["role"] != "user"):
        last = prompt[-1]["role"] if prompt else "missing"
        raise DataError(f"{origin}: the last message of the prompt must be from the user, found {last}")
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if not text.strip():
        raise DataError(f"{origin}: empty prompt: {text!r}; remove the row")
    for text in (prompt,) if isinstance(prompt, str) else (message["content"] for message in prompt):
        _check_unicode(text, "prompt", origin)


def _check_unicode(text, name, origin):
    """JSON can hold what no tokenizer takes: half of a character beyond 16 bits."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f"{text[error.start]!a} at character {error.start}"
        raise DataError(f"{origin}: {name} holds half of a surrogate pair, {where}; mend or remove the row") from None


def listing(row: Collection[str]) -> str:
    """Names of columns, for messages."""
    names = [name if len(name) <= 40 else f"{name[:37]}..." for name in map(str, row)]
    return ", ".join(names[:12] + [f"{len(names) - 12} more"] * (len(names) > 12)) or "none"


def _kind(value):
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
