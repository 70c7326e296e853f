r"""Renders a conversation with a chat template, as the text of the prompt and the text of the response.

A template is a program, so only its output shows what it does. A conversation is therefore rendered twice: the prompt with a
generation prompt, and the whole. The part of the whole behind the prompt, up to its stop token, is the response. A row whose
whole does not begin with its prompt cannot be trained on, because the template never shows a model the two together.

Thoughts: some generation prompts end with an empty thought (`enable_thinking=False` of Qwen3), others open one (DeepSeek
R1). `Thinking` says how prompts end. `choose_thinking` finds it from the responses of the data, so that the prompts of
rollouts end like those of the training.

Templates differ in what they accept: arguments of tool calls as a dict or as JSON text, a content that is missing, None or
empty beside them, function schemas bare or within {"type": "function"}. A conversation that a template refuses in one form,
or renders without its calls, is given to it in the next form. This uses `render_jinja_template`, because newer versions of
`apply_chat_template` drop every None.
"""

import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from rto_fast.data.messages import (
    CALLS,
    THOUGHT_CLOSES,
    THOUGHT_OPENS,
    as_message,
    conversation_forms,
    thought_in_text,
    thought_of,
)
from rto_fast.errors import DataError, error_text

FALLBACK_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] | trim }}"
    "{% elif message['role'] == 'assistant' %}{{ '\n\nAssistant: ' + message['content'] | trim }}{{ eos_token }}"
    "{% else %}{{ '\n\nHuman: ' + message['content'] | trim }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
_OPENING_AT_END = re.compile(rf"{THOUGHT_OPENS}\s*\Z")
_EMPTY_THOUGHT = rf"{THOUGHT_OPENS}\s*{THOUGHT_CLOSES}\s*"
SHOWN = 30  # characters of a rendering that errors quote
_LOST = "the chat template leaves out the response's thought"
_KEEPS = "give the tokenizer a template that keeps it"
QUESTION, ANSWER, MORE = ("xQuestionx", "xAnswerx", "xMorex")  # their positions in a rendering are searched


class Thinking(NamedTuple):
    """How prompts end with respect to thoughts."""

    enabled: bool  # the template's `enable_thinking`
    may_open: bool  # whether the prompt may open a thought; else an opening at its end is cut off


NO_THOUGHTS = Thinking(enabled=False, may_open=False)  # no response has a thought
THOUGHTS = Thinking(enabled=True, may_open=True)  # responses have thoughts, or templates write empty ones for them
BOTH = Thinking(enabled=True, may_open=False)  # some responses have thoughts, which they open themselves
UNKNOWN = Thinking(enabled=False, may_open=True)  # there are no responses: the template's own end, with thinking off
MODES = {"on": THOUGHTS, "off": NO_THOUGHTS}


class Response(NamedTuple):
    """The text of a response: all that the template writes behind the prompt, up to its stop token."""

    text: str
    stop: str | None  # the stop token that the template writes behind it, if any
    tail: str = ""  # what the template writes between a response and its stop token; part of `text`


class ChatTemplate:
    """The chat template of a tokenizer, or `FALLBACK_TEMPLATE` if it has none.

    Args:
        stop_tokens: the run's, as text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_tokens: Sequence[str] = ()):
        self.tokenizer, self._special_tokens = tokenizer, tokenizer.special_tokens_map
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        # All added tokens, because some tokenizers do not mark the tokens around turns as special.
        self._marks = [token for token in added if token.strip() and not is_thought_mark(token)]
        self._stops = list(dict.fromkeys([*stop_tokens, *filter(None, [tokenizer.eos_token])]))
        self.mark = any_of([*self._marks, *self._stops])

    # Rendering

    def render(self, messages: Sequence[dict], tools: Any, thinking: Thinking, *, generation: bool = False) -> str:
        """The text that the template renders, with a generation prompt if `generation`; its errors are raised."""
        tokenizer, tools = self.tokenizer, list(tools) if tools else None
        template = FALLBACK_TEMPLATE if tokenizer.chat_template is None else tokenizer.get_chat_template(None, tools)
        switches = {"enable_thinking": thinking.enabled, "thinking": thinking.enabled}
        rendered, _ = render_jinja_template(
            conversations=[list(messages)],
            tools=tools,
            chat_template=template,
            add_generation_prompt=generation,
            **{**self._special_tokens, **switches},
        )
        return rendered[0]

    def conversation(
        self,
        prompt: Sequence[dict],
        responses: Sequence[str | dict],
        tools: Any,
        thinking: Thinking,
        strict: bool = True,
    ) -> tuple[str, list[Response]]:
        """The text of a prompt and the responses to it. The prompt followed by a response is what the template renders.

        Args:
            prompt: messages. responses: text, or the assistant's message; may be empty. tools: function schemas, or None.
            strict: refuse a conversation of which something would be lost, or whose prompt does not end as `thinking` says;
                else the prompt ends earlier.
        Raises:
            DataError: the template refuses the conversation, or the two parts cannot be told apart.
        """
        given = [as_message(response) for response in responses]
        found, failures = None, []
        for turns, answers, schemas in conversation_forms(prompt, given, tools):
            try:
                generation = self.render(turns, schemas, thinking, generation=True)
                answers = [_continuing(generation, answer) for answer in answers]
                text = _ended(generation, thinking)
                wholes = [self.render([*turns, answer], schemas, thinking) for answer in answers]
                text = text if strict else os.path.commonprefix([text, *wholes])
                parts = text, [self._response(text, *pair, strict) for pair in zip(wholes, answers, strict=True)]
            except Exception as error:  # a template is code that may raise anything
                failures.append(error)
                continue
            if not self._leaves_out_calls(turns, answers, schemas, thinking, wholes):
                return parts
            # Another form of the messages may keep the calls, but it may render a content of None as "None".
            if all(turn.get("content", "") is not None for turn in [*turns, *answers]):
                found = found or parts
        if found:
            return found
        for error in failures:
            if isinstance(error, DataError):
                raise error
        own = [error for error in failures if type(error) is jinja2.TemplateError]  # its raise_exception
        reason = error_text(own[0], with_type=False) if own else error_text(failures[0], with_type=True)
        roles = ", ".join(message["role"] for message in [*prompt, *given[:1]])
        raise DataError(f"the chat template refuses roles {roles}: {reason}") from (own or failures)[0]

    def _leaves_out_calls(
        self, turns: list[dict], answers: list[dict], tools: Any, thinking: Thinking, wholes: list[str]
    ) -> bool:
        """Whether the messages have calls, and the template renders the same without them."""
        if not any(key in turn for turn in [*turns, *answers] for key in CALLS):
            return False
        bare = [{key: turn[key] for key in turn if key not in CALLS} for turn in turns]
        bare_answers = [{key: answer[key] for key in answer if key not in CALLS} for answer in answers]
        try:
            if answers:
                return wholes == [self.render([*bare, answer], tools, thinking) for answer in bare_answers]
            return self.render(turns, tools, thinking) == self.render(bare, tools, thinking)
        except Exception:  # the template needs the calls
            return False

    def _response(self, prompt: str, whole: str, message: dict, strict: bool) -> Response:
        """The part of `whole` behind the prompt, up to its stop token."""
        if not whole.startswith(prompt):
            raise DataError(self._difference(prompt, whole, message))
        rest = whole[len(prompt) :]
        stop = self._end.search(rest)
        text, after = (rest[: stop.start()], rest[stop.end() :]) if stop else (rest.removesuffix(self.turn.tail), "")
        if not strict:
            return Response(text, stop[0] if stop else None, self.turn.tail if stop else "")
        if self.mark.sub("", after).strip():
            raise DataError(f"the chat template goes on behind the response's {stop[0]}: {_brief(after.strip())}")  # type: ignore[index]
        if not (text.removesuffix(self.turn.tail) if stop else text).strip():
            raise DataError("empty response: the chat template renders nothing of it")
        content = message.get("content") or ""
        thought = thought_in_text(content)
        answer = "".join(re.split(THOUGHT_CLOSES, content, maxsplit=1)[1:])
        if thought and text.count(thought) <= answer.count(thought):  # the answer may repeat it
            raise DataError(f"{_LOST} {_brief(thought)}; {_KEEPS}")
        return Response(text, stop[0] if stop else None, self.turn.tail if stop else "")

    @staticmethod
    def _difference(prompt: str, whole: str, message: dict) -> str:
        """The reason why a whole does not begin with its prompt."""
        same = len(os.path.commonprefix([prompt, whole]))
        where = (
            f"behind {_brief(prompt[:same], last=True)} the prompt has {_brief(prompt[same:])}, "
            f"the conversation {_brief(whole[same:])}"
        )
        thought = thought_of(message)
        if thought and thought not in whole[same:]:
            return f"{_LOST} {_brief(thought)}: {where}; {_KEEPS}"
        if re.search(THOUGHT_CLOSES, prompt[same:]) and thought:
            return f"the prompt ends without a thought, the response has one: {where}; set data.thinking to on"
        if _OPENING_AT_END.search(prompt):
            found = "begins its own otherwise" if thought else "has none"
            return f"the prompt opens a thought, the response {found}: {where}; set data.thinking to off"
        return (
            f"the chat template's prompt is not how its conversation begins: {where}; give the tokenizer a template "
            "that ends a prompt where the answer begins"
        )

    # What the template does to every conversation, found from one

    def probe(self, *messages: dict, thinking: Thinking = NO_THOUGHTS, generation: bool = False) -> str:
        """The rendering of a conversation that every template should know."""
        failures = []
        for system in ([], [{"role": "system", "content": "system"}]):  # some templates ask for a system message
            try:
                return self.render([*system, *messages], None, thinking, generation=generation)
            except Exception as error:
                failures.append(error)
        raise DataError(
            f"the chat template of {self.tokenizer.name_or_path} does not render a question and its answer: "
            f"{error_text(failures[0], with_type=True)}; mend it "
            "(chat_template.jinja, or chat_template in tokenizer_config.json), or give data.prompt_format: text"
        ) from failures[0]

    @cached_property
    def turn(self) -> Response:
        """What the template writes behind a response: `tail`, then the token that ends the turn, if there is one."""
        after = self.probe(as_user(QUESTION), as_message(ANSWER)).rpartition(ANSWER)[2]
        end = self.mark.search(after)
        return Response("", end[0], after[: end.start()]) if end else Response("", None, after)

    @cached_property
    def _end(self) -> re.Pattern[str]:
        """Matches the tokens that end a response."""
        return any_of([*self._stops, *filter(None, [self.turn.stop])])

    @cached_property
    def endings(self) -> dict[Thinking, str]:
        """What the template writes behind the last message of a prompt, for each way in which prompts can end."""
        prompts = {
            thinking: _ended(self.probe(as_user(QUESTION), thinking=thinking, generation=True), thinking)
            for thinking in (UNKNOWN, NO_THOUGHTS, THOUGHTS, BOTH)
        }
        return {thinking: prompt.rpartition(QUESTION)[2] for thinking, prompt in prompts.items()}

    def choose_thinking(self, responses: Iterable[str | dict]) -> Thinking:
        """How prompts must end so that these responses can follow, and for prompts of the same run without responses."""
        found, openings = set(), set()
        for response in responses:
            has_thought = bool(thought_of(response))
            found.add(has_thought)
            opening = (
                re.match(rf"\s*{THOUGHT_OPENS}\s*", as_message(response)["content"] or "") if has_thought else None
            )
            openings |= {opening[0]} if opening else set()
        if True not in found:
            return NO_THOUGHTS if found else UNKNOWN
        own = _OPENING_AT_END.search(self.endings[THOUGHTS])
        openings -= {own[0]} if own else openings
        answers = [ANSWER] * (False in found) + [_with_thought(opening) for opening in openings]
        try:
            self.conversation([as_user(QUESTION)], answers, None, THOUGHTS)
        except DataError:  # the generation prompt opens a thought, which not every response continues
            return BOTH
        return THOUGHTS

    def opening_left_out(self, thinking: Thinking) -> str:
        """The mark of a thought at the end of the template's generation prompts, if `thinking` leaves it out."""
        whole = self.endings[THOUGHTS if thinking.enabled else UNKNOWN]
        return whole[len(self.endings[thinking]) :].strip()

    @cached_property
    def control_tokens(self) -> list[str]:
        """The added tokens that the template sets around messages, except for the marks of thoughts."""
        turns = [as_user(QUESTION), as_message(ANSWER)]
        try:
            text = self.probe(*turns, as_user(MORE), generation=True)
        except DataError:
            text = ""
        return [token for token in self._marks if token in text]


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of these texts, the longest first, as tokenizers do. Without texts it matches nothing."""
    longest_first = sorted(set(tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def is_thought_mark(token: str) -> bool:
    return re.fullmatch(rf"{THOUGHT_OPENS}|{THOUGHT_CLOSES}", token) is not None


def _ended(prompt: str, thinking: Thinking) -> str:
    return prompt if thinking.may_open else _OPENING_AT_END.sub("", prompt)


def _continuing(prompt: str, message: dict) -> dict:
    """The message with the marks of its thought that fit the end of the template's whole prompt.

    Where the template's prompt opens a thought, data may hold only the closing mark; where it ends with an empty thought,
    the response's own empty one would be the second.
    """
    content = message.get("content") or ""
    opening = _OPENING_AT_END.search(prompt)
    closes = re.search(THOUGHT_CLOSES, content)
    if opening and closes and not re.search(THOUGHT_OPENS, content[: closes.start()]):
        return message | {"content": opening[0] + content}
    empty = re.match(rf"\s*{_EMPTY_THOUGHT}", content)
    if empty and re.search(rf"{_EMPTY_THOUGHT}\Z", prompt):
        return message | {"content": content[empty.end() :]}
    return message


def _with_thought(opening: str) -> str:
    """A short answer whose thought begins with this mark, including the space around it."""
    mark = opening.strip()
    return f"{opening}{MORE}\n{mark[0]}/{mark[1:]}\n\n{ANSWER}"


def as_user(text: str) -> dict:
    return {"role": "user", "content": text}


def _brief(text: str, last: bool = False) -> str:
    """The beginning of a text, or its end, within quotes."""
    cut = text[-SHOWN:] if last else text[:SHOWN]
    return repr(cut) if len(text) <= SHOWN else f"…{cut!r}" if last else f"{cut!r}…"
