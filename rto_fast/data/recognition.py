"""Prompts whose text somebody has rendered with the chat template before: such text is no user's message."""

import os
import re
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from rto_fast.data.templates import (
    ANSWER,
    MORE,
    QUESTION,
    ChatTemplate,
    Thinking,
    any_of,
    as_assistant,
    as_user,
)
from rto_fast.data.transcripts import with_newlines
from rto_fast.errors import DataError

_BOS = re.compile(r"\s*(?:<s>|<bos>|<\|begin_of_text\|>)?\s*")
_MARKS = re.compile(
    r"<\|[^<>|\s]+\|>|<\uff5c[^<>\uff5c\s]+\uff5c>|<(?:start|end)_of_turn>|</s>|\[/?INST\]"
)  # of many templates


def marks_turns(text: str, mark: re.Pattern[str]) -> bool:
    """Whether a text looks like a chat whose turns have these marks, as `<|im_start|>user` marks one.

    It begins with the mark of the system's or the user's turn, and has another mark.
    """
    first = mark.match(text)
    if not first or len(set(mark.findall(text))) < 2:
        return False
    turn = first[0] + re.match(r"\s*\w*", text[first.end() :])[0]  # type: ignore[index]  # matches anything
    return re.search(r"system|user|human|inst", turn, re.IGNORECASE) is not None


def looks_rendered(text: str) -> bool:
    """Whether a text looks like a chat that some template rendered, not only that of the tokenizer."""
    return marks_turns(text[_BOS.match(text).end() :], _MARKS)  # type: ignore[union-attr]  # matches anything


class Written(NamedTuple):
    """A prompt that somebody has rendered before."""

    text: str  # with the template's BOS and generation prompt
    thinking: Thinking  # how it ends
    headers: Sequence[str] = ()  # what a response may repeat of it, the longest first
    space: str = ""  # what it may repeat of the space at the prompt's end
    has_begun: bool = False  # the text goes on with the beginning of the response


class Recogniser:
    """Recognises prompts that a template rendered, by what it sets before the first message and behind the last.

    Text that only mentions such marks, or quotes a conversation after words of its own, is not recognised.
    """

    def __init__(self, template: ChatTemplate):
        self.template = template
        self._bos = template.tokenizer.bos_token or ""

    @cached_property
    def _question(self) -> str:
        return self.template.probe(as_user(QUESTION))

    def _before(self, turns: list[dict], begins: str, ends: str) -> str | None:
        """Of these turns' rendering, the first line between two texts, without BOS and space; None if it has not both."""
        try:
            text = self.template.probe(*turns)
        except DataError:  # many know no system message
            return None
        before, found, _ = text[text.find(begins) + len(begins) :].partition(ends)
        if begins:  # an answer: behind it stands what ends its turn
            before = before.removeprefix(self.template.turn.tail).removeprefix(self.template.turn.stop or "")
        return self._without_bos(before).partition("\n")[0].strip() if found else None

    @cached_property
    def _opening(self) -> re.Pattern[str]:
        """What prompts that it rendered begin with, BOS aside."""
        question, answer = as_user(QUESTION), as_assistant(ANSWER)
        user = self._before([question, answer, as_user(MORE)], ANSWER, MORE)
        system = self._before([{"role": "system", "content": MORE}, question], "", MORE)
        if user and system == "":  # it sets nothing before a system message
            return re.compile(f".*?{re.escape(user)}", re.DOTALL)
        return any_of(filter(None, [user, system, self._before([question], "", QUESTION)]))

    def _without_bos(self, text: str) -> str:
        return text.strip().removeprefix(self._bos).strip()

    def recognise(self, text: str) -> Written | None:
        """Whether the text of a prompt is a conversation that this template rendered; None if not. Line ends may be any."""
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
