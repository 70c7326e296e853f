r"""Anthropic HH transcripts: text whose turns begin with "\n\nHuman:" and "\n\nAssistant:".

Line ends may be those of any system, and spaces may stand around a marker's line ends, word and colon.
"""

import re
from typing import Any

_OPENING = re.compile(r"\s*Human[^\S\r\n]*:")
# A marker follows a blank line. [^\S\n] is a space of any kind that does not end the line.
_TURN = re.compile(r"\n[^\S\n]*\n[^\S\n]*(Human|Assistant)[^\S\n]*:")


def is_transcript(value: Any) -> bool:
    """Whether a value is a transcript: text that opens with a Human turn and has an Assistant turn."""
    if not isinstance(value, str) or not _OPENING.match(value):
        return False
    return any(match[1] == "Assistant" for match in _TURN.finditer(_with_newlines(value)))


def transcript_messages(text: str) -> tuple[dict, ...]:
    r"""Messages of a transcript; an open last turn has empty content. Repeated speakers are joined.

    Every line end inside a turn becomes \n, so that two sides which differ only in them share their prompt.
    """
    pieces = _TURN.split("\n\n" + _with_newlines(text).lstrip())[1:]
    messages: list[dict] = []
    for speaker, content in zip(pieces[::2], pieces[1::2], strict=True):
        role, content = "user" if speaker == "Human" else "assistant", content.strip()
        if messages and messages[-1]["role"] == role:
            content = messages.pop()["content"] + "\n\n" + content
        messages.append({"role": role, "content": content})
    return tuple(messages)


def _with_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
