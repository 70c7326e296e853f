r"""Finds the layout of a source by a vote of its first rows, and makes an `Example` of a row.

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

Other columns are mapped: `columns={"prompt": "question", "response": "answer"}` (ours: theirs). Remaining columns go to
`Example.extra`. A space at the end of the common prefix of two plain texts belongs to the responses, as in TRL. A column
`tools` (function schemas, as a list or as its text) beside messages goes to the chat template.

Within a layout some rows may hold text and others messages. Messages that a text column spells out, as JSON, as JSON of that
JSON, or as Python prints them, are read as messages. Where the prompt is a transcript, a response that is text is read as
its next turn. A row that the layout would misread is unusable.
"""

import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rto_fast.data.encoded import decoded
from rto_fast.data.messages import (
    as_messages,
    check_prompt,
    check_unicode,
    content_of,
    only_response,
    read_messages,
    read_tools,
)
from rto_fast.data.transcripts import is_transcript, transcript_messages, turn_text
from rto_fast.errors import DataError

ROLES = ("prompt", "response", "completion", "chosen", "rejected", "messages")
COLUMNS = (*ROLES, "tools")  # the names that a mapping may use
Text = str | tuple[dict, ...]  # plain text, or chat messages
PAIR_LAYOUTS = ("HH transcript", "explicit prompt", "UltraFeedback", "implicit prompt")


@dataclass(frozen=True)
class Example:
    """One row of any layout.

    `prompt` is plain text, or chat messages of which the last is from the user or a tool. A response is text, or the
    assistant's message where that holds more than text, such as tool calls (`rto_fast.data.messages.response_text`).
    """

    prompt: Text
    response: str | dict | None = None
    chosen: str | dict | None = None
    rejected: str | dict | None = None
    origin: str = ""  # "file:line" or "name[index]", for messages
    extra: dict = field(default_factory=dict)  # other columns, for reward functions
    tools: tuple[dict, ...] | None = None  # function schemas that the chat template is given


def check_columns(columns: Mapping[str, str] | None) -> None:
    """Raises DataError for a mapping with keys that are not in `COLUMNS`."""
    unknown = [key for key in columns or {} if key not in COLUMNS]
    if unknown:
        raise DataError(f"columns: {unknown[0]!r} is not one of {', '.join(COLUMNS)}; write {{ours: theirs}}")


def layout_of(values: Mapping[str, Any], unknown: Collection[str] = ()) -> str | None:
    """The layout of one row, named as in the module's table; None where the row does not show it.

    Args:
        values: the row's values under our names.
        unknown: our names of columns in which the row has no value. The layout is None if it depends on them.
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


def to_example(row: Mapping[str, Any], layout: str, origin: str, columns: Mapping[str, str] | None = None) -> Example:
    """The `Example` of a row.

    Args:
        row: the row.
        layout: the source's layout, named as in the module's table.
        origin: "file:line" or "name[index]", for messages.
        columns: {ours: theirs}.
    Raises:
        DataError: the row does not fit the layout; names `origin` and what was found.
    """
    present = {name: value for name, value in role_values(row, columns or {}, origin).items() if value is not None}
    used = {*ROLES, *(columns or {}).values()}
    extra = {key: value for key, value in row.items() if key not in used}
    responses: dict[str, str | dict] = {}
    if layout in PAIR_LAYOUTS:
        _need(present, ("chosen", "rejected") + (("prompt",) if layout == "explicit prompt" else ()), row, origin)
        _check_layout(present, layout, origin)
        prompt, responses["chosen"], responses["rejected"] = _preference(present, layout, origin)
    elif layout == "messages":
        _need(present, ("messages",), row, origin)
        messages = read_messages(present["messages"], "messages", origin)
        if messages[-1]["role"] == "assistant":
            prompt, responses["response"] = messages[:-1], only_response(messages[-1:], "messages", origin)
        else:
            prompt = messages
    else:
        _need(present, ("prompt",), row, origin)
        prompt = _prompt(present["prompt"], origin)
        if layout == "prompt/response":
            name = next((name for name in ("response", "completion") if name in present), "response")
            _need(present, (name,), row, origin)
            responses["response"] = only_response(
                _after(present["prompt"], prompt, present[name], name, origin), name, origin
            )
    check_prompt(prompt, origin)
    tools = read_tools(present.get("tools"), origin)
    for name, value in {"prompt": prompt, **responses, "tools": tools}.items():
        check_unicode(value, name, origin)
    return Example(prompt, origin=origin, extra=extra, tools=tools, **responses)


def _check_layout(present: Mapping[str, Any], layout: str, origin: str) -> None:
    """Raises DataError for a pair that the layout of the other rows would misread."""
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


def _preference(present: Mapping[str, Any], layout: str, origin: str) -> tuple[Text, str | dict, str | dict]:
    """The prompt, the chosen and the rejected response of a row in one of `PAIR_LAYOUTS`."""
    prompt: Text
    chosen, rejected = present["chosen"], present["rejected"]
    if layout == "HH transcript":
        chosen, rejected = transcript_messages(chosen), transcript_messages(rejected)
    else:
        chosen = chosen if isinstance(chosen, str) else read_messages(chosen, "chosen", origin)
        rejected = rejected if isinstance(rejected, str) else read_messages(rejected, "rejected", origin)
    if layout == "explicit prompt":
        prompt = _prompt(present["prompt"], origin)
        chosen = _after(present["prompt"], prompt, chosen, "chosen", origin)
        rejected = _after(present["prompt"], prompt, rejected, "rejected", origin)
    elif isinstance(chosen, str) != isinstance(rejected, str):
        kinds = ["text" if isinstance(side, str) else "messages" for side in (chosen, rejected)]
        raise DataError(f"{origin}: chosen is {kinds[0]} but rejected is {kinds[1]}; make them alike")
    elif isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = _split_text(chosen, rejected, origin)
    else:
        prompt = chosen[:-1]
        if content_of(rejected[:-1]) != content_of(prompt):
            raise DataError(f"{origin}: chosen and rejected differ before their last message; only it may differ")
        chosen, rejected = chosen[-1:], rejected[-1:]
    return prompt, only_response(chosen, "chosen", origin), only_response(rejected, "rejected", origin)


def _split_text(chosen: str, rejected: str, origin: str) -> tuple[str, str, str]:
    """The common prefix of two plain texts, cut before a space so that it ends with a whole word, and what follows it."""
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        only_response(text, name, origin)
    size = len(os.path.commonprefix([chosen, rejected]))
    inside = [match.start() for match in re.finditer(r"(?<=\S)\s+(?=\S)", chosen[: size + 1])]
    if not inside:
        raise DataError(f"{origin}: chosen and rejected share no prompt; add a prompt column, or map it with columns")
    cut = inside[-1]
    return chosen[:cut], chosen[cut:], rejected[cut:]


def role_values(row: Mapping[str, Any], columns: Mapping[str, str], origin: str) -> dict[str, Any]:
    """The row's values under our names, nulls included. `decoded` reads messages that text columns spell out."""
    for ours, theirs in columns.items():
        if theirs not in row:
            raise DataError(f"{origin}: no column {theirs!r} for {ours}; found {listing(row)}")
    taken = set(columns.values())
    natural = {name: row[name] for name in COLUMNS if name in row and name not in taken}
    named = natural | {ours: row[theirs] for ours, theirs in columns.items()}
    return {name: decoded(value, name, origin) if isinstance(value, str) else value for name, value in named.items()}


def _need(present: Mapping[str, Any], names: Collection[str], row: Mapping[str, Any], origin: str) -> None:
    for name in names:
        if name not in present:
            raise DataError(f"{origin}: {name} is missing or null; found {listing(row)}")
        if isinstance(present[name], DataError):  # see encoded.decoded
            raise present[name]


def _prompt(value: Any, origin: str) -> Text:
    if is_transcript(value):
        messages = transcript_messages(value)
        return messages[:-1] if messages[-1] == {"role": "assistant", "content": ""} else messages
    return value if isinstance(value, str) else read_messages(value, "prompt", origin)


def _after(given: Any, prompt: Text, value: Any, name: str, origin: str) -> Text:
    """A response without the prompt, which whole conversations repeat.

    Args:
        given: the prompt as it stands in the row. After a transcript, a response that is text is read as its next turn.
        prompt: the prompt as it was read.
        value: the response as it stands in the row.
        name: its column, for messages.
        origin: as in `to_example`.
    """
    if isinstance(value, str):
        return turn_text(value) if is_transcript(given) else value
    messages, before = read_messages(value, name, origin), as_messages(prompt)
    return messages[len(before) :] if content_of(messages[: len(before)]) == content_of(before) else messages


def listing(row: Collection[str]) -> str:
    """The names of columns, for messages: at most twelve, long ones cut."""
    names = [name if len(name) <= 40 else f"{name[:37]}..." for name in map(str, row)]
    return ", ".join(names[:12] + [f"{len(names) - 12} more"] * (len(names) > 12)) or "none"


# Of layouts with equal votes the first one wins: first the prompt alone, which any row with a prompt has, then the layouts
# that use more of the columns.
LAYOUTS = ("prompt only", *PAIR_LAYOUTS, "messages", "prompt/response")


def find_layout(rows: Sequence[tuple[str, dict | DataError]], columns: Mapping[str, str] | None = None) -> str:
    """The name of the layout that most rows have (see the table of `rto_fast.data.layouts`).

    Empty text, and a value that is neither text nor messages, count as null: a row whose layout depends on one does not
    vote. Only where no row can vote do they count as values, and nulls as missing columns.

    Args:
        rows: the origin and the row of the first rows, or the error of a row that could not be read.
        columns: {our name: the rows' name}.
    Raises:
        DataError: no row has a known layout.
    """
    read, errors = [], []
    for origin, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            read.append((origin, row, role_values(row, columns or {}, origin)))
        except DataError as error:
            errors.append(error)
    if not read:
        raise errors[0]
    for strict in (True, False):
        votes = Counter(layout for _, _, values in read if (layout := _vote(values, strict)))
        if votes:
            return max(LAYOUTS, key=lambda layout: votes[layout])
    raise _unknown_layout(read)


def _vote(values: Mapping[str, Any], strict: bool) -> str | None:
    """The layout of a row. If `strict`, None where it depends on a null or on a value that counts as one."""
    held = {name: value for name, value in values.items() if (_is_usable(value) if strict else value is not None)}
    return layout_of(held, values.keys() - held.keys() if strict else ())


def _is_usable(value: Any) -> bool:
    """Whether a value is messages, or text that is not blank: a csv writes null as blank text."""
    if isinstance(value, str):
        return value != "" and not value.isspace()
    return isinstance(value, list) and value != [] and isinstance(value[0], dict)


def _unknown_layout(read: list[tuple[str, dict, dict]]) -> DataError:
    origin = read[0][0]
    names = dict.fromkeys(name for _, row, _ in read for name in row)
    filled = {name for _, row, _ in read for name, value in row.items() if value is not None}
    header = " (a csv begins with a line of their names)" if ".csv:" in origin else ""
    return DataError(
        f"{origin}: no known layout in columns {listing([n if n in filled else f'{n} (null)' for n in names])}{header}; "
        'map them with columns, such as columns={"prompt": "question", "chosen": "better", "rejected": "worse"}'
    )
