r"""Anthropic HH transcripts: text whose turns begin with "\n\nHuman:" and "\n\nAssistant:".

Line ends may be those of any system. Spaces may stand around a marker's line ends, word and colon in a transcript whose
turns do not alternate by the markers without them; elsewhere a marker with spaces is part of what is said: responses of
the HH data quote turns that way.
"""

import re
from itertools import pairwise
from typing import Any

_OPENING = re.compile(r"\s*Human[^\S\r\n]*:")
_PLAIN = r"\n\n(Human|Assistant):"
_SPACED = r"\n[^\S\n]*\n[^\S\n]*(Human|Assistant)[^\S\n]*:"  # [^\S\n]: a space of any kind that ends no line
_ANSWER = re.compile(_SPACED.replace("Human|", ""))


def is_transcript(value: Any) -> bool:
    """Whether a value is a transcript: text that opens with a Human turn and has an Assistant turn."""
    return isinstance(value, str) and bool(_OPENING.match(value)) and bool(_ANSWER.search(with_newlines(value)))


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
