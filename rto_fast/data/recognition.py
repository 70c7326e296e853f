"""Recognises prompts whose text was rendered with the chat template before, which are not a user's message."""

import os
import re
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from rto_fast.data.messages import as_message
from rto_fast.data.templates import (
    ANSWER,
    MORE,
    QUESTION,
    ChatTemplate,
    Thinking,
    any_of,
    as_user,
)
from rto_fast.data.transcripts import with_newlines
from rto_fast.errors import DataError

_BOS = re.compile(r"\s*(?:<s>|<bos>|<\|begin_of_text\|>)?\s*")
_MARKS = re.compile(
    r"<\|[^<>|\s]+\|>|<\uff5c[^<>\uff5c\s]+\uff5c>|<(?:start|end)_of_turn>|</s>|\[/?INST\]"
)  # of many templates


def marks_turns(text: str, mark: re.Pattern[str]) -> bool:
    """Whether a text looks like a chat whose turns have marks such as `<|im_start|>user`: it begins with the mark of a turn
    of the system or the user, and has another mark.
    """
    first = mark.match(text)
    if not first or len(set(mark.findall(text))) < 2:
        return False
    turn = first[0] + re.match(r"\s*\w*", text[first.end() :])[0]  # type: ignore[index]  # matches anything
    return re.search(r"system|user|human|inst", turn, re.IGNORECASE) is not None


def looks_rendered(text: str) -> bool:
    """Whether a text looks like a chat that any template rendered, not only that of the tokenizer."""
    return marks_turns(text[_BOS.match(text).end() :], _MARKS)  # type: ignore[union-attr]  # matches anything


class Written(NamedTuple):
    """A prompt that was rendered before."""

    text: str  # with the template's BOS and generation prompt
    thinking: Thinking  # how it ends
    headers: Sequence[str] = ()  # the parts of it that a response may repeat, the longest first
    space: str = ""  # the part of the space at its end that a response may repeat
    has_begun: bool = False  # whether the text ends with the beginning of the response


class Recogniser:
    """Recognises prompts that a template rendered, by the text that it sets before the first message and behind the last.

    Text that only mentions such marks, or quotes a conversation after words of its own, is not recognised.
    """

    def __init__(self, template: ChatTemplate):
        self.template = template
        self._bos = template.tokenizer.bos_token or ""

    @cached_property
    def _question(self) -> str:
        return self.template.probe(as_user(QUESTION))

    def _before(self, turns: list[dict], begins: str, ends: str) -> str | None:
        """The first line between two texts in the rendering of these turns, without BOS and space; None if it lacks one."""
        try:
            text = self.template.probe(*turns)
        except DataError:  # many templates refuse a system message
            return None
        before, found, _ = text[text.find(begins) + len(begins) :].partition(ends)
        if begins:  # behind an answer stands the end of its turn
            before = before.removeprefix(self.template.turn.tail).removeprefix(self.template.turn.stop or "")
        return self._without_bos(before).partition("\n")[0].strip() if found else None

    @cached_property
    def _opening(self) -> re.Pattern[str]:
        """Matches the beginning of prompts that the template rendered, without BOS."""
        question, answer = as_user(QUESTION), as_message(ANSWER)
        user = self._before([question, answer, as_user(MORE)], ANSWER, MORE)
        system = self._before([{"role": "system", "content": MORE}, question], "", MORE)
        if user and system == "":  # the template sets nothing before a system message
            return re.compile(f".*?{re.escape(user)}", re.DOTALL)
        return any_of(filter(None, [user, system, self._before([question], "", QUESTION)]))

    def _without_bos(self, text: str) -> str:
        return text.strip().removeprefix(self._bos).strip()

    def recognise(self, text: str) -> Written | None:
        """The prompt that this template rendered; None for any other text. Line ends may be of any kind."""
        text = with_newlines(text)
        bare = self._without_bos(text)
        if not self._opening.match(bare):
            return None
        full = text.lstrip()
        if self._question.startswith(self._bos):
            full = self._bos + full.removeprefix(self._bos)
        question_end = self._pieces(self._question.rpartition(QUESTION)[2])
        endings = []  # (text that ends a prompt, what is missing then, thinking)
        for thinking, ending in self.template.endings.items():
            turn_end = "".join(os.path.commonprefix([question_end, self._pieces(ending)]))
            endings += [(ending, "", thinking), (turn_end, ending[len(turn_end) :], thinking)]
        endings = sorted((item for item in endings if item[0].strip()), key=lambda item: -len(item[0]))
        headers = sorted({missing.strip() for _, missing, _ in endings if missing}, key=len, reverse=True)
        for ending, missing, thinking in endings:
            if bare.endswith(ending.strip()):
                space = ending[len(ending.rstrip()) :]
                cut = space if full == full.rstrip() and not missing else ""  # then the response begins with it
                return Written(full.rstrip() + space + missing, thinking, headers, cut)
        for ending, missing, thinking in endings:
            begun = full.rpartition(ending)[2] if not missing and ending in full else full
            if not missing and begun != full and not self.template.mark.search(begun):
                return Written(full, thinking, has_begun=True)
        return None

    def _pieces(self, text: str) -> list[str]:
        return re.split(f"({self.template.mark.pattern})", text)
