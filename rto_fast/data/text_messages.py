r"""Reads chat messages that a text column spells out: Anthropic HH transcripts, JSON, and what Python and numpy print.

A csv has no other way to hold messages. Read as plain text, their brackets and keys would be trained on.

The turns of a transcript begin with "\n\nHuman:" and "\n\nAssistant:". Line ends may be those of any system. Spaces may
stand around a marker's line ends, word and colon in a transcript whose turns do not alternate by the markers without them;
elsewhere a marker with spaces is part of what is said: responses of the HH data quote turns that way.
"""

import ast
import json
import re
from itertools import pairwise
from typing import Any

from rto_fast.errors import DataError

_HUMAN = re.compile(r"\s*Human[^\S\r\n]*:")
_PLAIN = r"\n\n(Human|Assistant):"
_SPACED = r"\n[^\S\n]*\n[^\S\n]*(Human|Assistant)[^\S\n]*:"  # [^\S\n]: a space of any kind that ends no line
_ANSWER = re.compile(_SPACED.replace("Human|", ""))


def is_transcript(value: Any) -> bool:
    """Whether a value is a transcript: text that opens with a Human turn and has an Assistant turn."""
    return isinstance(value, str) and bool(_HUMAN.match(value)) and bool(_ANSWER.search(with_newlines(value)))


def transcript_messages(text: str) -> tuple[dict, ...]:
    r"""Messages of a transcript; an open last turn has empty content. Repeated speakers are joined.

    Every line end inside a turn becomes \n, so that two sides which differ only in them share their prompt.
    """
    messages: list[dict] = []
    for speaker, content in _turns(with_newlines(text)):
        role, content = "user" if speaker == "Human" else "assistant", content.strip()
        if messages and messages[-1]["role"] == role:
            content = messages.pop()["content"] + "\n\n" + content
        messages.append({"role": role, "content": content})
    return tuple(messages)


def turn_text(text: str) -> str:
    """What a turn says, if its text stands in another column than the transcript that it continues."""
    return with_newlines(text).strip()


def _turns(text: str) -> list[tuple[str, str]]:
    """(speaker, content) of each turn."""
    for marker in (_PLAIN, _SPACED):
        before, *pieces = re.split(marker, "\n\n" + text.lstrip())
        speakers = pieces[::2]
        if not before and len(speakers) > 1 and all(one != other for one, other in pairwise(speakers)):
            break
    return list(zip(speakers, pieces[1::2], strict=True))


def with_newlines(text: str) -> str:
    r"""The text with \n for the line ends of any system."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


_OPENING = re.compile(r"""\s*(\[?)\s*\{\s*["'](\w+)["']\s*:""")
_QUOTED = re.compile(r"""\s*"\s*\[\s*\{\s*\\?["']""")  # a JSON text of a JSON text
_SPEAKERS = ("system", "developer", "user", "assistant", "tool")
_SPEAKER = re.compile(r"""["'](?:role|from)["']\s*:""")
_FIRST_KEYS = ("role", "content", "from", "value")
# A string in either kind of quotes, which may be cut off. Possessive quantifiers never backtrack: long texts are fast.
_STRING = r"""'[^'\\]*+(?:\\.[^'\\]*+)*+(?:'|\\?\Z)|"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)"""
# numpy prints the objects of an array without commas between them.
_PYTHON = re.compile(rf"(?P<string>{_STRING})|(?P<word>\b(?:None|True|False)\b)|(?P<gap>\}}\s+(?=\{{))", re.S)
_WORDS = {"None": "null", "True": "true", "False": "false"}


def decoded(text: str, name: str, origin: str) -> Any:
    """The list of messages that a text spells out; any other text as it is.

    Args:
        text: a value of a column.
        name: the column, for the error.
        origin: file and line, for the error.
    Returns:
        The messages or the text. For a list that is damaged or cut off, as spreadsheets cut long cells, the DataError to
        raise where the value is used.
    """
    if _QUOTED.match(text):
        inner = parsed(text)
        value = decoded(inner, name, origin) if isinstance(inner, str) else text
        return text if isinstance(value, str) else value
    opening = _OPENING.match(text)
    if opening is None or not _SPEAKER.search(text):
        return text
    value = parsed(text)
    if isinstance(value, list):
        return value if any(map(_is_message, value)) else text
    if isinstance(value, dict):  # the caller refuses a message that is not in a list
        return value if _is_message(value) and value.get("role") in _SPEAKERS else text
    if opening[1] and opening[2] in _FIRST_KEYS and _is_one_list(text):
        return DataError(
            f"{origin}: {name} looks like a list of chat messages written as text, but cannot be parsed, "
            f"{text.strip()[:40]!r}...; write it with json.dumps, or remove the row"
        )
    return text


def _is_message(value: Any) -> bool:
    """Whether a value has the keys of a message. The types of its values are checked where messages are used."""
    if not isinstance(value, dict):
        return False
    return "role" in value and ("content" in value or "tool_calls" in value) or {"from", "value"} <= value.keys()


def parsed(text: str) -> Any:
    """The value of a text in JSON, or in Python's notation of the same; None if it is neither."""
    for read in (str, _as_json):
        try:
            return json.loads(read(text))
        except (ValueError, SyntaxError, RecursionError, MemoryError):  # ValueError includes JSONDecodeError
            continue
    return None


def _as_json(text: str) -> str:
    """Translates Python's literals to JSON one by one, because `ast.literal_eval` of the whole could use up all memory."""

    def translated(match: re.Match) -> str:
        if match["string"]:
            return json.dumps(ast.literal_eval(match["string"]))
        return _WORDS[match["word"]] if match["word"] else "}, "

    return _PYTHON.sub(translated, text)


def _is_one_list(text: str) -> bool:
    """Whether no prose follows the list: its brackets outside of strings are never closed, or are closed at the very end."""
    outside = re.sub(_STRING, "", text, flags=re.S).rstrip()
    opened = sum(map(outside.count, "[{"))
    closed = sum(map(outside.count, "]}"))
    return opened > closed or outside.endswith("]")
