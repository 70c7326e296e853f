"""Conversations for the tests of chat templates, and how they are loaded, rendered and tokenised."""

import json

from rto_fast.data.encoding import ConversationEncoder
from rto_fast.data.sources import load_examples
from rto_fast.data.templates import NO_THOUGHTS
from rto_fast.data.tokenizing import Limits, sft_sequences, stop_token_ids
from tests.chat_templates import space_tokenizer

UNLIMITED = Limits(10**6, 10**6)
THOUGHT = "<think>\ntwo and two\n</think>\n\n4"


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text} | more


def call(**arguments):
    return {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": arguments}}


TOOLS = [{"type": "function", "function": {"name": "weather", "description": "the weather", "parameters": {}}}]
SYSTEM = {"role": "system", "content": "Be brief."}
RESULT = {"role": "tool", "content": "blue sky", "tool_call_id": "abcdefghi", "name": "weather"}
HISTORY = [user("hi"), assistant("hello"), user("2+2?")]
CONVERSATIONS = {  # name: messages, the last of which is the response, and the tools
    "plain": ([user("sky?"), assistant("blue")], None),
    "turns": ([*HISTORY, assistant("4\n\n it is")], None),
    "space": ([*HISTORY, assistant(" \n 4 \n")], None),
    "system": ([SYSTEM, *HISTORY, assistant("4")], None),
    "thought": ([*HISTORY, assistant(THOUGHT)], None),
    "thoughts before": (
        [user("1+1?"), assistant("<think>\none\n</think>\n\n2"), user("2+2?"), assistant(THOUGHT)],
        None,
    ),
    "empty thought": ([*HISTORY, assistant("<think>\n\n</think>\n\n4")], None),
    "reasoning": ([*HISTORY, assistant("4", reasoning_content="two and two")], None),
    "call": ([user("weather?"), assistant(None, tool_calls=[call(city="Paris")])], TOOLS),
    "text and call": ([user("weather?"), assistant("I look.", tool_calls=[call(city="Paris")])], TOOLS),
    "result": (
        [user("weather?"), assistant(None, tool_calls=[call(city="Zürich")]), RESULT, assistant("It is blue")],
        TOOLS,
    ),
}
NO_CALLS = ("ChatML", "ChatML on a base model", "Llama-2", "Llama-3", "Gemma", "Zephyr", "Phi-3")
REFUSED = {  # of these, prompt and response cannot be what the template renders, or nothing of the response is
    *((name, "call") for name in NO_CALLS),
    *(("R1-distill", kind) for kind in ("thought", "thoughts before", "reasoning")),
    ("R1, thoughts kept", "reasoning"),
    ("Llama-2", "result"),
    ("Gemma", "system"),
    ("Mistral", "system"),
}


def rendered(tokenizer, messages, tools, end):
    """The conversation as the template renders it, up to the token that ends it; in the first form it takes."""
    forms = []
    for change in (
        without_content,
        lambda message: message,
        lambda message: message | {"content": message["content"] or ""},
    ):
        forms += [[change(message) for message in messages], [change(as_text(message)) for message in messages]]
    for form in forms:
        try:
            text = render(tokenizer, form, tools)
        except Exception:
            continue
        return text[: text.rindex(end) + len(end)]
    return None


def without_content(message):
    return {key: value for key, value in message.items() if value is not None}


def render(tokenizer, messages, tools, **options):
    from transformers.utils.chat_template_utils import render_jinja_template

    values = {"conversations": [messages], "tools": tools, "chat_template": tokenizer.chat_template}
    return render_jinja_template(**values, **tokenizer.special_tokens_map, **options)[0][0]


def as_text(message):
    calls = [
        c | {"function": c["function"] | {"arguments": json.dumps(c["function"]["arguments"], ensure_ascii=False)}}
        for c in message.get("tool_calls", [])
    ]
    return message | ({"tool_calls": calls} if calls else {})


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(tmp_path, *rows, **options):
    return load_examples(write(tmp_path / "x.jsonl", *rows), **options)


def sft(tokenizer, examples, prompt_format="auto", **options):
    return sft_sequences(examples, tokenizer, UNLIMITED, prompt_format, stop_token_ids(tokenizer), **options)[0]


def joined(tokenizer, sequence):
    return tokenizer.decode(sequence.prompt_ids + sequence.response_ids)


def always_spaces(name):
    return space_tokenizer(name, scheme="always")


def count_special(tokenizer, ids):
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sum(i in special for i in ids)


def encode_prompt(tokenizer, prompt, prompt_format="auto"):
    """The ids of a prompt (text or messages), up to where the response begins."""
    encoder = ConversationEncoder(tokenizer, prompt_format, (), NO_THOUGHTS)
    return encoder.prompt_ids([encoder.read(prompt, ())])[0]


def encode_response(tokenizer, prompt, response, prompt_format, stop_ids):
    """The ids that follow `encode_prompt(tokenizer, prompt, prompt_format)`; the last is in `stop_ids`."""
    encoder = ConversationEncoder(tokenizer, prompt_format, stop_ids, NO_THOUGHTS)
    return encoder.response_ids([encoder.read(prompt, [response])], 0)[0]
