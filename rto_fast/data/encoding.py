"""Turns a conversation into token ids: formats of prompts, stop tokens in data, what a chat template does not read; and
warnings that users should see before they train."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rto_fast.data.layouts import Example
from rto_fast.data.messages import as_message, as_messages
from rto_fast.data.recognition import Recogniser, Written, looks_rendered, marks_turns
from rto_fast.data.special_tokens import SpecialTokens, shown_again
from rto_fast.data.templates import FALLBACK_TEMPLATE, ChatTemplate, Response, Thinking
from rto_fast.errors import DataError
from rto_fast.system.notices import notify

FORMATS = ("auto", "chat", "text")
_STAND_IN = {"role": "user", "content": "question"}  # takes the place of a prompt that was rendered before


class Row(NamedTuple):
    """A conversation as text that is ready to be tokenised."""

    format: str  # "chat", "text", or "templated" for text that was rendered before
    prompt: str
    responses: list[Response]
    hidden: dict[str, str]  # see `SpecialTokens.hide`
    has_bos: bool = False  # whether the prompt's text began with BOS
    ignored: frozenset[str] = frozenset()  # keys of messages and the like that do not change the texts


class ConversationEncoder:
    """Turns conversations into ids.

    Args:
        tokenizer: the tokenizer, with its chat template.
        prompt_format: one of `FORMATS`; see `rto_fast.data.tokenizing`.
        stop_ids: the ids that end a response; may be empty if only prompts are read.
        thinking: how prompts end; None chooses the way that a conversation's own responses can follow.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt_format: str, stop_ids: Sequence[int], thinking: Thinking | None
    ):
        if prompt_format not in FORMATS:
            raise DataError(f"prompt_format: {prompt_format!r} is not 'auto', 'chat' or 'text'")
        self.tokenizer, self.prompt_format, self.stop_ids, self.thinking = tokenizer, prompt_format, stop_ids, thinking
        self._has_warned = False
        self._added = {token.content: (i, token) for i, token in tokenizer.added_tokens_decoder.items()}
        stops = [content for content, (i, _) in self._added.items() if i in stop_ids]
        self.template = ChatTemplate(tokenizer, stops)
        self._recogniser = Recogniser(self.template)
        has_template = tokenizer.chat_template is not None
        self._stops = [*stops, *filter(None, [tokenizer.eos_token, self.template.turn.stop if has_template else None])]
        special = [content for content, (_, token) in self._added.items() if token.special and content.strip()]
        self._at_end = (*self._stops, *special)
        self.special = SpecialTokens(tokenizer, [*self.template.control_tokens, *stops] if has_template else stops)

    # Text

    def read(
        self, prompt: str | Sequence[dict], responses: Sequence[str | dict], tools: Any = None, *, strict: bool = True
    ) -> Row:
        """The texts of a conversation.

        Args:
            prompt: text or messages.
            responses: the responses to that prompt, each text or a message.
            tools: function schemas, or None.
            strict: see `ChatTemplate.conversation`.
        Raises:
            DataError: the conversation cannot be used. The message does not name the row.
        """
        responses = [self._without_stops(response) for response in responses]
        if isinstance(prompt, str) and self.prompt_format != "chat":
            row = self._templated(prompt, responses, strict)
            if row is None and (self.prompt_format == "text" or self.tokenizer.chat_template is None):
                row = self._text(prompt, responses, strict)
            if row is not None:
                return row._replace(ignored=frozenset(_extra_keys(responses, tools)))
        turns = [self._without_stops(turn) if turn["role"] == "assistant" else turn for turn in as_messages(prompt)]
        return self._chat(turns, responses, tools, strict)

    def _without_stops(self, response: Any) -> Any:
        """The response without the stop tokens, the space around them and the padding at its end, as some data has them."""
        if isinstance(response, dict):
            content = response.get("content")
            return response | {"content": self._without_stops(content)} if content else response
        kept, text = response, response.rstrip()
        while text.endswith(self._at_end):
            token = max((token for token in self._at_end if text.endswith(token)), key=len)
            text = text.removesuffix(token).rstrip()
            kept = text if token in self._stops else kept  # special tokens behind a stop token are padding
        return kept

    def _chat(self, messages: list[dict], responses: list, tools: Any, strict: bool) -> Row:
        thinking = self.thinking or self.template.choose_thinking(responses)
        if self.tokenizer.chat_template is None and not self._has_warned:
            self._has_warned = True
            what = "the tokenizer has no chat template: messages become a 'Human: ... Assistant:' transcript"
            notify("data", "no_chat_template", what)
        template = str(self.tokenizer.chat_template or FALLBACK_TEMPLATE)
        (messages, responses, tools), hidden = self.special.hide(messages, responses, tools, beside=template)
        try:
            texts = self.template.conversation(messages, responses, tools, thinking, strict)
        except DataError as error:
            raise DataError(shown_again(str(error), hidden)) from error
        ignored = self._ignored(texts, messages, responses, tools, thinking, strict)
        return Row("chat", *texts, hidden, ignored=ignored)

    def _ignored(
        self,
        texts: tuple[str, list[Response]],
        messages: list[dict],
        responses: list,
        tools: Any,
        thinking: Thinking,
        strict: bool,
    ) -> frozenset[str]:
        """The parts that the template does not render: keys of messages, tools, and messages by their role."""

        def same_without(names: set[str], among: list[dict] = messages) -> bool:
            def keep(turn: Any) -> Any:
                return turn if isinstance(turn, str) else {k: v for k, v in turn.items() if k not in names}

            turns, answers = [keep(turn) for turn in among], [keep(answer) for answer in responses]
            given = None if "tools" in names else tools
            try:
                return self.template.conversation(turns, answers, given, thinking, strict) == texts
            except DataError:
                return False

        keys = _extra_keys([*messages, *responses], tools)
        ignored = keys if keys and same_without(keys) else {key for key in keys if same_without({key})}
        for index, turn in enumerate(messages):
            content = turn["content"]
            if isinstance(content, str) and content.strip() not in texts[0]:
                if same_without(set(), messages[:index] + messages[index + 1 :]):
                    ignored = ignored | {f"messages of role {turn['role']}"}
        return frozenset(ignored)

    def _templated(self, prompt: str, responses: list, strict: bool) -> Row | None:
        """The row of a prompt that was rendered before; None for any other prompt."""
        if self.tokenizer.chat_template is None:
            bare, bos = prompt.strip(), self.tokenizer.bos_token or ""
            if bare.count(bos) == 1:  # where it occurs more often it begins each turn
                bare = bare.removeprefix(bos).lstrip()
            if not marks_turns(bare, self.special.in_data):
                return None
            return self._text("", responses, strict)._replace(format="templated", prompt=prompt)
        found = self._recogniser.recognise(prompt)
        if found is None:
            return None
        if found.has_begun:  # the template's rules for the beginning of a response do not apply
            row, turn = self._text("", responses, strict), self.template.turn
            answers = [Response(answer.text + turn.tail, turn.stop, turn.tail) for answer in row.responses]
            return row._replace(format="templated", prompt=found.text, responses=answers)
        (answers,), hidden = self.special.hide([_rest(answer, found) for answer in responses], beside=found.text)
        _, answers = self.template.conversation([_STAND_IN], answers, None, found.thinking, strict)
        return Row("templated", found.text, answers, hidden)

    def _text(self, prompt: str, responses: list, strict: bool) -> Row:
        """The row of plain text, without a template."""
        bos = self.tokenizer.bos_token
        has_bos = bool(bos) and prompt.startswith(bos)
        texts = [as_message(response)["content"] or "" for response in responses]
        if strict and not all(text.strip() for text in texts):
            raise DataError(
                "empty response: nothing but stop tokens, or tool calls, which plain text (prompt_format) has not"
            )
        (prompt, *texts), hidden = self.special.hide(prompt.removeprefix(bos or "") if has_bos else prompt, *texts)
        return Row("text", prompt, [Response(text, None) for text in texts], hidden, has_bos)

    # Ids

    def prompt_ids(self, rows: Sequence[Row]) -> list[list[int]]:
        """The ids of the rows' prompts."""
        bos = self.tokenizer.bos_token_id
        adds_bos = bos is not None and self.tokenizer("").input_ids[:1] == [bos]
        as_is = [{} if row.format == "templated" else row.hidden for row in rows]
        encoded = self.special.encode([row.prompt for row in rows], as_is)
        has_template = self.tokenizer.chat_template is not None
        for row, ids in zip(rows, encoded, strict=True):
            as_text = row.format == "text" or not has_template
            if row.has_bos or (adds_bos and as_text and ids[:1] != [bos]):
                ids.insert(0, bos)
        return encoded

    def response_ids(self, rows: Sequence[Row], side: int, finished: bool = True) -> list[list[int]]:
        """The ids of each row's response number `side`, with one stop token at the end if `finished`."""
        responses = [row.responses[side] for row in rows]
        texts = [self._up_to_stop(response, finished) for response in responses]
        encoded = self.special.encode(texts, [row.hidden for row in rows], follows=True)
        return [ids + [self._stop(response)] * finished for ids, response in zip(encoded, responses, strict=True)]

    def usual_end(self) -> int:
        """The stop token of an ordinary response."""
        return self._stop(self.read("question", ["answer"], strict=False).responses[0])

    def _up_to_stop(self, response: Response, finished: bool) -> str:
        if not finished:
            return response.text.removesuffix(response.tail)
        takes_space = response.stop in self._added and self._added[response.stop][1].lstrip
        return response.text.rstrip() if takes_space else response.text

    def _stop(self, response: Response) -> int:
        stop = self._added[response.stop][0] if response.stop in self._added else self.tokenizer.eos_token_id
        return stop if stop in self.stop_ids else self.stop_ids[0]


def _extra_keys(turns: Sequence[str | dict], tools: Any) -> set[str]:
    """The keys of messages beside role and content, and "tools" where there are tools."""
    keys = {key for turn in turns if isinstance(turn, dict) for key, value in turn.items() if value not in ("", [], {})}
    keys -= {"role", "content"}
    return keys | {"tools"} if tools else keys


def _rest(response: str | dict, prompt: Written) -> str | dict:
    """A response without the marks that begin an answer, with which its rendered prompt ends."""
    if isinstance(response, dict):
        return response
    for header in prompt.headers:
        if response.lstrip().startswith(header):
            return response.lstrip().removeprefix(header).lstrip("\n")
    return response.removeprefix(prompt.space)


_SHOWN = 60  # characters of a prompt


def notes(
    source: str, encoder: ConversationEncoder, rows: Sequence[Row], examples: Sequence[Example]
) -> Iterator[tuple[str, str]]:
    """Yields the kind and the text of each warning. A kind need not be shown twice.

    Args:
        source: the name of the rows' file.
        encoder: the encoder that read the rows.
        rows: the rows.
        examples: the example of each row.
    """
    ignored = Counter(key for row in rows for key in row.ignored)
    if ignored:
        keys = ", ".join(f"{key} ({count:,} rows)" for key, count in sorted(ignored.items()))
        yield f"{source} ignored", f"{source}: the chat template (or data.prompt_format) leaves out {keys}"

    pairs = list(zip(rows, examples, strict=True))
    templated = [example for row, example in pairs if row.format == "templated"]
    if templated:
        yield (
            f"{source} templated",
            f"{source}: {len(templated):,} prompts are chat-templated already and used as they are, special tokens "
            f"included, the first {templated[0].origin}: {_begins(templated[0])}; data.prompt_format chat makes them a "
            "user's message",
        )
    if encoder.prompt_format == "auto":
        inside = [example for row, example in pairs if row.format == "chat" and looks_rendered(_first_text(example))]
        if inside:
            yield (
                f"{source} inside",
                f"{source}: {len(inside):,} prompts hold text that some chat template has rendered, and this one renders "
                f"it once more, the first {inside[0].origin}: {_begins(inside[0])}; give messages, or plain text",
            )
    spelled = [example for row, example in pairs if row.hidden]
    if spelled:
        yield (
            f"{source} spelled",
            f"{source}: special tokens that stand in the text of {len(spelled):,} rows stay text, the first "
            f"{spelled[0].origin}",
        )
    chat = any(row.format == "chat" for row in rows)
    if chat and encoder.thinking and (opening := encoder.template.opening_left_out(encoder.thinking)):
        yield (
            "opening",
            f"the chat template's generation prompt opens a thought ({opening!r}), responses of the data begin without "
            "one, or write it otherwise: prompts end before it (data.thinking)",
        )


def _first_text(example: Example) -> str:
    content = as_messages(example.prompt)[0]["content"]
    return content if isinstance(content, str) else ""


def _begins(example: Example) -> str:
    return repr(_first_text(example)[:_SHOWN])
