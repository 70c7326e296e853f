"""Checks chat messages as data sets hold them, compares them, and shows them as text.

A message is a dict with `role` and `content`. It keeps its other keys (`tool_calls`, `tool_call_id`, `name`,
`reasoning_content`, …): they are the chat template's and the reward function's business. Keys without a value are left out,
as columnar files fill every key of every message. Text of tool calls is null beside them in many data sets; `content` is
None there. What a tool returned may be any value that JSON knows.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rto_fast.data.encoded import parsed
from rto_fast.errors import DataError

CALLS = ("tool_calls", "function_call")  # keys of what an assistant may say instead of text
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of an assistant's thought
_RESULTS = ("tool", "function", "ipython", "observation", "environment")  # roles of messages with the result of a call
_ENDS_A_PROMPT = ("user", *_RESULTS)  # roles of messages that the assistant answers

# The marks of a thought within text: those of Qwen3, DeepSeek R1 and others, of Seed-OSS, and of Magistral.
THOUGHT_OPENS = r"(?:<(?:\w+:)?think(?:ing)?>|\[THINK\])"
THOUGHT_CLOSES = r"(?:</(?:\w+:)?think(?:ing)?>|\[/THINK\])"


def read_messages(value: Any, name: str, origin: str) -> tuple[dict, ...]:
    """The messages of a column.

    Args:
        value: the value of the column.
        name: the column, for errors.
        origin: file and line, for errors.
    Raises:
        DataError: it is not a list of messages.
    """
    if not isinstance(value, list | tuple):
        raise DataError(f"{origin}: {name} must be text or a list of chat messages, found {kind(value)}")
    if not value:
        raise DataError(f"{origin}: {name} is an empty list of messages; remove the row")
    return tuple(_read_message(message, name, origin) for message in value)


def _read_message(message: Any, name: str, origin: str) -> dict:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{origin}: {name}: a message needs text under 'role' and 'content', found {kind(message)}")
    kept = {key: plain(item) for key, item in message.items() if item is not None}
    for key in CALLS:
        if key in kept:
            kept[key] = _read_calls(kept[key], key, name, origin)
            if not kept[key]:
                del kept[key]
    content = kept.setdefault("content", None)
    says_more = any(key in kept for key in (*CALLS, *REASONING))
    is_result = kept["role"] in _RESULTS  # a tool may return any value
    if not (isinstance(content, str) or is_result or (content is None and says_more)):
        raise DataError(f"{origin}: {name}: a message needs text under 'role' and 'content', found {kind(message)}")
    return kept


def _read_calls(value: Any, key: str, name: str, origin: str) -> Any:
    """Tool calls: a list of dicts, or one dict under `function_call`, perhaps as JSON or Python text."""
    calls = _from_text(value)
    expected = dict if key == "function_call" else list
    if isinstance(calls, expected) and all(isinstance(call, dict) for call in ([calls] if expected is dict else calls)):
        return calls
    raise DataError(
        f"{origin}: {name}: {key} must be {'a dict' if expected is dict else 'a list of dicts'}, or JSON "
        f"text of one, found {kind(value)}"
    )


def read_tools(value: Any, origin: str) -> tuple[dict, ...] | None:
    """The function schemas of a `tools` column: a list, or its JSON or Python text. None if it holds something else.

    Raises:
        DataError: it begins like a list of schemas, but is not one.
    """
    tools = _from_text(value)
    tools = [tools] if isinstance(tools, dict) else tools
    if isinstance(tools, list | tuple):
        tools = [plain(_from_text(tool)) for tool in tools]
        if all(isinstance(tool, dict) for tool in tools):
            return tuple(tools) or None
        is_meant = any(isinstance(tool, dict) for tool in tools)
    else:
        is_meant = isinstance(value, str) and re.match(r"\s*(\[\s*\{|\{\s*[\"'])", value) is not None
    if is_meant:
        raise DataError(
            f"{origin}: tools must be a list of function schemas (dicts), or JSON text of one, found {kind(value)}"
        )
    return None


def _from_text(value: Any) -> Any:
    """The value of a list or an object in JSON or Python text; anything else as it is."""
    found = parsed(value) if isinstance(value, str) and re.match(r"\s*[\[{]", value) else None
    return value if found is None else found


def plain(value: Any) -> Any:
    """The value made of JSON's types. Columnar files also hold dates, bytes and arrays."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def only_response(value: Any, name: str, origin: str) -> str | dict:
    """A response: its text, or its message where that holds more than text.

    Args:
        value: text, or the messages that follow the prompt: exactly one, from the assistant.
        name: the column, for errors.
        origin: file and line, for errors.
    Raises:
        DataError: it is something else, or empty.
    """
    if isinstance(value, tuple):
        if len(value) != 1 or value[0]["role"] != "assistant":
            found = ", ".join(message["role"] for message in value) or "none"
            raise DataError(f"{origin}: {name} must add one assistant message to the prompt, found {found}")
        value = value[0] if value[0].keys() - {"role", "content"} else value[0]["content"]
    if not isinstance(value, str | dict):
        raise DataError(f"{origin}: {name} must be text or a list of chat messages, found {kind(value)}")
    text = value if isinstance(value, str) else value["content"] or ""
    if not text.strip() and not (isinstance(value, dict) and any(key in value for key in CALLS)):
        raise DataError(f"{origin}: empty response: {name} is {text!r}; remove the row")
    return value


def as_message(response: str | dict) -> dict:
    """A response as the assistant's message."""
    return response if isinstance(response, dict) else {"role": "assistant", "content": response}


def as_messages(prompt: str | Sequence[dict]) -> list[dict]:
    """A prompt as messages; text becomes a message from the user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def check_prompt(prompt: str | tuple[dict, ...], origin: str) -> None:
    """Raises DataError for a prompt that is empty, or whose last message the assistant does not answer."""
    if isinstance(prompt, tuple) and (not prompt or prompt[-1]["role"] not in _ENDS_A_PROMPT):
        last = prompt[-1]["role"] if prompt else "missing"
        raise DataError(
            f"{origin}: the last message of the prompt, if not a tool's, must be from the user, found {last}"
        )
    message = as_messages(prompt)[-1]
    if message["role"] == "user" and not (message["content"] or "").strip():
        raise DataError(f"{origin}: empty prompt: {message['content']!r}; remove the row")


def check_unicode(value: Any, name: str, origin: str) -> None:
    """Raises DataError for half of a surrogate pair, which JSON can hold and no tokenizer accepts."""
    for text in strings(value):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = f"{text[error.start]!a} at character {error.start}"
            raise DataError(
                f"{origin}: {name} holds half of a surrogate pair, {where}; mend or remove the row"
            ) from None


def strings(value: Any) -> Iterator[str]:
    """Yields all text in a value of lists and dicts, including the keys of dicts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def map_strings(change: Callable[[str], str], value: Any) -> Any:
    """The value with `change` applied to all text in it, including the keys of dicts."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): map_strings(change, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_strings(change, item) for item in value)
    return value


def content_of(value: Any) -> Any:
    """A prompt or a response without what else data sets write into messages, such as ids and dates."""
    if isinstance(value, dict):
        return {key: value[key] for key in ("role", "content", *CALLS, *REASONING) if value.get(key)}
    return [content_of(item) for item in value] if isinstance(value, list | tuple) else value


def message_text(message: dict) -> str:
    """A message as text for people to read: its thought, its content, its calls as JSON."""
    thought = [f"<think>{message[key]}</think>" for key in REASONING if message.get(key)][:1]
    content = [_as_json(message["content"])] if message.get("content") else []
    calls = [_as_json(message[key]) for key in CALLS if message.get(key)]
    return "\n".join(thought + content + calls)


def _as_json(value: Any) -> str:
    """Text as it is, any other value as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def response_text(response: str | dict) -> str:
    """A response as text for people to read."""
    return response if isinstance(response, str) else message_text(response)


def thought_of(response: str | dict) -> str:
    """The thought before the answer; empty if there is none."""
    if isinstance(response, dict):
        for key in REASONING:
            if isinstance(response.get(key), str) and response[key].strip():
                return response[key].strip()
        response = response.get("content") or ""
    return thought_in_text(response)


def thought_in_text(text: str) -> str:
    """The thought between its marks in a text. The opening mark may be missing: a generation prompt may end with it."""
    closed = re.search(THOUGHT_CLOSES, text)
    opened = re.match(rf"\s*{THOUGHT_OPENS}", text)
    if not closed and not opened:
        return ""
    thought = text[: closed.start()] if closed else text
    return re.split(THOUGHT_OPENS, thought)[-1].strip()


def kind(value: Any) -> str:
    """The type of a value and its beginning, for errors."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def conversation_forms(
    prompt: Sequence[dict], answers: list[dict], tools: Any
) -> Iterator[tuple[list[dict], list[dict], Any]]:
    """Yields a conversation in the forms that templates accept: as it is first, and no other form where it has no tools."""
    turns = [*prompt, *answers]
    arguments = (_from_text, _as_json) if any(key in turn for turn in turns for key in CALLS) else (_from_text,)
    if any(turn.get("content") is None for turn in turns):
        contents: tuple = (_ABSENT, None, "")
    else:
        contents = ("", _ABSENT, None) if any(map(_lacks_text, turns)) else ("",)
    is_text = all(isinstance(turn.get("content"), str | None) for turn in turns)
    schemas = [tools]
    if any("function" not in tool for tool in tools or []):
        schemas.append([tool if "function" in tool else {"type": "function", "function": tool} for tool in tools])
    results = (_as_is,) if is_text else (_as_is, _as_json)
    for content, result, tools_form, argument in itertools.product(contents, results, schemas, arguments):
        formed = [_formed(turn, content, result, argument) for turn in turns]
        yield formed[: len(prompt)], formed[len(prompt) :], tools_form


_ABSENT = object()


def _as_is(value: Any) -> Any:
    return value


def _lacks_text(message: dict) -> bool:
    """Whether the content is None, or empty beside calls, which means the same."""
    content = message.get("content")
    return content is None or (content == "" and any(key in message for key in CALLS))


def _formed(message: dict, empty: Any, result: Callable[[Any], Any], argument: Callable[[Any], Any]) -> dict:
    """A message in one form.

    Args:
        empty: the content where the message lacks text: None, "", or `_ABSENT` for a message without the key.
        result: changes another content, which is the result of a call if it is not text.
        argument: changes the arguments of calls.
    """

    def call(value: dict) -> dict:
        value = value | {"arguments": argument(value["arguments"])} if "arguments" in value else value
        return value | {"function": call(value["function"])} if isinstance(value.get("function"), dict) else value

    formed = message | {"content": empty if _lacks_text(message) else result(message["content"])}
    for key in CALLS:
        if key in message:
            calls = message[key]
            formed[key] = call(calls) if isinstance(calls, dict) else [call(item) for item in calls]
    return {key: value for key, value in formed.items() if value is not _ABSENT}
